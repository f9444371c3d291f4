"""One model and one processor in many threads, and features that many calls share: the answers of each alone."""

import functools
import hashlib
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import reference_routing as routing
from builders import GEOMETRY, geometry_of, make_batch, random_image, tiny_config, tiny_model, tiny_processor
from hires_lmm.inference import AnswerStream, map_tokens, prepare


THREADS = 4
SMALL = {"view_ops": [{"part": "query_compressor", "on": "crops", "num_queries": 9}]}
MODELS = {
    "slime": ("slime", {**SMALL, "token_ops": routing.Rule("cosine").token_ops()}),
    "attention": ("slime", {**SMALL, "token_ops": routing.Rule("attention").token_ops()}),
    "router": ("slime", {**SMALL, "token_ops": routing.Rule("saliency", "budget").token_ops()}),
    "vlsa": ("vlsa", {}),
    "fusion": ("fusion", {}),
}
QUESTIONS = ["How many cats?", "What is red here, and what is not?", "Is it a boat", "Describe the table."]
GREEDY = {"max_new_tokens": 5, "do_sample": False}
MODES = [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}]
all_models = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def switch_often():
    """Let Python change threads every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def build(name: str):
    """A new model, its hooks not yet hung in by a first call, and its processor."""
    preset, connector = MODELS[name]
    config = tiny_config(preset, **({"connector_config": connector} if connector else {}))
    processor = tiny_processor(config, "chatml")
    return tiny_model(config), processor


shared = functools.cache(build)


def together(*works) -> list:
    """Run functions at the same moment, each in a thread of its own; their results, or the first error."""
    barrier = threading.Barrier(len(works))

    def start(work):
        barrier.wait(60)
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(start, work) for work in works]]


def text_of(batch) -> dict:
    """A batch without its views."""
    return {name: value for name, value in batch.items() if name not in GEOMETRY}


def views_of(batch) -> dict:
    """The views of a batch."""
    return {name: batch[name] for name in GEOMETRY}


def batches_of(name: str, processor) -> list:
    """A question on a picture for each thread, all of different sizes; every second one under a budget."""
    batches = []
    for number, question in enumerate(QUESTIONS):
        picture = random_image(60 + 25 * number, 200 - 30 * number, seed=number)
        full = make_batch(processor, [(f"USER: <image>\n{question} ASSISTANT:", [picture])])
        budget = {"max_image_tokens": {"fusion": 7}.get(name, 20)} if number % 2 and name != "vlsa" else {}
        batches.append(make_batch(processor, [(f"USER: <image>\n{question} ASSISTANT:", [picture])], **budget))
        assert budget or torch.equal(batches[-1]["input_ids"], full["input_ids"])
    return batches


@torch.no_grad()
def ask(model, batch, number: int) -> list[torch.Tensor]:
    """What a thread does: forward and generate, with pixels and with features, in an order of its own."""
    features = model.get_image_features(**views_of(batch), return_dict=True)
    given = {**text_of(batch), "mm_encoder_outputs": {"image": features}}
    works = [
        lambda: model(**batch).logits,
        lambda: model.generate(**batch, **GREEDY, **MODES[number % len(MODES)]),
        lambda: model(**given, output_token_map=True).token_map.kept,
        lambda: model.generate(**given, **GREEDY, **MODES[(number + 1) % len(MODES)]),
    ]
    order = works[number % 4 :] + works[: number % 4]
    results = {id(work): work() for work in order}
    return [results[id(work)] for work in works]


# --- one model -----------------------------------------------------------------------------------------------------
@all_models
def test_threads_get_the_answers_of_a_model_alone(name):
    """From the very first call on, when transformers hangs its hooks into the model."""
    alone, processor = build(name)
    batches = batches_of(name, processor)
    expected = [ask(alone, batch, number) for number, batch in enumerate(batches)]
    assert len({str(answers[1].tolist()) for answers in expected}) == len(batches)
    model, _ = build(name)
    works = [functools.partial(ask, model, batch, number) for number, batch in enumerate(batches)]
    for found in (together(*works), together(*works[::-1])[::-1]):
        for own, wanted in zip(found, expected, strict=True):
            assert all(torch.equal(*pair) for pair in zip(own, wanted, strict=True))


@all_models
def test_threads_that_share_features_get_the_answers_of_each_alone(name):
    """One picture, encoded once, asked about by all threads; fusion keeps on the features what it has read."""
    model, processor = shared(name)
    picture = random_image(100, 130)
    samples = [make_batch(processor, [(f"USER: <image>\n{question} ASSISTANT:", [picture])]) for question in QUESTIONS]
    expected = [model.generate(**batch, **GREEDY) for batch in samples]
    with torch.no_grad():
        features = model.get_image_features(**views_of(samples[0]), return_dict=True)

    def work(batch):
        return [
            model.generate(**text_of(batch), mm_encoder_outputs={"image": features}, **GREEDY, **mode)
            for mode in ({}, {"num_beams": 2}, {"cache_implementation": "static"})
        ]

    found = together(*(functools.partial(work, batch) for batch in samples))
    for own, wanted in zip(found, expected, strict=True):
        assert torch.equal(own[0], wanted) and torch.equal(own[2], wanted)


# --- features ------------------------------------------------------------------------------------------------------
def fingerprint(value, seen=None) -> str:
    """A hash of all tensors and plain values below a carrier."""
    digest = hashlib.sha256()

    def add(item) -> None:
        if isinstance(item, torch.Tensor):
            digest.update(f"{item.dtype}{tuple(item.shape)}{item.stride()}".encode())
            digest.update(item.detach().contiguous().view(torch.uint8).numpy().tobytes() if item.numel() else b"")
        elif isinstance(item, dict):
            for key in item:
                digest.update(repr(key).encode())
                add(item[key])
        elif isinstance(item, (list, tuple)):
            digest.update(f"{type(item).__name__}{len(item)}".encode())
            for entry in item:
                add(entry)
        elif hasattr(item, "__dict__"):
            add(vars(item))
        else:
            digest.update(repr(item).encode())

    add(value)
    return digest.hexdigest()


# --- state ---------------------------------------------------------------------------------------------------------
def model_state(model: nn.Module) -> dict:
    """Everything that hangs on a model: weights, attributes and hooks of all modules, and both configurations."""
    state = {"config": json.dumps(model.config.to_dict(), sort_keys=True, default=str)}
    state["generation"] = json.dumps(model.generation_config.to_dict(), sort_keys=True, default=str)
    for path, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if not key.startswith("_") or "hooks" in key}
        state[path] = {
            **{key: str(list(value)) if isinstance(value, dict) else repr(value) for key, value in own.items()},
            "names": sorted(vars(module)),
            "tensors": fingerprint([*module.parameters(recurse=False), *module.buffers(recurse=False)]),
        }
    return state


# --- one processor -------------------------------------------------------------------------------------------------
def processor_state(processor) -> dict:
    """Everything that hangs on a processor: attributes of its parts, and what the tokenizer would write to disk."""
    parts = {"processor": processor, "image": processor.image_processor, "tokenizer": processor.tokenizer}
    state = {name: {key: repr(value) for key, value in vars(part).items()} for name, part in parts.items()}
    return {**state, "backend": processor.tokenizer.backend_tokenizer.to_str()}


@all_models
def test_calls_leave_nothing_on_a_model(name):
    """The first calls may leave what transformers installs once; none leaves anything of its inputs."""
    model, processor = build(name)
    batches = batches_of(name, processor)
    both = make_batch(processor, [("<image> a", [random_image(60, 60)]), ("b", [])])

    def call(number: int, batch) -> None:
        ask(model, batch, number)
        with torch.no_grad():
            model(**both, labels=both["input_ids"])
            model.get_image_features(**geometry_of(both), vision_chunk_size=1 + number)

    for number in range(4):
        call(number, batches[0])
    before = model_state(model)
    for number, batch in enumerate(batches):
        call(number, batch)
    after = model_state(model)
    assert after.keys() == before.keys()
    for path in before:
        assert after[path] == before[path], path


def process(processor, number: int):
    """Calls of a processor that differ in everything that could stick to it."""
    picture = random_image(50 + 30 * number, 150, seed=number)
    texts = ["<image> " + "a red boat " * number, "short"]
    call = functools.partial(processor, text=texts, images=[picture])
    needed = max(len(ids) for ids in processor(text=texts, images=[picture])["input_ids"])
    options = [
        {"padding": True, "return_tensors": "pt"},
        {},
        {"padding": "max_length", "max_length": needed + 30, "padding_side": "right", "return_tensors": "pt"},
        {"truncation": True, "max_length": needed, "padding": False},
    ]
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    results = [
        call(**options[number]),
        call(**options[(number + 1) % 4], max_crops=1 + number),
        processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt"),
        processor.image_processor([picture], views="global", return_tensors="pt"),
    ]
    values = [{name: torch.as_tensor(value[0]).tolist() for name, value in result.items()} for result in results]
    return [*values, processor.image_tokens(picture.height, picture.width, max_crops=1 + number)]


def test_calls_leave_nothing_on_a_processor():
    """Neither padding nor truncation of a call; the tokenizer's own are given back."""
    processor = build("slime")[1]
    before = processor_state(processor)
    for number in range(4):
        process(processor, number)
    assert processor_state(processor) == before
    backend = processor.tokenizer.backend_tokenizer
    backend.enable_padding(length=9, direction="right", pad_id=2, pad_token="<pad>")
    backend.enable_truncation(max_length=500, stride=1)
    before = processor_state(processor)
    process(processor, 1)
    with pytest.raises(ValueError, match="placeholders"):
        processor(text="<image>", images=None, padding=True)
    assert processor_state(processor) == before


def test_threads_share_a_processor(monkeypatch):
    """Padding of one thread must not reach the texts of another, which would like to tokenise right between."""
    processor = build("slime")[1]
    expected = [process(processor, number) for number in range(4)]
    kind = type(processor.tokenizer)
    choose = kind.set_truncation_and_padding

    def choose_and_wait(self, *args, **kwargs):
        choose(self, *args, **kwargs)
        time.sleep(0.002)

    monkeypatch.setattr(kind, "set_truncation_and_padding", choose_and_wait)

    def work(number):
        return [process(processor, number) for _ in range(2)]

    found = together(*(functools.partial(work, number) for number in range(4)))
    assert found == [[wanted] * 2 for wanted in expected]


def test_threads_cut_images_at_the_same_time(monkeypatch):
    """While one thread waits within the image processor, another one gets through a whole call."""
    processor = build("slime")[1]
    inside, go_on = threading.Event(), threading.Event()
    cut = processor.image_processor.preprocess

    def slow(images, **kwargs):
        if threading.current_thread().name == "slow":
            inside.set()
            assert go_on.wait(60)
        return cut(images, **kwargs)

    monkeypatch.setattr(processor.image_processor, "preprocess", slow)
    call = functools.partial(processor, text="<image> x", images=[random_image(40, 40)], padding=True)
    expected, found = call()["input_ids"], []
    thread = threading.Thread(target=lambda: found.append(call()["input_ids"]), name="slow")
    thread.start()
    assert inside.wait(60)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(call)
        try:
            assert other.result(timeout=20)["input_ids"] == expected and not found
        finally:
            go_on.set()
    thread.join(60)
    assert found == [expected]


def test_a_process_that_is_forked_within_a_call_can_tokenise():
    """A lock that another thread held at the fork would never be released."""
    import multiprocessing

    from hires_lmm.processing.processing_hires_lmm import _tokenizer_alone

    processor = build("slime")[1]
    with _tokenizer_alone(processor.tokenizer):
        child = multiprocessing.get_context("fork").Process(target=lambda: processor(text="a b"))
        child.start()
        child.join(30)
        code = child.exitcode
        child.kill()
    assert code == 0


# --- answers -------------------------------------------------------------------------------------------------------
def test_streams_in_threads():
    """What the page and the command line do, on one model: pieces and maps of tokens of each alone."""
    model, processor = shared("slime")
    pictures = [random_image(60 + 20 * number, 150, seed=number) for number in range(THREADS)]

    def work(number: int):
        prepared = prepare(processor, [pictures[number]], QUESTIONS[number], max_crops=2 + number)
        text = "".join(AnswerStream(model, processor, prepared, 6))
        return text, map_tokens(model, prepared).kept.tolist()

    expected = [work(number) for number in range(THREADS)]
    assert len({answer[0] for answer in expected}) > 1
    assert together(*(functools.partial(work, number) for number in range(THREADS))) == expected


def test_a_reader_who_leaves_ends_the_stream():
    model, processor = shared("slime")
    prepared = prepare(processor, [random_image(60, 90)], QUESTIONS[0])
    expected, running = "".join(AnswerStream(model, processor, prepared, 6)), threading.active_count()
    leaving = iter(AnswerStream(model, processor, prepared, 6))
    first = next(leaving)
    leaving.close()
    assert "".join(AnswerStream(model, processor, prepared, 6)) == expected and expected.startswith(first)
    stop = time.monotonic() + 10
    while threading.active_count() > running and time.monotonic() < stop:
        time.sleep(0.05)
    assert threading.active_count() <= running


def test_a_stream_that_cannot_decode_ends_with_the_error(monkeypatch):
    model, processor = shared("slime")
    prepared = prepare(processor, [random_image(60, 90)], QUESTIONS[0])

    def refuse(*args, **kwargs):
        raise RuntimeError("no text today")

    monkeypatch.setattr(processor.tokenizer, "decode", refuse)
    errors = []

    def read():
        try:
            list(AnswerStream(model, processor, prepared, 4))
        except RuntimeError as error:
            errors.append(str(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(30)
    assert errors == ["no text today"]

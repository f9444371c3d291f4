"""The oracle over our models and over transformers' own LLaVA-NeXT; the policies and the command line on top."""

import copy
import functools
import json
import math

import pytest
import torch
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from typer.testing import CliRunner

from builders import (
    random_image,
    randomise,
    scaled_pinpoints,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_text_config,
    tiny_vision_config,
)
from builders.text import tiny_tokenizer
from hires_lmm.cli import app
from hires_lmm.search import Ask, CallLimitError, ModelOracle, Prompt, StepByStep, ZoomEye


TOLERANCE = 1e-4
FAMILIES = ("llava_next of transformers", "llava_next", "slime", "keep_after", "fusion")
IMAGES = [random_image(60 + 10 * index, 80 + 20 * index, seed=index) for index in range(4)]
SHORT, LONG = Prompt("Is there {}?"), Prompt("Is there {} in the picture? Answer Yes or No.")


def theirs():
    vision, text, tokenizer = tiny_vision_config("clip"), tiny_text_config("llama"), tiny_tokenizer("chatml")
    pinpoints, size = scaled_pinpoints(56), {"height": 56, "width": 56}
    config = LlavaNextConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
    )
    model = randomise(LlavaNextForConditionalGeneration(config), seed=1).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, tokenizer.pad_token_id
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size=size, crop_size=size, image_grid_pinpoints=pinpoints, do_center_crop=False
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return model, processor


@functools.cache
def family(name: str):
    if name == FAMILIES[0]:
        return theirs()
    changes = {}
    if name == "keep_after":
        changes = {"connector_config": {"layer_ops": [{"part": "keep_after", "layers": 0, "share": 0.5}]}}
    config = tiny_config("llava_next" if name == "keep_after" else name, **changes)
    return tiny_model(config), tiny_processor(config, "chatml")


def ask(prompt: Prompt, subject: str, *images) -> Ask:
    return Ask("existence", subject, prompt, (0, 0, 1, 1), 0, lambda: list(images))


ASKS = [
    ask(SHORT, "a boat", IMAGES[0]),
    ask(LONG, "a long red boat on a lake", IMAGES[1]),
    ask(LONG, "a boat", IMAGES[0]),
    ask(SHORT, "a long red boat on a lake", IMAGES[2]),
    ask(SHORT, "a cat", IMAGES[1]),
]


def plain_inputs(processor, messages: list) -> dict:
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return dict(processor.apply_chat_template(messages, **options))


def user(text: str, *images) -> dict:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return {"role": "user", "content": content}


@torch.no_grad()
def plain_confidence(model, processor, question: Ask) -> float:
    """One `generate` a question, the two probabilities summed over the ways to begin with one word alone."""
    inputs = plain_inputs(processor, [user(question.text, *question.views())])
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    chances = model.generate(**inputs, **options).logits[0][0].double().softmax(dim=-1)
    tokenizer = processor.tokenizer
    first = [{tokenizer.encode(space + word)[0] for space in ("", " ")} for word in ("Yes", "No")]
    yes, no = (sum(chances[number].item() for number in ids - (first[0] & first[1])) for ids in first)
    return 2 * (yes / (yes + no) - 0.5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_one_by_one_is_plain_generate(name):
    model, processor = family(name)
    batched = ModelOracle(model, processor).confidences(ASKS)
    halves = ModelOracle(model, processor, batch_size=2).confidences(ASKS)
    plain = [plain_confidence(model, processor, each) for each in ASKS]
    assert batched == pytest.approx(plain, abs=TOLERANCE)
    assert halves == pytest.approx(plain, abs=TOLERANCE)
    single = ModelOracle(model, processor)
    assert [single.confidences([each])[0] for each in ASKS] == pytest.approx(plain, abs=TOLERANCE)
    assert len({round(value, 3) for value in plain}) > 2


@pytest.mark.parametrize("name", FAMILIES[:3])
def test_several_images_in_one_question(name):
    model, processor = family(name)
    questions = [ask(SHORT, "a boat", IMAGES[0], IMAGES[3]), ask(LONG, "it", IMAGES[1], IMAGES[0]), ASKS[0]]
    plain = [plain_confidence(model, processor, each) for each in questions]
    oracle = ModelOracle(model, processor)
    assert oracle.confidences(questions) == pytest.approx(plain, abs=TOLERANCE)
    assert oracle.encoded == 3


@pytest.mark.parametrize("name", FAMILIES)
def test_every_crop_passes_the_tower_once(name):
    model, processor = family(name)
    views = []
    tower = model.model.vision_tower
    hook = tower.register_forward_pre_hook(
        lambda _, args, kwargs: views.append(_count(args, kwargs)), with_kwargs=True
    )
    try:
        oracle = ModelOracle(model, processor)
        oracle.confidences(ASKS)
        seen = sum(views)
        oracle.confidences(ASKS[::-1])
        oracle.confidences([ask(Prompt("What about {}?"), "it", IMAGES[2])])
        oracle.answer([IMAGES[1]], ["What is it?"], max_new_tokens=2)
    finally:
        hook.remove()
    images = IMAGES[:3]
    alone = [plain_inputs(processor, [user("?", image)])["pixel_values"].flatten(0, -4).shape[0] for image in images]
    assert sum(views) == seen == sum(alone)
    assert oracle.encoded == 3 and oracle.calls == 2 * len(ASKS) + 2


def _count(args: tuple, kwargs: dict) -> int:
    pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
    return pixels.flatten(0, -4).shape[0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("beams", [1, 3])
def test_answers_in_turns_are_those_of_generate(name, beams):
    model, processor = family(name)
    oracle, image = ModelOracle(model, processor, max_new_tokens=4), IMAGES[0]
    messages = [user("What is it?", image), {"role": "assistant", "content": [{"type": "text", "text": "a boat"}]}]
    messages.append(user("Which colour?"))
    for turns, asked in ((["What is it?"], messages[:1]), (["What is it?", "a boat", "Which colour?"], messages)):
        inputs = plain_inputs(processor, asked)
        wanted = model.generate(**inputs, max_new_tokens=4, num_beams=beams, do_sample=False)
        text = processor.tokenizer.decode(wanted[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert oracle.answer([image], turns, num_beams=beams) == text.strip()
    if name != FAMILIES[0]:
        assert oracle.answer([], ["Hello"]) == oracle.answer([], ["Hello"])


def test_a_question_about_the_image_token_stays_a_text():
    model, processor = family("llava_next")
    questions = [ask(Prompt("What does {} mean?"), "<image>", IMAGES[0]), ASKS[0]]
    plain = [plain_confidence(model, processor, each) for each in questions]
    assert ModelOracle(model, processor).confidences(questions) == pytest.approx(plain, abs=TOLERANCE)


def test_a_processor_that_writes_otherwise_than_its_template_is_asked_for_every_text(monkeypatch):
    """As Gemma's, which writes an end behind each image that the template does not have."""
    model, processor = family("llava_next")
    right = ModelOracle(model, processor).confidences(ASKS)
    monkeypatch.setattr(ModelOracle, "_tail", lambda self, messages, turns: [7, 7, 7])
    oracle = ModelOracle(model, processor)
    assert oracle.confidences(ASKS) == pytest.approx(right, abs=TOLERANCE)
    assert oracle.confidences(ASKS) == pytest.approx(right, abs=TOLERANCE) and oracle.encoded == len(ASKS)


@pytest.mark.parametrize("name", FAMILIES[:3])
def test_half_precision(name):
    model, processor = family(name)
    half = copy.deepcopy(model).to(torch.bfloat16)
    found = ModelOracle(half, processor).confidences(ASKS)
    assert found == pytest.approx(ModelOracle(model, processor).confidences(ASKS), abs=0.2)


def test_old_beginnings_leave_when_they_fill_the_memory():
    model, processor = family("llava_next")
    oracle = ModelOracle(model, processor, cache_bytes=1)
    first = [oracle.confidences([each])[0] for each in ASKS]
    assert len(oracle._begun) == 1 and oracle.encoded == 5
    assert first == pytest.approx(ModelOracle(model, processor).confidences(ASKS), abs=TOLERANCE)


def test_how_sure_a_model_is_needs_no_words():
    model, processor = family("llava_next")
    question = ask(Prompt("{}", (), ()), "What is it?", IMAGES[0])
    inputs = plain_inputs(processor, [user("What is it?", IMAGES[0])])
    with torch.no_grad():
        chance = model(**inputs).logits[0, -1].softmax(dim=-1).max().item()
    assert ModelOracle(model, processor).confidences([question])[0] == pytest.approx(2 * chance - 1, abs=TOLERANCE)


def test_what_may_not_be_asked_is_said():
    model, processor = family("llava_next")
    oracle = ModelOracle(model, processor, max_calls=4)
    oracle.confidences(ASKS[:3])
    with pytest.raises(CallLimitError, match=r"max_calls=4, 3 were made and 2 more"):
        oracle.confidences(ASKS[:2])
    oracle.answer([IMAGES[0]], ["What?"], max_new_tokens=1)
    assert oracle.calls == 4
    for name in ("batch_size", "max_new_tokens", "max_calls"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            ModelOracle(model, processor, **{name: 0})
    with pytest.raises(ValueError, match="training mode"):
        ModelOracle(copy.deepcopy(model).train(), processor)
    with pytest.raises(ValueError, match="max_image_tokens"):
        ModelOracle(model, processor, max_image_tokens=1).confidences(ASKS[:1])


def test_words_that_a_tokenizer_lacks_are_named(needle):
    model, processor = needle
    question = ask(Prompt("which digit is {} ?", ("yes",), ("perhaps",)), "red", IMAGES[0])
    with pytest.raises(ValueError, match="does not know 'perhaps'"):
        ModelOracle(model, processor).confidences([question])
    model, processor = family("llava_next")  # its words are spelt in letters
    with pytest.raises(ValueError, match="with the same tokens; choose other words"):
        ModelOracle(model, processor).confidences([ask(Prompt("{}?", ("Yes",), ("Yesterday",)), "it", IMAGES[0])])


@pytest.fixture(scope="module")
def needle():
    from builders.docs import ROOT
    from hires_lmm.inference import load_model, load_processor

    folder = str(ROOT / "checkpoints" / "needle-slime")
    return load_model(folder, device="cpu"), load_processor(folder)


@pytest.mark.parametrize("name", FAMILIES[:3])
def test_zoom_eye_walks_with_any_model(name):
    model, processor = family(name)
    oracle = ModelOracle(model, processor, max_new_tokens=3, progress=False)
    assert oracle.side == 56
    options = {"cues": ["a boat"], "depth_limit": 2, "threshold": 1.0, "floor": 0.9, "decreases": (0.2,), "side": 60}
    result = ZoomEye(**options).run([random_image(200, 160)], "What is it?", oracle)
    assert all(math.isfinite(step.confidence) for step in result.steps)
    assert oracle.calls == len(result.steps) + 1
    assert {step.depth for step in result.steps} == {0, 1, 2}
    # one by one, without anything shared, in the same order
    alone = ZoomEye(**options).run([random_image(200, 160)], "What is it?", _Alone(model, processor))
    assert [step.box for step in alone.steps] == [step.box for step in result.steps]
    values = [step.confidence for step in alone.steps]
    assert [step.confidence for step in result.steps] == pytest.approx(values, abs=TOLERANCE)


class _Alone:
    side = 56

    def __init__(self, model, processor):
        self.model, self.processor = model, processor

    def confidences(self, asks):
        return [plain_confidence(self.model, self.processor, each) for each in asks]

    def answer(self, images, turns, **options):
        return ""


def test_step_by_step_speaks_four_times():
    oracle = ModelOracle(*family("llava_next"), max_new_tokens=2, progress=False)
    result = StepByStep(num_beams=2).run([IMAGES[0]], "What is it?", oracle)
    assert len(result.steps) == 4 == oracle.calls and oracle.encoded == 1


# ---- the command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model, processor = family("slime")
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    IMAGES[3].save(folder / "image.png")
    return folder


def ask_command(checkpoint, *words: str):
    return CliRunner().invoke(
        app, ["ask", str(checkpoint), str(checkpoint / "image.png"), "-q", "What is it?", *words]
    )


def test_the_command_searches_draws_and_tells(checkpoint):
    picture = checkpoint / "walk.png"
    options = ["--search", "zoom_eye", "--search-option", 'cues=["a boat"]', "--search-option", "depth_limit=1"]
    found = ask_command(checkpoint, *options, "--show", str(picture), "--max-new-tokens", "3", "--json")
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert record["calls"] == 1 + len(record["steps"]) and record["steps"][0]["kind"] == "answering"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    said = ask_command(
        checkpoint, "--search", "step_by_step", "--search-option", "num_beams=1", "--max-new-tokens", "2"
    )
    assert said.exit_code == 0 and "4 questions and answers" in said.stderr


@pytest.mark.parametrize(
    "words, said",
    [
        (["--search", "zoom"], "search='zoom' is unknown"),
        (["--search", "zoom_eye", "--search-option", "depth=1"], "no option 'depth'"),
        (["--search", "zoom_eye", "--show", "walk.jpg"], "must end in .png"),
        (["--show", "walk.png"], "need --search"),
        (["--search", "zoom_eye", "--search-option", "depth"], "KEY=VALUE"),
    ],
)
def test_the_command_refuses_by_name(checkpoint, words, said):
    found = ask_command(checkpoint, *words)
    assert found.exit_code in (1, 2) and said in " ".join(found.stderr.replace("│", " ").split())

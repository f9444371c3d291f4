"""The engine answers what transformers answers, or refuses by name; `make test-vllm`."""

import pytest


pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm installs it")

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from builders.serving import (
    BUDGETS,
    NEEDLE,
    chat,
    cut,
    expected,
    needle_requests,
    run_engine,
    save_tiny,
    serve,
    tiny_requests,
)


TOKENS = 8
SERVED = [
    *("llava_next", "llava_hd", "monkey", "slime", "slime_release", "vlsa"),
    *("mqt", "mg_llava", "llava_uhd", "hires_llava", "inf_llava"),
]
THRESHOLDS = ("slime", "slime_release")


def without_router(model) -> None:
    """What an engine makes of a threshold: every token stays."""
    connector = model.model.connector
    connector.token_ops, connector.is_done_early, connector.is_count_static = torch.nn.ModuleList(), True, True


@pytest.fixture(scope="module")
def needle(tmp_path_factory):
    """The shipped checkpoint with its code beside it, and fifteen requests."""
    folder = tmp_path_factory.mktemp("needle")
    AutoModelForImageTextToText.from_pretrained(NEEDLE).save_pretrained(folder / "checkpoint")
    processor = AutoProcessor.from_pretrained(NEEDLE)
    processor.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint", needle_requests(processor, folder), processor


@pytest.fixture
def tiny(request, tmp_path):
    """A random checkpoint of a preset and its requests; routers of budgets keep all of an image that is below."""
    preset = request.param
    has_budget = "budget" in request.node.name and preset in THRESHOLDS
    router = {"token_ops": [{"part": "router", "on": "crops", "keep": {"rule": "budget"}}]} if has_budget else {}
    folder = save_tiny(preset, tmp_path / "checkpoint", **router)
    return folder, tiny_requests(AutoProcessor.from_pretrained(folder), tmp_path, pairs=preset != "fusion"), preset


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "plugin"])
def test_a_threshold_keeps_all_and_nothing_else_changes(needle, tmp_path, plain):
    folder, requests, processor = needle
    wanted = expected(folder, requests, TOKENS, without_router)
    given = serve(folder, requests, tmp_path, TOKENS, plain=plain)
    assert cut(given, processor.tokenizer.eos_token_id) == cut(wanted, processor.tokenizer.eos_token_id)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"enforce_eager": False},
        {"max_num_batched_tokens": 256},
        {"enable_prefix_caching": False},
        {"mm_processor_cache_gb": 0},
    ],
    ids=lambda value: next(iter(value), "usual"),
)
def test_a_budget_that_the_question_decides_is_exact_with_the_plugin(needle, tmp_path, changes):
    folder, requests, processor = needle
    end = processor.tokenizer.eos_token_id
    wanted = expected(folder, requests, TOKENS, max_image_tokens=150)
    engine = {"mm_processor_kwargs": {"max_image_tokens": 150}, **changes}
    given = serve(folder, requests, tmp_path, TOKENS, engine=engine)
    assert cut(given, end) == cut(wanted, end)
    words = [processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in given]
    assert all(word == request["answer"] for word, request in zip(words, requests, strict=True) if "answer" in request)


def test_requests_have_budgets_views_and_crops_of_their_own_and_caches_keep_questions_apart(needle, tmp_path):
    folder, _, processor = needle
    image = needle[1][0]["images"]
    options = [{}, {"max_image_tokens": 120}, {"max_image_tokens": 150}, {"views": "global"}, {"max_crops": 4}]
    questions = ["which digit is blue ?", "which shape is cyan ?", "where is the blue object ?"]
    requests = [
        {"text": chat(processor, question, 1), "images": image, "options": {"max_image_tokens": 130, **own}}
        for own in options[1:]
        for question in questions
    ]
    for request in requests:
        if request["options"].get("views") == "global":
            del request["options"]["max_image_tokens"]
    end = processor.tokenizer.eos_token_id
    given = serve(folder, requests, tmp_path, TOKENS, one_by_one=True)
    assert cut(given, end) == cut(expected(folder, requests, TOKENS), end)


@pytest.mark.parametrize("tiny", SERVED, indirect=True)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "plugin"])
def test_a_preset_answers_as_in_transformers(tiny, tmp_path, plain):
    folder, requests, preset = tiny
    wanted = expected(folder, requests, TOKENS, without_router if preset in THRESHOLDS else None)
    assert serve(folder, requests, tmp_path / "run", TOKENS, plain=plain, ignore_eos=True) == wanted


@pytest.mark.parametrize("tiny", BUDGETS, indirect=True)
def test_a_preset_answers_as_in_transformers_under_a_budget(tiny, tmp_path):
    folder, requests, preset = tiny
    budget = {"max_image_tokens": BUDGETS[preset]}
    given = serve(folder, requests, tmp_path / "run", TOKENS, ignore_eos=True, engine={"mm_processor_kwargs": budget})
    assert given == expected(folder, requests, TOKENS, **budget)


@pytest.mark.parametrize("tiny", ["fusion"], indirect=True)
def test_fusion_answers_as_in_transformers_with_the_plugin_and_refuses_a_second_turn(tiny, tmp_path):
    folder, requests, _ = tiny
    wanted = expected(folder, requests, TOKENS)
    processor = AutoProcessor.from_pretrained(folder)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "where is it"}]}]
    turns += [{"role": "assistant", "content": "here"}, {"role": "user", "content": "and now"}]
    again = {**requests[0], "text": processor.apply_chat_template(turns, add_generation_prompt=True)}
    spec = {"ignore_eos": True, "one_by_one": True}
    given = serve(folder, [*requests, again], tmp_path / "run", TOKENS, **spec)
    assert given[:-1] == wanted and "Fusion reads one turn" in given[-1]


REFUSED = {
    "fusion": ("fusion", {}, True, "reads the question"),
    "llava_mini": ("llava_mini", {}, False, "works inside the language model or on the text"),
    "layer op": ("llava_next", {"layer_ops": [{"part": "keep_after", "layers": 1, "share": 0.5}]}, False, "KeepAfter"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_at_load_by_name(tmp_path, name):
    preset, connector, plain, words = REFUSED[name]
    folder = save_tiny(preset, tmp_path / "checkpoint", **connector)
    done = run_engine(folder, [], tmp_path / "run", TOKENS, plain=plain)
    assert done.returncode == 1 and words in done.stderr, done.stderr[-3000:]


def test_a_budget_that_the_question_decides_is_refused_without_the_plugin(needle, tmp_path):
    folder, requests, _ = needle
    asked = [{**request, "options": {"max_image_tokens": 150}} for request in requests[:2]]
    given = serve(folder, [*asked, requests[2]], tmp_path, TOKENS, plain=True, one_by_one=True)
    assert all("HiResLmmProcessor" in answer for answer in given[:2])  # the reason is in the log
    assert isinstance(given[2], list)


def test_another_number_of_crops_for_one_request_is_refused_without_the_plugin(needle, tmp_path):
    folder, requests, _ = needle
    asked = [{**requests[0], "options": {"max_crops": 2}}, requests[1]]
    refused, answered = serve(folder, asked, tmp_path, TOKENS, plain=True, one_by_one=True)
    assert "cannot be split" in refused and isinstance(answered, list)


@pytest.mark.parametrize("tiny", ["llava_next"], indirect=True)
def test_an_adapter_of_the_language_model_answers_as_in_transformers(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    folder, requests, _ = tiny
    model = AutoModelForImageTextToText.from_pretrained(folder)
    config = LoraConfig(r=8, target_modules=r".*language_model.*\.(q_proj|v_proj|o_proj)", init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = expected(folder, requests, TOKENS, lambda plain: plain.load_adapter(str(tmp_path / "adapter")))
    assert wanted != expected(folder, requests, TOKENS)
    spec = {"lora": str(tmp_path / "adapter"), "engine": {"enable_lora": True, "max_lora_rank": 8}}
    assert serve(folder, requests, tmp_path / "run", TOKENS, ignore_eos=True, **spec) == wanted

"""A saved checkpoint works in a process that cannot import the package, for every auto class, and saves itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from builders.tiny import make_batch, random_image, tiny_config, tiny_model, tiny_processor


WORKER = Path(__file__).with_name("remote_checks.py")
OPTIONS = {"max_image_tokens": 40}
LAYOUT = {
    "order": ["global", "crops", "frames"],
    "separators": {"newline": {"place": "token_row_end", "on": "crops"}},
}
VIDEO_PROMPT = "USER: <video>\nWhat moves? ASSISTANT:"
PROMPTS = ["USER: <image>\nHow many cats are on the table? ASSISTANT:", "<image> A boat? <image>", "A chat."]
SIZES = [(100, 180), (57, 150), (300, 90)]
QUESTIONS = ["How many cats?", "What is in the picture?"]
AUTO_CLASSES = {
    "AutoConfig": "HiResLmmConfig",
    "AutoModel": "HiResLmmModel",
    "AutoModelForImageTextToText": "HiResLmmForConditionalGeneration",
    "AutoModelForMultimodalLM": "HiResLmmForConditionalGeneration",
    "AutoModelForSequenceClassification": "HiResLmmForSequenceClassification",
    "AutoProcessor": "HiResLmmProcessor",
    "AutoImageProcessor": "HiResLmmImageProcessor",
}
FIRST_CHECKS = ("config", "refused", "processors", "models", "resave", "pipeline", "unimported")
SECOND_CHECKS = ("config", "processors", "models", "unimported")


def answer(model, processor, question: str, image) -> str:
    """What the pipeline must return for one chat: greedy text after the prompt."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**batch, max_new_tokens=6, do_sample=False)[0, batch["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of a saved checkpoint, folder of what it must give, the texts, model and processor."""
    root = tmp_path_factory.mktemp("hub")
    folder, expected = root / "checkpoint", root / "expected"
    expected.mkdir()
    config = tiny_config("llava_next", "clip", "llama", connector_config={"layout": LAYOUT})
    model, processor = tiny_model(config, seed=5), tiny_processor(config, "chatml")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    images = [random_image(*size, seed=index) for index, size in enumerate(SIZES)]
    for index, image in enumerate(images):
        image.save(expected / f"image_{index}.png")
    batch = make_batch(processor, [(PROMPTS[0], images[:1]), (PROMPTS[1], images[1:]), (PROMPTS[2], [])], **OPTIONS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        tensors = {
            "batch": dict(batch),
            "video": dict(processor(text=VIDEO_PROMPT, videos=images[0:1] * 5, num_frames=3, return_tensors="pt")),
            "logits": model(**batch).logits,
            "hidden": model.model(**batch).last_hidden_state,
            "sequences": model.generate(**batch, max_new_tokens=6, do_sample=False),
        }
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]}]
    plain = make_batch(processor, [(PROMPTS[0], images[:1])])
    plain_ids = model.generate(**plain, max_new_tokens=6, do_sample=False)[0, plain["input_ids"].shape[1] :]
    texts = {
        "prompts": PROMPTS,
        "video_prompt": VIDEO_PROMPT,
        "options": OPTIONS,
        "messages": messages,
        "chat": processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
        "first_ids": processor.tokenizer(PROMPTS[0]).input_ids,
        "questions": QUESTIONS,
        "answers": [answer(model, processor, *pair) for pair in zip(QUESTIONS, images, strict=False)],
        "plain": processor.decode(plain_ids, skip_special_tokens=True),
        "image_tokens": processor.image_tokens(100, 180),
    }
    torch.set_num_threads(threads)
    torch.save(tensors, expected / "tensors.pt")
    (expected / "texts.json").write_text(json.dumps(texts))
    return folder, expected, texts, model, processor


def run_remote(folder: Path, expected: Path, work: Path, checks: tuple[str, ...]) -> dict:
    """Results of the checks in a fresh, isolated process with its own module cache."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "COV"))}
    environment = {
        **kept,
        "HF_HOME": str(work / "hf_home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "warning",
    }
    command = [sys.executable, "-I", str(WORKER), str(folder), str(expected), str(work / "out"), *checks]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=work, stdin=subprocess.DEVNULL, timeout=600
    )
    lines = [line.split(": ", 1) for line in done.stdout.splitlines()]
    results = {name: json.loads(result) for name, result in lines}
    assert done.returncode == 0, done.stderr[-4000:]
    assert set(results) == set(checks)
    return results


@pytest.fixture(scope="module")
def first(checkpoint, tmp_path_factory):
    """Results of a process that loads the checkpoint of the package; its working folder."""
    work = tmp_path_factory.mktemp("first")
    return run_remote(*checkpoint[:2], work, FIRST_CHECKS), work


@pytest.fixture(scope="module")
def second(checkpoint, first, tmp_path_factory):
    """Results of another process that loads what the first one saved."""
    work = tmp_path_factory.mktemp("second")
    return run_remote(first[1] / "out" / "third", checkpoint[1], work, SECOND_CHECKS)


@pytest.fixture(params=["first", "second"])
def results(request):
    found = request.getfixturevalue(request.param)
    return found[0] if request.param == "first" else found


def value_of(results: dict, name: str) -> dict:
    assert "exception" not in results[name], results[name]["exception"]
    return results[name]


def modules_of_shipped_code() -> set[str]:
    root = Path(sys.modules["hires_lmm"].__file__).parent
    return {path.name for part in ("modeling", "processing") for path in (root / part).glob("*_hires_lmm.py")}


def test_the_process_could_not_import_the_package(results):
    assert value_of(results, "unimported") == {"blocked": True, "modules": []}


def test_the_config_loads_with_the_complete_auto_map(results):
    found = value_of(results, "config")
    assert found["module"].startswith("transformers_modules.")
    assert {name: target.split(".")[-1] for name, target in found["auto_map"].items()} == AUTO_CLASSES


def test_the_saved_config_names_files_that_exist(checkpoint):
    folder = checkpoint[0]
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    for target in auto_map.values():
        module, class_name = target.split(".")
        assert f"class {class_name}(" in (folder / f"{module}.py").read_text()


def test_without_trust_the_code_is_refused(first):
    assert "trust_remote_code" in value_of(first[0], "refused")["error"]


def test_processors_and_tokenizer_give_the_same_batch(results, checkpoint):
    found = value_of(results, "processors")
    assert all(name.startswith("transformers_modules.") for name in found["modules"])
    assert found["different"] == []
    assert found["different_alone"] == []
    assert found["different_video"] == []
    assert found["same_chat"]
    assert found["same_ids"]
    assert found["image_tokens"] == checkpoint[2]["image_tokens"]


@pytest.mark.parametrize("auto", [name for name in AUTO_CLASSES if name.startswith("AutoModel")])
def test_models_give_the_same_numbers_bit_for_bit(results, auto):
    found = value_of(results, "models")[auto]
    assert found["module"].startswith("transformers_modules.")
    assert found["class"] == AUTO_CLASSES[auto]
    assert all(found["same"])
    assert found["info"] == {}


def test_a_checkpoint_saved_there_is_complete(first, checkpoint):
    found = value_of(first[0], "resave")
    assert found["base"]
    original = {path.name for path in checkpoint[0].iterdir()}
    assert modules_of_shipped_code() <= original
    assert set(found["files"]) == original


def test_the_pipeline_gives_the_greedy_text_single_and_batched(first, checkpoint):
    found, texts = value_of(first[0], "pipeline"), checkpoint[2]
    assert found["single"] == texts["answers"]
    assert found["batched"] == texts["answers"]
    assert found["plain"] == [texts["plain"]]


# --- push_to_hub ------------------------------------------------------------------------------------------


def test_push_to_hub_sends_a_complete_checkpoint(checkpoint, hub):
    folder, _, _, model, processor = checkpoint
    model.push_to_hub("someone/tiny")
    processor.push_to_hub("someone/tiny")
    sent = {path.name for path in hub.iterdir()} - {"README.md"}
    assert sent == {path.name for path in folder.iterdir()}
    for name in sent:
        assert (hub / name).read_bytes() == (folder / name).read_bytes(), name


def test_push_to_hub_of_the_base_model_alone_carries_its_code(checkpoint, hub):
    checkpoint[3].model.push_to_hub("someone/tiny")
    auto_map = json.loads((hub / "config.json").read_text())["auto_map"]
    for name in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText"):
        assert (hub / f"{auto_map[name].split('.')[0]}.py").exists()

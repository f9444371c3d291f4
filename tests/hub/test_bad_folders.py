"""Folders of models and processors in which one thing is wrong: an error says which, and nothing in them runs."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from builders.tiny import tiny_config, tiny_model, tiny_processor
from hires_lmm.inference import load_model, load_processor


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder, config = tmp_path_factory.mktemp("sound"), tiny_config("llava_next")
    tiny_model(config).save_pretrained(folder)
    tiny_processor(config, "chatml").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, sound) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(sound, tmp_path / "folder")


@pytest.fixture(autouse=True)
def quiet():
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


def text(name: str, content: str) -> Callable:
    """Replaces a file."""
    return lambda folder: (folder / name).write_text(content)


def values(name: str, **entries) -> Callable:
    """Changes entries of a JSON file; `a__b` means b in a."""

    def change(folder):
        whole = json.loads((folder / name).read_text())
        for path, value in entries.items():
            *above, last = path.split("__")
            inner = whole
            for key in above:
                inner = inner[key]
            inner[last] = value
        (folder / name).write_text(json.dumps(whole))

    return change


def no(name: str) -> Callable:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 9)


CONFIG, PROCESSOR, WEIGHTS = "config.json", "processor_config.json", "model.safetensors"
BOTH = {
    "no config": (no(CONFIG), "model_type"),
    "config cut off": (cut(CONFIG), "not a valid JSON"),
    "config is a list": (text(CONFIG, "[]"), "model_type"),
    "unknown part": (values(CONFIG, connector_config__adapter={"part": "nobody"}), "unknown part 'nobody'; known"),
    "unknown language model": (values(CONFIG, text_config__model_type="nobody"), "nobody"),
    "no such width": (values(CONFIG, text_config__hidden_size=-1), "-1"),
    "id is a text": (values(CONFIG, image_token_id="x"), "image_token_id"),
}
PROCESSORS = {
    **BOTH,
    "another model": (values(CONFIG, model_type="llama"), "'llama'"),
    "no processor": (no(PROCESSOR), "processor"),
    "processor cut off": (cut(PROCESSOR), "not a valid JSON"),
    "no view": (values(PROCESSOR, image_processor__view_size=0), "view_size=0"),
    "unknown option": (values(PROCESSOR, image_processor__zoom=3), r"Unknown image options \['zoom'\]"),
    "unknown planner": (values(PROCESSOR, image_processor__planner="grid"), "planner='grid'"),
    "no deviation": (values(PROCESSOR, image_processor__image_std=[0, 0, 0]), "image_std"),
    "layout in part": (values(PROCESSOR, image_processor__token_layout={"patch_grid": [2, 2]}), "no grids"),
    "no tokenizer": (no("tokenizer.json"), "tokenizer"),
    "tokenizer cut off": (cut("tokenizer.json"), "line|EOF|expected"),
}
MODELS = {
    **BOTH,
    "no weights": (no(WEIGHTS), WEIGHTS),
    "weights cut off": (cut(WEIGHTS), "not fully covered"),
    "weights of nothing": (text(WEIGHTS, ""), "header"),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_bad_processor_folder_is_refused(folder, name):
    damage, match = PROCESSORS[name]
    damage(folder)
    with pytest.raises((ValueError, OSError), match=match):
        load_processor(str(folder))


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_model_folder_is_refused(folder, name):
    damage, match = MODELS[name]
    damage(folder)
    with pytest.raises((ValueError, OSError), match=match):
        load_model(str(folder), device="cpu")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_in_a_pickle_is_not_run(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Payload(tmp_path / "ran")}))
    with pytest.raises((ValueError, OSError)):
        load_model(str(folder), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_code_in_the_folder_is_not_run_without_trust(folder, tmp_path):
    for path in folder.glob("*.py"):
        path.write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    model, processor = load_model(str(folder), device="cpu"), load_processor(str(folder))
    assert not (tmp_path / "ran").exists()
    assert type(model).__module__.startswith("hires_lmm.") and type(processor).__module__.startswith("hires_lmm.")

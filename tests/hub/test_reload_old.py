"""Checkpoints that earlier commits saved still load, whole, and give what they gave then."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from hires_lmm import HiResLmmConfig
from hires_lmm.conversion import export


ROOT = Path(__file__).parents[1] / "fixtures" / "checkpoints"
FOLDERS = sorted(path.parent for path in ROOT.glob("*/config.json"))
# what a folder does not say, and what it means then
ADDED = {
    "1_first": {"training_stage": None, "vision_chunk_size": None},
    "2_training_stage": {"vision_chunk_size": None},
}
GIVEN = {"2_training_stage": {"training_stage": "II"}, "3_vision_chunk_size": {"vision_chunk_size": 2}}


def picture(height: int, width: int) -> Image.Image:
    """The picture of `make.py`."""
    rows, columns = np.mgrid[:height, :width]
    channels = (7 * rows + 3 * columns, rows * columns, 5 * columns + 40)
    return Image.fromarray((np.stack(channels, axis=-1) % 256).astype(np.uint8))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
@torch.no_grad()
def test_an_old_checkpoint_gives_what_it_gave(folder):
    expected = json.loads((folder / "expected.json").read_text())
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "How many cats are on the table?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == expected["text"]
    batch = processor(text=[text], images=[picture(*expected["size"])], return_tensors="pt")
    assert batch["input_ids"][0].tolist() == expected["input_ids"]
    logits = model(**batch).logits[0]
    torch.testing.assert_close(logits[-1, ::8], torch.tensor(expected["last_logits"]), atol=2e-4, rtol=1e-4)
    assert logits.argmax(-1).tolist() == expected["best"]
    new = model.generate(**batch, do_sample=False)[0, len(expected["input_ids"]) :]
    assert new.tolist() == expected["generated"]  # the length and the end token come from generation_config.json
    assert model.generation_config.max_new_tokens == 7


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_fields_that_came_later_have_their_defaults(folder):
    config, entries = AutoConfig.from_pretrained(folder), json.loads((folder / "config.json").read_text())
    for name, value in ADDED.get(folder.name, {}).items():
        assert name not in entries and getattr(config, name) == value
    for name, value in GIVEN.get(folder.name, {}).items():
        assert entries[name] == value == getattr(config, name)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_saving_it_again_changes_no_weight(folder, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    states = model.state_dict()
    assert states.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in states.items())


def test_the_pooling_head_of_siglip_is_left_out():
    folder = ROOT / "3_vision_chunk_size_siglip"
    name = "model.vision_tower.head.probe"
    with safe_open(folder / "model.safetensors", framework="pt") as stored:
        assert name in set(stored.keys())
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert not [key for key in model.state_dict() if key.startswith("model.vision_tower.head")]
    base, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and not hasattr(base.vision_tower, "head")


def test_an_old_checkpoint_with_a_pooling_head_is_exported_without(tmp_path):
    export(ROOT / "3_vision_chunk_size_siglip", tmp_path / "out")
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    old = AutoModelForImageTextToText.from_pretrained(ROOT / "3_vision_chunk_size_siglip").state_dict()
    assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())


def test_the_newest_format_has_a_checkpoint():
    """A field that no folder knows is a new format: add a folder (see the README there)."""
    known = set().union(*(json.loads((folder / "config.json").read_text()) for folder in FOLDERS))
    own = {name for name in HiResLmmConfig.__annotations__ if not name.startswith("_")}
    assert own - {"keys_to_ignore_at_inference", "sub_configs_defaults", "model_type"} <= known


def test_the_folders_are_small_and_hold_no_code():
    assert len(FOLDERS) == 5
    for folder in FOLDERS:
        files = list(folder.iterdir())
        assert sum(file.stat().st_size for file in files) < 100_000
        assert not [file for file in files if file.suffix not in (".json", ".safetensors", ".jinja")]

"""Released checkpoints in every form, made from the golden one, and what tests ask of the folders they become."""

import contextlib
import json
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from builders.text import tiny_tokenizer
from hires_lmm.conversion import convert_released, convert_to_released


GOLDEN = Path(__file__).parents[1] / "fixtures" / "slime_tiny"
TOWER = "model.vision_tower.vision_tower."

convert_slime, convert_to_slime = partial(convert_released, "slime"), partial(convert_to_released, "slime")


def golden_config(**changes) -> dict:
    """The golden `config.json`."""
    return {**json.loads((GOLDEN / "config.json").read_text()), **changes}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of safetensors."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found.update(load_file(path))
    return found


def write_json(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def save_bin_shards(folder: Path, tensors: dict[str, torch.Tensor], count: int = 3, index: bool = True) -> None:
    """Write `pytorch_model-*.bin`, dealt out in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"pytorch_model-{number + 1:05d}-of-{count:05d}.bin" for number in range(count)]
    keys = list(tensors)
    for number, name in enumerate(names):
        torch.save({key: tensors[key] for key in keys[number::count]}, folder / name)
    if index:
        table = {key: names[number % count] for number, key in enumerate(keys)}
        write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": table})


def write_released(folder: Path, tensors: dict | None = None, vision: bool = True, **changes) -> Path:
    """A full released checkpoint in one safetensors file; golden unless told otherwise."""
    write_json(folder / "config.json", golden_config(**changes))
    if vision:
        (folder / "vision_config.json").write_bytes((GOLDEN / "vision_config.json").read_bytes())
    save_file(tensors if tensors is not None else tensors_of(GOLDEN), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_tower(folder: Path, tensors: dict | None = None) -> Path:
    """The golden tower as a folder of its own, with the text side of a CLIP that must not matter."""
    golden = tensors if tensors is not None else tensors_of(GOLDEN)
    tower = {key.removeprefix(TOWER): value for key, value in golden.items() if key.startswith(TOWER)}
    text = {"text_model.final_layer_norm.weight": torch.ones(8), "logit_scale": torch.tensor(2.0)}
    ids = {"vision_model.embeddings.position_ids": torch.arange(577)[None]}
    folder.mkdir(parents=True)
    save_file({**tower, **text, **ids}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((GOLDEN / "vision_config.json").read_bytes())
    return folder


def without_tower(tensors: dict) -> dict:
    return {key: value for key, value in tensors.items() if not key.startswith(TOWER)}


def language_part(tensors: dict) -> dict:
    """The language model of a released checkpoint."""
    names = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
    return {key: value for key, value in tensors.items() if key.startswith(names)}


def write_language_model(folder: Path, tensors: dict, **changes) -> Path:
    """A plain Llama checkpoint with the golden sizes."""
    config = golden_config(model_type="llama", architectures=["LlamaForCausalLM"], **changes)
    write_json(folder / "config.json", {key: value for key, value in config.items() if not key.startswith("mm_")})
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def leftovers(folder: Path) -> list[str]:
    """Whatever a failed conversion left in a folder where only its source should be."""
    return sorted(path.name for path in folder.iterdir() if "out" in path.name)


@contextlib.contextmanager
def no_output(folder: Path):
    """Nothing named like an output may exist after the block."""
    yield
    assert leftovers(folder) == []


def tokenizer_without_image_token(template: str | None = None):
    """The tiny tokenizer as a released checkpoint has it."""
    return tiny_tokenizer(template, image_token=False)

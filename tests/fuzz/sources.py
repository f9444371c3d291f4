"""Sound checkpoints of every kind, made once for all cases; a case gets links to their files and replaces some."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file


sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))  # the builders of the conversion tests

from convert_tools import (
    GOLDEN,
    golden_config,
    language_part,
    save_bin_shards,
    tensors_of,
    tokenizer_without_image_token,
    write_json,
    write_language_model,
    write_tower,
)
from fusion_tools import write_released_fusion
from test_llava_next import save_source, their_model
from transformers import AutoModelForCausalLM

from builders import randomise, tiny_config, tiny_model, tiny_processor, tiny_text_config


GENERATION = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "suppress_tokens": [3], "do_sample": False}


def _slime(folder: Path) -> None:
    for path in (*GOLDEN.glob("model*"), GOLDEN / "config.json", GOLDEN / "vision_config.json"):
        shutil.copyfile(path, folder / path.name)
    tokenizer_without_image_token().save_pretrained(folder)
    write_json(folder / "generation_config.json", GENERATION)


def _pickles(folder: Path) -> None:
    write_json(folder / "config.json", golden_config())
    shutil.copyfile(GOLDEN / "vision_config.json", folder / "vision_config.json")
    save_bin_shards(folder, tensors_of(GOLDEN), count=2)


def _lora(folder: Path) -> None:
    golden = tensors_of(GOLDEN)
    write_language_model(folder / "base", language_part(golden))
    write_tower(folder / "tower")
    write_json(folder / "lora" / "config.json", golden_config())
    write_json(folder / "lora" / "adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"})
    parts = {key: value for key, value in golden.items() if ".mm_projector." in key or ".sampler." in key}
    torch.save(
        {f"base_model.model.{key}": value for key, value in parts.items()}, folder / "lora/non_lora_trainables.bin"
    )
    weight = golden["model.layers.0.self_attn.q_proj.weight"]
    root = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    adapter = {f"{root}A.weight": torch.ones(4, weight.shape[1]), f"{root}B.weight": torch.ones(weight.shape[0], 4)}
    save_file(adapter, folder / "lora" / "adapter_model.safetensors", {"format": "pt"})


def _llava_next(folder: Path) -> None:
    save_source(folder, their_model("llama"))


def _compose(folder: Path) -> None:
    write_tower(folder / "vision")
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    write_json(folder / "vision" / "preprocessor_config.json", values)
    tokenizer = tokenizer_without_image_token("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}")
    config = tiny_text_config("qwen2", vocab_size=len(tokenizer))
    randomise(AutoModelForCausalLM.from_config(config)).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")


def _ours(folder: Path) -> None:
    config = tiny_config("llava_next")
    tiny_model(config).save_pretrained(folder)
    tiny_processor(config, "chatml").save_pretrained(folder)


def _ours_slime(folder: Path) -> None:
    from hires_lmm.conversion import convert_slime

    released = folder.with_name("released")
    released.mkdir(exist_ok=True)
    _slime(released)
    convert_slime(released, folder)


def _fusion(folder: Path) -> None:
    write_released_fusion(folder)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "slime": _slime,
    "pickles": _pickles,
    "lora": _lora,
    "fusion": _fusion,
    "llava_next": _llava_next,
    "compose": _compose,
    "ours": _ours,
    "ours_slime": _ours_slime,
}


def sound(name: str, root: Path) -> Path:
    """The sound checkpoint of a kind; built at the first call."""
    folder = root / "sources" / name
    if not folder.exists():
        folder.mkdir(parents=True)
        BUILDERS[name](folder)
    return folder


def copy_sound(name: str, root: Path, target: Path) -> Path:
    """A folder of links to the files of a sound checkpoint: replace them, never write into them."""
    shutil.copytree(sound(name, root), target, copy_function=os.link)
    return target


def replace(path: Path, data: bytes | str) -> None:
    """Put other content at a path without touching the file that other links lead to."""
    if path.is_symlink() or path.exists():
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)


def read_values(path: Path) -> dict:
    """A sound JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))

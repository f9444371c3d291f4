"""The halves on disk: `vision/` (CLIPVisionModel), `language/` (LlamaForCausalLM and tokenizer), `heads.safetensors`,
`halves.json`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from .vision import VisionHalf


VISION, LANGUAGE, HEADS_FILE, RECORD_FILE = "vision", "language", "heads.safetensors", "halves.json"


@dataclass(frozen=True)
class Halves:
    """Vision half with its heads, language half, tokenizer, and the record of how they were made."""

    vision: VisionHalf
    language: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    record: dict[str, Any]


def save_weights(
    folder: str | Path, vision: VisionHalf, language: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Write both halves, weights in half precision, configurations that load them in single precision.

    Args:
        folder (`str` or `Path`): Target.
        vision (`VisionHalf`): Tower and heads; not changed.
        language (`LlamaForCausalLM`): The language half; not changed.
        tokenizer: Its tokenizer.
    """
    folder = Path(folder)
    _save_model(vision.tower, folder / VISION)
    _save_model(language, folder / LANGUAGE)
    tokenizer.save_pretrained(folder / LANGUAGE)
    heads = {name: tensor for name, tensor in vision.state_dict().items() if not name.startswith("tower.")}
    save_file({name: tensor.contiguous() for name, tensor in heads.items()}, folder / HEADS_FILE)


def _save_model(model: PreTrainedModel, folder: Path) -> None:
    single = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.half().save_pretrained(folder)
    model.float().load_state_dict(single)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def load_halves(folder: str | Path) -> Halves:
    """Load what `pretrain_halves` wrote.

    Args:
        folder (`str` or `Path`): `checkpoints/halves` of the repository, or another run's.

    Returns:
        The halves, in evaluation mode, single precision, with eager attention.

    Raises:
        ValueError: If the folder holds no halves.
    """
    folder = Path(folder)
    if not (folder / RECORD_FILE).exists():
        raise ValueError(f"{folder} has no {RECORD_FILE}: run python -m needle.pretrain_halves --out {folder}")
    options: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32}
    tower = CLIPVisionModel.from_pretrained(folder / VISION, **options)
    vision = VisionHalf(tower.config)
    vision.tower = tower
    vision.load_state_dict(load_file(folder / HEADS_FILE), strict=False)
    language = LlamaForCausalLM.from_pretrained(folder / LANGUAGE, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder / LANGUAGE)
    record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    return Halves(vision.eval(), language.eval(), tokenizer, record)

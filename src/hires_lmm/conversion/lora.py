"""Merging a LoRA folder into the weights it was trained on: W + scale * B A."""

import math
import re
from dataclasses import replace
from pathlib import Path

import torch

from .errors import ConversionError, problem_table
from .tensors import Entries, Entry, file_entries, read_json, shown


ADAPTER_CONFIG = "adapter_config.json"
ALPHA_LIMIT = 1e6
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_NEUTRAL: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layer_replication": ([], None),
    "target_parameters": ([], None),
    "trainable_token_indices": (None,),
    "init_lora_weights": (True, False, "gaussian", None),
}
"""Options of an adapter with the values for which W + scale * B A is the whole story."""


def plain_key(key: str) -> str:
    """The name a tensor has without the wrapping of peft.

    Args:
        key (`str`): Name in a file of the trainer.
    """
    while key.startswith(_PREFIX):
        key = key.removeprefix(_PREFIX)
    return key.replace(".base_layer.", ".").removeprefix("base_model.")


def adapter_scale(config: dict, rank: int) -> float:
    """The factor before B A.

    Args:
        config (`dict`): `adapter_config.json`.
        rank (`int`): Rows of A.
    """
    alpha = config["lora_alpha"]
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def read_adapter_config(folder: Path) -> dict:
    """Read `adapter_config.json` and refuse adapters that are more than a low-rank sum.

    Args:
        folder (`Path`): The LoRA folder.

    Raises:
        ConversionError: If an option asks for more.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    for name, allowed in _NEUTRAL.items():
        if config.get(name, allowed[-1]) not in allowed:
            raise ConversionError(
                f"{ADAPTER_CONFIG} has {name}={shown(config[name])}; only plain LoRA (and rslora) is merged here. "
                "Merge it with peft (merge_and_unload), save the full model and convert that."
            )
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < ALPHA_LIMIT:
        raise ConversionError(f"{ADAPTER_CONFIG} has lora_alpha={shown(alpha)}; a number is expected.")
    return config


def adapter_entries(folder: Path) -> Entries:
    """The tensors of `adapter_model.safetensors` or `adapter_model.bin`, without the prefix of peft.

    Args:
        folder (`Path`): The LoRA folder.

    Raises:
        ConversionError: If there is none.
    """
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return {plain_key(key): entry for key, entry in file_entries(folder / name).items()}
    raise ConversionError(
        f"{folder.name} has {ADAPTER_CONFIG}, but no adapter_model.safetensors or adapter_model.bin."
    )


def _merged(weight: Entry, down: Entry, up: Entry, scale: float, transposed: bool) -> Entry:
    """One weight with its adapter added, computed in float32 and rounded once."""

    def read() -> torch.Tensor:
        table = weight.read()
        delta = up.read().float() @ down.read().float()
        delta = delta.T if transposed else delta
        return delta.mul_(scale).add_(table).to(table.dtype)

    note = "; ".join(filter(None, [weight.note, f"LoRA of rank {down.shape[0]} merged"]))
    return replace(weight, read=read, note=note)


def merge_adapter(entries: Entries, adapter: Entries, config: dict) -> Entries:
    """Add an adapter to the weights it belongs to.

    Args:
        entries (`Entries`): The base weights.
        adapter (`Entries`): `….lora_A.weight` and `….lora_B.weight`, without the prefix of peft.
        config (`dict`): `adapter_config.json`.

    Returns:
        All entries, the adapted ones merged.

    Raises:
        ConversionError: With a table of tensors that do not belong together.
    """
    problems = []
    pairs: dict[str, dict[str, Entry]] = {}
    for key, entry in adapter.items():
        match = _KEY.fullmatch(key)
        if match is None:
            reason = "DoRA" if "magnitude" in key else "no lora_A or lora_B of a linear layer"
            problems.append(("unexpected", key, reason))
        else:
            pairs.setdefault(match["module"], {})[match["side"]] = entry
    transposed = bool(config.get("fan_in_fan_out"))
    merged = dict(entries)
    for module, sides in pairs.items():
        weight, key = entries.get(f"{module}.weight"), f"{module}.weight"
        if set(sides) != {"A", "B"}:
            problems.append(("missing", module, "lora_A and lora_B do not come in pairs"))
        elif weight is None:
            problems.append(("missing", key, "the adapter changes it, but the base does not have it"))
        else:
            down, up = sides["A"], sides["B"]
            if len(down.shape) != 2 or len(up.shape) != 2 or not down.shape[0]:
                problems.append(("mis-shaped", key, f"A is {down.shape} and B is {up.shape}; two tables are expected"))
                continue
            shape = (up.shape[0], down.shape[-1])
            if (shape[::-1] if transposed else shape) != weight.shape or up.shape[-1] != down.shape[0]:
                problems.append(("mis-shaped", key, f"{weight.shape}, but B A gives {shape}"))
                continue
            merged[key] = _merged(weight, down, up, adapter_scale(config, down.shape[0]), transposed)
    if problems:
        raise ConversionError(problem_table("The adapter does not fit its base:", problems))
    return merged

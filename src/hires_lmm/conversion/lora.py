"""Merging a LoRA folder into the weights it was trained on: W + scale * B A."""

import math
import re
from dataclasses import replace
from pathlib import Path

import torch

from .errors import ConversionError, problem_table
from .tensors import Entries, Entry, file_entries, read_json


ADAPTER_CONFIG = "adapter_config.json"
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
    """The name a tensor has without the wrapping of peft."""
    while key.startswith(_PREFIX):
        key = key.removeprefix(_PREFIX)
    return key.replace(".base_layer.", ".").removeprefix("base_model.")


def read_adapter_config(folder: Path) -> dict:
    """Read `adapter_config.json` and refuse adapters that are more than a low-rank sum."""
    config = read_json(folder / ADAPTER_CONFIG)
    for name, allowed in _NEUTRAL.items():
        if config.get(name, allowed[-1]) not in allowed:
            raise ConversionError(
                f"{ADAPTER_CONFIG} has {name}={config[name]!r}; only plain LoRA (and rslora) is merged here. "
                "Merge it with peft (merge_and_unload), save the full model and convert that."
            )
    return config


def adapter_entries(folder: Path) -> Entries:
    """The tensors of `adapter_model.safetensors` or `adapter_model.bin`, without the prefix of peft."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return {plain_key(key): entry for key, entry in file_entries(folder / name).items()}
    raise ConversionError(
        f"{folder.name} has {ADAPTER_CONFIG}, but no adapter_model.safetensors or adapter_model.bin."
    )


def merge_adapter(entries: Entries, adapter: Entries, config: dict) -> Entries:
    """Add an adapter (`….lora_A.weight`, `….lora_B.weight`) to the weights it belongs to."""
    problems = []
    pairs: dict[str, dict[str, Entry]] = {}
    for key, entry in adapter.items():
        match = _KEY.fullmatch(key)
        if match is None:
            reason = "DoRA" if "magnitude" in key else "no lora_A or lora_B of a linear layer"
            problems.append(("unexpected", key, reason))
        else:
            pairs.setdefault(match["module"], {})[match["side"]] = entry
    merged = dict(entries)
    for module, sides in pairs.items():
        key = f"{module}.weight"
        if set(sides) != {"A", "B"}:
            problems.append(("missing", module, "lora_A and lora_B do not come in pairs"))
        elif key not in entries:
            problems.append(("missing", key, "the adapter changes it, but the base does not have it"))
        else:
            weight, down, up = entries[key], sides["A"], sides["B"]
            shape = _product_shape(down.shape, up.shape, config)
            if shape == weight.shape:
                merged[key] = _merged(weight, down, up, config)
            else:
                wrong = f"{weight.shape}, but B A gives {shape}" if shape else f"A is {down.shape} and B is {up.shape}"
                problems.append(("mis-shaped", key, wrong))
    if problems:
        raise ConversionError(problem_table("The adapter does not fit its base:", problems))
    return merged


def _product_shape(down: tuple[int, ...], up: tuple[int, ...], config: dict) -> tuple[int, ...] | None:
    """The shape of B A, turned where the base keeps its weights so; None where there is no product."""
    if len(down) != 2 or len(up) != 2 or up[1] != down[0]:
        return None
    return (down[1], up[0]) if config.get("fan_in_fan_out") else (up[0], down[1])


def _merged(weight: Entry, down: Entry, up: Entry, config: dict) -> Entry:
    """One weight with its adapter added, computed in float32 and rounded once."""
    rank = down.shape[0]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def read() -> torch.Tensor:
        table = weight.read()
        delta = up.read().float() @ down.read().float()
        delta = delta.T if config.get("fan_in_fan_out") else delta
        return delta.mul_(scale).add_(table).to(table.dtype)

    note = "; ".join(filter(None, [weight.note, f"LoRA of rank {rank} merged"]))
    return replace(weight, read=read, note=note)

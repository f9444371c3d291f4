"""Vision towers: their configuration and their weights, out of folders that may hold more than the tower."""

from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoConfig, AutoModel
from transformers.utils import is_timm_available

from ..processing.tower_table_hires_lmm import TOWERS, complete_tower, tower_family
from .configs import common_dtype, known_fields
from .errors import ConversionError, readable
from .hub import resolve_folder
from .tensors import Entries, entry_of, folder_entries, read_json


KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
"""Sizes of the tower that every published SliME model uses, so that a full checkpoint converts without a network."""

COMPOSITES = {
    "clip": "clip_vision_model",
    "siglip": "siglip_vision_model",
    "siglip2": "siglip2_vision_model",
    "aimv2": "aimv2_vision_model",
    "internvl": "internvl_vision",
}
"""Models of image and text whose tower can be taken alone, and the type of it."""

CONVOLUTIONAL = ("convnext", "convnextv2")
INSIDE = ("model.vision_tower.", "vision_tower.", "model.vision_model.", "vision_model.")
"""What models of image and text put before the names of their tower."""

TIMM_FIELDS = ("pretrained_cfg", "num_features", "hidden_size", "image_size", "patch_size", "view_size")
SEED = 0


def tower_config(values: dict, name: str) -> Any:
    """The configuration of a tower alone, from its `config.json` or that of a model of image and text, or of timm."""
    model_type = str(values.get("model_type") or ("timm_wrapper" if "pretrained_cfg" in values else None))
    if model_type in COMPOSITES:
        projection = {key: values[key] for key in ("projection_dim",) if key in values and model_type == "clip"}
        model_type = COMPOSITES[model_type]
        values = {**projection, **(values.get("vision_config") or {})}
    known = [kind for kind, family in TOWERS.items() if family.refused is None]
    if model_type in TOWERS and TOWERS[model_type].refused is not None:
        raise ConversionError(f"{name} is a tower of type {model_type!r}: {TOWERS[model_type].refused}.")
    if model_type not in known:
        names = ", ".join([*known, *COMPOSITES])
        raise ConversionError(f"{name} describes a model of type {model_type!r}; vision towers can be: {names}.")
    is_timm = model_type == "timm_wrapper"
    others = TIMM_FIELDS if is_timm else ("vision_use_head", "view_size")
    fields = known_fields(values, model_type, *others)
    with readable(f"The vision tower's configuration in {name}"):
        for field in ("num_classes", "label_names") if is_timm else ():
            fields.pop(field, None)
        config = complete_tower(AutoConfig.for_model(model_type, **fields))
        return ask_timm(config) if is_timm else config


def ask_timm(config: Any) -> Any:
    """What timm knows of an architecture and its checkpoint does not say; nothing where timm is not installed."""
    sizes = [getattr(config, name, None) for name in ("patch_size", "hidden_size")]
    if None not in sizes or not is_timm_available():
        return config
    import timm

    model = timm.create_model(config.architecture, num_classes=0, **(config.model_args or {}))
    config.patch_size, config.hidden_size = model.feature_info[-1]["reduction"], model.num_features
    if getattr(config, "image_size", None) is None:
        config.image_size = model.pretrained_cfg["input_size"][-1]
    return config


def tower_entries(folder: Path, config: Any = None) -> Entries:
    """The weights of a tower, named as in the tower alone; what else a model has, text or classes, is left out."""
    config = tower_config(read_json(folder / "config.json"), folder.name) if config is None else config
    entries = folder_entries(folder)
    for prefix in INSIDE:
        inside = {key.removeprefix(prefix): entry for key, entry in entries.items() if key.startswith(prefix)}
        if inside:
            entries = inside
            break
    with torch.device("meta"):
        wanted = AutoModel.from_config(config).state_dict()
    if set(wanted) <= set(entries):
        return {key: entries[key] for key in wanted}
    return _renamed_entries(entries, config, folder.name)


def _renamed_entries(entries: Entries, config: Any, name: str) -> Entries:
    """The weights of a tower that a checkpoint names otherwise, as transformers reads them."""
    tensors = {key: entry.read() for key, entry in entries.items() if not key.startswith("language_model.")}
    with readable(f"The vision tower in {name}"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model, info = MODEL_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=tensors, dtype=common_dtype(entries), output_loading_info=True
        )
    unread = tower_family(config).unread
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(unread)):
        raise ConversionError(f"{name} holds no vision tower of type {config.model_type!r}: it has no {missing[0]}.")
    return {key: entry_of(tensor, note="read by transformers") for key, tensor in model.state_dict().items()}


def find_tower(choice: str | Path | None, name: str | None, folder: Path) -> tuple[Any, Path | None]:
    """The tower that the caller chose (file, folder, repository) or the checkpoint names: configuration and folder."""
    if choice is not None and Path(choice).expanduser().is_file():
        return tower_config(read_json(Path(choice).expanduser()), str(choice)), None
    if choice is None and (folder / "vision_config.json").is_file():
        return tower_config(read_json(folder / "vision_config.json"), "vision_config.json"), None
    if choice is None and name in KNOWN_TOWERS:
        return tower_config(dict(KNOWN_TOWERS[name]), name), None
    chosen = choice if choice is not None else name
    if chosen is None:
        raise ConversionError("The released configuration names no mm_vision_tower; pass vision_config.")
    tower = resolve_folder(chosen, "The vision tower")
    return tower_config(read_json(tower / "config.json"), tower.name), tower

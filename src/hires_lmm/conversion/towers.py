"""Vision towers: their configuration and their weights, out of folders that may hold more than the tower."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from .configs import known_fields
from .errors import ConversionError, readable
from .hub import resolve_folder
from .tensors import Entries, folder_entries, read_json


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

COMPOSITES = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
CONVOLUTIONAL = ("convnext", "convnextv2")
_UNREAD = ("embeddings.position_ids", "head.", "classifier.")
"""Beginnings of names that no model of ours has: a buffer, SigLIP's pooling head, ConvNeXt's classifier."""


def tower_config(values: dict, name: str) -> Any:
    """The configuration of a tower alone, from its `config.json` or that of a model of image and text."""
    model_type = str(values.get("model_type"))
    if model_type in COMPOSITES:
        projection = {key: values[key] for key in ("projection_dim",) if key in values and model_type == "clip"}
        model_type = COMPOSITES[model_type]
        values = {**projection, **(values.get("vision_config") or {})}
    if model_type not in (*COMPOSITES.values(), *CONVOLUTIONAL):
        known = ", ".join([*COMPOSITES.values(), *COMPOSITES, *CONVOLUTIONAL])
        raise ConversionError(f"{name} describes a model of type {model_type!r}; vision towers can be: {known}.")
    with readable(f"The vision tower's configuration in {name}"):
        return AutoConfig.for_model(model_type, **known_fields(values, model_type, "vision_use_head"))


def tower_entries(folder: Path) -> Entries:
    """The weights of a tower, named as in the tower alone; what else a model has, text or classes, is left out."""
    entries = folder_entries(folder)
    for name in CONVOLUTIONAL:
        entries = {key.removeprefix(f"{name}."): entry for key, entry in entries.items()}
    inside = {key.removeprefix("vision_model."): entry for key, entry in entries.items() if key.startswith("vision_")}
    inside = {key: entry for key, entry in inside.items() if f"vision_model.{key}" in entries}
    found = {key: entry for key, entry in (inside or entries).items() if not key.startswith(_UNREAD)}
    if not {"embeddings.patch_embedding.weight", "embeddings.patch_embeddings.weight"} & set(found):
        raise ConversionError(f"{folder.name} holds no vision tower: it has no embeddings.patch_embedding.weight.")
    return found


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

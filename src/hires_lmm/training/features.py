"""Features of all towers on disk, so that stages with frozen towers run none."""

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..modeling.towers_hires_lmm import EXTRA_LAYER, run_tower
from ..processing.geometry_hires_lmm import MAIN_TOWER, Column, Kind
from ..processing.image_input_hires_lmm import open_image, to_rgb
from ..processing.tower_table_hires_lmm import tower_grid, tower_width
from .image_store import SHARD_BYTES, ImageStore, pixel_key, read_pictures
from .parameters import find_base


VIEW_OPTIONS = (
    "planner",
    "view_size",
    "patch_size",
    "max_crops",
    "pinpoints",
    "unpad",
    "global_view",
    "enlarge",
    "resize_backend",
    "resample",
    "image_mean",
    "image_std",
    "rescale_factor",
    "background",
    "extra_towers",
)


def planner_key(processor: Any) -> dict[str, Any]:
    """What decides over the pixels of views: the options of the image processor, as JSON values."""
    values = {name: getattr(processor.image_processor, name) for name in VIEW_OPTIONS}
    return json.loads(json.dumps(values, default=list))


def towers_of(model: nn.Module) -> dict[str, Any]:
    """The vision towers of a model by name, the main one first."""
    base = find_base(model)
    return {MAIN_TOWER: base.vision_tower, **dict(base.extra_towers.items())}


def tower_key(model: nn.Module, name: str = MAIN_TOWER) -> str:
    """Hash of the weights of a vision tower and of the layer that is read."""
    layer = find_base(model).config.vision_feature_layer if name == MAIN_TOWER else EXTRA_LAYER
    digest = blake2b(str(layer).encode(), digest_size=16)
    for key, tensor in sorted(towers_of(model)[name].state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class VisionFeatureStore(ImageStore):
    """Reads what `cache_vision_features` wrote."""

    written_by = "cache_vision_features"

    def check_processor(self, processor: Any) -> None:
        """Compare the processor with the one that made the views."""
        self.check(planner_key(processor))

    def rows(self, processor: Any, images: list, view_positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of the views that a processor call made."""
        options = processor.image_processor
        starts = [*torch.nonzero(view_positions[:, Column.STARTS_IMAGE])[:, 0].tolist(), len(view_positions)]
        parts: dict[str, list] = {name: [features] for name, features in self.empty().items()}
        for image, first, last in zip(images, starts, starts[1:], strict=False):
            picture = to_rgb(open_image(image, 0), 0, tuple(options.background), options.pixel_limit)
            features = self.get(feature_key(picture, MAIN_TOWER))
            if last - first not in (1, len(features)):
                raise ValueError(
                    f"The cache holds {len(features)} views of an image of which {last - first} are asked for; write "
                    "it with the same max_crops and planner."
                )
            parts["vision_features"].append(features[: last - first])
            if view_positions[first, Column.KIND] == Kind.GLOBAL:
                for name in list(self.made_from["shapes"])[1:]:
                    parts[f"vision_features_{name}"].append(self.get(feature_key(picture, name)))
        return {name: torch.cat([features.to(own[-1].dtype) for features in own]) for name, own in parts.items()}

    def empty(self) -> dict[str, torch.Tensor]:
        """Features of no view `(0, L, C)`: a batch without images under a cache still runs no tower."""
        shapes = self.made_from["shapes"].items()
        return {
            "vision_features" if name == MAIN_TOWER else f"vision_features_{name}": torch.zeros(0, *shape)
            for name, shape in shapes
        }


def feature_key(picture: Any, tower: str) -> str:
    """Name of what a tower gave for an image in a store."""
    return pixel_key(picture) if tower == MAIN_TOWER else f"{pixel_key(picture)}.{tower}"


def cache_vision_features(
    model: nn.Module,
    processor: Any,
    images: Iterable,
    folder: str | Path,
    views_per_pass: int = 32,
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> VisionFeatureStore:
    """Write the features of every tower of images, all views each.

    Images that the folder already holds are skipped, so an interrupted run goes on where its last shard ended. One
    process writes at a time; others wait, and then find the images there.

    Args:
        images (`Iterable`): Images or sources; repetitions cost a hash.
        folder (`str`): Where to write.
        views_per_pass (`int`): Views that a tower sees at once.
        shard_bytes (`int`): Size of a shard.
        dtype (`torch.dtype`, *optional*): Type on disk; that of the tower by default.

    Raises:
        ValueError: If the folder holds features of other towers or another processor; if views are of unequal size; if
            an image cannot be read: the message names its number, counted from 0, and what came before it is kept.
    """
    if find_base(model).config.unequal_views:
        raise ValueError(
            "Features of views of unequal size cannot be cached; train on pixel_values, without features."
        )
    towers, options = towers_of(model), processor.image_processor
    grids = {name: tower_grid(tower.config) for name, tower in towers.items()}
    shapes = {name: [rows * cols, tower_width(towers[name].config)] for name, (rows, cols) in grids.items()}
    keys = {name: tower_key(model, name) for name in towers}
    store = VisionFeatureStore(folder, {"towers": keys, "shapes": shapes, **planner_key(processor)})
    pictures = read_pictures(images, tuple(options.background), options.pixel_limit)
    items = ((feature_key(picture, name), (picture, name)) for _, picture in pictures for name in towers)
    base = find_base(model)
    with ExitStack() as stack:
        for tower in towers.values():
            stack.enter_context(evaluating(tower))
        store.fill(
            items,
            lambda some: [encode_picture(base, processor, one, views_per_pass, dtype, name) for one, name in some],
            shard_bytes=shard_bytes,
        )
    return store


@torch.no_grad()
def encode_picture(
    base: Any,
    processor: Any,
    picture: Any,
    views_per_pass: int = 32,
    dtype: torch.dtype | None = None,
    tower: str = MAIN_TOWER,
) -> torch.Tensor:
    """Features `(V, L, C)` that a tower gives for all its views of an image, on the CPU."""
    if tower != MAIN_TOWER:
        pixels = processor.image_processor(picture, views="global", return_tensors="pt")[f"pixel_values_{tower}"]
        module = base.extra_towers[tower]
        return run_tower(module, pixels.to(module.device), EXTRA_LAYER).features.to("cpu", dtype).contiguous()
    pixels = processor.image_processor(picture, views="all", return_tensors="pt")["pixel_values"]
    pixels = pixels.to(base.vision_tower.device)
    parts = [base.encode_pixels(part).to("cpu", dtype) for part in pixels.split(views_per_pass)]
    return torch.cat(parts).contiguous()


@contextmanager
def evaluating(tower: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, whatever happens in it."""
    was_training = tower.training
    tower.eval()
    try:
        yield
    finally:
        tower.train(was_training)

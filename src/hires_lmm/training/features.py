"""Tower features on disk, so that stages with a frozen tower run none."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..processing.geometry_hires_lmm import Column
from ..processing.image_input_hires_lmm import open_image, to_rgb
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
    "resample",
    "image_mean",
    "image_std",
    "rescale_factor",
    "background",
)


def planner_key(processor: Any) -> dict[str, Any]:
    """What decides over the pixels of views: the options of the image processor, as JSON values."""
    values = {name: getattr(processor.image_processor, name) for name in VIEW_OPTIONS}
    return json.loads(json.dumps(values, default=list))


def tower_key(model: nn.Module) -> str:
    """Hash of the weights of a vision tower and of the layer that is read."""
    base = find_base(model)
    digest = blake2b(str(base.config.vision_feature_layer).encode(), digest_size=16)
    for name, tensor in sorted(base.vision_tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class VisionFeatureStore(ImageStore):
    """Reads what `cache_vision_features` wrote.

    Args:
        folder (`str`): The folder.
        made_from (`dict`, *optional*): See `ImageStore`.
    """

    written_by = "cache_vision_features"

    def check_processor(self, processor: Any) -> None:
        """Compare the processor with the one that made the views.

        Raises:
            ValueError: If an option differs.
        """
        self.check(planner_key(processor))

    def rows(self, processor: Any, images: list, view_positions: torch.Tensor) -> torch.Tensor:
        """Features of the views that a processor call made.

        Args:
            processor (`HiResLmmProcessor`): The processor.
            images (`list`): The images of the call, in order.
            view_positions (`torch.Tensor` of shape `(V, 6)`): Its geometry; without crops the global view is taken.

        Returns:
            `(V, L, C)`.

        Raises:
            ValueError: If an image is missing or was cut differently.
        """
        options = processor.image_processor
        starts = [*torch.nonzero(view_positions[:, Column.STARTS_IMAGE])[:, 0].tolist(), len(view_positions)]
        parts = []
        for image, first, last in zip(images, starts, starts[1:], strict=False):
            picture = to_rgb(open_image(image, 0), 0, tuple(options.background), options.pixel_limit)
            features = self.get(pixel_key(picture))
            if last - first not in (1, len(features)):
                raise ValueError(
                    f"The cache holds {len(features)} views of an image of which {last - first} are asked for; write "
                    "it with the same max_crops and planner."
                )
            parts.append(features[: last - first])
        return torch.cat(parts)

    def empty(self) -> torch.Tensor:
        """Features of no view `(0, L, C)`: a batch without images under a cache still runs no tower."""
        return torch.zeros(0, *self.made_from["shape"])


def cache_vision_features(
    model: nn.Module,
    processor: Any,
    images: Iterable,
    folder: str | Path,
    views_per_pass: int = 32,
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> VisionFeatureStore:
    """Write the tower features of images, all views each.

    Images that the folder already holds are skipped, so an interrupted run goes on where its last shard ended. One
    process writes at a time; others wait, and then find the images there.

    Args:
        model (`nn.Module`): The model whose tower is run, in evaluation mode.
        processor (`HiResLmmProcessor`): Cuts the images.
        images (`Iterable`): Images or sources; repetitions cost a hash.
        folder (`str`): Where to write.
        views_per_pass (`int`): Views that the tower sees at once.
        shard_bytes (`int`): Size of a shard.
        dtype (`torch.dtype`, *optional*): Type on disk; that of the tower by default.

    Returns:
        The store.

    Raises:
        ValueError: If the folder holds features of another tower or processor; if an image cannot be read: the message
            names its number, counted from 0, and what came before it is kept.
    """
    base, options = find_base(model), processor.image_processor
    rows, cols = base.config.patch_grid
    shape = [rows * cols, base.config.vision_config.hidden_size]
    store = VisionFeatureStore(folder, {"tower": tower_key(model), "shape": shape, **planner_key(processor)})
    pictures = read_pictures(images, tuple(options.background), options.pixel_limit)
    with evaluating(base.vision_tower):
        store.fill(
            pictures,
            lambda some: [encode_picture(base, processor, one, views_per_pass, dtype) for one in some],
            shard_bytes=shard_bytes,
        )
    return store


@torch.no_grad()
def encode_picture(
    base: Any, processor: Any, picture: Any, views_per_pass: int = 32, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Tower features `(V, L, C)` of all views of an image, on the CPU."""
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

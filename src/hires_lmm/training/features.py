"""Tower features on disk, so that stages with a frozen tower run none."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..files import replacing, write_text
from ..processing.geometry_hires_lmm import Column
from ..processing.image_input_hires_lmm import flatten_images, open_image, to_rgb
from .stages import find_base


INDEX, LOCK = "index.json", "lock"
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


def image_key(processor: Any, image: Any, number: int = 0) -> str:
    """Name of an image in a cache: a hash of its upright RGB pixels.

    Args:
        processor (`HiResLmmProcessor`): Its background colour and size limit are used.
        image: An image or a source, as the processor takes it.
        number (`int`): Named in errors.
    """
    options = processor.image_processor
    rgb = to_rgb(open_image(image, number), number, tuple(options.background), options.pixel_limit)
    digest = blake2b(digest_size=16)
    digest.update(np.array(rgb.size, dtype=np.int64).tobytes())
    digest.update(rgb.tobytes())
    return digest.hexdigest()


def planner_key(processor: Any) -> dict[str, Any]:
    """What decides over the pixels of views: the options of the image processor, as JSON values.

    Args:
        processor (`HiResLmmProcessor`): Any processor.
    """
    values = {name: getattr(processor.image_processor, name) for name in VIEW_OPTIONS}
    return json.loads(json.dumps(values, default=list))


def tower_key(model: nn.Module) -> str:
    """Hash of the weights of a vision tower and of the layer that is read.

    Args:
        model (`nn.Module`): A model of this package, bare or wrapped by PEFT.
    """
    base = find_base(model)
    digest = blake2b(str(base.config.vision_feature_layer).encode(), digest_size=16)
    for name, tensor in sorted(base.vision_tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class VisionFeatureStore:
    """Reads what `cache_vision_features` wrote.

    Args:
        folder (`str`): The folder.

    Raises:
        ValueError: If the folder holds no cache.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise ValueError(f"{str(folder)!r} holds no {INDEX}; write it with cache_vision_features.")
        self.index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        self._files: dict[str, Any] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}

    def __len__(self) -> int:
        return len(self.index["images"])

    def __contains__(self, key: str) -> bool:
        return key in self.index["images"]

    def check_processor(self, processor: Any) -> None:
        """Compare the processor with the one that made the views.

        Raises:
            ValueError: If an option differs.
        """
        now, then = planner_key(processor), self.index["planner"]
        changed = [name for name in now if now[name] != then.get(name)]
        if changed:
            raise ValueError(
                f"The cache {str(self.folder)!r} was made with {changed[0]}={then.get(changed[0])!r}, the processor "
                f"has {now[changed[0]]!r}; write the cache anew or change the processor."
            )

    def check_model(self, model: nn.Module) -> None:
        """Compare the vision tower with the one that made the features.

        Raises:
            ValueError: If its weights or the layer differ.
        """
        if tower_key(model) != self.index["tower"]:
            raise ValueError(
                f"The cache {str(self.folder)!r} was made by another vision tower or another layer; write it anew."
            )

    def get(self, key: str) -> torch.Tensor:
        """Features `(V, L, C)` of all views of an image.

        Raises:
            ValueError: If the image is not in the cache, or its file is damaged.
        """
        if key not in self.index["images"]:
            raise ValueError(
                f"The cache {str(self.folder)!r} does not hold the image {key}; run cache_vision_features over all "
                "images of the dataset (it goes on where it stopped)."
            )
        shard = self.index["images"][key]
        try:
            if shard not in self._files:
                self._files[shard] = safe_open(self.folder / shard, framework="pt")
            return self._files[shard].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"The cache file {str(self.folder / shard)!r} is missing or damaged ({error}); delete "
                f"{str(self.folder)!r} and run cache_vision_features again."
            ) from error

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
        starts = [*torch.nonzero(view_positions[:, Column.STARTS_IMAGE])[:, 0].tolist(), len(view_positions)]
        parts = []
        for image, first, last in zip(images, starts, starts[1:], strict=False):
            features = self.get(image_key(processor, image))
            if last - first not in (1, len(features)):
                raise ValueError(
                    f"The cache holds {len(features)} views of an image of which {last - first} are asked for; write "
                    "it with the same max_crops and planner."
                )
            parts.append(features[: last - first])
        return torch.cat(parts)

    def empty(self) -> torch.Tensor:
        """Features of no view `(0, L, C)`: a batch without images under a cache still runs no tower."""
        return torch.zeros(0, *self.index["shape"])


@torch.no_grad()
def cache_vision_features(
    model: nn.Module,
    processor: Any,
    images: Iterable,
    folder: str | Path,
    views_per_pass: int = 32,
    shard_bytes: int = 1 << 30,
    dtype: torch.dtype | None = None,
) -> VisionFeatureStore:
    """Write the tower features of images, all views each, to safetensors shards.

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
    base: Any = find_base(model)
    folder = Path(folder)
    dtype = dtype or base.vision_tower.dtype
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK), evaluating(base.vision_tower):
        index = _open_index(folder, model, processor)
        waiting: dict[str, torch.Tensor] = {}
        try:
            for key, image in _new_images(processor, images, index["images"], waiting):
                pixels = processor.image_processor(image, views="all", return_tensors="pt")["pixel_values"]
                pixels = pixels.to(base.vision_tower.device)
                parts = [base.encode_pixels(part).to("cpu", dtype) for part in pixels.split(views_per_pass)]
                waiting[key] = torch.cat(parts).contiguous()
                if sum(features.nbytes for features in waiting.values()) >= shard_bytes:
                    _write_shard(folder, index, waiting)
        except ValueError:
            if waiting:
                _write_shard(folder, index, waiting)
            raise
        _write_shard(folder, index, waiting)
    return VisionFeatureStore(folder)


@contextmanager
def evaluating(tower: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, whatever happens in it.

    Args:
        tower (`nn.Module`): Gets its own mode back.
    """
    was_training = tower.training
    tower.eval()
    try:
        yield
    finally:
        tower.train(was_training)


def _new_images(processor: Any, images: Iterable, known: dict, waiting: dict) -> Iterator[tuple[str, Any]]:
    """Key and source of each image that is neither known nor waiting."""
    flat = (single for image in images for single in flatten_images(image))
    for number, single in enumerate(flat):
        key = image_key(processor, single, number)
        if key not in known and key not in waiting:
            yield key, single


def _open_index(folder: Path, model: nn.Module, processor: Any) -> dict[str, Any]:
    """The index of a folder, or a new one."""
    base: Any = find_base(model)
    rows, cols = base.config.patch_grid
    index = {
        "tower": tower_key(model),
        "planner": planner_key(processor),
        "shape": [rows * cols, base.config.vision_config.hidden_size],
        "images": {},
    }
    if (folder / INDEX).is_file():
        store = VisionFeatureStore(folder)
        store.check_model(model)
        store.check_processor(processor)
        index["images"] = store.index["images"]
    return index


def _write_shard(folder: Path, index: dict, waiting: dict[str, torch.Tensor]) -> None:
    """Write a shard, then the index, so that a killed run leaves a whole cache."""
    if waiting:
        name = f"features-{len(set(index['images'].values())):05d}.safetensors"
        with replacing(folder / name) as partial:
            save_file(waiting, partial)
        index["images"].update(dict.fromkeys(waiting, name))
        waiting.clear()
    write_text(folder / INDEX, json.dumps(index))

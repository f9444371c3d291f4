"""Codebook indices on disk, so that training runs no VQ model."""

from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from ...processing.image_input_hires_lmm import DEFAULT_PIXEL_LIMIT
from ..image_store import ImageStore, pixel_key, read_pictures
from .cognition_codes import Quantiser, check_codes


class CachedCodes(ImageStore):
    """Reads what `cache_codes` wrote; a quantiser that runs no model.

    Args:
        folder (`str`): The folder.
        made_from (`dict`, *optional*): See `ImageStore`.
    """

    written_by = "cache_codes"

    def __init__(self, folder: str | Path, made_from: dict[str, Any] | None = None):
        super().__init__(folder, made_from)
        self.num_codes: int = self.made_from["num_codes"]
        self.grid: tuple[int, int] = tuple(self.made_from["grid"])

    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        """Indices of images.

        Args:
            images (`list[Image.Image]`): n upright RGB images, as `to_rgb` gives them.

        Returns:
            `np.ndarray` (n, rows, cols) int64.

        Raises:
            ValueError: If an image is not in the cache: it was not there, or has another background colour.
        """
        return np.stack([self.get(pixel_key(image)).long().numpy() for image in images])


def cache_codes(
    quantiser: Quantiser,
    images: Iterable,
    folder: str | Path,
    batch_size: int = 16,
    background: tuple[int, int, int] = (255, 255, 255),
    pixel_limit: int = DEFAULT_PIXEL_LIMIT,
    show_progress: bool = True,
    shard_bytes: int = 1 << 21,
) -> CachedCodes:
    """Write the codes of images to a folder, so that training runs no VQ model.

    Images that the folder already holds are skipped, so an interrupted run goes on where its last shard ended. One
    process writes at a time; others wait, and then find the images there.

    Args:
        quantiser (`Quantiser`): Makes the codes.
        images (`Iterable`): Images or sources, as the processor takes them; repetitions cost a hash.
        folder (`str`): Where to write.
        batch_size (`int`): Images that the quantiser sees at once.
        background (`tuple[int, int, int]`): Colour under transparent pixels, that of the processor.
        pixel_limit (`int`): Most pixels of an image, that of the processor.
        show_progress (`bool`): Draw a bar on the standard error stream.
        shard_bytes (`int`): Size of a shard.

    Returns:
        The cache.

    Raises:
        ValueError: If the folder holds codes of another quantiser, or the quantiser gives senseless ones; if an image
            cannot be read: the message names its number, counted from 0, and what was coded before it is kept.
    """
    fingerprint = getattr(quantiser, "fingerprint", type(quantiser).__name__)
    facts = {"quantiser": fingerprint, "num_codes": int(quantiser.num_codes), "grid": list(quantiser.grid)}
    store = CachedCodes(folder, facts)
    kind = torch.int16 if quantiser.num_codes <= 1 << 15 else torch.int32
    known = len(images) if isinstance(images, Sized) else None
    shown = track(images, "codes", total=known, console=Console(stderr=True), disable=not show_progress)

    def make(pictures: list) -> list[torch.Tensor]:
        codes = check_codes(quantiser(pictures), quantiser, len(pictures))
        return [one.clone() for one in torch.as_tensor(codes).to(kind)]

    store.fill(read_pictures(shown, background, pixel_limit), make, batch_size, shard_bytes)
    return store

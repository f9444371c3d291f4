"""Codebook indices of images: the nearest codebook vector of each cell, from a model or from a cache on disk."""

from collections.abc import Iterable, Sized
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from ...extras import import_extra
from ...processing.image_input_hires_lmm import DEFAULT_PIXEL_LIMIT
from ..image_store import ImageStore, pixel_key, read_pictures


ROWS_PER_BLOCK = 4096


class Quantiser(Protocol):
    """What a codebook task asks of a quantiser; any object with these three members will do.

    Args:
        num_codes (`int`): Size of the codebook.
        grid (`tuple[int, int]`): Rows and columns of cells of every image.
    """

    num_codes: int
    grid: tuple[int, int]

    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        """Indices (n, rows, cols) of n upright RGB images of any size."""


def nearest_codes(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the nearest vector of a codebook `(K, d)` for vectors `(..., d)`; the lowest index among equals.

    Source: VLSA, OpenReview RLhEGWt94S, eq. 5, which prints the argmin of a similarity; this is the argmin of the
    Euclidean distance, as VQ models define their codes.
    """
    centre = codebook.float().mean(dim=0)  # distances do not change, and rounding matters less
    codes = codebook.float() - centre
    flat = vectors.float().flatten(0, -2) - centre
    if not (torch.isfinite(flat).all() and torch.isfinite(codes).all()):
        raise ValueError(
            f"Vectors or codebook hold NaN or infinity (they come in {vectors.dtype}); load the VQ model in float32."
        )
    norms = codes.square().sum(dim=1)
    blocks = [(norms - 2 * block @ codes.T).argmin(dim=1) for block in flat.split(ROWS_PER_BLOCK)]
    return torch.cat(blocks).view(vectors.shape[:-1])


class VqQuantiser:
    """Codes of a `VQModel` of diffusers, or of any model with the same `encode` and `quantize.embedding`.

    Images are squeezed to a square, so that a cell always means the same share of width and height.

    Args:
        model (`VQModel`): The model; it is put into evaluation mode.
        image_size (`int`): Side of the square, pixels.
    """

    def __init__(self, model: Any, image_size: int = 256):
        if not hasattr(model, "encode") or not hasattr(getattr(model, "quantize", None), "embedding"):
            raise ValueError(
                f"{type(model).__name__} has no encode or no quantize.embedding; pass a diffusers VQModel, or any "
                "object with num_codes, grid and a call as the quantiser itself."
            )
        self.model = model.eval()
        self.image_size = image_size
        self.codebook = model.quantize.embedding.weight.detach()
        self.num_codes = len(self.codebook)
        blank = Image.new("RGB", (image_size, image_size))
        try:
            self.grid: tuple[int, int] = tuple(self([blank]).shape[1:])
        except RuntimeError as error:
            raise ValueError(
                f"{type(model).__name__} cannot encode RGB images of {image_size} x {image_size} pixels ({error}); "
                "choose the image_size it was trained with."
            ) from error

    @property
    def fingerprint(self) -> str:
        """Hash of the weights and of the size of the images: what the codes depend on."""
        digest = blake2b(str(self.image_size).encode(), digest_size=16)
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        """Indices `(n, rows, cols)` int64 of n RGB images of any size."""
        side = (self.image_size, self.image_size)
        arrays = [np.asarray(image.resize(side, Image.Resampling.BICUBIC), dtype=np.float32) for image in images]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
        weight = next(self.model.parameters())
        latents = self.model.encode(pixels.to(weight.device, weight.dtype)).latents
        return nearest_codes(latents.permute(0, 2, 3, 1), self.codebook.to(latents.device)).cpu().numpy()


def load_quantiser(name_or_path: str, image_size: int = 256, **kwargs: Any) -> VqQuantiser:
    """Load a `VQModel` of diffusers (extra `reconstruction`).

    Args:
        name_or_path (`str`): Folder or repository.
        image_size (`int`): Side of the square that images are squeezed to, pixels.
        **kwargs: More arguments of `VQModel.from_pretrained`, such as `subfolder="vqvae"`.

    Raises:
        ImportError: If diffusers is not installed.
    """
    model = import_extra("diffusers", "reconstruction").VQModel.from_pretrained(name_or_path, **kwargs)
    return VqQuantiser(model, image_size)


def check_codes(codes: Any, quantiser: Quantiser, number: int) -> np.ndarray:
    """Codes `(number, rows, cols)` int64 of so many images, in shape, type and range what the quantiser announces."""
    array = np.asarray(codes)
    shape = (number, *quantiser.grid)
    if array.shape != shape or array.dtype.kind not in "iu":
        raise ValueError(
            f"{type(quantiser).__name__} gave codes of shape {array.shape} and type {array.dtype} for {number} "
            f"images; its grid announces whole numbers of shape {shape}."
        )
    if array.min() < 0 or array.max() >= quantiser.num_codes:
        raise ValueError(
            f"{type(quantiser).__name__} gave codes from {array.min()} to {array.max()}, but num_codes is "
            f"{quantiser.num_codes}; correct num_codes."
        )
    return array.astype(np.int64)


class CachedCodes(ImageStore):
    """Reads what `cache_codes` wrote; a quantiser that runs no model."""

    written_by = "cache_codes"

    def __init__(self, folder: str | Path, made_from: dict[str, Any] | None = None):
        super().__init__(folder, made_from)
        self.num_codes: int = self.made_from["num_codes"]
        self.grid: tuple[int, int] = tuple(self.made_from["grid"])

    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        """Indices of images."""
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

"""Pictures at other sizes, by torch or by Pillow: the same filters, which round their own way.

A *picture* is an upright RGB image of 8 bit: of Pillow, or an array `(height, width, 3)`.
"""

from typing import cast

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers.image_utils import PILImageResampling

from .image_input_hires_lmm import DEFAULT_PIXEL_LIMIT
from .view_plans_hires_lmm import Size


Picture = Image.Image | np.ndarray
RESIZE_BACKENDS = ("torch", "pillow")
TORCH_FILTERS = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}
"""Filters that torch has with antialiasing; all others are Pillow's."""

BAND_BYTES = 2**20
"""Rows of so many bytes are read at once, which stay in the cache of a core and bound the memory."""


def size_of(picture: Picture) -> Size:
    """Height and width."""
    return (picture.height, picture.width) if isinstance(picture, Image.Image) else cast("Size", picture.shape[:2])


def as_image(picture: Picture) -> Image.Image:
    """A picture as one of Pillow."""
    return picture if isinstance(picture, Image.Image) else Image.fromarray(np.ascontiguousarray(picture))


def resize_all(picture: Picture, wanted: list[tuple[Size, int]], backend: str) -> list[np.ndarray]:
    """A picture at several sizes, each with a filter of Pillow, as arrays `(height, width, 3)`; not to be written to."""
    found: dict[tuple[Size, int], np.ndarray] = {}
    own = size_of(picture)
    by_torch = [each for each in dict.fromkeys(wanted) if backend == "torch" and _is_for_torch(own, *each)]
    if by_torch:
        found = dict(zip(by_torch, _resize_by_torch(picture, by_torch), strict=True))
    for size, resample in wanted:
        if (size, resample) not in found:
            found[size, resample] = np.asarray(picture if size == own else _resize_by_pillow(picture, size, resample))
    return [found[each] for each in wanted]


def _is_for_torch(own: Size, size: Size, resample: int) -> bool:
    """Whether torch has the filter, and the picture is not so long that its rows should not be widened first."""
    return size != own and resample in TORCH_FILTERS and own[0] * size[1] <= DEFAULT_PIXEL_LIMIT


def _resize_by_pillow(picture: Picture, size: Size, resample: int) -> Image.Image:
    image = as_image(picture)
    if size[1] * image.height > DEFAULT_PIXEL_LIMIT:  # Pillow widens all rows first; here that is too much
        image = image.resize((image.width, size[0]), resample)
    return image.resize((size[1], size[0]), resample)


def _resize_by_torch(picture: Picture, wanted: list[tuple[Size, int]]) -> list[np.ndarray]:
    """Rows are resized band by band, then columns: what torch does with the whole picture, bit by bit."""
    height, width = size_of(picture)
    step = max(1, BAND_BYTES // (3 * width))
    narrow = [np.empty((height, size[1], 3), dtype=np.uint8) for size, _ in wanted]
    for top in range(0, height, step):
        bottom = min(top + step, height)
        band = picture.crop((0, top, width, bottom)) if isinstance(picture, Image.Image) else picture[top:bottom]
        band = np.require(band, requirements=["C", "W"])
        for (size, resample), rows in zip(wanted, narrow, strict=True):
            rows[top:bottom] = _interpolate(band, (bottom - top, size[1]), TORCH_FILTERS[resample])  # type: ignore[index]
    return [
        _interpolate(rows, size, TORCH_FILTERS[resample])  # type: ignore[index]
        for (size, resample), rows in zip(wanted, narrow, strict=True)
    ]


def _interpolate(array: np.ndarray, size: Size, mode: str) -> np.ndarray:
    if array.shape[:2] == size:
        return array
    planes = torch.from_numpy(array).permute(2, 0, 1)[None]
    return interpolate(planes, size=size, mode=mode, antialias=True)[0].permute(1, 2, 0).numpy()

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
"""Rows or columns of so many bytes are resized at once, which bounds the memory; each band costs a tenth of a ms."""


def size_of(picture: Picture) -> Size:
    """Height and width."""
    return (picture.height, picture.width) if isinstance(picture, Image.Image) else cast("Size", picture.shape[:2])


def as_image(picture: Picture) -> Image.Image:
    """A picture as one of Pillow."""
    return picture if isinstance(picture, Image.Image) else Image.fromarray(np.ascontiguousarray(picture))


def empty_planes(size: Size) -> np.ndarray:
    """Room for a picture, `(height, width, 3)`, that lies plane by plane, as torch resizes and the model reads."""
    return np.empty((3, *size), dtype=np.uint8).transpose(1, 2, 0)


def resize_all(picture: Picture, wanted: list[tuple[Size, int]], backend: str) -> list[np.ndarray]:
    """A picture at several sizes, each with a filter of Pillow, as arrays `(height, width, 3)` to read."""
    own = size_of(picture)
    by_torch = [each for each in dict.fromkeys(wanted) if backend == "torch" and _is_for_torch(own, *each)]
    found = _resize_by_torch(picture, by_torch)
    for size, resample in wanted:
        if (size, resample) not in found:
            found[size, resample] = np.asarray(picture if size == own else _resize_by_pillow(picture, size, resample))
    return [found[each] for each in wanted]


def _is_for_torch(own: Size, size: Size, resample: int) -> bool:
    """Whether torch has the filter, and the picture between the two passes is not too large."""
    between = size[0] * own[1] if _first_axis(own, size) == 0 else own[0] * size[1]
    return size != own and resample in TORCH_FILTERS and between <= DEFAULT_PIXEL_LIMIT


def _resize_by_pillow(picture: Picture, size: Size, resample: int) -> Image.Image:
    image = as_image(picture)
    if size[1] * image.height > DEFAULT_PIXEL_LIMIT:  # Pillow widens all rows first; here that is too much
        image = image.resize((image.width, size[0]), resample)
    return image.resize((size[1], size[0]), resample)


def _resize_by_torch(picture: Picture, wanted: list[tuple[Size, int]]) -> dict[tuple[Size, int], np.ndarray]:
    """One axis, then the other, in the order of Pillow 13: else two passes that round would differ by more."""
    own, found = size_of(picture), {}
    for axis in (0, 1):
        group = [each for each in wanted if _first_axis(own, each[0]) == axis]
        halves = _resize_axis(picture, axis, [(size[axis], resample) for size, resample in group])
        while halves:  # each goes when it has been used
            size, resample = group[len(halves) - 1]
            (found[size, resample],) = _resize_axis(halves.pop(), 1 - axis, [(size[1 - axis], resample)])
    return found


def _first_axis(own: Size, size: Size) -> int:
    """Height comes first where it is lowered, by more than twice the pixels that width is."""
    lowered = own[0] - size[0]
    return 0 if own[1] == size[1] or (lowered > 0 and lowered > 2 * (own[1] - size[1])) else 1


def _resize_axis(picture: Picture, axis: int, wanted: list[tuple[int, int]]) -> list[np.ndarray]:
    """One axis of a picture at several lengths, each with a filter, band by band along the other axis."""
    own, along = size_of(picture), 1 - axis
    halves = [empty_planes((length, own[1]) if axis == 0 else (own[0], length)) for length, _ in wanted]
    room = BAND_BYTES // 2 if isinstance(picture, Image.Image) else BAND_BYTES  # which is read through two copies
    step = max(1, room // (3 * own[axis]))
    for start in range(0, own[along] if wanted else 0, step):
        end = min(start + step, own[along])
        band = _band(picture, along, start, end)
        for half, (_, resample) in zip(halves, wanted, strict=True):
            part = half[start:end] if along == 0 else half[:, start:end]
            part[...] = _interpolate(band, part.shape[:2], resample)
    return halves


def _band(picture: Picture, along: int, start: int, end: int) -> np.ndarray:
    """Rows or columns of a picture as an array of its own, unless it is a writable array that lies so already."""
    if isinstance(picture, Image.Image):
        box = (0, start, picture.width, end) if along == 0 else (start, 0, end, picture.height)
        return np.array(picture.crop(box))
    return np.require(picture[start:end] if along == 0 else picture[:, start:end], requirements=["C", "W"])


def _interpolate(array: np.ndarray, size: tuple[int, ...], resample: int) -> np.ndarray:
    if array.shape[:2] == size:
        return array
    planes, mode = torch.from_numpy(array).permute(2, 0, 1)[None], TORCH_FILTERS[PILImageResampling(resample)]
    return interpolate(planes, size=size, mode=mode, antialias=True)[0].permute(1, 2, 0).numpy()

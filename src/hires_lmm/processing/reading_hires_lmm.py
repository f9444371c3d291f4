"""Sources to pictures and plans: files are opened, planned and decoded, several at once and as small as may be."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

import torch
from PIL import Image

from .image_input_hires_lmm import check_size, open_bytes, open_image, orientation, to_picture
from .resizing_hires_lmm import Picture, size_of
from .view_plans_hires_lmm import ViewPlan


MOST_THREADS = 4
"""Threads of a call, unless it asks for more: as many pictures are decoded at once."""

DECODES = ("full", "scaled")
TURNED = (5, 6, 7, 8)
"""EXIF orientations that exchange height and width."""


def in_threads(call: Callable[[Any], Any], items: Iterable[Any], num_threads: int | None) -> list[Any]:
    """`[call(item) for item in items]`, in a few threads that end with it; the first item that fails raises.

    By default as many threads as torch has, which is one in the workers of a data loader.
    """
    items = list(items)
    number = min(num_threads or min(torch.get_num_threads(), MOST_THREADS), len(items))
    if number < 2:
        return [call(item) for item in items]
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(call, items))


def read_picture(source: Any, index: int, settings: Any) -> tuple[Picture, ViewPlan]:
    """A source as a picture, decoded, with the plan of its true size; of a JPEG file perhaps a smaller picture."""
    image, plan = open_image(source, index), None
    if settings.decode == "scaled" and _is_jpeg_file(image):
        image = image if image is not source else open_bytes(_file_of(image))
        width, height = image.size if orientation(image) not in TURNED else image.size[::-1]
        check_size(height, width, index, settings.pixel_limit)
        plan = settings.planner(height, width, settings.limits)
        _scale_down(image, plan, settings)
    limits = (settings.background, settings.pixel_limit, settings.input_data_format)
    picture = to_picture(image, index, *limits, unit_floats=settings.do_rescale)
    return picture, plan or settings.planner(*size_of(picture), settings.limits)


def locks_of(sources: list[Any]) -> dict[int, Lock]:
    """A lock for each source, by its id: an image of Pillow that two threads decode at once is spoilt."""
    return {id(source): Lock() for source in sources}


def _is_jpeg_file(image: Any) -> bool:
    """Whether an image of Pillow is a JPEG file that nobody has decoded or scaled."""
    is_file = isinstance(image, Image.Image) and image.format in ("JPEG", "MPO")
    return is_file and bool(image.tile) and not image.decoderconfig


def _file_of(image: Any) -> bytes:
    """The file of an image that a user has opened; his image stays as it is."""
    place = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read()
    image.fp.seek(place)
    return data


def _scale_down(image: Any, plan: ViewPlan, settings: Any) -> None:
    """Let a JPEG file decode itself at an eighth, quarter or half, never below a size at which it will be drawn."""
    if plan.square is not None or plan.global_square is not None:
        return  # drawn at its own size
    sizes = [plan.global_size, plan.resized]
    sizes += [plan.whole(tower["size"])[0] for tower in (settings.extra_towers or {}).values()]
    largest = tuple(max(1, *(size[axis] for size in sizes)) for axis in (0, 1))
    image.draft(None, largest if orientation(image) in TURNED else largest[::-1])

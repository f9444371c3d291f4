"""What the image processor must make of any input: the right views, or an error that names the image."""

import functools
import io
import re
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from fuzz.harness import Fault, Place, Subject, expect_clear
from hires_lmm.processing.image_processing_hires_lmm import HiResLmmImageProcessor


PIXEL_LIMIT = 4_000_000
SIMPLE_MODES = ("RGB", "L", "1", "CMYK", "YCbCr")
FILES = (bytes, bytearray, memoryview)


@functools.cache
def processor(planner: str) -> HiResLmmImageProcessor:
    """Views of 28 pixels, few crops."""
    return HiResLmmImageProcessor(planner=planner, view_size=28, patch_size=14, max_crops=4, pixel_limit=PIXEL_LIMIT)


def process(planner: str, image: Any, limits: str = "") -> dict[str, np.ndarray]:
    """The four arrays of an image."""
    options = {"pixel_limit": 178_956_970} if limits == "default" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on damaged files; errors are not silenced by this
        return dict(processor(planner)(image, **options))


def check_image(subject: Subject, place: Place) -> str:
    """An input through one planner."""
    planner = subject.notes["planner"]
    images = [subject.value] if not isinstance(subject.value, list) else subject.value
    frame = subject.value.tell() if "frame" in subject.notes else None
    try:
        found = process(planner, images, subject.notes.get("limits", ""))
    except Exception as error:
        text = expect_clear(error)
        if not re.search(r"Image \d", text) and "images is nested" not in text and "list is empty" not in text:
            raise Fault(f"the error does not name the image: {text[:300]}") from error
        if subject.expected is not None and "damaged" not in subject.kind and "chunks" not in subject.kind:
            raise Fault(f"a sound image is refused: {text[:300]}") from error
        return "error"
    if subject.refused:
        raise Fault(f"taken for an image: {subject.value!r}"[:300])
    if frame is not None and subject.value.tell() != frame:
        raise Fault("the user's image was moved to another frame")
    check_views(found)
    expected = reference(subject)
    if expected is not None:
        compare(found, process(planner, [Image.fromarray(expected)]))
    return "result"


def check_views(found: dict[str, np.ndarray]) -> None:
    """For each image one global view, then crops in raster order; finite pixels; as many tokens on every row."""
    pixels, positions = found["pixel_values"], found["view_positions"]
    if pixels.shape != (len(positions), 3, 28, 28) or pixels.dtype != np.float32 or not np.isfinite(pixels).all():
        raise Fault(f"pixel_values {pixels.shape} {pixels.dtype}, finite: {np.isfinite(pixels).all()}")
    for own in np.split(positions, np.flatnonzero(positions[:, 0] == 0)[1:]):
        rows, cols = own[0, 1:3]
        wanted = [[0, 0, 0]] + [[1, row, col] for row in range(rows) for col in range(cols)]
        if own[:, [0, 3, 4]].tolist() != wanted or len(np.unique(own[:, 5])) != 1 or own[0, 5] < 1:
            raise Fault(f"view_positions {own.tolist()}")


def reference(subject: Subject) -> np.ndarray | None:
    """The picture that must come out: said by the generator, or what Pillow alone makes of a plain file."""
    if subject.expected is not None:
        return subject.expected
    if not isinstance(subject.value, FILES) or subject.notes.get("limits"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(bytes(subject.value)))
            image.load()
            upright = ImageOps.exif_transpose(image)
        except Exception:  # noise in EXIF can be too much for Pillow's own function
            return None
    plain = upright.mode in SIMPLE_MODES and not upright.has_transparency_data
    return np.asarray(upright.convert("RGB")) if plain else None


def compare(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Every array equal."""
    for name, value in wanted.items():
        if found[name].shape != value.shape or not np.array_equal(found[name], value):
            raise Fault(f"{name} is not what the picture gives")

"""What needle scenes are made of: handwritten digits, words and numbers in several fonts, shapes and small charts.

A sprite is its coverage `(height, width)`, float32 in [0, 1]; the scene paints it in a colour.
"""

import random
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont


DIGITS = tuple(str(value) for value in range(10))
NUMBERS = tuple(str(value) for value in range(10, 100))
WORDS = ("bus", "cat", "cup", "dog", "hat", "ice", "jam", "key", "map", "owl", "pen", "sun")
SHAPES = ("circle", "cross", "diamond", "ring", "square", "triangle")
BARS = ("left", "middle", "right")
VALUES_BY_KIND: dict[str, tuple[str, ...]] = {
    "digit": DIGITS,
    "number": NUMBERS,
    "word": WORDS,
    "shape": SHAPES,
    "chart": BARS,
}
"""What an object of each kind can show: a chart of three bars "shows" the place of its tallest bar."""

KINDS = tuple(VALUES_BY_KIND)
VALUES = tuple(value for values in VALUES_BY_KIND.values() for value in values)

FONT_FILES = {
    "dejavu-sans": "DejaVuSans.ttf",
    "dejavu-bold": "DejaVuSans-Bold.ttf",
    "dejavu-serif": "DejaVuSerif.ttf",
    "dejavu-mono": "DejaVuSansMono-Bold.ttf",
}
"""Font name -> file in matplotlib's package; Pillow's own font is called `pillow`."""

FONTS = ("pillow", *FONT_FILES)
OVERSAMPLING = 4
WIDEST_TEXT = 2.0
"""Text is condensed to at most this many times its height."""

SPLITS = ("train", "validation", "test")
DIGIT_SHARES = {"train": (0, 1300), "validation": (1300, 1500), "test": (1500, 1797)}
"""Rows of the shuffled digit images that belong to each split."""


@lru_cache(maxsize=1)
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = list(range(len(data.target)))
    random.Random("needle digits").shuffle(order)
    return np.asarray(data.images[order] * (255 / 16), dtype=np.uint8), data.target[order]


@lru_cache(maxsize=3)
def digit_rows(split: str) -> dict[str, tuple[int, ...]]:
    """The digit images of one split; no image is in two splits.

    Args:
        split (`str`): `train`, `validation` or `test`.

    Returns:
        Value -> rows that `handwritten_digit` takes.

    Raises:
        ValueError: If the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
    first, last = DIGIT_SHARES[split]
    targets = _all_digits()[1]
    return {value: tuple(row for row in range(first, last) if str(targets[row]) == value) for value in DIGITS}


def handwritten_digit(row: int, height: int, turn: float = 0.0, stretch: float = 1.0) -> np.ndarray:
    """A digit of scikit-learn's handwritten digits (8 x 8), enlarged.

    Args:
        row (`int`): Row in the shuffled data set, from `digit_rows`.
        height (`int`): Height of the sprite, pixels.
        turn (`float`): Rotation, radians.
        stretch (`float`): Width over height.

    Returns:
        `np.ndarray` (height, width): Coverage.
    """
    width = max(1, round(height * stretch))
    cos, sin = np.cos(turn) * 8, np.sin(turn) * 8
    a, b, d, e = cos / width, sin / height, -sin / width, cos / height
    coefficients = (a, b, 4 - (a * width + b * height) / 2, d, e, 4 - (d * width + e * height) / 2)
    image = Image.fromarray(_all_digits()[0][row])
    image = image.transform((width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(image, dtype=np.float32) * (1.3 / 255), 0.0, 1.0)


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if name == "pillow":
        return ImageFont.load_default(size)
    if name not in FONT_FILES:
        raise ValueError(f"Unknown font {name!r}: fonts are {', '.join(FONTS)}.")
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FONT_FILES[name]
    return ImageFont.truetype(BytesIO(file.read_bytes()), size)


@lru_cache(maxsize=8192)
def rendered_text(text: str, height: int, font: str = "pillow") -> np.ndarray:
    """A word or number whose ink is exactly `height` pixels high.

    Args:
        text (`str`): The text; written as it is.
        height (`int`): Height of the ink, pixels.
        font (`str`): A name in `FONTS`.

    Returns:
        `np.ndarray` (height, width): Coverage; wide text is condensed.

    Raises:
        ValueError: If the font is unknown.
    """
    face = _font(font, OVERSAMPLING * height)
    left, top, right, bottom = (round(edge) for edge in face.getbbox(text))
    canvas = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(canvas).text((2 - left, 2 - top), text, fill=255, font=face)
    canvas = canvas.crop(canvas.getbbox())
    width = max(1, round(min(canvas.width * height / canvas.height, WIDEST_TEXT * height)))
    return _coverage(canvas.resize((width, height), Image.Resampling.BOX))


@lru_cache(maxsize=1024)
def drawn_shape(name: str, height: int) -> np.ndarray:
    """A filled geometric shape.

    Args:
        name (`str`): A name in `SHAPES`.
        height (`int`): Height and width, pixels.

    Returns:
        `np.ndarray` (height, height): Coverage.

    Raises:
        ValueError: If the shape is unknown.
    """
    if name not in SHAPES:
        raise ValueError(f"Unknown shape {name!r}: shapes are {', '.join(SHAPES)}.")
    side = 8 * height
    half, third = side // 2, side // 3
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    if name in ("circle", "ring"):
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
    if name == "ring":
        draw.ellipse((side // 4, side // 4, side - side // 4, side - side // 4), fill=0)
    if name == "square":
        draw.rectangle((0, 0, side, side), fill=255)
    if name == "triangle":
        draw.polygon(((half, 0), (side, side), (0, side)), fill=255)
    if name == "diamond":
        draw.polygon(((half, 0), (side, half), (half, side), (0, half)), fill=255)
    if name == "cross":
        draw.rectangle((third, 0, 2 * third, side), fill=255)
        draw.rectangle((0, third, side, 2 * third), fill=255)
    return _coverage(canvas.resize((height, height), Image.Resampling.BOX))


def bar_chart(tallest: str, height: int, look: int) -> np.ndarray:
    """Three bars on a base line.

    Args:
        tallest (`str`): `left`, `middle` or `right`.
        height (`int`): Height and width, pixels.
        look (`int`): Any number; it chooses the heights of the two other bars.

    Returns:
        `np.ndarray` (height, height): Coverage.
    """
    shares = [0.3 + 0.05 * (look % 7), 0.3 + 0.05 * (look // 7 % 7)]
    shares.insert(BARS.index(tallest), 1.0)
    coverage = np.zeros((height, height), dtype=np.float32)
    for index, share in enumerate(shares):
        first = round(index * height / 3)
        last = max(first + 1, round((index + 1) * height / 3) - max(1, height // 12))
        coverage[height - round(share * height) :, first:last] = 1.0
    coverage[height - max(1, height // 12) :] = 1.0
    return coverage


def _coverage(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / 255

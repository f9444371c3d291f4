"""Answers of cognition alignment as text: written for training, read and scored for evaluation.

Both formats have one line for each row of a grid. Indices are separated by spaces; the three numbers of a colour by
commas, colours by spaces. The readers accept any white space instead, and nothing else: a wrong number of values, a
value out of range or any other character gives None, which stands for "no answer". Wrong arguments raise.
"""

import re
from collections.abc import Sequence

import numpy as np


COLOURS = 256
"""Values of a channel."""

_INDEX = re.compile(r"[0-9]+")
# a colour starts after white space, so that a long run of digits is read once, not from each digit
_COLOUR = re.compile(r"(?<!\S)([0-9]+)\s*,\s*([0-9]+)\s*,\s*([0-9]+)(?=\s|$)")


def check_grid(grid: Sequence[int], name: str = "grid") -> tuple[int, int]:
    """Check a number of rows and columns.

    Args:
        grid (sequence of two `int`): Rows, columns.
        name (`str`): Its name in errors.

    Raises:
        ValueError: If it is anything else than two whole numbers of at least 1.
    """
    values = tuple(grid) if isinstance(grid, (tuple, list)) else ()
    whole = all(isinstance(value, int | np.integer) and not isinstance(value, bool) for value in values)
    if len(values) != 2 or not whole or min(values) < 1:
        raise ValueError(f"{name}={grid!r} must be two whole numbers of at least 1: rows, columns; such as (4, 4).")
    return int(values[0]), int(values[1])


def write_codes(codes: np.ndarray) -> str:
    """Codebook indices as text.

    Args:
        codes (`np.ndarray` of shape `(rows, cols)`): Indices.

    Returns:
        One line a row, indices separated by spaces.

    Raises:
        ValueError: If they are no grid of whole numbers from 0.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or not codes.size or codes.dtype.kind not in "iu" or codes.min() < 0:
        raise ValueError(f"Codes of shape {codes.shape} and type {codes.dtype} must be a grid of indices from 0.")
    return "\n".join(" ".join(str(code) for code in row) for row in codes.tolist())


def read_codes(text: str, grid: Sequence[int], num_codes: int) -> np.ndarray | None:
    """Read what `write_codes` wrote.

    Args:
        text (`str`): An answer.
        grid (`tuple[int, int]`): Rows and columns that were asked for.
        num_codes (`int`): Size of the codebook.

    Returns:
        `np.ndarray` (rows, cols) int64, or None where the text is not exactly so many indices below `num_codes`.

    Raises:
        ValueError: If grid or size of the codebook are senseless.
    """
    rows, cols = check_grid(grid)
    if isinstance(num_codes, bool) or not isinstance(num_codes, int | np.integer) or num_codes < 1:
        raise ValueError(f"num_codes={num_codes!r} must be a whole number of at least 1: the size of the codebook.")
    words = text.split()
    if len(words) != rows * cols or not all(_INDEX.fullmatch(word) for word in words):
        return None
    return _grid_of([word.lstrip("0") or "0" for word in words], int(num_codes), (rows, cols))


def write_pixels(pixels: np.ndarray) -> str:
    """Colours as text.

    Args:
        pixels (`np.ndarray` of shape `(rows, cols, 3)`): uint8, RGB.

    Returns:
        One line a row, `red,green,blue` separated by spaces.

    Raises:
        ValueError: If they are no grid of RGB values from 0 to 255.
    """
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size or pixels.dtype != np.uint8:
        raise ValueError(
            f"Pixels of shape {pixels.shape} and type {pixels.dtype} must be (rows, columns, 3) of uint8."
        )
    return "\n".join(" ".join(",".join(map(str, pixel)) for pixel in row) for row in pixels.tolist())


def read_pixels(text: str, grid: Sequence[int]) -> np.ndarray | None:
    """Read what `write_pixels` wrote.

    Args:
        text (`str`): An answer.
        grid (`tuple[int, int]`): Rows and columns that were asked for.

    Returns:
        `np.ndarray` (rows, cols, 3) int64, or None where the text is not exactly so many colours from 0 to 255.

    Raises:
        ValueError: If the grid is senseless.
    """
    rows, cols = check_grid(grid)
    if _COLOUR.sub("", text).strip():
        return None
    numbers = [number.lstrip("0") or "0" for colour in _COLOUR.findall(text) for number in colour]
    return None if len(numbers) != rows * cols * 3 else _grid_of(numbers, COLOURS, (rows, cols, 3))


def _grid_of(numbers: list[str], limit: int, shape: tuple[int, ...]) -> np.ndarray | None:
    """Numbers without leading zeros as an array, or None where one reaches the limit; a model may write any length."""
    digits = len(str(limit))
    if any(len(number) > digits or int(number) >= limit for number in numbers):
        return None
    return np.array([int(number) for number in numbers], dtype=np.int64).reshape(shape)


def code_accuracy(codes: np.ndarray | None, target: np.ndarray) -> float:
    """Share of cells with the right index.

    Args:
        codes (`np.ndarray` of shape `(rows, cols)`, *optional*): What was read; None scores 0.
        target (`np.ndarray` of shape `(rows, cols)`): What is right.

    Raises:
        ValueError: If the shapes differ.
    """
    return 0.0 if codes is None else float((_same_shape(codes, target) == target).mean())


def pixel_error(pixels: np.ndarray | None, target: np.ndarray) -> float | None:
    """Mean absolute difference of all channels.

    Args:
        pixels (`np.ndarray` of shape `(rows, cols, 3)`, *optional*): What was read.
        target (`np.ndarray` of shape `(rows, cols, 3)`): What is right, 0 to 255.

    Returns:
        0 to 255, or None where nothing was read: there is no error of an answer that is none.

    Raises:
        ValueError: If the shapes differ.
    """
    if pixels is None:
        return None
    return float(np.abs(_same_shape(pixels, target).astype(np.float64) - target).mean())


def _same_shape(values: np.ndarray, target: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != target.shape:
        raise ValueError(f"An answer of shape {values.shape} cannot be compared with a target of {target.shape}.")
    return values

"""Answers of cognition alignment as text: written for training, read and scored for evaluation.

Both formats have one line for each row of a grid. Indices are separated by spaces; the three numbers of a colour by
commas, colours by spaces. The readers accept any white space instead, and nothing else: a wrong number of values, a
value out of range or any other character gives None, which stands for "no answer".
"""

import re
from collections.abc import Sequence

import numpy as np


_INDEX = re.compile(r"[0-9]{1,9}")
# a colour starts after white space, so that a long run of digits is read once, not from each digit
_COLOUR = re.compile(r"(?<!\S)([0-9]{1,9})\s*,\s*([0-9]{1,9})\s*,\s*([0-9]{1,9})(?=\s|$)")


def check_grid(grid: Sequence[int], name: str = "grid") -> tuple[int, int]:
    """Rows and columns as a tuple, both whole numbers of at least 1; `name` is named in errors."""
    values = tuple(grid) if isinstance(grid, (tuple, list)) else ()
    if len(values) != 2 or not all(isinstance(value, int | np.integer) and value >= 1 for value in values):
        raise ValueError(f"{name}={grid!r} must be two whole numbers of at least 1: rows, columns; such as (4, 4).")
    return int(values[0]), int(values[1])


def write_codes(codes: np.ndarray) -> str:
    """Codebook indices `(rows, cols)` as text, one line a row, separated by spaces."""
    return "\n".join(" ".join(str(code) for code in row) for row in codes.tolist())


def read_codes(text: str, grid: tuple[int, int], num_codes: int) -> np.ndarray | None:
    """Read what `write_codes` wrote.

    Args:
        text (`str`): An answer.
        grid (`tuple[int, int]`): Rows and columns that were asked for.
        num_codes (`int`): Size of the codebook.

    Returns:
        `np.ndarray` (rows, cols) int64, or None where the text is not exactly so many indices below `num_codes`.
    """
    words = text.split()
    if not all(_INDEX.fullmatch(word) for word in words):
        return None
    return _as_grid(words, num_codes, grid)


def write_pixels(pixels: np.ndarray) -> str:
    """Colours `(rows, cols, 3)` as text, one line a row, `red,green,blue` separated by spaces."""
    return "\n".join(" ".join(",".join(map(str, pixel)) for pixel in row) for row in pixels.tolist())


def read_pixels(text: str, grid: tuple[int, int]) -> np.ndarray | None:
    """Read what `write_pixels` wrote.

    Args:
        text (`str`): An answer.
        grid (`tuple[int, int]`): Rows and columns that were asked for.

    Returns:
        `np.ndarray` (rows, cols, 3) int64, or None where the text is not exactly so many colours from 0 to 255.
    """
    if _COLOUR.sub("", text).strip():
        return None
    return _as_grid([number for colour in _COLOUR.findall(text) for number in colour], 256, (*grid, 3))


def _as_grid(numbers: list[str], limit: int, shape: tuple[int, ...]) -> np.ndarray | None:
    """Numbers below the limit as an array of that shape, or None where they are none."""
    values = np.array(numbers, dtype=np.int64)
    return values.reshape(shape) if values.size == np.prod(shape) and values.max() < limit else None


def code_accuracy(codes: np.ndarray | None, target: np.ndarray) -> float:
    """Share of cells `(rows, cols)` with the right index; 0 where nothing was read."""
    return 0.0 if codes is None else float((codes == target).mean())


def pixel_error(pixels: np.ndarray | None, target: np.ndarray) -> float | None:
    """Mean absolute difference of all channels of `(rows, cols, 3)`, 0 to 255; None where nothing was read."""
    return None if pixels is None else float(np.abs(pixels.astype(np.float64) - target).mean())

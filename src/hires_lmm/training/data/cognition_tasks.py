"""The two tasks of cognition alignment, codebook indices of cells and colours of a quarter of the image: how they are
worded, and their answers as text, written for training, read and scored for evaluation.

Answers have one line for each row of a grid. Indices are separated by spaces; the three numbers of a colour by commas,
colours by spaces. The readers accept any white space instead, and nothing else: a wrong number of values, a value out
of range or any other character gives None, which stands for "no answer".
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image

from .cognition_codes import Quantiser, check_codes
from .conversations import IMAGE_MARK


PIXEL_FIELDS = ("image", "left", "right", "top", "bottom", "rows", "cols")
CODE_FIELDS = (
    *("image", "num_codes", "last_code", "grid_rows", "grid_cols"),
    *("first_row", "last_row", "first_col", "last_col", "rows", "cols"),
)

PIXEL_TEMPLATES = (
    "Look at the part of {image} between {left}% and {right}% of its width and between {top}% and {bottom}% of its "
    "height. Shrink it to {rows} rows of {cols} pixels and write their colours as red,green,blue from 0 to 255, one "
    "row a line.",
    "Cut a window out of {image}: columns from {left}% to {right}%, rows from {top}% to {bottom}%. Scaled down to "
    "{rows} x {cols} pixels, which red,green,blue values (0 to 255) does it have? Give one line for each row.",
    "Which colours remain when the window of {image} that spans {left}% to {right}% from the left and {top}% to "
    "{bottom}% from the top is averaged to a grid of {rows} rows and {cols} columns? Answer line by line with "
    "red,green,blue triples between 0 and 255.",
    "The corner at {left}% of the width and {top}% of the height opens a quarter of {image}; its other corner lies at "
    "{right}% and {bottom}%. State the mean red,green,blue of each cell when it is divided into {rows} rows and "
    "{cols} columns, one line per row, numbers from 0 to 255.",
    "I reduce a region of {image} to {rows} lines of {cols} pixels. The region starts {top}% down and {left}% across "
    "and ends {bottom}% down and {right}% across. List the pixels as red,green,blue with values up to 255, a line for "
    "each row.",
    "Report pixel values: {image}, from {top}% to {bottom}% vertically, from {left}% to {right}% horizontally, "
    "averaged to {rows} by {cols}. Format: red,green,blue (0-255), rows on separate lines.",
)
"""Wordings of questions for colours, our own; the paper prints none."""

CODE_TEMPLATES = (
    "A codebook of {num_codes} entries describes {image} as a grid of {grid_rows} rows and {grid_cols} columns. Which "
    "entries, numbered from 0, stand in rows {first_row} to {last_row} and columns {first_col} to {last_col}? Write "
    "one row a line.",
    "Encode {image} as {grid_rows} x {grid_cols} codes between 0 and {last_code}. Write the codes of rows {first_row} "
    "to {last_row}, columns {first_col} to {last_col}, one line for each row.",
    "Divide {image} into {grid_rows} rows and {grid_cols} columns of cells. Name the codebook index (0 to "
    "{last_code}) of each of the {rows} x {cols} cells whose first one is in row {first_row}, column {first_col}; "
    "separate rows by line breaks.",
    "For {image}, which of the {num_codes} code vectors comes nearest to each cell? Give the numbers, from 0, of rows "
    "{first_row}-{last_row} and columns {first_col}-{last_col} in the {grid_rows} x {grid_cols} grid, row by row.",
    "Read off the discrete code of {image}: grid {grid_rows} x {grid_cols}, values 0 to {last_code}. I need {rows} "
    "rows of {cols} values, starting at row {first_row} and column {first_col}.",
    "List codebook indices. Picture: {image}. Grid: {grid_rows} rows, {grid_cols} columns. Wanted: rows {first_row} "
    "to {last_row}, columns {first_col} to {last_col}. Indices run from 0 to {last_code}; one line per row.",
)
"""Wordings of questions for codebook indices, our own; rows and columns count from 1, indices from 0."""


def check_templates(templates: Iterable[str], fields: Sequence[str]) -> tuple[str, ...]:
    """Wordings as a tuple; each can be filled from the fields and holds no mark of an image."""
    if isinstance(templates, str) or not (checked := tuple(templates)):
        raise ValueError(f"templates={templates!r} must be a list of texts; leave it out for those of the package.")
    for template in checked:
        if IMAGE_MARK in template:
            raise ValueError(f"The template {template!r} holds {IMAGE_MARK}; write {{image}} there.")
        try:
            template.format(**dict.fromkeys(fields, 0))
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"The template {template!r} cannot be filled ({error}); its fields are {', '.join(fields)}."
            ) from error
    return checked


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
    """Read what `write_codes` wrote."""
    words = text.split()
    if not all(_INDEX.fullmatch(word) for word in words):
        return None
    return _as_grid(words, num_codes, grid)


def write_pixels(pixels: np.ndarray) -> str:
    """Colours `(rows, cols, 3)` as text, one line a row, `red,green,blue` separated by spaces."""
    return "\n".join(" ".join(",".join(map(str, pixel)) for pixel in row) for row in pixels.tolist())


def read_pixels(text: str, grid: tuple[int, int]) -> np.ndarray | None:
    """Read what `write_pixels` wrote."""
    if _COLOUR.sub("", text).strip():
        return None
    return _as_grid([number for colour in _COLOUR.findall(text) for number in colour], 256, (*grid, 3))


def _as_grid(numbers: list[str], limit: int, shape: tuple[int, ...]) -> np.ndarray | None:
    """Numbers below the limit as an array of that shape, or None where they are none."""
    values = np.array(numbers, dtype=np.int64)
    return values.reshape(shape) if values.size == np.prod(shape) and values.max() < limit else None


IMAGE_NAME = "the image"
HALF = 50
"""Sides of the region in per cent: half of each side is a quarter of the area."""


@dataclass(frozen=True)
class CognitionQuery:
    """One question with its answer."""

    task: str
    prompt: str
    answer: str
    target: np.ndarray


class PixelTask:
    """Asks for the colours of a quarter of the image, averaged to a small grid.

    The region has half the width and half the height; its corner lies anywhere that leaves it inside, in whole per
    cent, and is stated in the question. Cells are means of the pixels under them.

    Args:
        grid (`tuple[int, int]`): Rows and columns of colours.
        templates (iterable of `str`, *optional*): Wordings with the fields of `PIXEL_FIELDS`.

    Source: VLSA, OpenReview RLhEGWt94S, section on cognition alignment. The paper gives neither the grid nor the
    wording; the grid and per cent are ours.
    """

    name = "pixels"

    def __init__(self, grid: Sequence[int] = (4, 4), templates: Iterable[str] = PIXEL_TEMPLATES):
        self.grid = check_grid(grid)
        self.templates = check_templates(templates, PIXEL_FIELDS)

    def ask(self, image: Image.Image, rng: Random, image_name: str = IMAGE_NAME) -> CognitionQuery:
        """A question about a random region of an upright RGB image; its target is `(rows, cols, 3)` uint8."""
        left, top = rng.randint(0, 100 - HALF), rng.randint(0, 100 - HALF)
        target = region_colours(image, left, top, self.grid)
        prompt = rng.choice(self.templates).format(
            image=image_name,
            left=left,
            right=left + HALF,
            top=top,
            bottom=top + HALF,
            rows=self.grid[0],
            cols=self.grid[1],
        )
        return CognitionQuery(self.name, prompt, write_pixels(target), target)

    def read(self, text: str) -> np.ndarray | None:
        """The colours `(rows, cols, 3)` of an answer, or None where it is not exactly that."""
        return read_pixels(text, self.grid)

    def score(self, texts: Sequence[str], queries: Sequence[CognitionQuery]) -> dict[str, float]:
        """Of answers of a model: `parsed`, the share that are so many colours, and the mean `error` of a channel of
        those, 0 to 255; NaN where there is none."""
        pairs = [(self.read(text), query.target) for text, query in zip(texts, queries, strict=True)]
        errors = [np.abs(pixels.astype(np.float64) - target).mean() for pixels, target in pairs if pixels is not None]
        return {"parsed": _mean([pixels is not None for pixels, _ in pairs]), "error": _mean(errors)}


class CodebookTask:
    """Asks for the codebook indices of a block of cells.

    Args:
        quantiser (`Quantiser`): A `VqQuantiser`, `CachedCodes`, or any object with `num_codes`, `grid` and a call.
        block (`tuple[int, int]`, *optional*): Rows and columns of the block, anywhere in the grid; None asks for the
            whole grid.
        templates (iterable of `str`, *optional*): Wordings with the fields of `CODE_FIELDS`.

    Source: VLSA, OpenReview RLhEGWt94S, section on cognition alignment. The paper does not say how many indices it
    asks for; the block is ours.
    """

    name = "codebook"

    def __init__(
        self,
        quantiser: Quantiser,
        block: Sequence[int] | None = (4, 4),
        templates: Iterable[str] = CODE_TEMPLATES,
    ):
        if not (hasattr(quantiser, "num_codes") and hasattr(quantiser, "grid")):
            raise ValueError(
                f"{type(quantiser).__name__} is no quantiser; wrap a VQModel in VqQuantiser, or give your object "
                "num_codes, grid and a call."
            )
        self.quantiser = quantiser
        self.grid = check_grid(quantiser.grid, "quantiser.grid")
        self.block = self.grid if block is None else check_grid(block, "block")
        if self.block[0] > self.grid[0] or self.block[1] > self.grid[1]:
            raise ValueError(
                f"block={block!r} does not fit into the {self.grid[0]} x {self.grid[1]} grid of the quantiser; "
                "choose a smaller one, or None for all cells."
            )
        self.templates = check_templates(templates, CODE_FIELDS)

    def ask(self, image: Image.Image, rng: Random, image_name: str = IMAGE_NAME) -> CognitionQuery:
        """A question about a random block of cells of an upright RGB image; its target is `(rows, cols)` int64."""
        rows, cols = self.block
        row, col = rng.randint(0, self.grid[0] - rows), rng.randint(0, self.grid[1] - cols)
        codes = check_codes(self.quantiser([image]), self.quantiser, 1)[0]
        target = codes[row : row + rows, col : col + cols]
        prompt = rng.choice(self.templates).format(
            image=image_name,
            num_codes=self.quantiser.num_codes,
            last_code=self.quantiser.num_codes - 1,
            grid_rows=self.grid[0],
            grid_cols=self.grid[1],
            first_row=row + 1,
            last_row=row + rows,
            first_col=col + 1,
            last_col=col + cols,
            rows=rows,
            cols=cols,
        )
        return CognitionQuery(self.name, prompt, write_codes(target), target)

    def read(self, text: str) -> np.ndarray | None:
        """The indices `(rows, cols)` of an answer, or None where it is not exactly that."""
        return read_codes(text, self.block, self.quantiser.num_codes)

    def score(self, texts: Sequence[str], queries: Sequence[CognitionQuery]) -> dict[str, float]:
        """Of answers of a model: `parsed`, the share that are so many indices, and `accuracy`, that of right cells."""
        pairs = [(self.read(text), query.target) for text, query in zip(texts, queries, strict=True)]
        right = [0.0 if codes is None else (codes == target).mean() for codes, target in pairs]
        return {"parsed": _mean([codes is not None for codes, _ in pairs]), "accuracy": _mean(right)}


def region_colours(image: Image.Image, left: int, top: int, grid: tuple[int, int]) -> np.ndarray:
    """Mean colours `(rows, cols, 3)` uint8 of the cells of a quarter of an RGB image; `left` and `top` in per cent."""
    width, height = image.size
    box = (left * width / 100, top * height / 100, (left + HALF) * width / 100, (top + HALF) * height / 100)
    return np.asarray(image.resize((grid[1], grid[0]), Image.Resampling.BOX, box=box))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")

"""The two tasks of cognition alignment: codebook indices of cells, and colours of a quarter of the image."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image

from .cognition_answers import (
    check_grid,
    code_accuracy,
    pixel_error,
    read_codes,
    read_pixels,
    write_codes,
    write_pixels,
)
from .cognition_codes import Quantiser, check_codes
from .cognition_templates import CODE_FIELDS, CODE_TEMPLATES, PIXEL_FIELDS, PIXEL_TEMPLATES, check_templates


IMAGE_NAME = "the image"
HALF = 50
"""Sides of the region in per cent: half of each side is a quarter of the area."""


@dataclass(frozen=True)
class CognitionQuery:
    """One question with its answer.

    Args:
        task (`str`): Name of the task.
        prompt (`str`): The question.
        answer (`str`): The right answer.
        target (`np.ndarray`): What the answer says: indices `(rows, cols)` or colours `(rows, cols, 3)`.
    """

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

    Raises:
        ValueError: If grid or templates are senseless.

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
        """Score the answers of a model to queries.

        Returns:
            `parsed`, the share of answers that are so many colours, and `error`, the mean absolute difference of a
            channel (0 to 255) over those; NaN where there is none.
        """
        errors = [pixel_error(self.read(text), query.target) for text, query in zip(texts, queries, strict=True)]
        found = [error for error in errors if error is not None]
        return {"parsed": _mean([e is not None for e in errors]), "error": _mean(found)}


class CodebookTask:
    """Asks for the codebook indices of a block of cells.

    Args:
        quantiser (`Quantiser`): A `VqQuantiser`, `CachedCodes`, or any object with `num_codes`, `grid` and a call.
        block (`tuple[int, int]`, *optional*): Rows and columns of the block, anywhere in the grid; None asks for the
            whole grid.
        templates (iterable of `str`, *optional*): Wordings with the fields of `CODE_FIELDS`.

    Raises:
        ValueError: If the block does not fit into the grid, or a value is senseless.

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
        """Score the answers of a model to queries.

        Returns:
            `parsed`, the share of answers that are so many indices, and `accuracy`, the share of right cells, in
            which an answer that is none has none right.
        """
        read = [self.read(text) for text in texts]
        right = [code_accuracy(codes, query.target) for codes, query in zip(read, queries, strict=True)]
        return {"parsed": _mean([codes is not None for codes in read]), "accuracy": _mean(right)}


def region_colours(image: Image.Image, left: int, top: int, grid: tuple[int, int]) -> np.ndarray:
    """Mean colours `(rows, cols, 3)` uint8 of the cells of a quarter of an RGB image; `left` and `top` in per cent."""
    width, height = image.size
    box = (left * width / 100, top * height / 100, (left + HALF) * width / 100, (top + HALF) * height / 100)
    return np.asarray(image.resize((grid[1], grid[0]), Image.Resampling.BOX, box=box))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")

"""The order in which the tokens of all views of an image enter the sequence, and the marks between them."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init

from .views_hires_lmm import (
    KIND_CROP,
    KIND_GLOBAL,
    KIND_MARK,
    ImageGeometry,
    TokenPlan,
    ViewFeatures,
    VisualTokens,
    find_groups,
    index_tensor,
    span_to_cells,
)


MARKS = ("between_views", "row_end", "view_end")
LEARNED = "learned"


@strict
@dataclass(unsafe_hash=True)
class LayoutOptions:
    """Order of views and marks.

    A block is the global view, the stitched map of all crops (`crop_order="raster"`) or one crop (`"views"`). A mark
    is `None` (absent), `"learned"` (a trained vector) or the id of a token whose embedding is used.

    Args:
        global_position (`str`): `"first"` or `"last"`.
        crop_order (`str`): `"raster"` reads the stitched map of all crops row by row; `"views"` one crop after
            another.
        between_views (`str` or `int`, *optional*): Mark between two blocks.
        row_end (`str` or `int`, *optional*): Mark after each row of tokens of a crop block.
        view_end (`str` or `int`, *optional*): Mark after each block.
    """

    global_position: Literal["first", "last"] = "first"
    crop_order: Literal["raster", "views"] = "raster"
    between_views: str | int | None = None
    row_end: str | int | None = None
    view_end: str | int | None = None

    def __post_init__(self) -> None:
        for name in MARKS:
            mark = getattr(self, name)
            if isinstance(mark, str) and mark != LEARNED:
                raise ValueError(f'layout.{name} is {mark!r}; use null, "learned" or a token id (an integer).')

    def active_marks(self) -> dict:
        """The marks in use, by name."""
        return {name: getattr(self, name) for name in MARKS if getattr(self, name) is not None}


@dataclass(frozen=True)
class ImageLayout:
    """Sequence of one image as index arrays of length n (see `image_layout`)."""

    source: np.ndarray
    view: np.ndarray
    cell: np.ndarray
    kind: np.ndarray


def _block(cells: tuple, kind: int) -> np.ndarray:
    """Tokens of one block (view, row, col arrays) in row-major order as columns view, row, col, kind."""
    view, rows, cols = cells
    return np.stack([view.ravel(), rows.ravel(), cols.ravel(), np.full(view.size, kind)], axis=1)


def _mark(name: str) -> np.ndarray:
    """A mark as a row of the same columns; its row field carries the number of the mark."""
    return np.array([[-1, MARKS.index(name), 0, KIND_MARK]])


def _view_cells(view: int, cells: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """View number, cell row and cell column of the cells of one view inside a span, as 2-d arrays."""
    rows, cols = np.meshgrid(np.arange(cells[0], cells[1]), np.arange(cells[2], cells[3]), indexing="ij")
    return np.full(rows.shape, view), rows, cols


def _stitch(image: ImageGeometry, cells: dict) -> tuple:
    """Cells of all crops side by side as one map (view, row, col arrays)."""
    bands = []
    for grid_row in range(image.crop_grid[0]):
        views = [v for v in cells if image.cells[v][0] == grid_row]
        views.sort(key=lambda v: image.cells[v][1])
        parts = [_view_cells(v, cells[v]) for v in views]
        if len({cells[v][:2] for v in views}) > 1:
            spans = [image.spans[v] for v in views]
            raise ValueError(f"Crops of one grid row differ in the rows that enter the sequence, view_spans {spans}.")
        if parts:
            bands.append([np.concatenate(part, axis=1) for part in zip(*parts, strict=True)])
    return tuple(np.concatenate(part, axis=0) for part in zip(*bands, strict=True))


def _with_row_ends(block: tuple, kind: int, row_end: bool) -> np.ndarray:
    """One block as rows, with a mark after each row where asked for."""
    if not row_end:
        return _block(block, kind)
    pieces = []
    for row in range(len(block[0])):
        pieces += [_block(tuple(part[row] for part in block), kind), _mark("row_end")]
    return np.concatenate(pieces)


@lru_cache(maxsize=1024)
def image_layout(
    image: ImageGeometry,
    options: LayoutOptions,
    patch_grid: tuple[int, int],
    global_grid: tuple[int, int],
    crop_grid: tuple[int, int],
) -> ImageLayout:
    """Order the tokens of one image.

    Args:
        image (`ImageGeometry`): Views of the image; `first_view` and `num_tokens` are not used.
        options (`LayoutOptions`): Order and marks.
        patch_grid (`tuple[int, int]`): Patch rows and columns of a view, the unit of the spans.
        global_grid (`tuple[int, int]`): Token rows and columns of the global view.
        crop_grid (`tuple[int, int]`): Token rows and columns of a crop; `(0, 0)` = crops give no tokens.

    Returns:
        `source` (index into the tokens of the image, view after view; -1 - number of the mark for marks), `view`
        (number of the view in the image; -1 for marks), `cell` (row, column) and `kind`, each of length n.

    Raises:
        ValueError: If crops to be stitched disagree on the rows that enter the sequence.
    """
    marks = options.active_marks()
    grids = [global_grid if kind == KIND_GLOBAL else crop_grid for kind in image.kinds]
    cells = {v: span_to_cells(image.spans[v], patch_grid, grids[v]) for v in range(len(image.kinds))}
    full = [v for v, span in cells.items() if span[1] > span[0] and span[3] > span[2]]
    crops = {v: span for v, span in cells.items() if image.kinds[v] != KIND_GLOBAL and span[1] > span[0]}
    global_block = [_block(_view_cells(0, cells[0]), KIND_GLOBAL)] if 0 in full else []
    if options.crop_order == "views":
        maps = [_view_cells(v, span) for v, span in crops.items() if v in full]
    elif "row_end" in marks:  # LLaVA-NeXT marks the rows of a map whose columns were all cut away
        maps = [_stitch(image, crops)] if crops else []
    else:
        maps = [_stitch(image, crops)] if any(v in full for v in crops) else []
    crop_blocks = [_with_row_ends(block, KIND_CROP, "row_end" in marks) for block in maps]
    blocks = global_block + crop_blocks if options.global_position == "first" else crop_blocks + global_block
    pieces = []
    for number, block in enumerate(blocks):
        if number and "between_views" in marks:
            pieces.append(_mark("between_views"))
        pieces.append(block)
        if "view_end" in marks:
            pieces.append(_mark("view_end"))
    table = np.concatenate(pieces) if pieces else np.zeros((0, 4), dtype=np.int64)
    return _to_layout(table, global_grid, crop_grid)


def _to_layout(table: np.ndarray, global_grid: tuple, crop_grid: tuple) -> ImageLayout:
    """Turn rows (view, row, col, kind) into index arrays."""
    view, row, col, kind = table.T
    global_size, crop_size = global_grid[0] * global_grid[1], crop_grid[0] * crop_grid[1]
    source = np.where(
        kind == KIND_GLOBAL,
        row * global_grid[1] + col,
        global_size + (view - 1) * crop_size + row * crop_grid[1] + col,
    )
    source = np.where(kind == KIND_MARK, -1 - row, source)
    cell = np.where((kind == KIND_MARK)[:, None], 0, table[:, 1:3])
    return ImageLayout(source=source, view=view.copy(), cell=cell, kind=kind.copy())


class HiResLmmLayout(nn.Module):
    """Puts the adapted features of all views into sequence order and adds the marks.

    Args:
        options (`LayoutOptions`): Order and marks.
        patch_grid (`tuple[int, int]`): Patch rows and columns of a view.
        width (`int`): Width of the adapted features.
    """

    def __init__(self, options: LayoutOptions, patch_grid: tuple[int, int], width: int):
        super().__init__()
        self.options = options
        self.option_values = tuple(getattr(options, field.name) for field in fields(options))
        self.patch_grid = tuple(patch_grid)
        self.width = width
        for name, mark in options.active_marks().items():
            if mark == LEARNED:
                self.register_parameter(name, nn.Parameter(torch.empty(width)))

    def init_weights(self) -> None:
        """Initialise learned marks like a token embedding of unit expected norm."""
        for parameter in self.parameters(recurse=False):
            init.normal_(parameter, mean=0.0, std=self.width**-0.5)

    def mark_vectors(self, features: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """One vector a mark, zero where the mark is absent: `(len(MARKS), D)`."""
        vectors = []
        for name in MARKS:
            mark = getattr(self.options, name)
            if mark is None:
                vectors.append(features.new_zeros(self.width))
            elif mark == LEARNED:
                vectors.append(getattr(self, name).to(features))
            else:
                token = torch.full((), mark, dtype=torch.long, device=features.device)
                vectors.append(embed(token).to(features))
        return torch.stack(vectors)

    def forward(self, views: ViewFeatures, embed: Callable[[torch.Tensor], torch.Tensor]) -> VisualTokens:
        """Order the tokens of a batch.

        Args:
            views (`ViewFeatures`): Adapted features of width D.
            embed (`Callable`): Looks up token embeddings of the language model, for marks that are token ids.

        Returns:
            `VisualTokens` of the batch.
        """
        glob, crops = views.global_features, views.crop_features
        bank = torch.cat([glob.flatten(0, 1), crops.flatten(0, 1), self.mark_vectors(glob, embed)])
        plan = token_plan(
            tuple((image.first_view, *image_key(image)) for image in views.images),
            self.option_values,
            (self.patch_grid, tuple(views.global_grid), tuple(views.crop_grid)),
            (*glob.shape[:2], *crops.shape[:2]),
            str(bank.device),
        )
        return VisualTokens(
            features=bank[plan.index],
            lengths=list(plan.lengths),
            num_tokens=[image.num_tokens for image in views.images],
            view=plan.view,
            cell=plan.cell,
            kind=plan.kind,
            grids={KIND_GLOBAL: views.global_grid, KIND_CROP: views.crop_grid},
            aux=views.aux,
            plan=plan,
        )


def image_key(image: ImageGeometry) -> tuple:
    """What decides the layout of an image: kinds, grid, cells and spans of its views, as tuples of integers.

    Args:
        image (`ImageGeometry`): Any geometry.
    """
    return image.kinds, image.crop_grid, image.cells, image.spans


@torch.compiler.assume_constant_result
def token_plan(images: tuple, options: tuple, grids: tuple, shapes: tuple, device: str) -> TokenPlan:
    """Order the tokens of a batch; computed once a geometry, a constant for compilers.

    Args:
        images (`tuple`): First view and `image_key` of each image.
        options (`tuple`): The values of `LayoutOptions`, in order.
        grids (`tuple`): Patch grid, token grid of global views, token grid of crops.
        shapes (`tuple[int, int, int, int]`): Number and tokens of global views, number and tokens of crops.
        device (`str`): Where index tensors are wanted.

    Returns:
        The plan; not to be changed, since later batches get the same one.

    Raises:
        ValueError: See `image_layout`.
    """
    plan = _cached_plan(images, options, grids, shapes, device)
    if type(plan.index) is not torch.Tensor:  # made while tensors were faked
        _cached_plan.cache_clear()
        plan = _cached_plan(images, options, grids, shapes, device)
    return plan


@lru_cache(maxsize=64)
def _cached_plan(images: tuple, options: tuple, grids: tuple, shapes: tuple, device: str) -> TokenPlan:
    geometries = [ImageGeometry(0, kinds, grid, cells, spans, 0) for _, kinds, grid, cells, spans in images]
    layouts = [image_layout(image, LayoutOptions(*options), *grids) for image in geometries]
    lengths = [len(layout.view) for layout in layouts]
    view, cell, kind = (_join([getattr(lay, name) for lay in layouts]) for name in ("view", "cell", "kind"))
    view = np.where(view < 0, -1, view + np.repeat([key[0] for key in images], lengths))
    kinds = index_tensor(kind, "cpu")
    return TokenPlan(
        index=index_tensor(_bank_index(layouts, geometries, shapes[:2], shapes[2:]), device),
        lengths=tuple(lengths),
        view=index_tensor(view, "cpu"),
        cell=index_tensor(cell.reshape(-1, 2), "cpu"),
        kind=kinds,
        groups=find_groups(kinds, lengths, device),
    )


def _join(arrays: list) -> np.ndarray:
    """Concatenate int64 arrays; an empty list gives an empty array."""
    return np.concatenate(arrays).astype(np.int64) if arrays else np.zeros(0, dtype=np.int64)


def _bank_index(layouts: list, images: list, global_shape: tuple, crop_shape: tuple) -> np.ndarray:
    """Index of every token of the batch in `[global tokens, crop tokens, marks]`."""
    global_size, crop_size = global_shape[1], crop_shape[1]
    crop_start = global_shape[0] * global_size
    marks_start = crop_start + crop_shape[0] * crop_size
    pieces, crops_before = [], 0
    for number, (layout, image) in enumerate(zip(layouts, images, strict=True)):
        index = np.where(
            layout.source < global_size,
            number * global_size + layout.source,
            crop_start + crops_before * crop_size + layout.source - global_size,
        )
        pieces.append(np.where(layout.source < 0, marks_start - 1 - layout.source, index))
        crops_before += image.num_crops
    return _join(pieces)

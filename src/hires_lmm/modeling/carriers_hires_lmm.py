"""What travels through the model: geometry of images, groups of views, visual tokens, and the question."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from .conversation_hires_lmm import Conversation
from .geometry_hires_lmm import KINDS, MAIN_TOWER, Column, Grid, Kind, ViewShape, kinds_on, object_view


@dataclass(frozen=True)
class ImageGeometry:
    """The views of one image, as Python integers.

    Args:
        first_view (`int`): Row of its first view in `pixel_values`.
        views (`tuple[tuple[int, ...], ...]`): One `ViewShape` a view, as plain tuples, which compilers accept.
        num_tokens (`int`): Placeholders of the image.
        num_objects (`int`): Boxes that came with it.
    """

    first_view: int
    views: tuple[tuple[int, ...], ...]
    num_tokens: int
    num_objects: int = 0

    @property
    def arranged(self) -> tuple[tuple[int, ...], ...]:
        """What the arrangement places: the views, and one that stands for the objects."""
        return (*self.views, tuple(object_view(self.num_objects)))

    def rows(self, kind: int) -> list[int]:
        """Rows of the views of a kind in `pixel_values`."""
        return [self.first_view + number for number, view in enumerate(self.views) if view[0] == kind]

    def grid(self, kind: int) -> tuple[int, int]:
        """Rows and columns of the grid of a kind's views; `(0, 0)` without any."""
        return next(((view[1], view[2]) for view in self.views if view[0] == kind), (0, 0))


def map_edges(
    geometry: ImageGeometry, grid: Grid, kind: int
) -> tuple[dict[int, tuple[ViewShape, tuple[int, int, int, int]]], list[int], list[int]]:
    """Where the views of a kind lie on the map that they make side by side, in tokens, without their padding.

    Returns:
        By number of the view its shape and its cells that enter; upper and left edges of the rows and columns of
        views on the map, one more than there are.
    """
    views = {number: ViewShape(*view) for number, view in enumerate(geometry.views) if view[0] == kind}
    cells = {number: (view, grid.cells(view)) for number, view in views.items()}
    rows, cols = geometry.grid(kind)
    heights, widths = [0] * rows, [0] * cols
    for view, (top, bottom, left, right) in cells.values():
        heights[view.row], widths[view.col] = max(heights[view.row], bottom - top), max(widths[view.col], right - left)
    return cells, list(accumulate(heights, initial=0)), list(accumulate(widths, initial=0))


def read_geometry(
    positions: list[list[int]], spans: list[list[int]], num_objects: list[int] | None = None
) -> list[ImageGeometry]:
    """Group the rows of `view_positions` and `view_spans`, one a view, by image."""
    if len(positions) != len(spans):
        raise ValueError(
            f"view_positions has {len(positions)} rows and view_spans has {len(spans)}; pass both as the processor "
            "returned them, without slicing one alone."
        )
    starts = [row for row, position in enumerate(positions) if position[Column.STARTS_IMAGE]]
    if positions and (not starts or starts[0] != 0):
        raise ValueError(
            "The first row of view_positions does not open an image; pass view_positions as the processor returned it."
        )
    objects = [0] * len(starts) if num_objects is None else num_objects
    if len(objects) != len(starts):
        raise ValueError(
            f"image_boxes is of {len(objects)} images, but view_positions describes {len(starts)}; pass both as the "
            "processor returned them."
        )
    shape = (
        Column.KIND,
        Column.GRID_ROWS,
        Column.GRID_COLS,
        Column.ROW,
        Column.COL,
        Column.PATCH_ROWS,
        Column.PATCH_COLS,
    )
    return [
        ImageGeometry(
            start,
            tuple((*(positions[row][column] for column in shape), *spans[row]) for row in range(start, stop)),
            positions[start][Column.NUM_TOKENS],
            number,
        )
        for start, stop, number in zip(starts, [*starts[1:], len(positions)], objects, strict=False)
    ]


@dataclass
class ViewGroup:
    """Views of one kind and tower, of all images of the batch.

    Args:
        kind (`int`): See `Kind`.
        features (`torch.Tensor` of shape `(n, L, C)`): Row-major in `grid`; may hold an idle view behind the others.
        grid (`tuple[int, int]`): Token rows and columns, of the largest view where they are unequal.
        rows (`tuple[int, ...]`): Row of each view in `pixel_values`, image after image.
        tower (`str`): Where they come from.
        scores (`dict[str, torch.Tensor]`): `(n, L)` by name, where a part needs them.
        hidden (`dict[int, torch.Tensor]`): States `(n, L, C)` of other layers, where a part needs them.
        aux (`dict[str, torch.Tensor]`): What an adapter says for losses and logs, by name.
    """

    kind: int
    features: torch.Tensor
    grid: tuple[int, int]
    rows: tuple[int, ...]
    tower: str = MAIN_TOWER
    scores: dict = field(default_factory=dict)
    hidden: dict = field(default_factory=dict)
    aux: dict = field(default_factory=dict)

    @property
    def key(self) -> tuple[int, str]:
        """Kind and tower, by which token grids are known."""
        return int(self.kind), self.tower


@dataclass
class ViewFeatures:
    """Features of all views of a batch before they become a token sequence.

    Args:
        groups (`list[ViewGroup]`): One a kind and tower that is there.
        limits (`dict[int, list[int]]`): By kind, tokens of each view that a budget leaves, where a view op consumes
            it: the first ones enter the sequence. Kinds without a limit are missing.
        aux (`dict[str, torch.Tensor]`): Tensors for losses and logs, by name.
        boxes (`torch.Tensor` of shape `(I, N, 4)`, *optional*): Objects of each image, see `image_boxes` of `forward`.
    """

    groups: list[ViewGroup]
    images: list[ImageGeometry]
    limits: dict = field(default_factory=dict)
    aux: dict = field(default_factory=dict)
    boxes: torch.Tensor | None = None

    def group(self, on: str, tower: str = MAIN_TOWER) -> ViewGroup | None:
        """The group of one kind, or None."""
        kind = kinds_on(on)[0]
        return next((group for group in self.groups if group.key == (kind, tower)), None)

    def patches(self, group: ViewGroup) -> list[tuple[int, int]]:
        """Patch rows and columns of each view of a group of the main tower: unequal ones are padded to its grid."""
        sizes = [ViewShape(*view)[5:7] for image in self.images for view in image.views]
        own = [sizes[row] for row in group.rows if sizes]  # views of no image have the whole grid
        return own + [group.grid] * (len(group.features) - len(own))

    def counts(self, group: ViewGroup) -> list[int]:
        """How many views of a group each image has, in order, and behind them how many are idle."""
        own = [sum(0 <= row - image.first_view < len(image.views) for row in group.rows) for image in self.images]
        return [*own, len(group.features) - len(group.rows)]

    def map(self, on: Any, function: Callable[[ViewGroup], ViewGroup]) -> "ViewFeatures":
        """Change the groups of the main tower that `on` names."""
        kinds = kinds_on(on)
        groups = [function(g) if g.kind in kinds and g.tower == MAIN_TOWER else g for g in self.groups]
        return replace(self, groups=groups)


@dataclass(frozen=True)
class TokenPlan:
    """Which token stands where, for a batch: known from its geometry alone, kept for batches of the same one.

    Args:
        index (`torch.Tensor` of shape `(N,)`): Row of each token in `[tokens of all groups, separators]`.
        lengths (`tuple[int]`): Tokens of each image, summing to N.
        view, cell, kind (`torch.Tensor`): See `VisualTokens`.
        rows (`dict[int, tuple[torch.Tensor, ...]]`): By kind, one rising index tensor an image; `None` = all kinds.
    """

    index: torch.Tensor
    lengths: tuple
    view: torch.Tensor
    cell: torch.Tensor
    kind: torch.Tensor
    rows: dict


def index_tensor(index: Any, device: str) -> torch.Tensor:
    """An int64 tensor that may be kept and used with and without gradients."""
    with torch.inference_mode(False):
        return torch.from_numpy(np.asarray(index, dtype=np.int64)).to(device)


@torch.compiler.assume_constant_result
def constant_index(numbers: tuple[int, ...], device: str) -> torch.Tensor:
    """Whole numbers on a device, the same tensor for the same numbers: nothing is copied again."""
    found = _cached_index(numbers, device)
    if type(found) is not torch.Tensor:  # made while tensors were faked
        _cached_index.cache_clear()
        found = _cached_index(numbers, device)
    return found


@torch.compiler.assume_constant_result
def constant_indices(numbers: tuple[tuple[int, ...], ...], device: str) -> tuple[torch.Tensor, ...]:
    """Several at once: in a compiled graph each of these functions can be called one time."""
    return tuple(constant_index(each, device) for each in numbers)


@lru_cache(maxsize=256)
def _cached_index(numbers: tuple[int, ...], device: str) -> torch.Tensor:
    return index_tensor(numbers, device)


def find_rows(kind: torch.Tensor, lengths: Any, device: str) -> dict[int | None, tuple[torch.Tensor, ...]]:
    """Tokens of each kind of views (None: of any), one index tensor an image."""
    kinds, starts = kind.numpy(), np.cumsum([0, *lengths])
    found: dict[int | None, tuple[torch.Tensor, ...]] = {}
    for wanted in (None, *sorted({int(k) for k in kinds} - {int(Kind.SEPARATOR)})):
        mine = kinds != Kind.SEPARATOR if wanted is None else kinds == wanted
        found[wanted] = tuple(
            index_tensor(start + np.flatnonzero(mine[start : start + length]), device)
            for start, length in zip(starts, lengths, strict=False)
        )
    return found


@dataclass
class VisualTokens:
    """The visual tokens of a batch, image after image, in sequence order.

    `view`, `cell` and `kind` live on the CPU: geometry is known there, so reading it never waits for a device.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Token vectors.
        lengths (`list[int]`): Tokens of each image, summing to N.
        num_tokens (`list[int]`): Placeholders of each image; at most its length.
        view (`torch.Tensor` of shape `(N,)`): Row of the view in `pixel_values`; -1 for a separator.
        cell (`torch.Tensor` of shape `(N, 2)`): Row and column in the token grid of the view.
        kind (`torch.Tensor` of shape `(N,)`): See `Kind`.
        grids (`dict[int, Grid]`): Token grid of the views of each kind.
        kept (`torch.Tensor` of shape `(N,)`, *optional*): True where the token reaches the language model; None = all.
        scores (`dict[str, torch.Tensor]`): Scores `(N,)` by name, NaN where a token has none.
        score (`str`, *optional*): Name of the score that decided `kept`.
        aux (`dict[str, torch.Tensor]`): Tensors for losses and logs, by name.
        plan (`TokenPlan`, *optional*): The plan they came from; not read once `kind` is another tensor.
        sources (`list[int]`, *optional*): Image of the caller that each one is, where images were chosen or repeated.
    """

    features: torch.Tensor
    lengths: list[int]
    num_tokens: list[int]
    view: torch.Tensor
    cell: torch.Tensor
    kind: torch.Tensor
    grids: dict
    images: list
    kept: torch.Tensor | None = None
    scores: dict = field(default_factory=dict)
    score: str | None = None
    aux: dict = field(default_factory=dict)
    plan: TokenPlan | None = None
    sources: list | None = None

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.lengths)

    def rows(self, on: Any) -> tuple[torch.Tensor, ...]:
        """Index of the tokens of each image that come from the views named by `on`, on the device of the features."""
        planned = self.plan is not None and self.plan.kind is self.kind
        rows = self.plan.rows if planned else find_rows(self.kind, self.lengths, str(self.features.device))  # type: ignore[union-attr]
        if on == "all":
            return rows[None]
        found = [rows[kind] for kind in kinds_on(on) if kind in rows]
        if not found:
            return tuple(index[:0] for index in rows[None])
        if len(found) == 1:
            return found[0]
        return tuple(torch.cat(own).sort().values for own in zip(*found, strict=True))

    def per_image(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Split a tensor whose first dimension runs over the tokens into one tensor an image."""
        return list(tensor.split(self.lengths))

    def select_images(self, indices: list[int]) -> "VisualTokens":
        """Gather images by index, with repetition, into new `VisualTokens`."""

        def gather(tensor: torch.Tensor) -> torch.Tensor:
            parts = self.per_image(tensor)
            return torch.cat([parts[index] for index in indices]) if indices else tensor[:0]

        return replace(
            self,
            features=gather(self.features),
            lengths=[self.lengths[index] for index in indices],
            num_tokens=[self.num_tokens[index] for index in indices],
            images=[self.images[index] for index in indices],
            view=gather(self.view),
            cell=gather(self.cell),
            kind=gather(self.kind),
            kept=None if self.kept is None else gather(self.kept),
            scores={name: gather(score) for name, score in self.scores.items()},
            sources=[self.sources[index] if self.sources is not None else index for index in indices],
        )

    def boxes(self, view_boxes: torch.Tensor) -> np.ndarray:
        """Boxes of all tokens, `(N, 4)` float64 in source pixels from `(V, 4)` in 1/256; NaN for separators."""
        views, kinds = self.view.numpy(), self.kind.numpy()
        shapes = {
            image.first_view + n: ViewShape(*view) for image in self.images for n, view in enumerate(image.views)
        }
        grids = np.ones((len(KINDS), max(len(view_boxes), 1), 2), dtype=np.float64)
        for kind, grid in self.grids.items():
            for row, shape in shapes.items():
                grids[kind, row] = grid.of((shape.patch_rows, shape.patch_cols))
        boxes = view_boxes.cpu().numpy().astype(np.float64)[np.maximum(views, 0)] / 256
        size = (boxes[:, 2:] - boxes[:, :2]) / grids[np.maximum(kinds, 0), np.maximum(views, 0)]
        start = boxes[:, :2] + self.cell.numpy() * size
        result = np.concatenate([start, start + size], axis=1)
        result[(kinds == Kind.SEPARATOR) | (views < 0)] = np.nan
        return result


def drop(tokens: VisualTokens) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Remove the tokens that are not kept, where placeholders are fewer than tokens.

    Returns:
        Features `(M, D)`, exactly `num_tokens` an image, and `kept` `(M,)` of them (None = all). Tokens of images
        without a budget stay in, kept or not.
    """
    if tokens.kept is None or tokens.lengths == tokens.num_tokens:
        return tokens.features, tokens.kept
    pieces, start = [], 0
    for length, num_tokens in zip(tokens.lengths, tokens.num_tokens, strict=True):
        index = torch.arange(start, start + length, device=tokens.kept.device)
        if num_tokens < length:
            order = torch.argsort((~tokens.kept[start : start + length]).to(torch.int8), stable=True)
            index = index[order[:num_tokens]]
        pieces.append(index)
        start += length
    index = torch.cat(pieces)
    return tokens.features[index], tokens.kept[index]


@dataclass
class Question:
    """The text that a question-reading operation may see.

    Args:
        embeds (`torch.Tensor` of shape `(B, S, D)`): Token embeddings of the batch.
        ids (`torch.Tensor` of shape `(B, S)`, *optional*): Token ids; None when the caller passed embeddings.
        turn (`torch.Tensor` of shape `(B, S)`): Number of the turn a token belongs to, from 1; 0 = must not be read.
        image_row (`torch.Tensor` of shape `(I,)`): Row of the batch that holds each image.
        image_turn (`torch.Tensor` of shape `(I,)`): Turn that holds each image.
        placeholder (`torch.Tensor` of shape `(B, S)`, *optional*): True at placeholders.
        next_turn (`torch.Tensor` of shape `(B, S)`, *optional*): Turn that is open or comes next.
        asked (`torch.Tensor` of shape `(B, turns, L)`, *optional*): Ids of the questions in another vocabulary; -1
            behind a question, -2 behind the last turn.
        conversation (`Conversation`, *optional*): What is remembered of the positions that a cache holds and the call
            does not show; None where no later call can go on from this one.
    """

    embeds: torch.Tensor
    ids: torch.Tensor | None
    turn: torch.Tensor
    image_row: torch.Tensor
    image_turn: torch.Tensor
    placeholder: torch.Tensor | None = None
    next_turn: torch.Tensor | None = None
    asked: torch.Tensor | None = None
    conversation: Conversation | None = None

    @property
    def continues(self) -> bool:
        """Whether earlier positions of the conversation are in a cache and not shown."""
        return self.conversation is not None and self.conversation.length > 0

    def image_mask(self) -> torch.Tensor:
        """True where a token belongs to the question of an image: `(I, S)`."""
        return (self.turn[self.image_row] == self.image_turn[:, None]) & (self.image_turn[:, None] > 0)

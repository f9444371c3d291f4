"""Puts the adapted features of all views into sequence order and adds the separators."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache

import numpy as np
import torch
from torch import nn
from transformers import initialization as init

from .carriers_hires_lmm import (
    ImageGeometry,
    TokenPlan,
    ViewFeatures,
    VisualTokens,
    constant_index,
    find_rows,
    index_tensor,
)
from .geometry_hires_lmm import Grid, Kind, ViewShape
from .sequence_hires_lmm import LEARNED, Arrangement, LayoutOptions, Run


class HiResLmmSeparators(nn.Module):
    """Vectors of separators: trained ones by name, and embeddings of token ids."""

    def __init__(self, values: dict[str, str | list], width: int):
        super().__init__()
        self.lengths = {name: None if value == LEARNED else int(np.size(value)) for name, value in values.items()}
        self.width = width
        self.ids = tuple(int(token) for value in values.values() if value != LEARNED for token in np.ravel(value))
        for name in (name for name, value in values.items() if value == LEARNED):
            self.register_parameter(name, nn.Parameter(torch.empty(width)))

    def init_weights(self) -> None:
        """Initialise like a token embedding of unit expected norm."""
        for parameter in self.parameters(recurse=False):
            init.normal_(parameter, mean=0.0, std=len(parameter) ** -0.5)

    def forward(self, like: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """All vectors in order, `(M, D)`, on the device and in the dtype of `like`."""
        rows = embed(constant_index(self.ids, str(like.device))).to(like).unbind(0) if self.ids else ()
        looked_up, vectors = iter(rows), []
        for name, length in self.lengths.items():
            if length is None:
                vectors.append(getattr(self, name).to(like))
            else:
                vectors += [next(looked_up) for _ in range(length)]
        return torch.stack(vectors) if vectors else like.new_zeros(0, self.width)


class HiResLmmLayout(nn.Module):
    """Orders the tokens of a batch by the arrangement that the processor counts by.

    Args:
        grids (`Mapping[int, Grid]`): Token grid of the views of each kind that enter.
        elastic (`Sequence[int]`): Kinds whose views give as many tokens as a budget leaves.
    """

    def __init__(self, options: LayoutOptions, grids: Mapping[int, Grid], elastic: Sequence[int], width: int):
        super().__init__()
        self.separators = HiResLmmSeparators({name: each.value for name, each in options.parts().items()}, width)
        self.spec = json.dumps(
            [asdict(options), [[kind, grid.to_dict()] for kind, grid in grids.items()], list(elastic)]
        )
        self.kinds = tuple(read_spec(self.spec).kinds)
        self.grids, self.is_elastic = dict(grids), bool(elastic)

    def forward(self, views: ViewFeatures, embed: Callable[[torch.Tensor], torch.Tensor]) -> VisualTokens:
        """Order the tokens of a batch."""
        groups = [group for kind in self.kinds for group in views.groups if group.kind == kind]
        like = views.groups[0].features
        bank = torch.cat([*(group.features.flatten(0, 1) for group in groups), self.separators(like, embed)])
        plan = token_plan(
            tuple((image.first_view, image.arranged, image.num_tokens) for image in views.images),
            tuple((int(group.kind), tuple(group.grid), tuple(group.features.shape[:2])) for group in groups),
            self.spec,
            str(bank.device),
        )
        names = dict.fromkeys(name for group in groups for name in group.scores)
        return VisualTokens(
            features=bank[plan.index],
            lengths=list(plan.lengths),
            num_tokens=[image.num_tokens for image in views.images],
            view=plan.view,
            cell=plan.cell,
            kind=plan.kind,
            grids=self.grids,
            images=views.images,
            scores={name: _score_bank(groups, name, len(bank))[plan.index] for name in names},
            aux=views.aux,
            plan=plan,
        )


def _score_bank(groups: list, name: str, length: int) -> torch.Tensor:
    """The scores of all groups in the order of the bank; NaN where there are none."""
    parts = [
        group.scores[name].flatten().float()
        if name in group.scores
        else group.features.new_full((group.features.shape[0] * group.features.shape[1],), float("nan")).float()
        for group in groups
    ]
    missing = length - sum(len(part) for part in parts)
    return torch.cat([*parts, parts[0].new_full((missing,), float("nan"))])


@lru_cache(maxsize=64)
def read_spec(spec: str) -> Arrangement:
    """The arrangement that a layout's `spec` describes."""
    options, grids, elastic = json.loads(spec)
    return Arrangement(LayoutOptions(**options), {kind: Grid.from_dict(grid) for kind, grid in grids}, elastic)


@torch.compiler.assume_constant_result
def token_plan(images: tuple, groups: tuple, spec: str, device: str) -> TokenPlan:
    """Order the tokens of a batch; computed once a geometry, a constant for compilers.

    Args:
        images (`tuple`): First view, views and placeholders of each image.
        groups (`tuple`): Kind, token grid and shape `(views, tokens)` of each group, in the order of the bank.
        spec (`str`): See `HiResLmmLayout`.
        device (`str`): Where index tensors are wanted.

    Returns:
        The plan; not to be changed, since later batches get the same one.

    Raises:
        ValueError: If a group has fewer views than its images, or crops cannot be stitched.
    """
    elastic = bool(read_spec(spec).elastic)
    key = tuple((first, views, number if elastic else None) for first, views, number in images)
    plan = _cached_plan(key, groups, spec, device)
    if type(plan.index) is not torch.Tensor:  # made while tensors were faked
        _cached_plan.cache_clear()
        plan = _cached_plan(key, groups, spec, device)
    return plan


@lru_cache(maxsize=64)
def _cached_plan(images: tuple, groups: tuple, spec: str, device: str) -> TokenPlan:
    arrangement = read_spec(spec)
    starts, end = {}, 0
    for kind, grid, (num_views, size) in groups:
        starts[kind] = (end, size, grid[1])
        end += num_views * size
    marks = np.cumsum([end, *(len(each.flat()) * each.num_tokens for each in arrangement.separators)])
    before = dict.fromkeys(starts, 0)
    pieces, lengths = [], []
    for first, values, num_tokens in images:
        views = [ViewShape(*view) for view in values]
        own = {kind: len(arrangement.own_views(views, kind)) for kind in starts}
        rows = {kind: _source_rows(arrangement, views, first, kind) for kind in starts}
        mine = []
        for piece in arrangement.walk(views, num_tokens):
            if isinstance(piece, Run):
                start, size, cols = starts[piece.kind]
                at = start + (before[piece.kind] + piece.view) * size + piece.row * cols + piece.start
                row = rows[piece.kind][piece.view]
                mine.append((at, piece.stop - piece.start, row, piece.row, piece.start, piece.kind))
            else:
                separator = arrangement.separators[piece.separator]
                entry = separator.entry(piece.row, piece.col) * separator.num_tokens
                mine.append((int(marks[piece.separator]) + entry, separator.num_tokens, -1, 0, 0, int(Kind.SEPARATOR)))
        pieces += mine
        lengths.append(sum(piece[1] for piece in mine))
        before = {kind: number + own[kind] for kind, number in before.items()}
    for kind, _, (num_views, _) in groups:
        if before[kind] > num_views:
            raise ValueError(f"Images have {before[kind]} views of kind {kind}, but a part made {num_views} of them.")
    return _as_plan(pieces, lengths, device)


def _source_rows(arrangement: Arrangement, views: list[ViewShape], first: int, kind: int) -> list[int]:
    """Row in `pixel_values` of each view of a kind, or of the first that stands for it; -1 for objects."""
    if kind == Kind.OBJECT:
        return [-1]
    rows = [first + number for number, view in enumerate(views) if view.kind in arrangement.sources(kind)]
    return [rows[place] for place in arrangement.grids[kind].first_views(len(rows))]


def _as_plan(pieces: list[tuple], lengths: list[int], device: str) -> TokenPlan:
    """Runs of (bank row, length, view, cell row, first cell column, kind) as index arrays."""
    table = np.array(pieces, dtype=np.int64).reshape(-1, 6)
    steps = np.arange(table[:, 1].sum()) - np.repeat(np.cumsum(table[:, 1]) - table[:, 1], table[:, 1])
    at, _, view, row, col, kind = np.repeat(table, table[:, 1], axis=0).T
    is_view = kind != Kind.SEPARATOR
    cell = np.stack([row, np.where(is_view, col + steps, 0)], axis=1)
    kinds = index_tensor(kind, "cpu")
    return TokenPlan(
        index=index_tensor(at + steps, device),
        lengths=tuple(lengths),
        view=index_tensor(view, "cpu"),
        cell=index_tensor(cell, "cpu"),
        kind=kinds,
        rows=find_rows(kinds, lengths, device),
    )


@torch.compiler.assume_constant_result
def view_limits(images: tuple, spec: str) -> dict[int, list[int]]:
    """Tokens of each view of the elastic kinds, image after image, where a budget limits any of them."""
    arrangement = read_spec(spec)
    limits: dict[int, list[int]] = {}
    for values, num_tokens in images:
        for kind, own in arrangement.elastic_limits([ViewShape(*view) for view in values], num_tokens).items():
            limits.setdefault(kind, []).extend(own)
    return limits


def idle_image(kinds: Sequence[int], patch_grid: tuple[int, int]) -> ImageGeometry:
    """A blank image with one whole view a kind, for batches without any."""
    rows, cols = patch_grid
    return ImageGeometry(0, tuple((int(kind), 1, 1, 0, 0, rows, cols, 0, rows, 0, cols) for kind in kinds), 0)

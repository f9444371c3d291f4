"""The one arrangement of an image's tokens: the model places by it, the processor counts by it.

Stands in `processing/` and, as a link, in `modeling/`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

from huggingface_hub.dataclasses import strict

from .geometry_hires_lmm import Grid, Kind, ViewShape, kinds_on, spread_evenly


PLACES = (
    "image_start",
    "image_end",
    "between_views",
    "view_start",
    "view_end",
    "token_row_end",
    "between_token_rows",
    "crop_column",
    "crop_row_end",
    "between_crop_rows",
    "between_frames",
)
CROP_PLACES = ("crop_column", "crop_row_end", "between_crop_rows")
LEARNED = "learned"
GRID_KINDS = (Kind.CROP, Kind.STRIDED)
"""Kinds whose views lie in a grid; frames do where it has several columns."""


@strict
@dataclass
class Separator:
    """Tokens that belong to no view.

    Args:
        place (`str`): Where they stand: one of `PLACES`.
        value (`str` or `list`): `"learned"` (one trained vector), a list of token ids, or ids by grid row and
            column of the view they belong to: `value[row][col]` is a list of ids, all equally long.
        on (`str` or `list[str]`): Kinds of views they belong to; of no meaning at the ends of an image and between
            views.
    """

    place: str
    value: str | list = LEARNED
    on: str | list = "all"

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise ValueError(f"place={self.place!r} is unknown; use one of {', '.join(PLACES)}.")
        kinds_on(self.on)
        flat = self.flat()
        lengths = {len(ids) for ids in flat}
        ids = [each for own in flat for each in own]
        is_table = self.value != LEARNED and bool(self.value) and isinstance(self.value[0], list)
        if len(lengths) != 1 or 0 in lengths or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise ValueError(
                f'value={self.value!r} must be "learned", a list of token ids, or equally long lists of ids by row '
                "and column."
            )
        if is_table and len({len(row) for row in self.value}) != 1:
            raise ValueError(f"value={self.value!r} must have as many columns in every row.")

    def flat(self) -> list[list[int]]:
        """The ids, one list an entry of the table; `[[-1]]` for a learned vector."""
        if self.value == LEARNED:
            return [[-1]]
        if isinstance(self.value, str) or not self.value:
            return [[]]
        if isinstance(self.value[0], list):
            return [list(ids) for row in self.value for ids in row]
        return [list(self.value)]

    @property
    def num_tokens(self) -> int:
        """Tokens of one occurrence."""
        return len(self.flat()[0])

    def entry(self, row: int, col: int) -> int:
        """Number of the entry for a view at a place of the grid."""
        if self.value == LEARNED or not isinstance(self.value[0], list):
            return 0
        if row >= len(self.value) or col >= len(self.value[0]):
            raise ValueError(
                f"A separator at {self.place} has ids for {len(self.value)} x {len(self.value[0])} views, but the "
                f"grid reaches row {row}, column {col}; lower max_crops or lengthen the table."
            )
        return row * len(self.value[0]) + col


@strict
@dataclass
class LayoutOptions:
    """Order of views and the separators between them.

    A block is the stitched map of all crops (`crop_order="raster"`) or one view.

    Args:
        order (`list[str]`): Kinds of views that enter, in order.
        crop_order (`str`): `"raster"` reads the map of all crops, side by side, row by row, that of all frames of a
            video in several columns, and that of all strided views, interleaved; `"views"` one after another.
        separators (`dict[str, dict]`): Name -> fields of `Separator`.
    """

    order: list = field(default_factory=lambda: ["global", "crops"])
    crop_order: Literal["raster", "views"] = "raster"
    separators: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = kinds_on(self.order)
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"layout.order={self.order!r} names views twice.")
        for name, separator in self.parts().items():
            if separator.place in CROP_PLACES and self.crop_order != "views":
                raise ValueError(
                    f'layout.separators.{name} stands at {separator.place}, which needs crop_order="views".'
                )

    def parts(self) -> dict[str, Separator]:
        """The separators as objects."""
        found = {}
        for name, values in self.separators.items():
            if not isinstance(values, dict) or not str(name).isidentifier():
                raise ValueError(f"layout.separators.{name}={values!r} must be a name and a dict with a place.")
            try:
                found[name] = Separator(**values)
            except Exception as error:  # the strict dataclasses raise their own type
                raise ValueError(f"layout.separators.{name}: {' '.join(str(error).split())}") from error
        return found


class Run(NamedTuple):
    """Neighbouring tokens of one row of one view; `view` counts the views of the kind within the image."""

    kind: int
    view: int
    row: int
    start: int
    stop: int


class Mark(NamedTuple):
    """One occurrence of a separator: its number, and the place in the grid of the view that it belongs to."""

    separator: int
    row: int
    col: int


class Arrangement:
    """How the tokens of images are arranged: by layout and token grid of each kind. Views of `elastic` kinds give as
    many tokens as the budget leaves, from the first on."""

    def __init__(self, layout: LayoutOptions, grids: Mapping[int, Grid], elastic: Sequence[int] = ()):
        self.separators, self.order = list(layout.parts().values()), layout.order
        self.kinds = [kind for kind in kinds_on(layout.order) if kind in grids]
        self.grids, self.elastic, self.is_raster = grids, tuple(elastic), layout.crop_order == "raster"
        self._at = {
            (place, kind): [
                number
                for number, each in enumerate(self.separators)
                if each.place == place and (kind is None or kind in kinds_on(each.on))
            ]
            for place in PLACES
            for kind in (None, *self.kinds)
        }

    def own_views(self, views: Sequence[ViewShape], kind: int) -> list[ViewShape]:
        """The views of a kind that an image has, or that stand for them."""
        grid = self.grids[kind]
        found = [view for view in views if view.kind in self.sources(kind)]
        first = grid.first_views(len(found))
        if len(first) == len(found):
            return found
        shape = {"grid_rows": len(first), "grid_cols": 1, "col": 0}
        return [found[place]._replace(row=number, **shape) for number, place in enumerate(first)]

    def sources(self, kind: int) -> tuple[int, ...]:
        """The kinds of views that stand for a kind."""
        return self.grids[kind].source or (kind,)

    def walk(self, views: Sequence[ViewShape], num_tokens: int | None = None) -> list[Run | Mark]:
        """Order the tokens of one image, under a budget that elastic kinds take if `num_tokens` is given."""
        limits = {} if num_tokens is None or not self.elastic else self.elastic_limits(views, num_tokens)
        out: list[Run | Mark] = [*self._marks("image_start")]
        num_blocks = 0
        for kind in self.kinds:
            blocks = list(self._blocks(self.own_views(views, kind), kind, limits.get(kind)))
            for number, (before, block) in enumerate(_sampled(blocks, self.grids[kind].sample)):
                out += before
                if kind == Kind.FRAME and number:
                    out += self._marks("between_frames", kind)
                elif num_blocks:
                    out += self._marks("between_views")
                out += block
                num_blocks += 1
        return [*out, *self._marks("image_end")]

    def count(self, views: Sequence[ViewShape]) -> dict[int, int]:
        """Tokens of one image by kind; separators under `Kind.SEPARATOR`."""
        return dict(_count(self, tuple(views)))

    def elastic_limits(self, views: Sequence[ViewShape], num_tokens: int) -> dict[int, list[int]]:
        """Tokens of each view of the elastic kinds under a budget, in proportion to its own."""
        counts = self.count(views)
        room = num_tokens - sum(counts.values()) + sum(counts.get(kind, 0) for kind in self.elastic)
        sizes = [
            (kind, self._area(view, kind))
            for kind in self.elastic
            if kind in self.kinds
            for view in self.own_views(views, kind)
        ]
        shares = split_budget(room, [size for _, size in sizes])
        limits: dict[int, list[int]] = {}
        for (kind, _), share in zip(sizes, shares, strict=True):
            limits.setdefault(kind, []).append(share)
        return limits

    def _area(self, view: ViewShape, kind: int) -> int:
        top, bottom, left, right = self.grids[kind].cells(view)
        return (bottom - top) * (right - left)

    def _marks(self, place: str, kind: int | None = None, row: int = 0, col: int = 0) -> list[Mark]:
        return [Mark(number, row, col) for number in self._at[place, kind]]

    def _blocks(
        self, own: Sequence[ViewShape], kind: int, limits: list[int] | None
    ) -> Iterator[tuple[list[Mark], list[Run | Mark]]]:
        """The blocks of one kind, each with the separators between it and its neighbours in the grid."""
        cells = [self.grids[kind].cells(view) for view in own]
        bands: dict[int, list[int]] = {}
        for number in sorted(range(len(own)), key=lambda n: (own[n].row, own[n].col)):
            bands.setdefault(own[number].row, []).append(number)
        is_map = kind in GRID_KINDS or (kind == Kind.FRAME and any(view.grid_cols > 1 for view in own))
        if is_map and self.is_raster and limits is None:
            yield from self._stitched(list(bands.values()), cells, kind)
            return
        shown = [
            [
                n
                for n in band
                if (cells[n][1] - cells[n][0]) * (cells[n][3] - cells[n][2]) and (limits is None or limits[n])
            ]
            for band in bands.values()
        ]
        shown = [band for band in shown if band]
        for which, band in enumerate(shown):
            for place, number in enumerate(band):
                view = own[number]
                limit = None if limits is None else limits[number]
                block = self._block(_side_by_side([[number]], cells), kind, view.row, view.col, limit)
                before: list[Mark] = []
                if kind in GRID_KINDS and place:
                    before = self._marks("crop_column", kind, view.row, view.col)
                elif kind in GRID_KINDS and which:
                    before = self._marks("between_crop_rows", kind, view.row, view.col)
                if kind in GRID_KINDS and place == len(band) - 1:
                    block += self._marks("crop_row_end", kind, view.row, view.col)
                yield before, block

    def _stitched(
        self, bands: list[list[int]], cells: list[tuple], kind: int
    ) -> Iterator[tuple[list[Mark], list[Run | Mark]]]:
        """The map of all views of a kind: crops side by side, strided views interleaved, as they were cut.

        It exists where it has tokens or separators of token rows.
        """
        lines = _interleaved(bands, cells) if kind == Kind.STRIDED else _side_by_side(bands, cells)
        if lines and (any(lines) or self._at["token_row_end", kind]):
            yield [], self._block(lines, kind, 0, 0, None)

    def _block(
        self, lines: list[list[tuple[int, int, int, int]]], kind: int, row: int, col: int, limit: int | None
    ) -> list[Run | Mark]:
        """One block: its token rows with what stands around them."""
        out: list[Run | Mark] = [*self._marks("view_start", kind, row, col)]
        between, end = self._marks("between_token_rows", kind), self._marks("token_row_end", kind)
        for number, line in enumerate(lines):
            if limit is not None:
                line = [(n, r, left, min(right, left + limit)) for n, r, left, right in line]
                limit -= sum(right - left for _, _, left, right in line)
            if number:
                out += between
            out += [Run(kind, *piece) for piece in line if piece[3] > piece[2]]
            out += end
        return [*out, *self._marks("view_end", kind, row, col)]


def _sampled(
    blocks: list[tuple[list[Mark], list[Run | Mark]]], number: int | None
) -> list[tuple[list[Mark], list[Run | Mark]]]:
    """Leave so many of the tokens in blocks, evenly spread; what stands around them stays."""
    if number is None:
        return blocks
    runs = [piece for _, block in blocks for piece in block if isinstance(piece, Run)]
    chosen = set(spread_evenly(sum(run.stop - run.start for run in runs), number))
    at, found = 0, []
    for before, block in blocks:
        left: list[Run | Mark] = []
        for piece in block:
            if isinstance(piece, Run):
                cols = [col for col in range(piece.start, piece.stop) if at + col - piece.start in chosen]
                left += [piece._replace(start=col, stop=col + 1) for col in cols]
                at += piece.stop - piece.start
            else:
                left.append(piece)
        found.append((before, left))
    return found


@lru_cache(maxsize=1024)
def _count(arrangement: Arrangement, views: tuple[ViewShape, ...]) -> dict[int, int]:
    """Images of a data set share few grids, so that most are walked once."""
    counts = dict.fromkeys((int(Kind.SEPARATOR), *arrangement.kinds), 0)
    for piece in arrangement.walk(views):
        if isinstance(piece, Run):
            counts[piece.kind] += piece.stop - piece.start
        else:
            counts[int(Kind.SEPARATOR)] += arrangement.separators[piece.separator].num_tokens
    return counts


def _side_by_side(bands: list[list[int]], cells: list[tuple]) -> list[list[tuple[int, int, int, int]]]:
    """Token rows of views that lie side by side: pieces (view, row, first and past-last column)."""
    for band in bands:
        if len({cells[n][:2] for n in band}) > 1:
            raise ValueError(
                f"Views of one grid row differ in the rows that enter the sequence: {[cells[n][:2] for n in band]}"
            )
    return [
        [(n, r, *cells[n][2:]) for n in band if cells[n][3] > cells[n][2]]
        for band in bands
        for r in range(*cells[band[0]][:2])
    ]


def _interleaved(bands: list[list[int]], cells: list[tuple]) -> list[list[tuple[int, int, int, int]]]:
    """Token rows of views that each took every n-th pixel: neighbours come from different views."""
    if len(set(cells)) > 1:
        raise ValueError(
            f"Strided views of one image differ in the tokens that enter the sequence, {sorted(set(cells))}, and "
            'cannot be interleaved; use layout.crop_order="views".'
        )
    top, bottom, left, right = cells[0] if cells else (0, 0, 0, 0)
    return [[(n, r, c, c + 1) for c in range(left, right) for n in band] for r in range(top, bottom) for band in bands]


def split_budget(total: int, sizes: Sequence[int]) -> list[int]:
    """Share a budget among groups in proportion to their sizes, none above its size; largest remainder first."""
    whole = sum(sizes)
    if total >= whole:
        return list(sizes)
    shares = [total * size // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda n: (-(total * sizes[n] % whole), n))
    for number in by_remainder[: total - sum(shares)]:
        shares[number] += 1
    return shares


__all__ = ["Arrangement", "LayoutOptions", "Mark", "Run", "Separator", "split_budget"]

"""The wire format of views: columns of `view_positions`, kinds of views, and the token grid of a view.

Stands in `processing/` and, as a link, in `modeling/`: both sides read the same words.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple


class Column(IntEnum):
    """Columns of `view_positions`."""

    KIND = 0
    GRID_ROWS = 1
    GRID_COLS = 2
    ROW = 3
    COL = 4
    NUM_TOKENS = 5
    PATCH_ROWS = 6
    PATCH_COLS = 7
    STARTS_IMAGE = 8


DENSE_PARTS = (("view_positions", 9), ("view_boxes", 4), ("view_spans", 4))
"""What a row of `pixel_attention_mask` of the dense layout holds behind its first number, with the columns of each."""


class Kind(IntEnum):
    """What a view shows; a separator between tokens is no view."""

    SEPARATOR = -1
    GLOBAL = 0
    CROP = 1
    STRIDED = 2
    FRAME = 3
    DETAIL = 4
    OBJECT = 5


KINDS = {
    "global": Kind.GLOBAL.value,
    "crops": Kind.CROP.value,
    "strided": Kind.STRIDED.value,
    "frames": Kind.FRAME.value,
    "detail": Kind.DETAIL.value,
    "objects": Kind.OBJECT.value,
}
"""Names of kinds in options (`on`, `order`); plain numbers, which compilers follow."""

WHOLE_KINDS = (Kind.GLOBAL.value, Kind.FRAME.value)
"""Kinds whose views extra towers see too: a picture and each frame of a video."""

MADE_KINDS = ("detail", "objects")
"""Kinds that no planner cuts: an extra tower or a part makes them."""

MAIN_TOWER = "vision_tower"
OBJECTS = "objects"
"""What stands for a tower in the group of object tokens, which have an adapter of their own."""

BOX_SIDE = 65536
"""A side of a global view in the unit of `image_boxes`."""


def kinds_on(on: Any) -> tuple[int, ...]:
    """The kinds that an option `on` names: `"all"`, one name of `KINDS`, or a list of names."""
    if on == "all":
        return tuple(KINDS.values())
    names = [on] if isinstance(on, str) else on
    if not isinstance(names, (list, tuple)) or not names or any(name not in KINDS for name in names):
        raise ValueError(f'on={on!r} names no views; use "all", one of {", ".join(KINDS)}, or a list of them.')
    return tuple(KINDS[name] for name in names)


class ViewShape(NamedTuple):
    """One view of an image in whole numbers; `top`, `bottom`, `left`, `right` span the patches that enter."""

    kind: int
    grid_rows: int
    grid_cols: int
    row: int
    col: int
    patch_rows: int
    patch_cols: int
    top: int
    bottom: int
    left: int
    right: int

    @property
    def span(self) -> tuple[int, int, int, int]:
        """First and past-last patch row, first and past-last patch column that enter the sequence."""
        return self.top, self.bottom, self.left, self.right


def object_view(number: int) -> ViewShape:
    """What stands for the objects of an image among its views: one column of as many patches."""
    return ViewShape(Kind.OBJECT.value, 0, 0, 0, 0, number, 1, 0, number, 0, 1)


@dataclass(frozen=True)
class Grid:
    """Token grid of the views of one kind, as far as a view op or adapter has changed it.

    Args:
        rows, cols (`int`): Tokens of a view of the tower's own size.
        stride (`tuple[int, int]`, *optional*): Patches a token along each axis, where the grid follows the size of the
            view; None: `rows` x `cols` whatever the size.
        whole (`bool`): All tokens of a view enter or none, whatever its span: queries that have no place in the view.
        source (`tuple[int, ...]`, *optional*): Kinds of the views that stand for these, where an operation or a second
            tower makes them; None: views of the kind itself.
        num_views (`int`, *optional*): Views of this kind that an image with any of them has, whatever it came with;
            None: one for each `view_stride` that stand for it.
        view_stride (`int`): Views that stand for one of this kind.
        sample (`int`, *optional*): Most tokens of all views of this kind of an image that enter, evenly spread.
    """

    rows: int
    cols: int
    stride: tuple[int, int] | None = (1, 1)
    whole: bool = False
    source: tuple[int, ...] | None = None
    num_views: int | None = None
    view_stride: int = 1
    sample: int | None = None

    def first_views(self, count: int) -> list[int]:
        """Of each view of this kind, the first of the `count` views that stand for all of them."""
        if self.num_views is None or not count:
            return list(range(0, count, self.view_stride))
        return [number * count // self.num_views for number in range(self.num_views)]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.cols

    def of(self, patches: tuple[int, int]) -> tuple[int, int]:
        """Token rows and columns of a view of so many patches."""
        if self.stride is None:
            return self.rows, self.cols
        return -(-patches[0] // self.stride[0]), -(-patches[1] // self.stride[1])

    def cells(self, view: ViewShape) -> tuple[int, int, int, int]:
        """First and past-last token row and column of a view that enter; spans of patches are rounded outwards."""
        patches = (view.patch_rows, view.patch_cols)
        size = self.of(patches)
        if self.whole:
            return (0, size[0], 0, size[1]) if view.bottom > view.top and view.right > view.left else (0, 0, 0, 0)
        (top, bottom), (left, right) = (
            _cell_interval(*interval, size[axis], patches[axis])
            for axis, interval in enumerate(((view.top, view.bottom), (view.left, view.right)))
        )
        return top, bottom, left, right

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; what has its default is left out."""
        values = {"rows": self.rows, "cols": self.cols, "stride": None if self.stride is None else list(self.stride)}
        rest = {name: getattr(self, name) for name in ("whole", "source", "num_views", "view_stride", "sample")}
        rest = {name: list(value) if isinstance(value, tuple) else value for name, value in rest.items()}
        return {**values, **{name: value for name, value in rest.items() if value != getattr(Grid, name)}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Grid":
        """Read what `to_dict` gave."""
        own: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**own)


def spread_evenly(total: int, number: int) -> list[int]:
    """`number` of the indices below `total`, the first and the last among them; all where there are no more.

    As `torch.linspace(0, total - 1, number).round()` in single precision, which decides where halves go; counting from
    sizes asks it without torch.
    """
    if number >= total or number == 1:
        return list(range(min(number, total)))
    step, half = _single(_single(total - 1) / (number - 1)), number // 2
    low = [_single(step * place) for place in range(half)]
    high = [_single(total - 1 - step * place) for place in range(number - half)]
    return [round(value) for value in [*low, *reversed(high)]]


def _single(value: float) -> float:
    """The nearest number of single precision."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, 24)), exponent - 24)


def check_stride(grid: Grid, patch_grid: tuple[int, int], where: str) -> None:
    """Refuse a grid whose size and stride contradict each other: counts would follow the stride."""
    if grid.of(patch_grid) != grid.size:
        raise ValueError(
            f"{where} gives {grid.rows}x{grid.cols} tokens, but views of {patch_grid[0]}x{patch_grid[1]} patches with "
            f"stride={grid.stride} have {'x'.join(map(str, grid.of(patch_grid)))}; correct one of them, or set "
            "stride=None where the number of tokens does not follow the size of a view."
        )


def _cell_interval(start: int, end: int, tokens: int, patches: int) -> tuple[int, int]:
    return (start * tokens // patches, -(-end * tokens // patches)) if end > start and tokens else (0, 0)

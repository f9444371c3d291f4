"""Slicing rules with views that are not all squares cut side by side: two perspectives, and slices of unequal size."""

import math
from dataclasses import dataclass, replace
from itertools import product

from .geometry_hires_lmm import Kind
from .view_plans_hires_lmm import (
    BLACK,
    CROPS_LIMIT,
    Canvas,
    PlannerLimits,
    Size,
    View,
    ViewPlan,
    assemble,
    check_count,
    checked_size,
    fit_inside,
    source_edges,
)


RELEASED_SLICES = 7


@dataclass(frozen=True)
class DualLimits(PlannerLimits):
    """Options of `dual`: rows and columns of the views of each perspective, and whether they follow the aspect of the
    image, at most n times n of them (ours)."""

    n: int = 3
    follow_aspect: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n", self.n)
        if self.n**2 > CROPS_LIMIT:
            raise ValueError(f"n={self.n} asks for more than {CROPS_LIMIT} crops; lower it.")
        if not isinstance(self.follow_aspect, bool):
            raise ValueError(f"follow_aspect={self.follow_aspect!r} must be True or False.")
        if self.unpad and self.global_view == "pad":
            raise ValueError(
                "planner='dual' cannot leave out padding, which its strided views share; leave out unpad."
            )


def plan_dual(height: int, width: int, limits: DualLimits) -> ViewPlan:
    """The image squeezed to n x n views, whole, cut contiguously, and by strides: each takes every n-th pixel.

    `max_crops` lowers n. With `global_view="pad"` the image is centred on black in all views.

    Source: INF-LLaVA, huggingface.co/papers/2407.16198, and its released code (n = 3). Differs: Pillow's filter in
        place of one without antialiasing.
    """
    size, side, most = checked_size(height, width), limits.view_size, limits.n**2
    most = most if limits.max_crops is None else min(most, limits.max_crops)
    grid = _nearest_grid(size, most) if limits.follow_aspect else (math.isqrt(most),) * 2
    square = (grid[0] * side, grid[1] * side)
    resized = fit_inside(size, square) if limits.global_view == "pad" else square
    paste = ((square[0] - resized[0]) // 2, (square[1] - resized[1]) // 2)
    plan = assemble(size, limits, Canvas(grid, resized, paste), global_view="squeeze")
    crops = plan.views[1:]
    box = (*crops[0].box[:2], *crops[-1].box[2:]) if crops else (0, 0, 0, 0)
    return replace(plan, views=(*plan.views, *(replace(view, kind=int(Kind.STRIDED), box=box) for view in crops)))


def plan_llava_uhd(height: int, width: int, limits: PlannerLimits) -> ViewPlan:
    """Slices of one size of their own, each about as large as a view, and the whole image at its own aspect.

    `max_crops` is at least 1 (default 7, as released; 6 in the paper). Views have as many patches as fit their aspect,
    so the model needs `unequal_views`.

    Source: LLaVA-UHD, huggingface.co/papers/2403.11703, and its released code (thunlp/LLaVA-UHD at dd7f6cc). Differs:
        a view that is thinner than a patch is no longer than the patches of a square view.
    """
    size, side = checked_size(height, width), limits.view_size
    if limits.global_view is not None:
        raise ValueError(
            f"planner='llava_uhd' draws the whole image at its own aspect, not by global_view={limits.global_view!r}; "
            "leave it out."
        )
    most = RELEASED_SLICES if limits.max_crops is None else limits.max_crops
    number = min(math.ceil(height * width / side**2), most)
    rows, cols = (0, 0)
    if number > 1 and limits.views != "global":
        counts = [count for count in (number - 1, number, number + 1) if 1 < count <= most]
        grids = [(count // cols, cols) for count in counts for cols in range(1, count + 1) if count % cols == 0]
        rows, cols = min(grids, key=lambda grid: abs(math.log(width / height) - math.log(grid[1] / grid[0])))
    overview = _fit_area(height, width, limits)
    span = (0, 0, 0, 0) if limits.views == "crops" else (0, overview[0], 0, overview[1])
    views = [View(Kind.GLOBAL, rows, cols, 0, 0, source_box(size, size, (0, 0), size), span, overview)]
    plan = ViewPlan(
        size, side, limits.patch_size, tuple(views), (0, 0), (0, 0), (0, 0), BLACK, (0, 0), (0, 0), BLACK, (None, None)
    )
    plan = replace(plan, global_size=plan.view_pixels(views[0]))
    if not rows:
        return plan
    patches = _fit_area(max(height // rows, 1), max(width // cols, 1), limits)
    slices = [
        View(Kind.CROP, rows, cols, row, col, (0, 0, 0, 0), (0, patches[0], 0, patches[1]), patches)
        for row, col in product(range(rows), range(cols))
    ]
    high, wide = plan.view_pixels(slices[0])
    canvas = (rows * high, cols * wide)
    slices = [
        replace(view, box=source_box(size, canvas, (view.row * high, view.col * wide), (high, wide)))
        for view in slices
    ]
    return replace(plan, views=(*views, *slices), canvas=canvas, resized=canvas)


def source_box(size: Size, canvas: Size, start: Size, shape: Size) -> tuple[int, int, int, int]:
    """A part of a canvas that the image fills, in 1/256 source pixel."""
    edges = [source_edges(size[axis], canvas[axis], 0, (start[axis], start[axis] + shape[axis])) for axis in (0, 1)]
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def _nearest_grid(size: Size, most: int) -> Size:
    """The grid of at most so many views whose aspect is nearest, the largest of those."""
    grids = [(rows, cols) for rows in range(1, most + 1) for cols in range(1, most // rows + 1)]
    aspect = math.log(size[1] / size[0])
    return min(grids, key=lambda grid: (abs(aspect - math.log(grid[1] / grid[0])), -grid[0] * grid[1]))


def _fit_area(height: int, width: int, limits: PlannerLimits) -> Size:
    """Rows and columns of patches of about the area of a view in an aspect, rounded down."""
    ratio = width / height
    rows = int(limits.view_size / math.sqrt(ratio))
    patches = (rows // limits.patch_size, int(rows * ratio) // limits.patch_size)
    return tuple(min(max(number, 1), limits.patch_grid**2) for number in patches)  # type: ignore[return-value]

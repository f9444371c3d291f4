"""What a planner is told and what it answers: limits, views and plans, and the cutting of a canvas into views.

Words used here: a *view* is a square of `view_size` pixels that the vision tower sees; the *global* view shows the
whole image; the *canvas* is the padded enlargement of the image that is cut into *crops*. Sizes are always
(height, width), grids (rows, columns), offsets (top, left).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from .geometry_hires_lmm import Kind, ViewShape


BOX_UNIT = 256
"""Boxes are written in 1/256 source pixel."""

BLACK = (0, 0, 0)
CROPS_LIMIT = 4096
"""Most crops of one image that any setting may ask for."""


Size = tuple[int, int]
Color = tuple[int, int, int]
Box = tuple[int, int, int, int]
Interval = tuple[int, int]


@dataclass(frozen=True)
class PlannerLimits:
    """What a caller may set for every planner; `None` leaves a choice to the planner. A planner with options of its
    own has a subclass of this beside it.

    Args:
        view_size (`int`): Side of a view, pixels.
        patch_size (`int`): Side of a patch of the vision tower, pixels.
        max_crops (`int`, *optional*): Most crops of one image (`slime_release` may exceed it by one).
        unpad (`bool`, *optional*): Whether only patches that show the image enter the sequence.
        global_view (`str`, *optional*): `"squeeze"` distorts the image to the square, `"pad"` keeps its aspect.
        views (`str`): `"all"`, `"global"` (no crops are made) or `"crops"` (the global view adds no tokens).
        square (`str`, *optional*): What is planned and drawn in place of the image, as in LLaVA-1.5: `"pad"`: a square
            of the tower's mean colour with the image in its middle; `"crop"`: the middle square of the image.

    Raises:
        ValueError: If a value has the wrong type or lies outside its range.
    """

    view_size: int = 336
    patch_size: int = 14
    max_crops: int | None = None
    unpad: bool | None = None
    global_view: str | None = None
    views: str = "all"
    square: str | None = None

    def __post_init__(self) -> None:
        check_count("view_size", self.view_size)
        check_count("patch_size", self.patch_size)
        if self.patch_size > self.view_size:
            raise ValueError(f"patch_size={self.patch_size} is larger than view_size={self.view_size}; lower it.")
        if self.max_crops is not None:
            check_count("max_crops", self.max_crops, hint=" To go without crops pass views='global'.")
            if self.max_crops > CROPS_LIMIT:
                raise ValueError(f"max_crops={self.max_crops} is more than {CROPS_LIMIT}; lower it.")
        if not (self.unpad is None or isinstance(self.unpad, bool)):
            raise ValueError(f"unpad={self.unpad!r} must be True, False or None.")
        _check_choice("square", self.square, (None, "pad", "crop"))
        if self.square is not None and self.unpad:
            raise ValueError(f"unpad=True cannot leave out the padding of square={self.square!r}; leave out one.")
        _check_choice("global_view", self.global_view, (None, "squeeze", "pad"))
        _check_choice("views", self.views, ("all", "global", "crops"))

    @property
    def patch_grid(self) -> int:
        """Patches along one side of a view; a remainder of the division is not seen by the tower."""
        return self.view_size // self.patch_size


@dataclass(frozen=True)
class PinpointLimits(PlannerLimits):
    """Limits of planners that choose a canvas from a list of (height, width) in pixels, multiples of `view_size`."""

    pinpoints: Sequence[Size] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pinpoints is not None:
            object.__setattr__(self, "pinpoints", _checked_pinpoints(self.pinpoints, self.view_size))


@dataclass(frozen=True)
class View:
    """One view: its kind, its place in the grid, `box` (top, left, bottom, right in the source image, 1/256 pixel,
    outside the image where padded), `span` (first and past-last row, first and past-last column of its patch grid that
    enter the sequence; one empty axis = no tokens), `patches` (rows and columns of its patch grid), and the number of
    the frame that it shows, 0 in an image."""

    kind: int
    grid_rows: int
    grid_cols: int
    row: int
    col: int
    box: Box
    span: Box
    patches: Size
    frame: int = 0

    @property
    def shape(self) -> ViewShape:
        """What decides the tokens of the view."""
        return ViewShape(self.kind, self.grid_rows, self.grid_cols, self.row, self.col, *self.patches, *self.span)


@dataclass(frozen=True)
class ViewPlan:
    """All geometry of one image or video: the views and how to draw them.

    Args:
        size (`tuple[int, int]`): The source image, or each frame, pixels.
        view_size, patch_size (`int`): Side of a view and of a patch, pixels.
        views (`tuple[View]`): One global view first, then the crops in raster order, then strided views; of a video
            frames in time order, each drawn as a global view is, behind a global view if it has one.
        canvas (`tuple[int, int]`): Size of the canvas, pixels; `(0, 0)` without crops.
        resized, paste (`tuple[int, int]`): Size of the image on the canvas and its offset.
        fill (`tuple[int, int, int]`): Colour of the canvas around the image, RGB.
        global_size, global_paste, global_fill: The same for the square of the global view.
        global_square (`int`, *optional*): Side of a square on which the image is centred at its own scale; the square
            is then interpolated to the global view. `None`: the image is resized, then pasted.
        resample (`tuple[int | None, int | None]`): Pillow filters for global view and canvas the rule asks for; `None`
            where it takes the vision tower's own.
        transposed (`bool`): Whether the canvas is resized with rows and columns exchanged and turned back, which only
            changes how Pillow rounds.
        square (`str`, *optional*): See `PlannerLimits`.
        collage (`int`): How many frames the global view shows side by side, drawn from their own views; 0 = none.
    """

    size: Size
    view_size: int
    patch_size: int
    views: tuple[View, ...]
    canvas: Size
    resized: Size
    paste: Size
    fill: Color
    global_size: Size
    global_paste: Size
    global_fill: Color
    resample: tuple[int | None, int | None]
    transposed: bool = False
    global_square: int | None = None
    square: str | None = None
    collage: int = 0

    @property
    def is_video(self) -> bool:
        """Whether it has frames."""
        return self.views[-1].kind == Kind.FRAME

    @property
    def grid(self) -> Size:
        """Rows and columns of the crops; `(0, 0)` without crops."""
        return self.views[0].grid_rows, self.views[0].grid_cols

    def view_pixels(self, view: View) -> Size:
        """Height and width of a view in pixels: the tower's own size, or as many patches as the view has."""
        if view.patches == (self.patch_grid, self.patch_grid):
            return self.view_size, self.view_size
        return view.patches[0] * self.patch_size, view.patches[1] * self.patch_size

    def whole(self, side: int) -> tuple[Size, Size]:
        """Size and offset of the image on a square of another side that shows what the global view shows."""
        scales = [side / pixels for pixels in self.view_pixels(self.views[0])]
        start, stop = (
            [round(edge * scale) for edge, scale in zip(edges, scales, strict=True)]
            for edges in (
                self.global_paste,
                [sum(pair) for pair in zip(self.global_paste, self.global_size, strict=True)],
            )
        )
        stop = [min(max(stop[axis], start[axis] + 1), side) for axis in (0, 1)]
        start = [min(start[axis], stop[axis] - 1) for axis in (0, 1)]
        return (stop[0] - start[0], stop[1] - start[1]), (start[0], start[1])

    @property
    def patch_grid(self) -> int:
        """Patches along one side of a view."""
        return self.view_size // self.patch_size


@dataclass(frozen=True)
class Canvas:
    """A rule's answer before it is cut into views: rows and columns of crops, size and offset of the image on them;
    `rows` and `cols` are the stitched patches that enter, `None` for the patches that hold image pixels."""

    grid: Size
    resized: Size
    paste: Size
    fill: Color = BLACK
    rows: Interval | None = None
    cols: Interval | None = None
    transposed: bool = False


def assemble(
    size: Size,
    limits: PlannerLimits,
    canvas: Canvas,
    global_view: str,
    unpad: bool = False,
    resample: tuple[int | None, int | None] = (None, None),
    truncate_global: bool = False,
    global_square: int | None = None,
) -> ViewPlan:
    """Cut a canvas into views, put the global view before them and apply the caller's switches."""
    side = limits.view_size
    unpad = unpad if limits.unpad is None else limits.unpad
    grid = (0, 0) if limits.views == "global" else canvas.grid
    padded = (limits.global_view or global_view) == "pad"
    global_size = _fit_square(size, side, truncate_global) if padded else (side, side)
    global_paste = ((side - global_size[0]) // 2, (side - global_size[1]) // 2)
    global_square = global_square if padded else None
    first = _global_view(size, limits, grid, global_size, global_paste, global_square, unpad)
    return ViewPlan(
        size=size,
        view_size=side,
        patch_size=limits.patch_size,
        views=(first, *_crop_views(size, limits, grid, canvas, unpad)),
        canvas=(grid[0] * side, grid[1] * side),
        resized=canvas.resized if grid[0] else (0, 0),
        paste=canvas.paste if grid[0] else (0, 0),
        fill=canvas.fill,
        global_size=global_size,
        global_paste=global_paste,
        global_fill=BLACK,
        resample=resample,
        transposed=canvas.transposed,
        global_square=global_square,
    )


def _global_view(
    size: Size,
    limits: PlannerLimits,
    grid: Size,
    global_size: Size,
    global_paste: Size,
    global_square: int | None,
    unpad: bool,
) -> View:
    drawn, paste, side = global_size, global_paste, limits.view_size
    if global_square is not None:
        drawn, paste, side = size, square_paste(size, global_square), global_square
    edges = [source_edges(size[axis], drawn[axis], paste[axis], (0, side)) for axis in (0, 1)]
    spans = [(0, limits.patch_grid)] * 2
    if unpad:
        spans = [_pixel_span(global_paste[axis], global_size[axis], 0, limits) for axis in (0, 1)]
    span = (0, 0, 0, 0) if limits.views == "crops" else (*spans[0], *spans[1])
    box = (edges[0][0], edges[1][0], edges[0][1], edges[1][1])
    return View(Kind.GLOBAL, *grid, 0, 0, box, span, (limits.patch_grid, limits.patch_grid))


def place_square(plan: ViewPlan, size: Size) -> ViewPlan:
    """The plan of an image of a size, from the plan of the square around its middle."""
    top, left = (BOX_UNIT * start for start in square_paste(size, plan.size[0]))
    boxes = [(view.box[0] - top, view.box[1] - left, view.box[2] - top, view.box[3] - left) for view in plan.views]
    views = tuple(replace(view, box=box) for view, box in zip(plan.views, boxes, strict=True))
    return replace(plan, size=size, views=views)


def square_paste(size: Size, side: int) -> Size:
    """Offset of an image that is centred on a square."""
    return (side - size[0]) // 2, (side - size[1]) // 2


def _crop_views(size: Size, limits: PlannerLimits, grid: Size, canvas: Canvas, unpad: bool) -> list[View]:
    if grid == (0, 0):
        return []
    side, patches = limits.view_size, limits.patch_grid
    edges, spans = [], []
    for axis, kept in ((0, canvas.rows), (1, canvas.cols)):
        cuts = [index * side for index in range(grid[axis] + 1)]
        edges.append(source_edges(size[axis], canvas.resized[axis], canvas.paste[axis], cuts))
        if not unpad:
            spans.append([(0, patches)] * grid[axis])
        elif kept is None:
            pixels = (canvas.paste[axis], canvas.resized[axis])
            spans.append([_pixel_span(*pixels, index, limits) for index in range(grid[axis])])
        else:
            spans.append([_clip_interval(kept, index * patches, patches) for index in range(grid[axis])])
    views = []
    for row, col in product(range(grid[0]), range(grid[1])):
        box = (edges[0][row], edges[1][col], edges[0][row + 1], edges[1][col + 1])
        views.append(View(Kind.CROP, *grid, row, col, box, (*spans[0][row], *spans[1][col]), (patches, patches)))
    return views


def source_edges(source: int, resized: int, offset: int, cuts: Sequence[int]) -> list[int]:
    """Canvas positions of one axis as source positions in 1/256 pixel, rounded half up in integers."""
    return [(2 * (cut - offset) * source * BOX_UNIT + resized) // (2 * resized) for cut in cuts]


def _pixel_span(offset: int, length: int, index: int, limits: PlannerLimits) -> Interval:
    """Patches of the view number `index` of one axis that hold any of the pixels `offset` to `offset + length`."""
    start, end = _clip_interval((offset, offset + length), index * limits.view_size, limits.view_size)
    if start == end:
        return 0, 0
    last = limits.patch_grid
    return min(start // limits.patch_size, last), min(-(-end // limits.patch_size), last)


def _clip_interval(interval: Interval, start: int, length: int) -> Interval:
    """The part of an interval inside `start` to `start + length`, counted from `start`; `(0, 0)` if there is none."""
    first = min(max(interval[0] - start, 0), length)
    last = min(max(interval[1] - start, 0), length)
    return (first, last) if first < last else (0, 0)


def fit_inside(size: Size, target: Size) -> Size:
    """The largest size of the same aspect inside another."""
    height_scale, width_scale = target[0] / size[0], target[1] / size[1]
    if width_scale < height_scale:
        return min(math.ceil(size[0] * width_scale), target[0]), target[1]
    return target[0], min(math.ceil(size[1] * height_scale), target[1])


def _fit_square(size: Size, side: int, truncate: bool) -> Size:
    if not truncate:
        return fit_inside(size, (side, side))
    longest = max(size)
    return max(1, size[0] * side // longest), max(1, size[1] * side // longest)


def checked_size(height: int, width: int) -> Size:
    """The size of an image, in integers of at least 1."""
    for name, value in (("height", height), ("width", width)):
        check_count(name, value)
    return int(height), int(width)


def check_count(name: str, value: int, hint: str = "") -> None:
    """Refuse what is no integer of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1.{hint}")


def _check_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if not (value is None or isinstance(value, str)) or value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.")


def _checked_pinpoints(pinpoints: Sequence[Size], side: int) -> tuple[Size, ...]:
    if isinstance(pinpoints, str) or not isinstance(pinpoints, Sequence) or not pinpoints:
        raise ValueError(f"pinpoints={pinpoints!r} must be a non-empty list of (height, width) in pixels.")
    for pinpoint in pinpoints:
        if isinstance(pinpoint, str) or not isinstance(pinpoint, Sequence) or len(pinpoint) != 2:
            raise ValueError(f"pinpoints holds {pinpoint!r}; every entry must be (height, width) in pixels.")
        if any(type(value) is not int or value < side or value % side for value in pinpoint):
            raise ValueError(f"pinpoints holds {tuple(pinpoint)}; its sides must be multiples of view_size={side}.")
        if pinpoint[0] * pinpoint[1] > CROPS_LIMIT * side**2:
            raise ValueError(f"pinpoints holds {tuple(pinpoint)}, which is more than {CROPS_LIMIT} crops of {side}.")
    return tuple((pinpoint[0], pinpoint[1]) for pinpoint in pinpoints)

"""How an image is cut into views: one pure function per published slicing rule.

Words used here: a *view* is a square of `view_size` pixels that the vision tower sees; the *global* view shows the
whole image; the *canvas* is the padded enlargement of the image that is cut into *crops*. Sizes are always
(height, width), grids (rows, columns), offsets (top, left).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from .geometry_hires_lmm import Kind, ViewShape
from .own_parts_hires_lmm import as_name, is_own, own_class, refusal


BOX_UNIT = 256
"""Boxes are written in 1/256 source pixel."""

LANCZOS, BILINEAR, BICUBIC = 1, 2, 3
"""Filter numbers of Pillow."""

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
PAPER_GRID_SIDE = 6
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

    Raises:
        ValueError: If a value has the wrong type or lies outside its range.
    """

    view_size: int = 336
    patch_size: int = 14
    max_crops: int | None = None
    unpad: bool | None = None
    global_view: str | None = None
    views: str = "all"

    def __post_init__(self) -> None:
        _check_count("view_size", self.view_size)
        _check_count("patch_size", self.patch_size)
        if self.patch_size > self.view_size:
            raise ValueError(f"patch_size={self.patch_size} is larger than view_size={self.view_size}; lower it.")
        if self.max_crops is not None:
            _check_count("max_crops", self.max_crops, hint=" To go without crops pass views='global'.")
            if self.max_crops > CROPS_LIMIT:
                raise ValueError(f"max_crops={self.max_crops} is more than {CROPS_LIMIT}; lower it.")
        if not (self.unpad is None or isinstance(self.unpad, bool)):
            raise ValueError(f"unpad={self.unpad!r} must be True, False or None.")
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
    enter the sequence; one empty axis = no tokens) and `patches` (rows and columns of its patch grid)."""

    kind: int
    grid_rows: int
    grid_cols: int
    row: int
    col: int
    box: Box
    span: Box
    patches: Size

    @property
    def shape(self) -> ViewShape:
        """What decides the tokens of the view."""
        return ViewShape(self.kind, self.grid_rows, self.grid_cols, self.row, self.col, *self.patches, *self.span)


@dataclass(frozen=True)
class ViewPlan:
    """All geometry of one image: the views and how to draw them.

    Args:
        size (`tuple[int, int]`): The source image, pixels.
        view_size, patch_size (`int`): Side of a view and of a patch, pixels.
        views (`tuple[View]`): One global view first, then the crops in raster order.
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

    @property
    def grid(self) -> Size:
        """Rows and columns of the crops; `(0, 0)` without crops."""
        return self.views[0].grid_rows, self.views[0].grid_cols

    def view_pixels(self, view: View) -> Size:
        """Height and width of a view in pixels: the tower's own size, or as many patches as the view has."""
        if view.patches == (self.patch_grid, self.patch_grid):
            return self.view_size, self.view_size
        return view.patches[0] * self.patch_size, view.patches[1] * self.patch_size

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


def plan_slime(height: int, width: int, limits: PinpointLimits) -> ViewPlan:
    """The rule of the SliME paper: the best fitting grid of at most 6 x 6 views, or the best of `pinpoints`.

    `max_crops` is 1 to 36 (default 36); the image is centred on a black canvas, the global view is padded.

    Source: SliME, huggingface.co/papers/2406.08487, section 3.
    """
    size, side = _checked_size(height, width), limits.view_size
    candidates = limits.pinpoints
    if candidates is None:
        most = _resolved_max_crops(limits, default=36, lowest=1, highest=PAPER_GRID_SIDE**2, planner="slime")
        grids = [(rows, cols) for cols in range(1, PAPER_GRID_SIDE + 1) for rows in range(1, PAPER_GRID_SIDE + 1)]
        candidates = [(rows * side, cols * side) for rows, cols in grids if rows * cols <= most]
    else:
        candidates = _within_max_crops(candidates, limits)
    canvas = _fit_canvas(size, _best_resolution(size, candidates), side)
    return assemble(size, limits, canvas, global_view="pad")


def plan_slime_release(height: int, width: int, limits: PlannerLimits) -> ViewPlan:
    """The rule SliME's released weights were trained with: about as many crops as the image has view areas.

    `max_crops` is at least 2 (default 6); as released, one crop more occurs (7x1, 1x7). The image is centred on a
    black canvas, the global view is squeezed.

    Source: github.com/yfzhang114/SliME at 5c89ec9.
    """
    size, side = _checked_size(height, width), limits.view_size
    most = _resolved_max_crops(limits, default=6, lowest=2, highest=None, planner="slime_release")
    count = max(2, min(most, -(-height * width // side**2)))
    candidates = [
        (number // cols * side, cols * side)
        for number in (count - 1, count, count + 1)
        if number > 1
        for cols in range(1, number + 1)
        if number % cols == 0
    ]
    canvas = _fit_canvas(size, _best_resolution(size, candidates), side)
    return assemble(size, limits, canvas, global_view="squeeze")


def plan_multiple(height: int, width: int, limits: PlannerLimits) -> ViewPlan:
    """The image at its own scale, padded with black at bottom and right to the next multiple of the view size.

    `max_crops` is at least 1 (default 36); the global view is squeezed.

    Source: VLSA, openreview.net/forum?id=RLhEGWt94S. Differs: the paper names neither the side of the padding nor a
        limit; an image that needs more than `max_crops` is shrunk by the smallest amount that fits.
    """
    size, side = _checked_size(height, width), limits.view_size
    most = _resolved_max_crops(limits, default=36, lowest=1, highest=None, planner="multiple")
    resized = size
    if -(-height // side) * -(-width // side) > most:
        resized = _shrink_to_grid(size, side, most)
    grid = (-(-resized[0] // side), -(-resized[1] // side))
    return assemble(size, limits, Canvas(grid, resized, (0, 0)), global_view="squeeze")


def plan_hd(height: int, width: int, limits: PlannerLimits) -> ViewPlan:
    """As many views along the longest side as keep the whole grid within `max_crops` (at least 1, default 9).

    White canvas padded across the long side, the global view is padded with black. A square image, or one that is
    smaller than a view, becomes its global view by bicubic interpolation without antialiasing.

    Source: github.com/tenghuilee/ScalingCapFusedVisionLM at 42a2596 (huggingface.co/papers/2412.18387). Differs: a
        short side that the released rule rounds to 0 is one pixel in one row of crops here.
    """
    size, side = _checked_size(height, width), limits.view_size
    most = _resolved_max_crops(limits, default=9, lowest=1, highest=None, planner="hd")
    portrait = height > width
    ratio = height / width if portrait else width / height
    steps = 1
    while (steps + 1) * math.ceil((steps + 1) / ratio) <= most:
        steps += 1
    long_side = steps * side
    short_side = max(1, int(long_side / ratio))
    across = -(-short_side // side)
    margin = (across * side - short_side) // 2
    if portrait:
        canvas = Canvas((steps, across), (long_side, short_side), (0, margin), WHITE, transposed=True)
    else:
        canvas = Canvas((across, steps), (short_side, long_side), (margin, 0), WHITE)
    shrinks = height != width and max(size) > side
    resample = (LANCZOS if shrinks else BICUBIC, BILINEAR)
    square = None if shrinks else max(size)
    return assemble(
        size, limits, canvas, global_view="pad", resample=resample, truncate_global=True, global_square=square
    )


def plan_llava_next(height: int, width: int, limits: PinpointLimits) -> ViewPlan:
    """As transformers: the best fitting canvas of `pinpoints` (default 1x2, 2x1, 2x2, 3x1, 1x3 views), unpadded.

    `max_crops` leaves out larger ones. Unpadding (`unpad`, default True) cuts the same number of patch rows or
    columns on both sides of the stitched map and can leave none of them for a very long image, as in transformers.

    Source: LLaVA-NeXT as in transformers (`select_best_resolution`, `unpad_image`).
    """
    size, side = _checked_size(height, width), limits.view_size
    candidates = limits.pinpoints
    if candidates is None:
        candidates = [(rows * side, cols * side) for rows, cols in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    best = _best_resolution(size, _within_max_crops(candidates, limits))
    canvas = _fit_canvas(size, best, side)
    rows, cols = _llava_next_intervals(size, canvas.grid, limits.patch_grid)
    canvas = Canvas(canvas.grid, canvas.resized, canvas.paste, canvas.fill, rows, cols)
    return assemble(size, limits, canvas, global_view="squeeze", unpad=True)


@dataclass(frozen=True)
class Planner:
    """One slicing rule: `(height, width, options) -> ViewPlan` in pixels, and the class of its options,
    `PlannerLimits` or a subclass with fields of its own. What is out of range is a ValueError. A user's own one is a
    subclass with `Options` and a static method `plan`."""

    plan: Callable[[int, int, Any], ViewPlan]
    options: type[PlannerLimits] = PlannerLimits
    Options = PlannerLimits

    def __call__(self, height: int, width: int, options: PlannerLimits) -> ViewPlan:
        """Plan one image."""
        return self.plan(height, width, options)

    def build_options(self, name: str, values: dict[str, Any]) -> PlannerLimits:
        """Check options by name; None leaves a choice to the planner."""
        known = [each.name for each in fields(self.options)]
        unknown = [key for key, value in values.items() if key not in known and value is not None]
        if unknown:
            raise ValueError(f"planner={name!r} takes no {', '.join(unknown)}; its options are {', '.join(known)}.")
        return self.options(**{key: value for key, value in values.items() if key in known})


PLANNERS: dict[str, Planner] = {
    "slime": Planner(plan_slime, PinpointLimits),
    "slime_release": Planner(plan_slime_release),
    "multiple": Planner(plan_multiple),
    "hd": Planner(plan_hd),
    "llava_next": Planner(plan_llava_next, PinpointLimits),
}


def find_planner(planner: Any) -> tuple[str, Planner, dict[str, Any]]:
    """Name, rule and own options of a planner given by name or class, or as `{"name": name, **options}`."""
    values = dict(planner) if isinstance(planner, dict) else {"name": planner}
    name = as_name(values.pop("name", None))
    own = own_class(name, "Planner")
    if own is not None and not hasattr(own, "plan"):
        raise ValueError(f"The planner {name} has no static method plan(height, width, options); write one.")
    if own is not None:
        return name, own(own.plan, own.Options), values
    if is_own(name):
        raise ValueError(refusal(name))
    if not isinstance(name, str) or name not in PLANNERS:
        raise ValueError(f"planner={planner!r} is unknown; choose one of {', '.join(PLANNERS)}.")
    return name, PLANNERS[name], values


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
    edges = [_source_edges(size[axis], drawn[axis], paste[axis], (0, side)) for axis in (0, 1)]
    spans = [(0, limits.patch_grid)] * 2
    if unpad:
        spans = [_pixel_span(global_paste[axis], global_size[axis], 0, limits) for axis in (0, 1)]
    span = (0, 0, 0, 0) if limits.views == "crops" else (*spans[0], *spans[1])
    box = (edges[0][0], edges[1][0], edges[0][1], edges[1][1])
    return View(Kind.GLOBAL, *grid, 0, 0, box, span, (limits.patch_grid, limits.patch_grid))


def square_paste(size: Size, side: int) -> Size:
    """Offset of an image that is centred on a square."""
    return (side - size[0]) // 2, (side - size[1]) // 2


def _crop_views(size: Size, limits: PlannerLimits, grid: Size, canvas: Canvas, unpad: bool) -> list[View]:
    side, patches = limits.view_size, limits.patch_grid
    edges, spans = [], []
    for axis, kept in ((0, canvas.rows), (1, canvas.cols)):
        cuts = [index * side for index in range(grid[axis] + 1)]
        edges.append(_source_edges(size[axis], canvas.resized[axis], canvas.paste[axis], cuts))
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


def _source_edges(source: int, resized: int, offset: int, cuts: Sequence[int]) -> list[int]:
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


def _llava_next_intervals(size: Size, grid: Size, patches: int) -> tuple[Interval, Interval]:
    """Rows and columns of the stitched patch map that unpadding leaves, in the order of operations of transformers."""
    height, width = size
    rows, cols = grid[0] * patches, grid[1] * patches
    if width / height > cols / rows:
        kept = int(round(height * (cols / width), 7))
        cut = (rows - kept) // 2
        return (cut, rows - cut), (0, cols)
    kept = int(round(width * (rows / height), 7))
    cut = (cols - kept) // 2
    return (0, rows), (cut, cols - cut)


def _best_resolution(size: Size, candidates: Sequence[Size]) -> Size:
    """The canvas that keeps most pixels of the image and, among those, wastes least; the first one wins ties."""
    height, width = size
    best, best_key = candidates[0], None
    for canvas_height, canvas_width in candidates:
        scale = min(canvas_width / width, canvas_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        key = (kept, kept - canvas_width * canvas_height)
        if best_key is None or key > best_key:
            best, best_key = (canvas_height, canvas_width), key
    return best


def _fit_canvas(size: Size, resolution: Size, side: int) -> Canvas:
    """Scale the image to touch the canvas and centre it."""
    resized = _fit_inside(size, resolution)
    paste = ((resolution[0] - resized[0]) // 2, (resolution[1] - resized[1]) // 2)
    return Canvas((resolution[0] // side, resolution[1] // side), resized, paste)


def _fit_inside(size: Size, target: Size) -> Size:
    height_scale, width_scale = target[0] / size[0], target[1] / size[1]
    if width_scale < height_scale:
        return min(math.ceil(size[0] * width_scale), target[0]), target[1]
    return target[0], min(math.ceil(size[1] * height_scale), target[1])


def _fit_square(size: Size, side: int, truncate: bool) -> Size:
    if not truncate:
        return _fit_inside(size, (side, side))
    longest = max(size)
    return max(1, size[0] * side // longest), max(1, size[1] * side // longest)


def _shrink_to_grid(size: Size, side: int, most: int) -> Size:
    """The largest size of the same aspect whose grid has at most `most` views."""
    best, best_scale = (0, 0), 0.0
    for rows in range(1, min(most, -(-size[0] // side)) + 1):
        target = (rows * side, most // rows * side)
        scale = min(target[0] / size[0], target[1] / size[1], 1.0)
        if scale > best_scale:
            height, width = (max(1, min(int(size[axis] * scale + 1e-6), target[axis])) for axis in (0, 1))
            best, best_scale = (height, width), scale
    return best


def _checked_size(height: int, width: int) -> Size:
    for name, value in (("height", height), ("width", width)):
        _check_count(name, value)
    return int(height), int(width)


def _check_count(name: str, value: int, hint: str = "") -> None:
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


def _resolved_max_crops(limits: PlannerLimits, default: int, lowest: int, highest: int | None, planner: str) -> int:
    most = default if limits.max_crops is None else limits.max_crops
    if most < lowest or (highest is not None and most > highest):
        bounds = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise ValueError(f"max_crops={most} is out of range: planner='{planner}' takes {bounds}.")
    return most


def _within_max_crops(candidates: Sequence[Size], limits: PlannerLimits) -> Sequence[Size]:
    if limits.max_crops is None:
        return candidates
    area = limits.max_crops * limits.view_size**2
    kept = [candidate for candidate in candidates if candidate[0] * candidate[1] <= area]
    if not kept:
        least = min(candidate[0] * candidate[1] for candidate in candidates) // limits.view_size**2
        raise ValueError(f"max_crops={limits.max_crops} leaves no canvas: the smallest of the list has {least} crops.")
    return kept

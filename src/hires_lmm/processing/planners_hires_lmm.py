"""How an image is cut into views: one pure function per published slicing rule."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from .own_parts_hires_lmm import as_name, is_own, own_class, refusal
from .slices_hires_lmm import DualLimits, plan_dual, plan_llava_uhd
from .video_planners_hires_lmm import FramesLimits, ThumbnailLimits, plan_frames, plan_thumbnail
from .view_plans_hires_lmm import (
    Canvas,
    Interval,
    PinpointLimits,
    PlannerLimits,
    Size,
    ViewPlan,
    assemble,
    checked_size,
    fit_inside,
    place_square,
)


LANCZOS, BILINEAR, BICUBIC = 1, 2, 3
"""Filter numbers of Pillow."""

WHITE = (255, 255, 255)
PAPER_GRID_SIDE = 6


def plan_slime(height: int, width: int, limits: PinpointLimits) -> ViewPlan:
    """The rule of the SliME paper: the best fitting grid of at most 6 x 6 views, or the best of `pinpoints`.

    `max_crops` is 1 to 36 (default 36); the image is centred on a black canvas, the global view is padded.

    Source: SliME, huggingface.co/papers/2406.08487, section 3.
    """
    size, side = checked_size(height, width), limits.view_size
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
    size, side = checked_size(height, width), limits.view_size
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
    size, side = checked_size(height, width), limits.view_size
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
    size, side = checked_size(height, width), limits.view_size
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
    size, side = checked_size(height, width), limits.view_size
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
    subclass with `Options` and a static method `plan`. One that `reads_frames` plans videos: it is called with the
    number of frames as a fourth argument."""

    plan: Callable[..., ViewPlan]
    options: type[PlannerLimits] = PlannerLimits
    reads_frames: bool = False
    Options = PlannerLimits

    def __call__(self, height: int, width: int, options: PlannerLimits, frames: int = 1) -> ViewPlan:
        """Plan one image, or one video of so many frames."""
        more = (frames,) if self.reads_frames else ()
        if options.square is None:
            return self.plan(height, width, options, *more)
        size = checked_size(height, width)
        side = max(size) if options.square == "pad" else min(size)
        plan = place_square(self.plan(side, side, options, *more), size)
        return replace(plan, square=options.square)

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
    "dual": Planner(plan_dual, DualLimits),
    "llava_uhd": Planner(plan_llava_uhd),
}

VIDEO_PLANNERS: dict[str, Planner] = {
    "frames": Planner(plan_frames, FramesLimits, reads_frames=True),
    "thumbnail": Planner(plan_thumbnail, ThumbnailLimits, reads_frames=True),
}
"""Rules for videos; as the planner of images they take an image for a video of one frame."""


def find_planner(planner: Any) -> tuple[str, Planner, dict[str, Any]]:
    """Name, rule and own options of a planner given by name or class, or as `{"name": name, **options}`."""
    values = dict(planner) if isinstance(planner, dict) else {"name": planner}
    name = as_name(values.pop("name", None))
    own = own_class(name, "Planner")
    if own is not None and not hasattr(own, "plan"):
        raise ValueError(f"The planner {name} has no static method plan(height, width, options); write one.")
    if own is not None:
        return name, own(own.plan, own.Options, own.reads_frames), values
    if is_own(name):
        raise ValueError(refusal(name))
    known = {**PLANNERS, **VIDEO_PLANNERS}
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"planner={planner!r} is unknown; choose one of {', '.join(known)}.")
    return name, known[name], values


def find_video_planner(planner: Any) -> tuple[str, Planner, dict[str, Any]]:
    """As `find_planner`, for one that reads frames."""
    name, found, options = find_planner(planner)
    if not found.reads_frames:
        raise ValueError(f"video_planner={planner!r} plans images; choose one of {', '.join(VIDEO_PLANNERS)}.")
    return name, found, options


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
    resized = fit_inside(size, resolution)
    paste = ((resolution[0] - resized[0]) // 2, (resolution[1] - resized[1]) // 2)
    return Canvas((resolution[0] // side, resolution[1] // side), resized, paste)


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

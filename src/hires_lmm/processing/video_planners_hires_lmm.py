"""How a video becomes views: each frame a view, in a grid in time order, and what may stand before them.

Counting from sizes calls these as well, without torch.
"""

import math
from dataclasses import dataclass, replace

from .geometry_hires_lmm import Kind
from .view_plans_hires_lmm import (
    BOX_UNIT,
    CROPS_LIMIT,
    Canvas,
    PlannerLimits,
    Size,
    ViewPlan,
    assemble,
    check_count,
    checked_size,
)


@dataclass(frozen=True)
class FramesLimits(PlannerLimits):
    """Options of `frames`; of `PlannerLimits` it takes `global_view` and `unpad`, for each frame, and `square`.

    Args:
        grid (`tuple[int, int]`, *optional*): Rows and columns in which the frames lie, in time order row by row; None:
            one column. With several columns and `crop_order="raster"` the sequence reads the whole map row by row.
        overview (`bool`): Whether a global view stands before the frames. It shows the first one; the view op
            `mean_global` fills it with the mean of all.
        min_frames (`int`, *optional*): A video of T fewer frames has each of them int(min_frames / T) + 1 times in
            place, of which the first `min_frames` count, as in PLLaVA; so an image has its one frame as often.

    Raises:
        ValueError: If a value has the wrong type or lies outside its range.
    """

    grid: Size | None = None
    overview: bool = False
    min_frames: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, idle in (("max_crops", None), ("views", "all")):
            if getattr(self, name) != idle:
                raise ValueError(f"{name}={getattr(self, name)!r} is of no meaning for frames; leave it out.")
        if self.grid is not None:
            if not isinstance(self.grid, (list, tuple)) or len(self.grid) != 2:
                raise ValueError(f"grid={self.grid!r} must be (rows, columns) of frames, or None.")
            for side in self.grid:
                check_count("grid", side)
            object.__setattr__(self, "grid", tuple(self.grid))
        if not isinstance(self.overview, bool):
            raise ValueError(f"overview={self.overview!r} must be True or False.")
        if self.min_frames is not None:
            check_count("min_frames", self.min_frames)


@dataclass(frozen=True)
class ThumbnailLimits(FramesLimits):
    """Options of `thumbnail`: those of `frames`, and how many frames the `collage` shows."""

    collage: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("collage", self.collage)
        if self.overview:
            raise ValueError("planner='thumbnail' has its collage as the global view; leave out overview.")
        rows = collage_grid(self.collage)[0]
        if rows > self.view_size:
            raise ValueError(
                f"collage={self.collage} gives {rows} rows in a view of {self.view_size} pixels; lower it."
            )


def plan_frames(height: int, width: int, limits: FramesLimits, frames: int = 1) -> ViewPlan:
    """Every frame is a view of kind 3, squeezed to the square, or padded with `global_view="pad"`.

    Source: PLLaVA, huggingface.co/papers/2404.16994, and its released code (`min_frames`); SliME
        (github.com/yfzhang114/SliME at 5c89ec9: `grid=(2, 4)`, `overview`).
    """
    size, number = checked_size(height, width), repeated(frames, limits.min_frames)
    rows, cols = (len(number), 1) if limits.grid is None else limits.grid
    if len(number) > rows * cols:
        raise ValueError(
            f"grid={limits.grid} has no room for {len(number)} frames; pass num_frames={rows * cols}, not fps."
        )
    if len(number) > CROPS_LIMIT:
        raise ValueError(f"A video has {len(number)} frames, more than {CROPS_LIMIT}; pass num_frames=....")
    plan = assemble(size, limits, Canvas((0, 0), (0, 0), (0, 0)), global_view="squeeze")
    whole = replace(plan.views[0], grid_rows=rows, grid_cols=cols)
    shown = [
        replace(whole, kind=int(Kind.FRAME), row=place // cols, col=place % cols, frame=frame)
        for place, frame in enumerate(number)
    ]
    return replace(plan, views=(whole, *shown) if limits.overview else tuple(shown))


def plan_thumbnail(height: int, width: int, limits: ThumbnailLimits, frames: int = 1) -> ViewPlan:
    """`frames`, and before them a collage of some as the global view, equidistant, without their aspect.

    Source: TS-LLaVA, huggingface.co/papers/2411.11066, and its released code (tingyu215/TS-LLaVA at 03cdeae). Differs:
        a collage that is smaller than the view, where its side does not divide, is filled up with zeros.
    """
    plan = plan_frames(height, width, limits, frames)
    if frames < limits.collage:
        raise ValueError(
            f"collage={limits.collage} needs as many frames, but a video has {frames}; raise num_frames, pass a "
            f"longer one, or video_planner={{'name': 'thumbnail', 'collage': {frames}}}."
        )
    first, patches = plan.views[0], limits.patch_grid
    whole = (0, 0, BOX_UNIT * height, BOX_UNIT * width)
    thumbnail = replace(first, kind=int(Kind.GLOBAL), row=0, col=0, box=whole, span=(0, patches, 0, patches), frame=0)
    return replace(plan, views=(thumbnail, *plan.views), collage=limits.collage)


def repeated(frames: int, least: int | None) -> list[int]:
    """The frame that each view shows."""
    check_count("frames", frames)
    if least is None or frames >= least:
        return list(range(frames))
    times = least // frames + 1
    return [place // times for place in range(least)]


def collage_grid(number: int) -> Size:
    """Rows and columns of a collage: the pair of factors with the least difference, more rows than columns."""
    cols = next(cols for cols in range(math.isqrt(number), 0, -1) if number % cols == 0)
    return number // cols, cols

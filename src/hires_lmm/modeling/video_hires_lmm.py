"""Operations on the frames of a video: pooled in space and time, averaged into a global view, sampled."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from .bases_hires_lmm import HiResLmmViewOp, PartContext, Traits
from .carriers_hires_lmm import ViewFeatures, ViewGroup
from .geometry_hires_lmm import KINDS, MAIN_TOWER, WHOLE_KINDS, Grid, Kind, kinds_on


GLOBAL, FRAMES = (KINDS["global"], MAIN_TOWER), (KINDS["frames"], MAIN_TOWER)


def check_shape(shape: Any) -> None:
    """Refuse what is not (frames, rows, columns)."""
    if len(shape) != 3 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in shape):
        raise ValueError(f"shape={shape!r} must be [frames, rows, columns], integers of at least 1.")


def pool_frames(
    states: torch.Tensor, grid: tuple[int, int], counts: Sequence[int], shape: Sequence[int]
) -> torch.Tensor:
    """Means over frames, rows and columns, bins may overlap: `(n, L, C)` of runs of `counts` frames -> `(m, l, C)`."""
    volumes = states.unflatten(1, grid).permute(3, 0, 1, 2).split(list(counts), dim=1)
    pooled = [nn.functional.adaptive_avg_pool3d(own, tuple(shape)) for own in volumes if own.shape[1]]
    return torch.cat([own.flatten(2).permute(1, 2, 0) for own in pooled])


def pooled_rows(rows: tuple[int, ...], counts: Sequence[int], number: int) -> tuple[int, ...]:
    """Row of the first frame behind each of `number` pooled ones, for runs of `counts` frames."""
    starts, pooled = [sum(counts[:place]) for place in range(len(counts))], Grid(1, 1, num_views=number)
    return tuple(rows[s + p] for s, count in zip(starts, counts, strict=True) for p in pooled.first_views(count))


class HiResLmmPool3d(HiResLmmViewOp):
    """Pools the tokens of all frames of a video to `shape`; what stands alone is pooled as if it were repeated.

    Source: PLLaVA, huggingface.co/papers/2404.16994, which pools behind the adapter. Ours: any number of frames.
    """

    needs_equal_views = True

    @strict
    @dataclass
    class Options:
        """Options of `pool3d`.

        Args:
            shape (`list[int]`): Frames, rows and columns afterwards.
            on (`str` or `list[str]`): Kinds of views that are pooled, those of an image together.
        """

        shape: list = field(default_factory=lambda: [16, 12, 12])
        on: str | list = "frames"

        def __post_init__(self) -> None:
            check_shape(self.shape)
            kinds_on(self.on)

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """As many views of one grid, whatever entered."""
        frames, rows, cols = options.shape
        traits = super().describe(options, context)
        made = {"rows": rows, "cols": cols, "stride": None, "num_views": frames, "view_stride": 1}
        pooled = {key: replace(context.grids[key], **made) for key in context.keys(options.on)}
        return replace(traits, grids={**traits.grids, **pooled})

    def forward(self, views: ViewFeatures) -> ViewFeatures:
        """Pool `(n, L, C)` to `(frames, rows * columns, C)` for each image that has such views."""
        return views.map(self.options.on, lambda group: self._pool(group, views.counts(group)))

    def _pool(self, group: ViewGroup, counts: list[int]) -> ViewGroup:
        shape = self.options.shape
        rows = pooled_rows(group.rows, counts[:-1], shape[0])
        scores = {
            name: pool_frames(score[..., None], group.grid, counts, shape)[..., 0]
            for name, score in group.scores.items()
        }
        features = pool_frames(group.features, group.grid, counts, shape)
        return replace(group, features=features, grid=tuple(shape[1:]), rows=rows, scores=scores, hidden={})


class HiResLmmMeanGlobal(HiResLmmViewOp):
    """Makes the global view of a video from the features of its frames; pictures keep theirs.

    Source: SliME, huggingface.co/papers/2406.08487, whose page describes the mean over frames, and whose released
    script takes the first.
    """

    needs_equal_views = True

    @strict
    @dataclass
    class Options:
        """Options of `mean_global`.

        Args:
            rule (`str`): `"mean"` over all frames, or the `"first"` one.
        """

        rule: Literal["mean", "first"] = "mean"

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """One global view of every image and video."""
        grids = [context.grids.get(key) for key in (GLOBAL, FRAMES)]
        if None in grids or grids[0].size != grids[1].size:  # type: ignore[union-attr]
            raise ValueError(
                f"mean_global makes global views of frames; both must reach it with one token grid, not {grids}: name "
                "them in layout.order, and put it before parts that change one of them."
            )
        made = replace(grids[0], source=WHOLE_KINDS, num_views=1)  # type: ignore[type-var]
        return Traits({**context.grids, GLOBAL: made}, context.width)

    def forward(self, views: ViewFeatures) -> ViewFeatures:
        """Put a global view `(L, C)` of each video among those of pictures, in the order of the images."""
        whole, frames = views.group("global"), views.group("frames")
        if frames is None or not frames.rows:
            return views
        rest = [group for group in views.groups if group is not whole]
        if whole is None:
            none = {name: score[:0] for name, score in frames.scores.items()}
            whole = replace(frames, kind=KINDS["global"], features=frames.features[:0], rows=(), scores=none)
        counts = views.counts(frames), views.counts(whole)

        def join(shown: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
            *own, _ = shown.split(counts[0])
            *others, idle = given.split(counts[1])
            return torch.cat([*(self._make(a) if len(a) else b[:1] for a, b in zip(own, others, strict=True)), idle])

        rows = [sorted(image.rows(Kind.GLOBAL) + image.rows(Kind.FRAME))[:1] for image in views.images]
        made = replace(
            whole,
            features=join(frames.features, whole.features),
            rows=tuple(row for own in rows for row in own),
            scores={name: join(score, whole.scores[name]) for name, score in frames.scores.items()},
            hidden={},
        )
        return replace(views, groups=[made, *rest])

    def _make(self, frames: torch.Tensor) -> torch.Tensor:
        return frames.mean(dim=0, keepdim=True) if self.options.rule == "mean" else frames[:1]


class HiResLmmSampleTokens(HiResLmmViewOp):
    """Lets `number` of all tokens of the frames of a video enter, evenly spread; which ones, the sizes alone tell.

    Source: TS-LLaVA, huggingface.co/papers/2411.11066. Ours: a video with fewer tokens keeps all.
    """

    @strict
    @dataclass
    class Options:
        """Options of `sample_tokens`.

        Args:
            number (`int`): Most tokens of an image's views of a kind.
            on (`str` or `list[str]`): Kinds of views that are sampled, each kind for itself.
        """

        number: int = 2880
        on: str | list = "frames"

        def __post_init__(self) -> None:
            kinds_on(self.on)
            if self.number < 1:
                raise ValueError(f"number={self.number} must be at least 1.")

    @classmethod
    def output_grid(cls, options: Any, grid: Grid) -> Grid:
        """The same grid; the layout takes the sample."""
        return replace(grid, sample=options.number)

    def forward(self, views: ViewFeatures) -> ViewFeatures:
        """Nothing: the features stay, and the layout places those of the sample."""
        return views

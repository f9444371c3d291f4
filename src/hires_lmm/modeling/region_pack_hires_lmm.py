"""Tokens of regions, in space and over time: a slow and a fast token set of one video (LLaVA-ST)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig

from .attention_hires_lmm import HiResLmmCrossAttention
from .bases_hires_lmm import HiResLmmViewOp, PartContext, Traits, follow_grid
from .carriers_hires_lmm import ViewFeatures, ViewGroup
from .geometry_hires_lmm import KINDS, MAIN_TOWER, Grid, Kind, kinds_on


FRAMES, SLOW = (KINDS["frames"], MAIN_TOWER), (KINDS["detail"], MAIN_TOWER)


def middle(regions: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
    """What (bi)linear resizing by whole factors leaves of regions: `(..., *sides, C)` -> `(..., C)`.

    The point in the middle; along an even side, the mean of the two there.
    """
    for number, side in enumerate(sides):
        dim = regions.ndim - 1 - len(sides) + number
        regions = regions.narrow(dim, (side - 1) // 2, 2 - side % 2).mean(dim=dim, keepdim=True)
    return regions.flatten(-1 - len(sides), -2).squeeze(-2)


def cut_patches(features: torch.Tensor, grid: tuple[int, int], factor: int) -> torch.Tensor:
    """Square regions of a token grid: `(V, rows * cols, C)` -> `(V, regions, factor, factor, C)`, row by row."""
    rows, cols = (side // factor for side in grid)
    cells = features.unflatten(1, (rows, factor, cols, factor)).transpose(2, 3)
    return cells.flatten(1, 2)


class HiResLmmRegionPacker(nn.Module):
    """The point in the middle of a region reads the region, and what it read is added to it.

    Args:
        width (`int`): Of the tokens.
        inner_width (`int`): Of the attention.
    """

    def __init__(self, config: PreTrainedConfig, width: int, inner_width: int, num_heads: int):
        super().__init__()
        self.query_mlp, self.key_mlp, self.value_mlp = (
            nn.Sequential(
                nn.Linear(width, inner_width),
                nn.GELU(),
                nn.Linear(inner_width, inner_width),
                nn.LayerNorm(inner_width),
            )
            for _ in range(3)
        )
        self.attention = HiResLmmCrossAttention(config, inner_width, num_heads)
        self.output = nn.Linear(inner_width, width, bias=False)

    def forward(self, regions: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
        """Pack regions: `(..., *sides, C)` -> `(..., C)`."""
        points, around = middle(regions, sides), regions.flatten(-1 - len(sides), -2)
        queries, cells = points.flatten(0, -2)[:, None], around.flatten(0, -3)
        read = self.attention(self.query_mlp(queries), self.key_mlp(cells), self.value_mlp(cells))
        return points + self.output(read).view_as(points)


class HiResLmmRegionPack(HiResLmmViewOp):
    """Packs the tokens of views region by region. Frames become two token sets, slow and fast.

    Every view is packed in space (27 x 27 tokens -> 9 x 9). Of frames, what that gives is packed over time, so many
    frames to a view of the kind `detail` (slow: few views, many tokens), and once more in space, as views of the kind
    `frames` (fast: many views, few tokens). Other views go through the packer over time alone, each as its own region.

    Source: LLaVA-ST (huggingface.co/papers/2501.08282) and its released code (appletea233/LLaVA-ST at bacf6d6), where
    a video has 100 frames and fast tokens stand before slow ones: `layout.order` says so. Ours: any number of frames
    that the factor divides, even factors too. The released model leaves pictures unpacked (`on="frames"`).
    """

    needs_equal_views = True

    @strict
    @dataclass
    class Options:
        """Options of `region_pack`.

        Args:
            on (`str` or `list[str]`): Kinds of views that are packed.
            spatial_factor (`int`): Rows, and columns, of tokens of a region.
            temporal_factor (`int`): Frames of a region.
            width (`int`): Width of the attention.
            num_heads (`int`): Heads of the attention.
            compat (`str`, *optional*): `"release"`: the fast tokens leave, as the released code writes the embeddings
                of their placeholders over them.
        """

        on: str | list = "all"
        spatial_factor: int = 3
        temporal_factor: int = 5
        width: int = 1024
        num_heads: int = 8
        compat: Literal["release"] | None = None

        def __post_init__(self) -> None:
            kinds_on(self.on)
            for name in ("spatial_factor", "temporal_factor", "width", "num_heads"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        sizes = (context.config, context.width, options.width, options.num_heads)
        self.packer, self.slow_packer = HiResLmmRegionPacker(*sizes), HiResLmmRegionPacker(*sizes)
        self.fast_packer = None
        if FRAMES in context.keys(options.on) and options.compat is None:
            self.fast_packer = HiResLmmRegionPacker(*sizes)

    @classmethod
    def output_grid(cls, options: Any, grid: Grid) -> Grid:
        """Token grid of a view that is packed in space once."""
        factor = options.spatial_factor
        if grid.rows % factor or grid.cols % factor:
            raise ValueError(
                f"region_pack cannot cut {grid.rows}x{grid.cols} tokens into regions of {factor}x{factor}: choose a "
                "spatial_factor that divides both, or another tower size."
            )
        stride = None if grid.stride is None else (factor * grid.stride[0], factor * grid.stride[1])
        return replace(grid, rows=grid.rows // factor, cols=grid.cols // factor, stride=stride)

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """Frames become two kinds of views."""
        packed = super().describe(options, context)
        if FRAMES not in context.keys(options.on):
            return packed
        if SLOW in context.grids:
            raise ValueError("region_pack makes views of the kind 'detail', but another part or tower makes them too.")
        grid = packed.grids[FRAMES]
        slow = replace(grid, source=(KINDS["frames"],), view_stride=options.temporal_factor)
        grids = {key: own for key, own in packed.grids.items() if key != FRAMES} | {SLOW: slow}
        if options.compat is None:
            grids[FRAMES] = cls.output_grid(options, grid)
        return Traits(grids, context.width)

    def forward(self, views: ViewFeatures) -> ViewFeatures:
        """Pack the views that `on` names."""
        groups = []
        for group in views.groups:
            if group.kind not in kinds_on(self.options.on) or group.tower != MAIN_TOWER:
                groups.append(group)
            elif group.key == FRAMES:
                groups += self.pack_frames(views, group)
            else:
                first = self.pack(self.packer, group)
                features = self.slow_packer(first.features[..., None, :], (1,))
                groups.append(replace(first, features=features))
        return replace(views, groups=groups)

    def pack(self, packer: nn.Module, group: ViewGroup) -> ViewGroup:
        """Pack each view of a group in space."""
        factor, grid = self.options.spatial_factor, self.output_grid(self.options, Grid(*group.grid))
        features = packer(cut_patches(group.features, group.grid, factor), (factor, factor))
        return replace(group, features=features, grid=grid.size, scores=follow_grid(group, grid))

    def pack_frames(self, views: ViewFeatures, group: ViewGroup) -> list[ViewGroup]:
        """The slow and the fast tokens of frames."""
        factor = self.options.temporal_factor
        for number, image in enumerate(views.images):
            frames = len(image.rows(Kind.FRAME))
            if frames % factor and image.num_tokens:  # a blank image has none
                raise ValueError(
                    f"Video {number} has {frames} frames, but region_pack joins {factor} at a time; set num_frames to "
                    f"a multiple of {factor}."
                )
        first = self.pack(self.packer, group)
        blanks = -len(first.features) % factor  # behind a blank frame
        clips = torch.cat([first.features, *[first.features[-1:]] * blanks]).unflatten(0, (-1, factor))
        slow = self.slow_packer(clips.transpose(1, 2), (factor,))
        known = {} if blanks else first.scores
        scores = {name: score.unflatten(0, (-1, factor)).mean(dim=1) for name, score in known.items()}
        made = [ViewGroup(SLOW[0], slow, first.grid, group.rows[::factor], scores=scores)]
        if self.fast_packer is not None:
            made.append(self.pack(self.fast_packer, first))
        return made

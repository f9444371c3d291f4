"""View operations that turn the tokens of each view into fewer tokens."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.utils import logging

from .attention_hires_lmm import HiResLmmQueryFormer, square_side
from .views_hires_lmm import PartContext, ViewFeatures


logger = logging.get_logger(__name__)


class HiResLmmViewOp(nn.Module):
    """Base of view operations that treat each view alone.

    Subclasses implement `forward_group` and `output_grid`; options carry `on`. An operation across views overrides
    `forward` and `output_grids` instead.
    """

    options: Any

    @classmethod
    def output_grid(cls, options: Any, grid: tuple[int, int]) -> tuple[int, int]:
        """Token grid of a view after the operation."""
        raise NotImplementedError

    @classmethod
    def output_grids(
        cls, options: Any, global_grid: tuple[int, int], crop_grid: tuple[int, int]
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Token grids of global views and crops after the operation; `(0, 0)` for crops that left.

        Raises:
            ValueError: If the operation is for crops and an earlier one left none.
        """
        if options.on != "global" and 0 in crop_grid:
            raise ValueError(
                f"A view operation with on={options.on!r} stands behind one that leaves no crops; move it before that "
                "one, or set on='global'."
            )
        if options.on != "crops":
            global_grid = cls.output_grid(options, global_grid)
        if options.on != "global":
            crop_grid = cls.output_grid(options, crop_grid)
        return global_grid, crop_grid

    @classmethod
    def is_count_fixed(cls, options: Any) -> bool:
        """Whether every image has the same number of tokens afterwards: one whole global view and no crops."""
        return False

    def forward_group(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Map the features `(V, L, C)` of views that share a grid."""
        raise NotImplementedError

    def forward(self, views: ViewFeatures) -> ViewFeatures:
        """Apply the operation to the views it is configured for."""
        changes: dict[str, Any] = {}
        if self.options.on != "crops":
            changes["global_features"] = self.forward_group(views.global_features, views.global_grid)
        if self.options.on != "global":
            changes["crop_features"] = self.forward_group(views.crop_features, views.crop_grid)
        global_grid, crop_grid = self.output_grids(self.options, views.global_grid, views.crop_grid)
        return replace(views, global_grid=global_grid, crop_grid=crop_grid, **changes)


class HiResLmmQueryCompressor(HiResLmmViewOp):
    """Compresses each view to a square number of query tokens at vision width.

    Args:
        context (`PartContext`): Widths and grids around the part.
        options (`Options`): Where, how many queries, heads.

    Source: SliME, huggingface.co/papers/2406.08487, section 3.2 (Table 3 compares 64, 144 and 196 queries).
    """

    @strict
    @dataclass
    class Options:
        """Options of `query_compressor`.

        Args:
            on (`str`): Views that are compressed: `"global"`, `"crops"` or `"all"`.
            num_queries (`int`): Tokens of a view afterwards, a square number; the paper's best is 144.
            num_heads (`int`, *optional*): Heads; by default one per 128 channels.
        """

        on: Literal["global", "crops", "all"] = "crops"
        num_queries: int = 144
        num_heads: int | None = None

        def __post_init__(self) -> None:
            square_side(self.num_queries, "num_queries")

    def __init__(self, context: PartContext, options: Options):
        super().__init__()
        self.options = options
        if options.on == "all" and context.global_grid != context.crop_grid:
            raise ValueError(
                f"query_compressor on all views needs one token grid, but global views have {context.global_grid} and "
                f'crops {context.crop_grid}; give each kind its own query_compressor ("on": "global" / "crops").'
            )
        grid = context.global_grid if options.on == "global" else context.crop_grid
        if options.num_queries > grid[0] * grid[1]:
            logger.warning_once(
                f"query_compressor makes {options.num_queries} tokens out of {grid[0] * grid[1]}; lower num_queries "
                "to compress."
            )
        self.query_former = HiResLmmQueryFormer(
            context.config, context.width, options.num_queries, grid, options.num_heads
        )

    @classmethod
    def output_grid(cls, options: Any, grid: tuple[int, int]) -> tuple[int, int]:
        """Token grid of a view afterwards: the grid of the queries."""
        side = square_side(options.num_queries, "num_queries")
        return side, side

    def forward_group(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Compress `(V, L, C)` -> `(V, num_queries, C)`."""
        return self.query_former(features)


class HiResLmmConvMerge(HiResLmmViewOp):
    """Merges 2 x 2 neighbours by a convolution: 3 x 3, stride 2, without bias.

    Args:
        context (`PartContext`): Widths and grids around the part.
        options (`Options`): Where; norm before, residual around.

    Source: token-space scaling, huggingface.co/papers/2412.18387; norm and residual come from its released code, which
    reads the last layer of the tower through a norm of its own in place of the tower's.
    """

    @strict
    @dataclass
    class Options:
        """Options of `conv_merge`.

        Args:
            on (`str`): Views that are merged: `"global"`, `"crops"` or `"all"`.
            norm (`bool`): Normalise the features first.
            norm_eps (`float`): Epsilon of that norm, as CLIP's.
            residual (`bool`): Add the features of the top left of each 2 x 2 neighbours.
        """

        on: Literal["global", "crops", "all"] = "all"
        norm: bool = True
        norm_eps: float = 1e-5
        residual: bool = True

    def __init__(self, context: PartContext, options: Options):
        super().__init__()
        self.options = options
        self.norm = nn.LayerNorm(context.width, eps=options.norm_eps) if options.norm else nn.Identity()
        self.conv = nn.Conv2d(context.width, context.width, kernel_size=3, stride=2, padding=1, bias=False)

    @classmethod
    def output_grid(cls, options: Any, grid: tuple[int, int]) -> tuple[int, int]:
        """Token grid of a view afterwards: half of each side, rounded up."""
        return -(-grid[0] // 2), -(-grid[1] // 2)

    def forward_group(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Merge `(V, L, C)` -> `(V, about L / 4, C)`."""
        planes = self.norm(features).transpose(1, 2).unflatten(2, grid)
        merged = self.conv(planes)
        if self.options.residual:
            merged = merged + planes[:, :, ::2, ::2]
        return merged.flatten(2).transpose(1, 2)

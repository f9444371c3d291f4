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

    Subclasses implement `forward_group` and `output_grid`; options carry `on`.
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
        """Token grids of global views and crops after the operation."""
        if options.on != "crops":
            global_grid = cls.output_grid(options, global_grid)
        if options.on != "global":
            crop_grid = cls.output_grid(options, crop_grid)
        return global_grid, crop_grid

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

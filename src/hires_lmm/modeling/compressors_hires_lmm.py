"""View operations that turn the tokens of each view into fewer tokens."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.utils import logging

from .attention_hires_lmm import HiResLmmQueryFormer, square_side
from .bases_hires_lmm import HiResLmmViewOp, PartContext
from .geometry_hires_lmm import Grid, kinds_on


logger = logging.get_logger(__name__)


class HiResLmmQueryCompressor(HiResLmmViewOp):
    """Compresses each view to a square number of query tokens at vision width.

    Source: SliME, huggingface.co/papers/2406.08487, section 3.2 (Table 3 compares 64, 144 and 196 queries).
    """

    @strict
    @dataclass
    class Options:
        """Options of `query_compressor`.

        Args:
            on (`str` or `list[str]`): Kinds of views that are compressed.
            num_queries (`int`): Tokens of a view afterwards, a square number; the paper's best is 144.
            num_heads (`int`, *optional*): Heads; by default one per 128 channels.
        """

        on: str | list = "crops"
        num_queries: int = 144
        num_heads: int | None = None

        def __post_init__(self) -> None:
            kinds_on(self.on)
            square_side(self.num_queries, "num_queries")

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        grid = context.grid(options.on).size
        if options.num_queries > grid[0] * grid[1]:
            logger.warning_once(
                f"query_compressor makes {options.num_queries} tokens out of {grid[0] * grid[1]}; lower num_queries "
                "to compress."
            )
        self.query_former = HiResLmmQueryFormer(
            context.config, context.width, options.num_queries, grid, options.num_heads
        )

    @classmethod
    def output_grid(cls, options: Any, grid: Grid) -> Grid:
        """Token grid of a view afterwards: the grid of the queries."""
        side = square_side(options.num_queries, "num_queries")
        return replace(grid, rows=side, cols=side, stride=None)

    def forward_group(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Compress `(V, L, C)` -> `(V, num_queries, C)`."""
        return self.query_former(features, grid)


class HiResLmmConvMerge(HiResLmmViewOp):
    """Merges 2 x 2 neighbours by a convolution: 3 x 3, stride 2, without bias.

    Source: token-space scaling, huggingface.co/papers/2412.18387; norm and residual come from its released code, which
    reads the last layer of the tower through a norm of its own in place of the tower's.
    """

    @strict
    @dataclass
    class Options:
        """Options of `conv_merge`.

        Args:
            on (`str` or `list[str]`): Kinds of views that are merged.
            norm (`bool`): Normalise the features first.
            norm_eps (`float`): Epsilon of that norm, as CLIP's.
            residual (`bool`): Add the features of the top left of each 2 x 2 neighbours.
        """

        on: str | list = "all"
        norm: bool = True
        norm_eps: float = 1e-5
        residual: bool = True

        def __post_init__(self) -> None:
            kinds_on(self.on)

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        self.norm = nn.LayerNorm(context.width, eps=options.norm_eps) if options.norm else nn.Identity()
        self.conv = nn.Conv2d(context.width, context.width, kernel_size=3, stride=2, padding=1, bias=False)

    @classmethod
    def output_grid(cls, options: Any, grid: Grid) -> Grid:
        """Token grid of a view afterwards: half of each side, rounded up."""
        stride = None if grid.stride is None else (2 * grid.stride[0], 2 * grid.stride[1])
        return replace(grid, rows=-(-grid.rows // 2), cols=-(-grid.cols // 2), stride=stride)

    def forward_group(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Merge `(V, L, C)` -> `(V, about L / 4, C)`."""
        planes = self.norm(features).transpose(1, 2).unflatten(2, grid)
        merged = self.conv(planes)
        if self.options.residual:
            merged = merged + planes[:, :, ::2, ::2]
        return merged.flatten(2).transpose(1, 2)

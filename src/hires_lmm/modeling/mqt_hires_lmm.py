"""Nested queries: a view becomes as many tokens as the budget leaves (Matryoshka query transformer)."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init

from .attention_hires_lmm import HiResLmmCrossAttention, resize_positions, sincos_positions, square_side
from .bases_hires_lmm import HiResLmmViewOp, PartContext, Traits
from .geometry_hires_lmm import Grid, kinds_on


class HiResLmmMqt(HiResLmmViewOp):
    """Learned queries read each view; each reads for itself, so the first m of them give the same whatever m is.

    All queries run in every call, and the layout takes the first ones under a budget. To train for every m, give the
    collator and the stage a list of budgets, of which one is drawn for each step, the same on all processes.

    Source: MQT-LLaVA, huggingface.co/papers/2405.19315, and its released code (gordonhu608/MQT-LLaVA), whose
    projection to the language model is the adapter `linear` without bias here. Ours: several views, keys of content.
    """

    positions: torch.Tensor

    @strict
    @dataclass
    class Options:
        """Options of `mqt`.

        Args:
            on (`str` or `list[str]`): Kinds of views that are compressed.
            num_queries (`int`): Most tokens of a view, a square number.
            num_heads (`int`): Heads of the attention.
            key_mode (`str`): `"position"` (released): keys are positions alone, so each query takes the same weighted
                mean of the patches of every view. `"content"`: keys are patches with positions.
        """

        on: str | list = "all"
        num_queries: int = 256
        num_heads: int = 16
        key_mode: Literal["position", "content"] = "position"

        def __post_init__(self) -> None:
            kinds_on(self.on)
            square_side(self.num_queries, "num_queries")
            if self.num_heads < 1:
                raise ValueError(f"num_heads={self.num_heads} must be at least 1.")

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        width, side = context.width, square_side(options.num_queries, "num_queries")
        self.queries = nn.Parameter(torch.empty(options.num_queries, width))
        self.register_buffer("positions", sincos_positions(width, side).to(self.queries.dtype))
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attention = HiResLmmCrossAttention(context.config, width, options.num_heads)

    @classmethod
    def output_grid(cls, options: Any, grid: Grid) -> Grid:
        """Token grid of a view afterwards: that of the queries, which enter or leave with the whole view."""
        side = square_side(options.num_queries, "num_queries")
        return replace(grid, rows=side, cols=side, stride=None, whole=True)

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """It takes the budget: the first tokens of each view enter."""
        return replace(super().describe(options, context), budget_on=options.on)

    def init_weights(self) -> None:
        """Initialise queries and fill the position table."""
        init.trunc_normal_(self.queries, std=0.02)
        init.copy_(self.positions, sincos_positions(self.queries.shape[1], square_side(len(self.queries), "queries")))

    def forward_group(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Compress `(V, L, C)` -> `(V, num_queries, C)`."""
        if not features.shape[0]:
            return features.new_zeros(0, *self.queries.shape)
        positions = self.positions.to(features.dtype)
        keys = resize_positions(positions, grid)[None]
        if self.options.key_mode == "content":
            keys = features + keys
        queries = self.query_norm(self.queries + positions)[None]
        return self.attention(queries, self.key_norm(keys), self.value_norm(features))

"""As many tokens of every view whatever its size: each query reads the patches of its own cell (LLaVA-UHD)."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_hires_lmm import (
    HiResLmmCrossAttention,
    default_num_heads,
    eager_attention_forward,
    resize_positions,
    sincos_positions,
    square_side,
)
from .bases_hires_lmm import HiResLmmViewOp, PartContext, Traits, follow_grid
from .carriers_hires_lmm import ViewFeatures, ViewGroup
from .geometry_hires_lmm import Grid


BINS = ((2, 4), (2, 3), (3, 4), (3, 3), (4, 2), (3, 2), (4, 3))
"""Rows and columns of the points at which a query reads its cell; the first that is nearest to the aspect counts."""


class HiResLmmUhdResampler(HiResLmmViewOp):
    """A grid of learned queries over each view; each reads points of its own cell of the patch map, between which the
    map is interpolated. The tokens have the width of the language model, so the adapter may be `identity`.

    Projections run once on all patches of a batch, whatever the sizes of its views.

    Source: LLaVA-UHD, huggingface.co/papers/2403.11703, and its released code (thunlp/LLaVA-UHD at dd7f6cc). Differs:
        points beyond a map of less than nine patches a side show its border in place of zeros.
    """

    positions: torch.Tensor

    @strict
    @dataclass
    class Options:
        """Options of `uhd_resampler`.

        Args:
            num_queries (`int`): Tokens of a view, a square number.
            num_heads (`int`, *optional*): Heads of the attention; by default one per 128 channels.
        """

        num_queries: int = 144
        num_heads: int | None = None

        def __post_init__(self) -> None:
            square_side(self.num_queries, "num_queries")
            if self.num_heads is not None and self.num_heads < 1:
                raise ValueError(f"num_heads={self.num_heads} must be at least 1.")

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        self.side, width = square_side(options.num_queries, "num_queries"), context.text_width
        self.queries = nn.Parameter(torch.empty(options.num_queries, width))
        self.register_buffer("positions", sincos_positions(width, self.side, rounded=False).to(self.queries.dtype))
        self.input_proj = nn.Linear(context.width, width, bias=False)
        self.query_norm, self.key_norm, self.output_norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attention = HiResLmmCrossAttention(context.config, width, options.num_heads or default_num_heads(width))
        self.output_proj = nn.Linear(width, width, bias=False)

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """All views of the main tower become one grid of tokens, of the width of the language model."""
        side = square_side(options.num_queries, "num_queries")
        keys = context.keys("all")
        if not keys:
            raise ValueError("uhd_resampler reads the views of the main tower, but none reach it.")
        changed = {key: replace(context.grids[key], rows=side, cols=side, stride=None) for key in keys}
        return Traits({**context.grids, **changed}, context.text_width)

    def init_weights(self) -> None:
        """Initialise queries and fill the position table."""
        init.trunc_normal_(self.queries, std=0.02)
        init.copy_(self.positions, sincos_positions(self.queries.shape[1], self.side, rounded=False))

    def forward(self, views: ViewFeatures) -> ViewFeatures:
        """Compress all views: `(V, L, C)` -> `(V, num_queries, D)`."""
        return views.map("all", lambda group: self.compress(group, self.sizes(views, group)))

    def compress(self, group: ViewGroup, sizes: list[tuple[int, int]]) -> ViewGroup:
        """Compress a group whose views have so many rows and columns of patches, each padded to the grid."""
        inputs = self.key_norm(self.input_proj(group.features))
        places = {size: self._places(size, group.grid).to(inputs.dtype) for size in dict.fromkeys(sizes)}
        keys = self.attention.k_proj(inputs + torch.stack([places[size] for size in sizes]))
        query = self.attention.q_proj(self.query_norm(self.queries) + self.positions.to(inputs.dtype))
        states = [each.unflatten(1, group.grid).unbind() for each in (keys, self.attention.v_proj(inputs))]
        read: list[Any] = [None] * len(sizes)
        for size in places:
            own = [number for number, each in enumerate(sizes) if each == size]
            planes = [torch.stack([each[number][: size[0], : size[1]] for number in own]) for each in states]
            for number, tokens in zip(own, self.read(query, *planes), strict=True):
                read[number] = tokens
        tokens = self.output_proj(self.output_norm(self.attention.o_proj(torch.stack(read))))
        grid = Grid(self.side, self.side, None)
        return replace(group, features=tokens, grid=grid.size, scores=follow_grid(group, grid, sizes))

    def _places(self, size: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
        """Positions of the patches of a view of a size in the grid that it is padded to, `(L, D)`."""
        places = resize_positions(self.positions, size).unflatten(0, size)
        return nn.functional.pad(places, (0, 0, 0, grid[1] - size[1], 0, grid[0] - size[0])).flatten(0, 1)

    def read(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Let the queries `(Q, D)` read views of one size, whose keys and values are `(n, h, w, D)`: `(n, Q, D)`."""
        points = [self._heads(cell_points(plane, self.side)) for plane in (keys, values)]
        queries = self._heads(query[:, None]).repeat(len(keys), 1, 1, 1)
        name = self.attention.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        options = {"dropout": 0.0, "scaling": self.attention.scaling, "is_causal": False}
        output, _ = attend(self.attention, queries, *points, None, **options)
        return output.flatten(1).unflatten(0, (len(keys), -1))

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.attention.num_heads, -1)).transpose(1, 2)


def cell_points(planes: torch.Tensor, side: int) -> torch.Tensor:
    """What maps `(n, h, w, D)` show at the points of each cell of a grid of `side` x `side`: `(n * side², points, D)`.

    As torchvision's RoIAlign with as many points as bins, aligned=False.
    """
    high, wide = planes.shape[1:3]
    bins = min(BINS, key=lambda each: abs(each[1] / each[0] - wide / high))
    down, across = (cell_weights(size, side, number, planes) for size, number in ((high, bins[0]), (wide, bins[1])))
    found = torch.einsum("bw,nawd->nabd", across, torch.einsum("ah,nhwd->nawd", down, planes))
    cells = found.unflatten(2, (side, -1)).unflatten(1, (side, -1)).permute(0, 1, 3, 2, 4, 5)
    return cells.flatten(3, 4).flatten(0, 2)


def cell_weights(length: int, side: int, bins: int, like: torch.Tensor) -> torch.Tensor:
    """How much each of `length` patches on a line counts at the points of `side` cells: `(side * bins, length)`.

    A cell is at least one patch long; a bin longer than a patch is the mean of several points.
    """
    cell = max(length / side, 1.0)
    number = math.ceil(cell / bins)
    places = torch.arange(max(length, bins * number, side), dtype=torch.float32, device=like.device)
    steps = (places[: bins * number] + 0.5) * (cell / (bins * number))
    starts = places[:side] * (length / side)
    points = (starts[:, None] + steps).flatten().clamp(max=length - 1)
    weights = (1 - (points[:, None] - places[:length]).abs()).clamp(min=0)
    return weights.unflatten(0, (-1, number)).mean(dim=1).to(like.dtype)

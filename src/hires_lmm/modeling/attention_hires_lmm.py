"""Cross-attention on transformers' attention interface, and the position tables of query-based parts."""

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import maybe_autocast


HEAD_WIDTH = 128


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in plain PyTorch with float32 scores and the signature of the attention interface."""
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = torch.matmul(query.to(wide), key.to(wide).transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def attend_by_count(
    module: Any,
    attend: Callable,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: list[int],
    mean: bool = False,
) -> torch.Tensor:
    """`(I, Q, H, E)` queries read their `counts` of the `(T, H, E)` keys, one call for each number: `(I, Q, C)`.

    Keys behind the last image belong to nobody. With `mean` the sum over the keys is divided by their number.
    """
    starts, order, outputs = list(accumulate(counts, initial=0)), [], []
    for count in sorted(set(counts)):
        rows = [row for row, own in enumerate(counts) if own == count]
        order += rows
        queries = torch.stack([query[row] for row in rows])
        if not count:
            outputs.append(0.0 * queries)
            continue
        keys = torch.stack([key[starts[row] : starts[row] + count] for row in rows]).transpose(1, 2)
        values = keys
        if value is not key:
            values = torch.stack([value[starts[row] : starts[row] + count] for row in rows]).transpose(1, 2)
        output, _ = attend(
            module, queries.transpose(1, 2), keys, values, None, dropout=0.0, scaling=module.scaling, is_causal=False
        )
        outputs.append(output / count if mean else output)
    unused = (0.0 * key[starts[-1] :]).sum() + (0.0 * value[starts[-1] :]).sum()  # keeps projections in the graph
    if not outputs:
        return (query + unused).flatten(2)
    places = sorted(range(len(order)), key=order.__getitem__)
    return (torch.cat(outputs)[torch.tensor(places, device=query.device)] + unused).flatten(2)


class HiResLmmCrossAttention(nn.Module):
    """Multi-head cross-attention with biases from plain linear layers.

    All keys of a row take part: callers pass rows of equal length, so no key mask is needed and every backend agrees.
    """

    is_causal = False

    def __init__(self, config: PreTrainedConfig, width: int, num_heads: int):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide the width {width}; choose a divisor.")
        self.config = config
        self.is_causal = False
        self.num_key_value_groups = 1
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.scaling = self.head_width**-0.5
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.num_heads, self.head_width)).transpose(1, 2)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Attend from queries and keys `(B or 1, Q or K, D)` to values `(B, K, D)`: `(B, Q, D)`."""
        value = self._heads(self.v_proj(values))
        query, key = self._heads(self.q_proj(queries)), self._heads(self.k_proj(keys))
        query, key = (each.expand(len(value), -1, -1, -1) for each in (query, key))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attend(self, query, key, value, None, dropout=0.0, scaling=self.scaling, is_causal=False)
        return self.o_proj(output.flatten(2))

    def read_ragged(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, counts: list[int]
    ) -> torch.Tensor:
        """Attend from queries `(I, Q, D)` to keys and values `(T, D)`, of which each row owns the next `counts`.

        The layers run once however many rows there are, as processes that share weights need it.
        """
        states = (self.q_proj(queries), self.k_proj(keys), self.v_proj(values))
        query, key, value = (each.unflatten(-1, (self.num_heads, self.head_width)) for each in states)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return self.o_proj(attend_by_count(self, attend, query, key, value, counts))


def default_num_heads(width: int) -> int:
    """Number of heads of 128 channels, at least one: the rule of the released query formers."""
    return max(1, width // HEAD_WIDTH)


def square_side(count: int, name: str) -> int:
    """Side of a square number of tokens, which the option `name` gave."""
    side = math.isqrt(max(count, 0))
    if count < 1 or side * side != count:
        raise ValueError(f"{name}={count} is not a square number; use for instance 64, 144, 196 or 576.")
    return side


def sincos_positions(width: int, side: int, rounded: bool = True) -> torch.Tensor:
    """Sine-cosine table of a square grid, `(side * side, width)` float32, rounded to float16 as most released.

    The first half of the channels encodes the column, the second half the row; within a half, sines come before
    cosines of frequencies 10000^(-k / (width / 4)).
    """
    if width % 4:
        raise ValueError(f"Sine-cosine positions need a width that is a multiple of 4, got {width}.")
    frequencies = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float32) / (width / 4))
    angles = torch.arange(side, dtype=torch.float32)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = line[None, :, :].expand(side, side, -1)
    rows = line[:, None, :].expand(side, side, -1)
    table = torch.cat([columns, rows], dim=-1).flatten(0, 1)
    return table.half().float() if rounded else table


def resize_positions(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Resize the positions `(side * side, D)` of a square grid to another one bicubically: `(rows * cols, D)`."""
    side, width = math.isqrt(table.shape[0]), table.shape[1]
    if (side, side) == tuple(grid):
        return table
    rows, columns = (_bicubic_weights(side, number, table.device) for number in grid)
    with maybe_autocast(table.device.type, enabled=False):
        stretched = (rows @ table.float().view(side, side * width)).view(grid[0], side, width)
        return (columns @ stretched).flatten(0, 1).to(table.dtype)


def _bicubic_weights(side: int, wanted: int, device: torch.device) -> torch.Tensor:
    """What each of `side` points on a line gives to each of `wanted` points, `(wanted, side)`.

    Two products with them take a small part of the time of the bicubic operation on a table of many channels.
    """
    points = torch.eye(side, dtype=torch.float32, device=device)[None, :, :, None]
    line = nn.functional.interpolate(points, size=(wanted, 1), mode="bicubic", align_corners=False)
    return line[0, :, :, 0].T


class HiResLmmQueryFormer(nn.Module):
    """Learned queries read the tokens of one view: cross-attention with sine-cosine positions between layer norms.

    Args:
        num_queries (`int`): Queries, a square number; they carry the positions of a square grid.
        grid (`tuple[int, int]`): Token rows and columns of a view.

    Source: SliME, huggingface.co/papers/2406.08487. Keys are normalised tokens plus positions, values the same
    without; positions of a different grid come by bicubic resizing, as in the released code.
    """

    positions: torch.Tensor

    def __init__(
        self,
        config: PreTrainedConfig,
        width: int,
        num_queries: int,
        grid: tuple[int, int],
        num_heads: int | None = None,
    ):
        super().__init__()
        self.grid = grid
        self.side = square_side(num_queries, "num_queries")
        self.queries = nn.Parameter(torch.empty(num_queries, width))
        self.register_buffer("positions", sincos_positions(width, self.side).to(self.queries.dtype))
        self.query_norm, self.key_norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = HiResLmmCrossAttention(config, width, num_heads or default_num_heads(width))
        self.output_norm = nn.LayerNorm(width, eps=1e-6)

    def init_weights(self) -> None:
        """Initialise queries and fill the position table."""
        init.trunc_normal_(self.queries, std=0.02)
        init.copy_(self.positions, sincos_positions(self.queries.shape[1], self.side))

    def forward(self, features: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Compress the row-major tokens of views, of a grid of their own: `(V, L, C)` -> `(V, num_queries, C)`."""
        if not features.shape[0]:
            return features.new_zeros(0, *self.queries.shape)
        positions = self.positions.to(features.dtype)
        values = self.key_norm(features)
        keys = values + resize_positions(positions, grid or self.grid)
        queries = (self.query_norm(self.queries) + positions)[None]
        return self.output_norm(self.attention(queries, keys, values))

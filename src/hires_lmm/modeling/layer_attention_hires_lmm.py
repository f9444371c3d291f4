"""The attention of one layer of a language model: who sees whom, and the scores of single queries."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .compat_hires_lmm import CACHE


QUERIES = "hires_lmm_queries"


def give_queries(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, tuple]:
    """An attention function that attends to nothing: queries, scale and cap come out in place of the weights."""
    return query.transpose(1, 2), (query, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)


def visible(slots: torch.Tensor, own: torch.Tensor, columns: torch.Tensor, window: int | None) -> torch.Tensor:
    """Which keys a query sees, `(B, r, K)`: those that are there, not later and in its window, and itself.

    Args:
        slots (`torch.Tensor` of shape `(B, r)`): Slots of the queries.
        own (`torch.Tensor` of shape `(B, r)`): Column of each query's own key.
        columns (`torch.Tensor` of shape `(B, K)`): Slots of the keys; -1 for padding and what has left.
        window (`int`, *optional*): Slots that a query looks back, itself included.
    """
    keys, queries = columns[:, None], slots[..., None]
    seen = (keys >= 0) & (keys <= queries)
    if window is not None:
        seen = seen & (queries - keys < window)
    return seen | (torch.arange(columns.shape[1], device=columns.device) == own[..., None])


def take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather positions `(B, r)` of `(B or 1, n, D)`: `(B, r, D)`."""
    return states.expand(index.shape[0], -1, -1).gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


@dataclass
class LayerAttention:
    """The attention of the layer that has just run, computed for the queries that an op asks for.

    Args:
        module (`nn.Module`): The attention module.
        inputs (`dict`): What it was called with.
        keys, values (`torch.Tensor` of shape `(B, heads, K, d)`): Keys and values as it saw them.
        slots (`torch.Tensor` of shape `(B, m)`): Slots of the tokens of the call.
        columns (`torch.Tensor` of shape `(B, K)`): Slots of the keys; -1 for padding and what has left.
        start (`int`): Column of the first token of the call.
        window (`int`, *optional*): Slots that a query looks back.
        visual (`torch.Tensor` of shape `(B, K)`): True at keys of visual tokens.
    """

    module: Any
    inputs: dict
    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor
    columns: torch.Tensor
    start: int
    window: int | None
    visual: torch.Tensor

    @property
    def rows(self) -> torch.Tensor:
        """Positions `(B, m)` of all tokens of the call."""
        return torch.arange(self.slots.shape[1], device=self.slots.device).expand_as(self.slots)

    def seen(self) -> torch.Tensor:
        """Which keys the tokens of the call see: `(B, 1, m, K)`."""
        return visible(self.slots, self.rows + self.start, self.columns, self.window)[:, None]

    def all_logits(self) -> torch.Tensor:
        """Scores before the softmax of all keys: `(B, heads, m, K)` float32."""
        return self._logits(self.rows)

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """What heads give with weights `(B, heads, m, K)`: `(B, heads, m, d)`."""
        values = self.values.repeat_interleave(weights.shape[1] // self.values.shape[1], dim=1)
        return weights.to(values.dtype) @ values

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Scores before the softmax of queries at `(B, r)` on all keys of this call: `(B, heads, r, m)` float32."""
        return self._logits(rows)[..., self.start : self.start + self.slots.shape[1]]

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Scores of all keys, `(B, heads, r, K)`."""
        module = copy.copy(self.module)  # shares all weights
        module.config = copy.copy(module.config)
        module.config._attn_implementation = QUERIES
        inputs = {**self.inputs, "attention_mask": None, CACHE: None}
        inputs["hidden_states"] = take(inputs["hidden_states"], rows)
        if inputs.get("position_embeddings") is not None:
            inputs["position_embeddings"] = tuple(take(part, rows) for part in inputs["position_embeddings"])
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = take_ids(inputs["position_ids"], rows)
        _, (query, scale, cap) = type(module).forward(module, **inputs)
        keys = self.keys.repeat_interleave(query.shape[1] // self.keys.shape[1], dim=1)
        logits = query.float() @ keys.float().transpose(2, 3) * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        """Softmax over all keys that queries at `(B, r)` see; of it those of this call, `(B, heads, r, m)` float32."""
        seen = visible(self.slots.gather(1, rows), rows + self.start, self.columns, self.window)
        weights = self._logits(rows).masked_fill(~seen[:, None], float("-inf")).softmax(dim=-1)
        return weights[..., self.start : self.start + self.slots.shape[1]]


def take_ids(ids: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather positions `(B, r)` of position ids `(..., B or 1, n)`."""
    shape = (*ids.shape[:-2], index.shape[0], -1)
    return ids.expand(*shape).gather(-1, index.expand(*shape))


def shown_columns(slots: torch.Tensor, length: int, offset: int) -> torch.Tensor:
    """Of the keys of a layer `(B, K)`, those that its cache shows to attention: `(B, length)`."""
    shown = slots[:, offset : offset + length]
    return nn.functional.pad(shown, (0, length - shown.shape[1]), value=-1)


class KeyNote:
    """A cache that hands on what attention puts into it and notes the keys and values that it gets back."""

    def __init__(self, cache: Any, note: Callable[[torch.Tensor, torch.Tensor], None]):
        self.cache, self.note = cache, note

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        """See `Cache.update`; without a cache, what comes in goes out."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        self.note(keys, values)
        return keys, values

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

"""Attention with SiLU in place of the softmax."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.utils.generic import maybe_autocast


SCORES_LIMIT = 2**24
"""Scores that are held at a time: 64 MiB in float32."""


def silu_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float = 1.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Sum of the values, weighted by SiLU(scaling · query · key), with the signature of the attention interface.

    Beyond `SCORES_LIMIT` scores the keys are read block by block, and each block is computed again for its gradients.

    Args:
        query (`torch.Tensor` of shape `(B, H, Q, E)`): Queries.
        key (`torch.Tensor` of shape `(B, H, K, E)`): Keys; all take part.
        value (`torch.Tensor` of shape `(B, H, K, E)`): Values.
        scaling (`float`): Multiplies the scores before the SiLU.

    Returns:
        `(B, Q, H, E)` in at least float32, which holds sums over many keys, and None: the weights are not kept.

    Source: VLSA, openreview.net/forum?id=RLhEGWt94S, which prints SiLU(Q Kᵀ) V without scale.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    step = max(SCORES_LIMIT // max(query[..., 0].numel(), 1), 1)
    recomputes = key.shape[2] > step and torch.is_grad_enabled()

    def read(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        scores = query.to(wide) @ keys.to(wide).mT * scaling
        return nn.functional.silu(scores) @ values.to(wide)

    output = torch.zeros_like(query, dtype=wide)
    with maybe_autocast(query.device.type, enabled=False):
        for block in zip(key.split(step, dim=2), value.split(step, dim=2), strict=True):
            output = output + (checkpoint(read, *block, use_reentrant=False) if recomputes else read(*block))
    return output.transpose(1, 2), None

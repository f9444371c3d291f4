"""Removing dropped positions from a batch and putting the hidden states back: pure functions."""

from dataclasses import dataclass
from typing import Any

import torch


# B = rows, L = input positions, P = packed positions


@dataclass
class Packing:
    """How a batch was packed.

    Args:
        index (`torch.Tensor` of shape `(B, P)`): Input position of each packed position.
        mask (`torch.Tensor` of shape `(B, P)`): True for real packed positions, False for padding.
        expand (`torch.Tensor` of shape `(B, L)`): Packed position that stands for each input position.
    """

    index: torch.Tensor
    mask: torch.Tensor
    expand: torch.Tensor


def plan_packing(real: torch.Tensor, padding_side: str) -> Packing:
    """Plan to keep the positions that are true in `(B, L)`; rows pad at `padding_side`.

    A removed position expands to the last kept one before it (to the first kept one at the start of a row), so that
    "the token after the image" is still predicted from the state it follows.
    """
    order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)
    counts = real.sum(dim=1)
    length = int(counts.max())
    columns = torch.arange(length, device=real.device)
    shift = (length - counts)[:, None] if padding_side == "left" else torch.zeros_like(counts)[:, None]
    mask = (columns >= shift) & (columns < shift + counts[:, None])
    index = order.gather(1, (columns - shift).clamp(min=0, max=real.shape[1] - 1).expand(real.shape[0], -1))
    expand = ((real.long().cumsum(dim=1) - 1).clamp(min=0) + shift).clamp(max=max(length - 1, 0))
    return Packing(index=index, mask=mask, expand=expand)


def plan_batch(
    kept: torch.Tensor, attention_mask: Any, past: int, in_generate: bool
) -> tuple[Packing, torch.Tensor, torch.Tensor]:
    """Plan a batch with padding and `past` cached positions: the plan, the mask `(B, past + P)`, positions `(B, P)`.

    In `generate` new tokens follow, so rows end together.
    """
    if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2):
        raise ValueError(
            "The threshold rule drops tokens inside the model and needs a two-dimensional attention_mask; "
            "pass (batch, length), or use the budget rule."
        )
    length, side = kept.shape[1], "left"
    prefix = kept.new_ones((kept.shape[0], past), dtype=torch.long)
    if attention_mask is not None:
        mask = attention_mask.to(kept.device)
        kept, prefix = kept & mask[:, -length:].bool(), mask[:, :-length].long()
        side = "right" if not in_generate and bool((mask[:, -1] == 0).any()) else "left"
    packing = plan_packing(kept, side)
    attention_mask = torch.cat([prefix, packing.mask.long()], dim=1)
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -packing.mask.shape[1] :]
    return packing, attention_mask, position_ids


def pack(states: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Gather the kept positions of `(B, L, D)`: `(B, P, D)`."""
    return states.gather(1, packing.index[..., None].expand(-1, -1, states.shape[-1]))


def expand(states: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Put packed states `(B, P, D)` back to the input length: `(B, L, D)`."""
    return states.gather(1, packing.expand[..., None].expand(-1, -1, states.shape[-1]))

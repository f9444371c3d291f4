"""Removing dropped positions from a batch and putting the hidden states back: pure functions."""

from dataclasses import dataclass

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
    """Plan the removal of positions, keeping order.

    Args:
        real (`torch.Tensor` of shape `(B, L)`): True for positions that stay.
        padding_side (`str`): Where shorter rows are padded: `"left"` or `"right"`.

    Returns:
        The plan. A removed position expands to the last kept one before it (to the first kept one at the start of a
        row), so that "the token after the image" is still predicted from the state it follows.
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


def pack(states: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Gather the kept positions.

    Args:
        states (`torch.Tensor` of shape `(B, L, D)`): States of all positions.
        packing (`Packing`): The plan.

    Returns:
        `(B, P, D)`.
    """
    return states.gather(1, packing.index[..., None].expand(-1, -1, states.shape[-1]))


def expand(states: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Put packed states back to the input length.

    Args:
        states (`torch.Tensor` of shape `(B, P, D)`): States of packed positions.
        packing (`Packing`): The plan.

    Returns:
        `(B, L, D)`.
    """
    return states.gather(1, packing.expand[..., None].expand(-1, -1, states.shape[-1]))

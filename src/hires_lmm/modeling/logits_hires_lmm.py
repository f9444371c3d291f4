"""From hidden states to logits, as each family of language models does it."""

from typing import Any

import torch


MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVIDERS = ("logits_scaling",)
MULTIPLY_INSTEAD = ("hyperclovax",)


def select_positions(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Pick the positions whose logits are wanted.

    Args:
        hidden (`torch.Tensor` of shape `(B, S, D)`): Hidden states.
        logits_to_keep (`int` or `torch.Tensor`): The last n positions (0 = all); or indices `(k,)`, `(B, k)`, or a
            mask `(B, S)`.

    Returns:
        `(B, k, D)`, or `(kept, D)` for a mask.
    """
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    if logits_to_keep.ndim == 2 and logits_to_keep.dtype == torch.bool:
        return hidden[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return torch.take_along_dim(hidden, logits_to_keep[..., None], dim=1)
    return hidden[:, logits_to_keep]


def scale_logits(logits: torch.Tensor, text_config: Any) -> torch.Tensor:
    """Apply what some language models do after their head: a factor, a divisor, a soft cap.

    Args:
        logits (`torch.Tensor` of shape `(..., vocabulary)`): Output of the head.
        text_config (`PreTrainedConfig`): Configuration of the language model.

    Returns:
        The logits that the language model itself would return.
    """
    for name in MULTIPLIERS + DIVIDERS:
        factor = getattr(text_config, name, None)
        if factor is not None:
            divides = name in DIVIDERS and text_config.model_type not in MULTIPLY_INSTEAD
            logits = logits / factor if divides else logits * factor
    cap = getattr(text_config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)

"""From hidden states to logits, as each family of language models does it."""

from typing import Any

import torch
from torch import nn


IGNORED_LABEL = -100
MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
DIVIDERS = ("logits_scaling",)
MULTIPLY_INSTEAD = ("hyperclovax",)


def select_positions(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Pick from `(B, S, D)` the last n positions (0 = all), or by indices `(k,)`, `(B, k)` or a mask `(B, S)`."""
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    if logits_to_keep.ndim == 2 and logits_to_keep.dtype == torch.bool:
        return hidden[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return torch.take_along_dim(hidden, logits_to_keep[..., None], dim=1)
    return hidden[:, logits_to_keep]


def last_positions(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The last position `(B,)` of each row of `(B, S, D)` that is no padding, whichever side that is on."""
    if attention_mask is None:
        return torch.full(hidden.shape[:1], hidden.shape[1] - 1, device=hidden.device)
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (places * (attention_mask != 0)).argmax(dim=1).to(hidden.device)


def select_learned(
    hidden: torch.Tensor, labels: torch.Tensor, shift_labels: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick the positions of `(B, S, D)` whose next token is learned, and their targets: `(1, k, D)` and `(1, k)`.

    `shift_labels` are targets that are shifted already. k may be 0, which keeps the head in the graph.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:]
    learned = shift_labels != IGNORED_LABEL
    return hidden[learned.to(hidden.device)][None], shift_labels[learned][None]


def scale_logits(logits: torch.Tensor, text_config: Any) -> torch.Tensor:
    """Apply what some language models do after their head: a factor, a divisor, a soft cap."""
    for name in MULTIPLIERS + DIVIDERS:
        factor = getattr(text_config, name, None)
        if factor is not None:
            divides = name in DIVIDERS and text_config.model_type not in MULTIPLY_INSTEAD
            logits = logits / factor if divides else logits * factor
    cap = getattr(text_config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def soften_labels(parts: list, logits: torch.Tensor, labels: torch.Tensor, options: dict[str, Any]) -> Any:
    """Give the loss function targets that parts with a vocabulary can score; what its mean lacks then.

    Args:
        parts (`list`): The parts.
        logits (`torch.Tensor` of shape `(B, S, V)`): At the positions of `shift_labels` in `options`, or of `labels`.
        labels (`torch.Tensor` of shape `(B, S)`): Targets.
        options (`dict`): Keyword arguments of the loss function; gets `shift_labels`.
    """
    targets, number, lacking = options.get("shift_labels"), options.get("num_items_in_batch"), 0.0
    targets = nn.functional.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:] if targets is None else targets
    number = (targets != IGNORED_LABEL).sum().clamp(min=1) if number is None else number
    for part in parts:
        targets, missing = part.soften(logits, targets.to(logits.device))
        lacking = lacking + missing / number
    options["shift_labels"] = targets
    return lacking

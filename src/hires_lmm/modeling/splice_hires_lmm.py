"""Visual tokens take the place of the placeholders in the prompt."""

from dataclasses import dataclass
from typing import Any

import torch

from .carriers_hires_lmm import Question, VisualTokens
from .connector_hires_lmm import drop


@dataclass
class Splice:
    """A prompt with its visual tokens.

    Args:
        embeds (`torch.Tensor` of shape `(B, S, D)`): What the language model reads.
        kept (`torch.Tensor` of shape `(B, S)`): False where a visual token is dropped.
        placed (`torch.Tensor` of shape `(M, D)`): The visual tokens, one a placeholder.
    """

    embeds: torch.Tensor
    kept: torch.Tensor
    placed: torch.Tensor


def find_placeholders(
    ids: torch.Tensor | None, embeds: torch.Tensor, token_id: int, embed: Any, prompt_length: int | None = None
) -> torch.Tensor:
    """Where the image placeholders are, `(B, S)` bool.

    Args:
        ids (`torch.Tensor` of shape `(B, S)`, *optional*): Token ids; without them embeddings are compared.
        embeds (`torch.Tensor` of shape `(B, S, D)`): Token embeddings.
        token_id (`int`): The placeholder.
        embed (`Callable`): Looks up token embeddings.
        prompt_length (`int`, *optional*): Positions beyond it are generated and hold no placeholders.
    """
    if ids is None:
        token = torch.full((), token_id, dtype=torch.long, device=embeds.device)
        mask = (embeds == embed(token)).all(dim=-1)
    else:
        mask = ids == token_id
    if prompt_length is not None:
        mask = mask & (torch.arange(mask.shape[1], device=mask.device) < prompt_length)
    return mask


def splice(
    embeds: torch.Tensor,
    placeholder: torch.Tensor,
    tokens: VisualTokens | list[torch.Tensor],
    question: Question | None = None,
) -> Splice:
    """Write visual tokens over placeholders, and what operations wrote into the question over its text.

    Args:
        embeds (`torch.Tensor` of shape `(B, S, D)`): Token embeddings.
        placeholder (`torch.Tensor` of shape `(B, S)`): True at placeholders.
        tokens (`VisualTokens` or `list[torch.Tensor]`): Tokens of all images, or the finished `(n_i, D)` of each.
        question (`Question`, *optional*): As the operations left it.
    """
    if isinstance(tokens, VisualTokens):
        placed, kept = drop(tokens)
    else:
        placed, kept = torch.cat([part.to(embeds.device) for part in tokens]), None
    if question is not None and question.embeds is not embeds:
        embeds = torch.where(question.turn[..., None].to(embeds.device) > 0, question.embeds.to(embeds), embeds)
    placed = placed.to(embeds.device, embeds.dtype)
    spliced = embeds.masked_scatter(placeholder[..., None].to(embeds.device), placed)
    kept_positions = torch.ones_like(placeholder)
    if kept is not None:
        kept_positions = kept_positions.masked_scatter(placeholder, kept.to(placeholder.device))
    return Splice(spliced, kept_positions, placed)

"""What the model returns: image features that can be cached, hidden states, logits, and the token map."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from .carriers_hires_lmm import VisualTokens


@dataclass
class HiResLmmImageFeatures(BaseModelOutputWithPooling):
    """Features of the images of a batch, before anything reads the question; can be cached and given back.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(V, L, C)`): Last hidden state of the vision tower.
        pooler_output (`list[torch.Tensor]`): One `(n_i, D)` tensor an image. Longer than the placeholders of the image
            where an operation that reads the question, or whose count depends on content, is still to come.
        tokens (`VisualTokens`): The same tokens before selection, with their geometry.
        view_boxes (`torch.Tensor` of shape `(V, 4)`, *optional*): Boxes of the views in 1/256 source pixel.
        prompt_length (`int`, *optional*): Set by `generate`: input positions that belong to the prompt.
        is_right_padded (`bool`, *optional*): Set by `generate`: rows end in padding, which leaves before new tokens
            follow.
        is_unpadded (`bool`, *optional*): Known to come with an attention mask of ones.
        earlier (`list[tuple]`, *optional*): Set by `generate`: what was asked about each image in the part of the
            conversation that the cache holds.
    """

    tokens: VisualTokens | None = None
    view_boxes: torch.Tensor | None = None
    prompt_length: int | None = None
    is_right_padded: bool | None = None
    is_unpadded: bool | None = None
    earlier: list | None = None

    @classmethod
    def of(cls, output: Any) -> "HiResLmmImageFeatures":
        """Features that another object holds as a list `pooler_output`, finished."""
        return cls(pooler_output=list(output.pooler_output))

    def keep_nothing(self) -> None:
        """Keep no conversations with these features: no later call can pass them again."""
        for memory in (self.tokens.memory if self.tokens is not None else None) or []:
            memory.keeps = False

    def select_images(self, indices: list[int]) -> "HiResLmmImageFeatures":
        """Features of some of the images, for a cache or for a batch that repeats images.

        Args:
            indices (`list[int]`): Images to gather, in the new order.

        Returns:
            New features; these are unchanged.
        """
        selected = copy.copy(self)
        selected.pooler_output = [self.pooler_output[index] for index in indices]
        selected.tokens = None if self.tokens is None else self.tokens.select_images(indices)
        selected.earlier = None if self.earlier is None else [self.earlier[index] for index in indices]
        return selected


@dataclass
class TokenMap:
    """One record a visual token before selection, image after image.

    Args:
        image (`torch.Tensor` of shape `(N,)`): Index of the image in the batch.
        view (`torch.Tensor` of shape `(N,)`): Row in `pixel_values`; -1 for separators.
        cell (`torch.Tensor` of shape `(N, 2)`): Row and column in the token grid of the view.
        kind (`torch.Tensor` of shape `(N,)`): Kind of the view, see `Kind`; -1 for separators.
        box (`torch.Tensor` of shape `(N, 4)`): Top, left, bottom, right in source pixels; NaN for separators.
        score (`torch.Tensor` of shape `(N,)`): The score that decided; NaN where a token was not scored.
        kept (`torch.Tensor` of shape `(N,)`): True where the token reached the language model.
    """

    image: torch.Tensor
    view: torch.Tensor
    cell: torch.Tensor
    kind: torch.Tensor
    box: torch.Tensor
    score: torch.Tensor
    kept: torch.Tensor


def build_token_map(tokens: VisualTokens, view_boxes: torch.Tensor | None) -> TokenMap:
    """Collect the records of a batch on the CPU.

    Args:
        tokens (`VisualTokens`): Tokens after routing, before dropping.
        view_boxes (`torch.Tensor` of shape `(V, 4)`, *optional*): As returned by the processor.

    Returns:
        The map.

    Raises:
        ValueError: If `view_boxes` is missing.
    """
    if view_boxes is None:
        raise ValueError("output_token_map=True needs view_boxes; pass the tensor that the processor returns.")
    count = len(tokens.view)
    score = tokens.scores.get(tokens.score or "")
    return TokenMap(
        image=torch.repeat_interleave(torch.arange(tokens.num_images), torch.tensor(tokens.lengths, dtype=torch.long)),
        view=tokens.view,
        cell=tokens.cell,
        kind=tokens.kind,
        box=torch.from_numpy(tokens.boxes(view_boxes)).float(),
        score=torch.full((count,), float("nan")) if score is None else score.detach().float().cpu(),
        kept=torch.ones(count, dtype=torch.bool) if tokens.kept is None else tokens.kept.cpu(),
    )


@dataclass
class HiResLmmModelOutputWithPast(BaseModelOutputWithPast):
    """Hidden states of the input length, whatever was dropped inside.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, S, D)`): A dropped position repeats the kept one before.
        cache (`Cache`, *optional*): Cache of the positions that were kept.
        hidden_states (`tuple[torch.Tensor]`, *optional*): Per layer, at packed length.
        attentions (`tuple[torch.Tensor]`, *optional*): Per layer, at packed length.
        image_hidden_states (`torch.Tensor` of shape `(M, D)`, *optional*): Visual tokens written over placeholders.
        kept_mask (`torch.Tensor` of shape `(B, S)`, *optional*): False where a visual token was dropped.
        packed_attention_mask (`torch.Tensor` of shape `(B, past + P)`, *optional*): Mask of the packed rows.
        num_drafted (`int`, *optional*): Positions beyond the prompt in this call.
        token_map (`TokenMap`, *optional*): With `output_token_map=True`.
        aux (`dict[str, torch.Tensor]`, *optional*): What parts say for losses and logs, by name.
    """

    image_hidden_states: torch.Tensor | None = None
    kept_mask: torch.Tensor | None = None
    packed_attention_mask: torch.Tensor | None = None
    num_drafted: int | None = None
    token_map: TokenMap | None = None
    aux: dict | None = None


@dataclass
class HiResLmmCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Loss and logits beside the fields of `HiResLmmModelOutputWithPast`.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): Next-token loss, with `labels`.
        logits (`torch.Tensor` of shape `(B, S, vocabulary)`, *optional*): Scores of the input length; None in training
            mode with `labels`, unless asked for.
        cache (`Cache`, *optional*): See `HiResLmmModelOutputWithPast`, as all that follow.
        hidden_states (`tuple[torch.Tensor]`, *optional*): As above.
        attentions (`tuple[torch.Tensor]`, *optional*): As above.
        image_hidden_states (`torch.Tensor`, *optional*): As above.
        kept_mask (`torch.Tensor`, *optional*): As above.
        packed_attention_mask (`torch.Tensor`, *optional*): As above.
        num_drafted (`int`, *optional*): As above.
        token_map (`TokenMap`, *optional*): As above.
        aux (`dict[str, torch.Tensor]`, *optional*): As above.
    """

    image_hidden_states: torch.Tensor | None = None
    kept_mask: torch.Tensor | None = None
    packed_attention_mask: torch.Tensor | None = None
    num_drafted: int | None = None
    token_map: TokenMap | None = None
    aux: dict | None = None

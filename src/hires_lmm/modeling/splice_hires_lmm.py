"""Visual tokens take the place of the placeholders in the prompt, and what is dropped leaves it."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from .carriers_hires_lmm import Question, VisualTokens, drop
from .compat_hires_lmm import call_language_model
from .conversation_hires_lmm import Conversation, cached_length
from .inputs_hires_lmm import check_context, placeholders_per_image
from .layer_ops_hires_lmm import LanguageCall, Placed, place
from .outputs_hires_lmm import HiResLmmImageFeatures, build_token_map
from .packing_hires_lmm import Packing, expand, pack, plan_batch
from .question_hires_lmm import PromptText, read_question


@dataclass
class Prompt:
    """What the language model reads of a call.

    Args:
        embeds (`torch.Tensor` of shape `(B, P, D)`): Embeddings; P < S where visual tokens were dropped.
        attention_mask (`torch.Tensor` of shape `(B, past + P)`, *optional*): 0 at padding; None = all ones.
        position_ids (`torch.Tensor` of shape `(B, P)`, *optional*): Positions; None = one after the other.
        packing (`Packing`, *optional*): How rows were packed.
        outputs (`dict`): Further fields of `HiResLmmModelOutputWithPast`.
        placed (`Placed`, *optional*): Where visual tokens stand, for position plan and layer ops.
        chunk_size (`int`, *optional*): Most positions that the language model reads at once.
    """

    embeds: torch.Tensor
    attention_mask: Any
    position_ids: torch.Tensor | None
    packing: Packing | None = None
    outputs: dict[str, Any] = field(default_factory=dict)
    conversation: Conversation | None = None
    placed: Placed | None = None
    layers: LanguageCall | None = None
    chunk_size: int | None = None

    def read(self, language_model: Any, cache: Cache | None, **options: Any) -> Any:
        """Run the language model; a long prompt in pieces, each behind the cache of those before it.

        With layer ops in one: what stays is known when the last token of the prompt was read.
        """
        length, mask, positions = self.embeds.shape[1], self.attention_mask, self.position_ids
        if self.chunk_size is None or self.chunk_size >= length or cache is None or self.layers is not None:
            return call_language_model(language_model, self.embeds, mask, positions, cache, options)
        past, read = cached_length(cache), []
        for start in range(0, length, self.chunk_size):
            stop = min(start + self.chunk_size, length)
            seen = mask
            if isinstance(mask, torch.Tensor):
                seen = mask[:, : past + stop] if mask.ndim == 2 else mask[:, :, start:stop, : past + stop]
            here = None if positions is None else positions[..., start:stop]
            outputs = call_language_model(language_model, self.embeds[:, start:stop], seen, here, cache, options)
            read.append(outputs.last_hidden_state)
        outputs.last_hidden_state = torch.cat(read, dim=1)
        return outputs

    def expand(self, hidden: torch.Tensor) -> torch.Tensor:
        """States of the language model at the caller's positions `(B, S, D)`."""
        hidden = hidden if self.layers is None else self.layers.expand(hidden)
        return hidden if self.packing is None else expand(hidden, self.packing)

    def remember(self, cache: Any) -> None:
        """Note what the cache now holds and what became of the tokens."""
        if self.layers is not None:
            self.layers.remember(cache, self.outputs)
        if self.conversation is not None:
            self.conversation.attach(cache).held = self.conversation.length + self.embeds.shape[1]
        images: Any = self.outputs.get("image_outputs")
        token_map = self.outputs.get("token_map")
        if token_map is not None and images.prompt is not None and images.prompt.token_maps == []:
            sources = images.tokens.sources or range(images.tokens.num_images)
            images.prompt.token_maps.append(token_map.merge_images(sources))


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
    """Where the image placeholders are, `(B, S)` bool, in the prompt; without ids embeddings are compared."""
    if ids is None:
        token = torch.full((1,), token_id, dtype=torch.long, device=embeds.device)
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
    """Write visual tokens over placeholders, and what operations wrote into the question over its text."""
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


def splice_images(
    model: Any,
    text: PromptText,
    features: HiResLmmImageFeatures,
    cache: Cache | None,
    position_ids: torch.Tensor | None,
    conversation: Conversation | None = None,
    output_token_map: bool = False,
) -> Prompt:
    """Run what needs the question, write visual tokens over placeholders, and take those that are dropped out."""
    past = cached_length(cache)
    known = features.prompt
    prompt_length = None if known is None else known.length
    if known is not None and text.ids is None:  # PEFT puts virtual tokens before what generate was given
        prompt_length = text.embeds.shape[1]
    placeholder = model.get_placeholder_mask(text.ids, text.embeds, prompt_length)
    tokens, question = _finish(model, text, features, placeholder, prompt_length, conversation)
    finished: Any = features.pooler_output if model.connector.is_done_early else tokens
    spliced = splice(text.embeds, placeholder, finished, question)
    outputs = _describe(features, tokens, spliced, output_token_map)
    prompt = Prompt(spliced.embeds, text.attention_mask, position_ids, outputs=outputs, conversation=conversation)
    num_drafted = placeholder.shape[1] - prompt_length if prompt_length is not None else 0
    if not model.connector.is_count_static or (known is not None and known.is_right_padded):
        prompt.packing, prompt.attention_mask, prompt.position_ids = plan_batch(
            spliced.kept, text.attention_mask, past, known is not None
        )
        prompt.embeds = pack(spliced.embeds, prompt.packing)
        virtual = 0 if known is None else known.num_virtual(past + placeholder.shape[1] - num_drafted)
        outputs["packed_attention_mask"] = prompt.attention_mask[:, virtual:]
        if conversation is not None:
            conversation.pack(prompt.packing.expand)
    elif features.is_unpadded and (position_ids is None or cache is not None):
        prompt.attention_mask = None  # all ones: the language model need not look
    if model.connector.layer_ops or model.connector.position_plan is not None:
        prompt.placed = place(text, placeholder, tokens, None if known is None else num_drafted)
    if known is not None:
        prompt.chunk_size = known.chunk_size
        outputs["num_drafted"] = num_drafted
        length = past + prompt.embeds.shape[1] - num_drafted
        check_context(length, prompt.attention_mask, num_drafted, model.config.text_config)
    return prompt


def _finish(
    model: Any,
    text: PromptText,
    features: HiResLmmImageFeatures,
    placeholder: torch.Tensor,
    prompt_length: int | None,
    conversation: Conversation | None,
) -> tuple[VisualTokens | None, Question | None]:
    """Run the operations that `encode` held back; finished features may have no tokens."""
    tokens, connector = features.tokens, model.connector
    if connector.is_done_early:
        return tokens, None
    if tokens is None:
        raise ValueError("These image features hold only pooler_output; pass what get_image_features returned.")
    question = None
    if connector.reads_question or connector.has_turns:
        if features.prompt is not None and not features.prompt.keeps_cache:
            conversation = None
        question = read_question(model, text, placeholder, tokens.num_tokens, prompt_length, conversation)
    return connector.finish(tokens, question)


def _describe(
    features: HiResLmmImageFeatures, tokens: VisualTokens | None, spliced: Splice, output_token_map: bool
) -> dict[str, Any]:
    """What the output says of the images."""
    images = copy.copy(features)
    counts = placeholders_per_image(features) if tokens is None else tokens.num_tokens
    images.pooler_output = list(spliced.placed.split(counts))
    outputs: dict[str, Any] = {"image_outputs": images, "kept_mask": spliced.kept}
    if tokens is not None and tokens.aux:
        outputs["aux"] = tokens.aux
    if output_token_map or (features.prompt is not None and features.prompt.token_maps is not None):
        if tokens is None:
            raise ValueError("output_token_map=True needs the features that get_image_features returned.")
        outputs["token_map"] = build_token_map(tokens, features.view_boxes)
    return outputs

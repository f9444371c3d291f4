"""The driver of position plans: it tells them what stands where, and the language model what they answer."""

from typing import Any

import torch
from transformers.masking_utils import create_masks_for_generate

from .bases_hires_lmm import RowTokens
from .compat_hires_lmm import CACHE
from .conversation_hires_lmm import Record
from .layer_ops_hires_lmm import Placed


RECORD = "positions"
MASKED_ATTENTION = ("eager", "sdpa", "flex_attention")


class RowRecord(Record):
    """What the cache holds."""

    def __init__(self, tokens: RowTokens):
        self.tokens = tokens

    def select(self, rows: list[int]) -> None:
        """See `Record`."""
        self.tokens = self.tokens.map(lambda part: part[rows])

    def follow(self, cache: Any, length: int) -> None:
        """See `Record`."""
        self.tokens = self.tokens.map(lambda part: part[:, :length])


def describe_call(placed: Placed | None, real: torch.Tensor, num_earlier: torch.Tensor) -> RowTokens:
    """The tokens of a call."""
    none = torch.full_like(real, -1, dtype=torch.long)
    if placed is None:
        return RowTokens(real, none, none, none)
    tokens, token = placed.tokens, placed.token
    if tokens is None:
        raise ValueError(
            "A position plan reads the geometry of images, and these image features hold only pooler_output; pass "
            "what get_image_features returned."
        )
    lengths = torch.tensor(tokens.lengths)
    image = torch.repeat_interleave(torch.arange(tokens.num_images), lengths)
    first = torch.tensor([geometry.first_view for geometry in tokens.images])[image]
    view = torch.where(tokens.view >= 0, tokens.view - first, -1)
    table = torch.stack([image, view, tokens.kind]).to(token.device)
    image, view, kind = torch.where(token >= 0, table[:, token.clamp(min=0)], -1)
    of_row = torch.where(image >= 0, image, tokens.num_images).amin(dim=1, keepdim=True)
    image = torch.where(image >= 0, image - of_row + num_earlier, -1)
    return RowTokens(real, image, view, kind, has_images=True)


def read_rows(prompt: Any) -> RowTokens:
    """The tokens of each row, those that are cached and those of the call."""
    past, mask = prompt.conversation.length, prompt.attention_mask
    rows, count = prompt.embeds.shape[:2]
    ones = torch.ones(rows, past + count, dtype=torch.bool, device=prompt.embeds.device)
    record = prompt.conversation.records.get(RECORD)
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        ones[:, -mask.shape[1] :] = mask[:, -ones.shape[1] :].bool()
    elif mask is not None and not past:
        raise ValueError("A position plan needs a two-dimensional attention_mask; pass (batch, length).")
    none = torch.full_like(ones[:, :past], -1, dtype=torch.long)
    earlier = RowTokens(ones[:, :past], none, none, none) if record is None else record.tokens
    num_earlier = torch.nn.functional.pad(earlier.image, (1, 0), value=-1).amax(dim=1, keepdim=True) + 1
    placed = prompt.placed
    if placed is not None and prompt.packing is not None:
        placed = placed.pack(prompt.packing)
    call = describe_call(placed, ones[:, past:], num_earlier)
    names = ("real", "image", "view", "kind")
    joined: dict = {name: torch.cat([getattr(earlier, name), getattr(call, name)], dim=1) for name in names}
    return RowTokens(**joined, num_cached=past, has_images=call.has_images)


def make_mask(config: Any, embeds: torch.Tensor, cache: Any, tokens: RowTokens, seen: torch.Tensor) -> Any:
    """The mask in which a token of the call sees what `seen` `(B, P, n)` says, in the form of the attention."""
    if config._attn_implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"The position plan has a mask, which {config._attn_implementation} cannot take; load the model with "
            'attn_implementation="sdpa".'
        )
    past, length = tokens.num_cached, seen.shape[2]

    def look_up(batch: Any, query: Any, key: Any) -> Any:
        return seen[batch, query - past, key.clamp(max=length - 1)]

    def seen_ahead(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return look_up(batch, query, key) & (key > query) & (key < length)

    def seen_at_all(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return look_up(batch, query, key)

    return create_masks_for_generate(
        config=config,
        inputs_embeds=embeds,
        attention_mask=tokens.real.long(),
        or_mask_function=seen_ahead,
        and_mask_function=seen_at_all,
        **{CACHE: cache},
    )


def plan_positions(model: Any, prompt: Any, cache: Any) -> None:
    """Ask the position plan where the tokens of a call stand and what they see; without a plan all stays."""
    plan = model.connector.position_plan
    if plan is None:
        return
    tokens = read_rows(prompt)
    prompt.conversation.records[RECORD] = RowRecord(tokens)
    positions, seen = plan(tokens)
    count = prompt.embeds.shape[1]
    wanted = (len(tokens.real), count, tokens.real.shape[1])
    if positions.shape != tokens.real.shape or (seen is not None and seen.shape != wanted):
        raise ValueError(
            f"{type(plan).__name__} gave positions of shape {tuple(positions.shape)} and a mask of shape "
            f"{None if seen is None else tuple(seen.shape)}, expected {tuple(tokens.real.shape)} and {wanted}."
        )
    prompt.position_ids = positions[:, -count:]
    if seen is None:
        if prompt.attention_mask is None and cache is None:  # else gaps in positions would pass for packed texts
            prompt.attention_mask = tokens.real.long()
        return
    if any(op.options.of == "language_model" for op in model.connector.layer_ops):
        raise ValueError(
            f"{type(plan).__name__} has a mask, and layer ops of the language model make masks of their own; leave "
            "one of the two out."
        )
    prompt.chunk_size = None  # tokens may see some behind them, so the prompt is read in one piece
    prompt.attention_mask = make_mask(model.language_model.config, prompt.embeds, cache, tokens, seen)

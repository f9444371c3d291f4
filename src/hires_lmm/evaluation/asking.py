"""From conversations to the ids that a model reads, and from the ids it wrote to answers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..processing.messages_hires_lmm import drop_marks
from ..training.parameters import find_base


def find_ends(model: Any, tokenizer: Any) -> torch.Tensor:
    """The ids that end an answer."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return torch.tensor(ends if isinstance(ends, list) else [ends], device=model.device)


def encode_prompts(processor: Any, texts: Sequence[str], placeholders: Sequence[str]) -> dict[str, torch.Tensor]:
    """Ids and mask, padded on the left, of texts from a chat template; one text of placeholders an image."""
    whole, _ = processor.get_text_with_replacements(list(texts), list(placeholders))
    tokenizer = processor.tokenizer
    adds = tokenizer.bos_token is None or not whole[0].startswith(tokenizer.bos_token)
    encoded = tokenizer(whole, padding=True, padding_side="left", add_special_tokens=adds)
    drop_marks(whole, encoded, (processor.image_token, processor.video_token), tokenizer)
    encoded.convert_to_tensors("pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def read_answers(
    tokenizer: Any, generated: torch.Tensor, ends: torch.Tensor
) -> tuple[list[str], list[bool], list[int]]:
    """Texts up to the first end token, whether it came, and the number of tokens before it."""
    is_end = torch.isin(generated, ends)
    ended = is_end.any(dim=1).tolist()
    before = is_end.long().cumsum(dim=1) == 0
    rows = [ids[mask].tolist() for ids, mask in zip(generated.cpu(), before.cpu(), strict=True)]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows], ended, [len(ids) for ids in rows]


@contextmanager
def use_threshold(model: Any, gamma: float | None) -> Iterator[None]:
    """Another gamma for the parts whose count depends on content."""
    if gamma is None:
        yield
        return
    parts = [op for op in find_base(model).connector.token_ops if op.traits.count == "content"]
    if not parts:
        raise ValueError(
            f"gamma={gamma}, but no part of this checkpoint keeps tokens by a threshold; set budgets (tokens, "
            'max_image_tokens) instead, or load it with a router whose keep is {"rule": "threshold"}.'
        )
    kept = [part.keep for part in parts]
    try:
        for part in parts:
            part.keep = replace(part.keep, gamma=gamma)
        yield
    finally:
        for part, keep in zip(parts, kept, strict=True):
            part.keep = keep

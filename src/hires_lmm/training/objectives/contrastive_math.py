"""The contrastive loss between fused queries and answers, as pure functions of states."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional


IDENTITY_SCOPES = ("batch", "block")


@torch.no_grad()
def find_outliers(matrix: torch.Tensor, sigma: float) -> torch.Tensor:
    """Elements further than some standard deviations from the mean of the whole matrix.

    Args:
        matrix (`torch.Tensor` of shape `(T, P)`): Any numbers.
        sigma (`float`): Standard deviations (with Bessel's correction) on each side of the mean.

    Returns:
        `(T, P)` bool; nothing of a matrix with a single element.
    """
    if matrix.numel() < 2:
        return torch.zeros_like(matrix, dtype=torch.bool)
    deviation, mean = torch.std_mean(matrix)
    return (matrix < mean - sigma * deviation) | (matrix > mean + sigma * deviation)


def normalise_texts(texts: torch.Tensor, outlier_sigma: float | None = 1.0) -> torch.Tensor:
    """Unit vectors of answers, with outlying elements set to zero before the division.

    Args:
        texts (`torch.Tensor` of shape `(T, P)`): Projected states of the text encoder, one row an answer.
        outlier_sigma (`float`, *optional*): See `find_outliers`; None keeps all elements.

    Returns:
        `(T, P)` float32 of length 1, or 0 where nothing of a row is left.

    Source: released code of huggingface.co/papers/2412.18387, which zeroes beyond 1; the paper does not say so. A row
    without elements gives zeros here and NaN there.
    """
    texts = texts.float()
    if outlier_sigma is not None:
        texts = texts.masked_fill(find_outliers(texts, outlier_sigma), 0.0)
    return functional.normalize(texts, dim=-1)


def contrast(queries: torch.Tensor, texts: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """Symmetric cross entropy of every query against all answers and of every answer against all queries.

    Args:
        queries (`torch.Tensor` of shape `(T, P)`): Unit vectors; row i belongs to answer i.
        texts (`torch.Tensor` of shape `(T, P)`): Unit vectors.
        logit_scale (`torch.Tensor`): Scalar; its exponential multiplies the cosines.

    Returns:
        A scalar.

    Source: first term of eq. 19 of huggingface.co/papers/2412.18387, as released.
    """
    logits = logit_scale.exp() * queries @ texts.T
    own = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def identity_term(slots: torch.Tensor, blocks: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared distance between the cosines of slots and the identity matrix: pushes slots apart.

    Args:
        slots (`torch.Tensor` of shape `(N, C)`): States of all slots, the end slots included.
        blocks (`torch.Tensor` of shape `(N,)`, *optional*): Number of the block of each slot; with it only pairs of
            one block count. Without it all pairs of the batch do, those of different images too.

    Returns:
        A scalar.

    Source: second term of eq. 19 of huggingface.co/papers/2412.18387. The released code takes the whole batch and
    the end slots; the paper speaks of the other slots only.
    """
    unit = functional.normalize(slots.float(), dim=-1)
    distance = (unit @ unit.T - torch.eye(len(unit), device=unit.device, dtype=unit.dtype)).square()
    return distance.mean() if blocks is None else distance[blocks[:, None] == blocks[None, :]].mean()


def compose_answers(
    answers: list[torch.Tensor],
    num_slots: list[int],
    end_token: int,
    max_length: int,
    block_tokens: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the text encoder reads of every answer: its tokens, tokens for the other slots, the end token.

    Args:
        answers (`list[torch.Tensor]`): Ids of each answer without any end token; cut where it is too long.
        num_slots (`list[int]`): Slots of the block that belongs to each answer, the end slot included.
        end_token (`int`): Id of the end token.
        max_length (`int`): Most tokens of a row.
        block_tokens (`list[int]`, *optional*): Ids that stand for the slots before the end slot; a shorter block takes
            the first of them. None leaves them out.

    Returns:
        `input_ids` and `attention_mask` `(T, S)`, padded on the right with the end token.

    Raises:
        ValueError: If the tokens for the slots leave no room, or are too few.

    Source: released code of huggingface.co/papers/2412.18387, whose answers carry the same placeholders as questions.
    """
    rows = []
    for answer, slots in zip(answers, num_slots, strict=True):
        middle = [] if block_tokens is None else block_tokens[: slots - 1]
        if block_tokens is not None and len(middle) < slots - 1:
            raise ValueError(f"A block has {slots} slots, but block_tokens holds {len(block_tokens)} ids; give more.")
        room = max_length - len(middle) - 1
        if room < 1:
            raise ValueError(f"max_length={max_length} leaves no room for an answer beside {slots} slots; raise it.")
        tail = torch.tensor([*middle, end_token], dtype=answer.dtype, device=answer.device)
        rows.append(torch.cat([answer[:room], tail]))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=end_token)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    return ids, (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()


def encode_answers(encoder: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Project the state at the last token of every answer.

    Args:
        encoder (`PreTrainedModel`): A text model with `text_projection`, such as `CLIPTextModelWithProjection`.
        input_ids (`torch.Tensor` of shape `(T, S)`): Answers that end with the end token, padded on the right.
        attention_mask (`torch.Tensor` of shape `(T, S)`): 1 for tokens.

    Returns:
        `(T, P)`. Unlike the encoder's own pooling this does not search for the end token, which CLIP's old
        configurations name wrongly and which may occur twice where it also pads.
    """
    states = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    last = attention_mask.long().sum(dim=1) - 1
    return encoder.text_projection(states[torch.arange(len(states), device=states.device), last])


def lengthen_positions(encoder: Any, length: int, seed: int = 0) -> None:
    """Give a text encoder with learned positions more of them, in place.

    Old rows stay; new ones are drawn from a normal distribution with mean and deviation of the old table.

    Args:
        encoder (`PreTrainedModel`): A text model with `position_embedding`, such as `CLIPTextModelWithProjection`.
        length (`int`): Positions wanted; nothing happens where there are as many.
        seed (`int`): Of the draw.

    Raises:
        ValueError: If the model has no table of positions.

    Source: released code of huggingface.co/papers/2412.18387 (77 to 512 for CLIP).
    """
    holders = [module for module in encoder.modules() if isinstance(_positions(module), nn.Embedding)]
    if not holders:
        raise ValueError(f"{type(encoder).__name__} has no position_embedding that could be made {length} long.")
    holder, old = holders[0], _positions(holders[0]).weight
    if length <= len(old):
        return
    deviation, mean = torch.std_mean(old.detach().float())
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(length - len(old), old.shape[1], generator=generator, dtype=torch.float32)
    drawn = drawn * deviation.cpu() + mean.cpu()
    table = nn.Embedding(length, old.shape[1], device=old.device, dtype=old.dtype)
    table.weight = nn.Parameter(torch.cat([old.detach(), drawn.to(old)]), requires_grad=old.requires_grad)
    holder.position_embedding = table
    holder.register_buffer("position_ids", torch.arange(length, device=old.device)[None], persistent=False)
    encoder.config.max_position_embeddings = length


def _positions(module: nn.Module) -> Any:
    """The table of positions that a module holds itself, or None."""
    return module._modules.get("position_embedding")

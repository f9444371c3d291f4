"""The contrastive loss between fused queries and answers, as pure functions of states."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional


IDENTITY_SCOPES = ("batch", "block")


@torch.no_grad()
def find_outliers(matrix: torch.Tensor, sigma: float) -> torch.Tensor:
    """Elements `(T, P)` further than `sigma` standard deviations from the mean of the whole matrix."""
    if matrix.numel() < 2:
        return torch.zeros_like(matrix, dtype=torch.bool)
    deviation, mean = torch.std_mean(matrix)
    return (matrix < mean - sigma * deviation) | (matrix > mean + sigma * deviation)


def normalise_texts(texts: torch.Tensor, outlier_sigma: float | None = 1.0) -> torch.Tensor:
    """Unit vectors `(T, P)` float32 of projected answers, with outlying elements set to zero before the division.

    Source: released code of huggingface.co/papers/2412.18387, which zeroes beyond 1; the paper does not say so. A row
    without elements gives zeros here and NaN there.
    """
    texts = texts.float()
    if outlier_sigma is not None:
        texts = texts.masked_fill(find_outliers(texts, outlier_sigma), 0.0)
    return functional.normalize(texts, dim=-1)


def contrast(queries: torch.Tensor, texts: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """Symmetric cross entropy of unit vectors `(T, P)`, each against all of the other side.

    Source: first term of eq. 19 of huggingface.co/papers/2412.18387, as released.
    """
    logits = logit_scale.exp() * queries @ texts.T
    own = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def identity_term(slots: torch.Tensor, blocks: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared distance of the cosines of slots `(N, C)` from the identity: all pairs, or those of one block.

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
    """Ids and mask `(T, S)` that the text encoder reads: the answer, `block_tokens` for other slots, the end token.

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
    """Project the state at the last token of every answer: `(T, P)`. The encoder's own pooling would search for the
    end token, which CLIP's old configurations name wrongly and which may occur twice where it also pads."""
    states = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    last = attention_mask.long().sum(dim=1) - 1
    return encoder.text_projection(states[torch.arange(len(states), device=states.device), last])


def lengthen_positions(encoder: Any, length: int, seed: int = 0) -> None:
    """Give a text encoder more learned positions, in place, drawn with mean and deviation of the old ones.

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

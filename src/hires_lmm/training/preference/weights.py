"""Columns of preference data that TRL's collator leaves out: revised answers and weights of tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


COLUMNS = ("revised", "chosen_weights", "rejected_weights", "image_weights")
"""`revised`: whether the chosen answer is an edited one. The others: a list of floats, one a token of the answer."""


class PreferenceColumns:
    """A collator around another one of preference data, such as TRL's, that brings `COLUMNS` into the batch.

    Args:
        collator (`Callable`): Its batches have `completion_mask`, chosen answers in the first half of the rows.

    The batch gains, where a row has the column: `revised` (B,), `answer_weights` (2B, L) and `image_weights` (B, L), 1
    where nothing else was said.
    """

    def __init__(self, collator: Callable[[list[dict]], Any]):
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """The batch of TRL, and the columns."""
        columns = {name: [row.get(name) for row in rows] for name in COLUMNS}
        batch = self.collator([{name: row[name] for name in row if name not in COLUMNS} for row in rows])
        mask = batch["completion_mask"]
        if any(value is not None for value in columns["revised"]):
            if wrong := [value for value in columns["revised"] if value not in (None, True, False)]:
                raise ValueError(f"revised={wrong[0]!r} must be true or false.")
            batch["revised"] = torch.tensor([bool(value) for value in columns["revised"]])
        answers = columns["chosen_weights"] + columns["rejected_weights"]
        if any(value is not None for value in answers):
            batch["answer_weights"] = place_weights(answers, mask)
        if any(value is not None for value in columns["image_weights"]):
            batch["image_weights"] = place_weights(columns["image_weights"], mask[: len(rows)])
        return batch


def place_weights(weights: Sequence[Sequence[float] | None], completion_mask: torch.Tensor) -> torch.Tensor:
    """Lay the weights of answers along their tokens: (rows, L), 1 elsewhere."""
    placed = torch.ones(completion_mask.shape)
    for row, values in enumerate(weights):
        columns = completion_mask[row].nonzero()[:, 0]
        if values is not None and len(values) > len(columns):
            raise ValueError(
                f"{len(values)} weights for an answer of {len(columns)} tokens; give one a token, see `token_weights`."
            )
        if values:
            placed[row, columns[: len(values)]] = torch.tensor(values, dtype=placed.dtype)
    return placed


def token_weights(tokenizer: Any, answer: str, spans: Mapping[str, float]) -> list[float]:
    """Weights of the tokens of an answer, for the columns `chosen_weights`, `rejected_weights`, `image_weights`.

    Args:
        tokenizer: A fast tokenizer.
        answer (`str`): The answer as it stands in the data.
        spans (mapping): Piece of the answer -> weight, such as 1.5 for what an expert marked as invented.

    Returns:
        One number a token: the weight of the last span that it touches, 1 elsewhere.

    Raises:
        ValueError: If the answer does not hold a span.
    """
    offsets = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    weights = [1.0] * len(offsets)
    for span, weight in spans.items():
        start = answer.find(span)
        if start < 0 or not span:
            raise ValueError(f"The span {span!r} is no piece of the answer {answer!r}.")
        inside = [low < start + len(span) and high > start for low, high in offsets]
        weights = [weight if here else old for here, old in zip(inside, weights, strict=True)]
    return weights

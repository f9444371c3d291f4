"""Several answers to one question, scored on several axes: the best of them, pairs for DPO, attributes as text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RankedAnswer:
    """An answer, its scores by axis, and their weighted mean."""

    text: str
    scores: dict[str, float]
    value: float


def rank_answers(
    answers: Sequence[str], scores: Sequence[Mapping[str, float]], weights: Mapping[str, float] | None = None
) -> list[RankedAnswer]:
    """Order the answers to one question, best first.

    Args:
        answers (sequence of `str`): Answers; of equal ones the first stands for all.
        scores (sequence of mappings): One an answer: axis, such as helpfulness or correctness, -> number.
        weights (mapping, *optional*): Axis -> weight in the mean; negative where less is better. Default: all alike.

    Returns:
        The answers with their values; ties stay in the order given.

    Raises:
        ValueError: If numbers or axes do not match.
    """
    if not answers or len(answers) != len(scores):
        raise ValueError(f"{len(answers)} answers with {len(scores)} scores; give one score an answer, at least one.")
    weights = dict.fromkeys(scores[0], 1.0) if weights is None else weights
    total = sum(abs(weight) for weight in weights.values())
    ranked: dict[str, RankedAnswer] = {}
    for text, own in zip(answers, scores, strict=True):
        if missing := sorted(weights.keys() - own.keys()):
            raise ValueError(f"The scores {dict(own)} of the answer {text[:60]!r} lack {', '.join(missing)}.")
        value = sum(weight * own[axis] for axis, weight in weights.items()) / (total or 1.0)
        ranked.setdefault(text, RankedAnswer(text, dict(own), value))
    return sorted(ranked.values(), key=lambda answer: -answer.value)


def best_answers(ranked: Sequence[RankedAnswer], least: float | None = None) -> list[str]:
    """Rejection sampling: the text of the best answer, or of none if its value is below `least`."""
    return [answer.text for answer in ranked[:1] if least is None or answer.value >= least]


def preference_pairs(
    ranked: Sequence[RankedAnswer], min_gap: float = 0.0, all_pairs: bool = False
) -> list[tuple[str, str]]:
    """Pairs (chosen, rejected) for DPO.

    Args:
        ranked (sequence of `RankedAnswer`): As `rank_answers` gives them.
        min_gap (`float`): Values of a pair differ by more than this.
        all_pairs (`bool`): All such pairs, not only the best and the worst.
    """
    found = [(a, b) for i, a in enumerate(ranked) for b in ranked[i + 1 :] if a.value - b.value > min_gap]
    ends = [pair for pair in found if pair == (ranked[0], ranked[-1])]
    return [(chosen.text, rejected.text) for chosen, rejected in (found if all_pairs else ends)]


def attribute_prompt(scores: Mapping[str, float], question: str) -> str:
    """SteerLM-like: the scores of an answer as text behind the question; ask with those that are wanted.

    Args:
        scores (mapping): Axis -> number; whole numbers are written without a point.
        question (`str`): The question.
    """
    return f"{question}\n[{', '.join(f'{axis} {value:g}' for axis, value in scores.items())}]"


def preference_row(images: Sequence[Any], question: str, chosen: str, rejected: str, **columns: Any) -> dict[str, Any]:
    """A row of preference data in the form of TRL, for `datasets.Dataset.from_list`.

    Args:
        images (sequence): Pictures, which stand before the question.
        question, chosen, rejected (`str`): Texts.
        columns: More columns, such as `revised`.
    """
    turns = {"prompt": ("user", question), "chosen": ("assistant", chosen), "rejected": ("assistant", rejected)}
    messages = {name: [{"role": role, "content": text}] for name, (role, text) in turns.items()}
    return {"images": list(images), **messages, **columns}

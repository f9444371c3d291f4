"""The plan of the token-scaling paper: contrastive warm-up, generation, a short tuning for every number of tokens."""

from dataclasses import replace
from typing import Any

from .stages import Stage, tower_rates


RATE = 2e-5
TOKENS = (256, 128, 64, 32, 16, 8, 1)
"""Numbers of tokens of the paper up to 256, the size of the preset `fusion`; it also has 768, 512 and 384."""

QUESTION = "connector.token_ops.0.question"
"""Whether the fusion transformer reads the question."""

QUESTIONS = {"with_question": True, "without_question": False}
"""Column -> whether the fusion transformer reads the question in the last stages."""


def fusion(column: str = "with_question", tower_rate: Any = None, tokens: tuple[int, ...] = TOKENS) -> list[Stage]:
    """One model a number of tokens, as the paper.

    Args:
        column (`str`): `"with_question"`, or `"without_question"`: the last stages switch the question off, as the
            paper's second column of models was made.
        tower_rate (`float` or `dict`, *optional*): See `tower_rates`.
        tokens (`tuple[int]`): Numbers of tokens, the largest first.

    Returns:
        `fusion/contrastive` (needs the objective `contrastive`) and `fusion/generation`, both with the largest number;
        then one stage for every other number, and without the question for the largest too, each of which starts
        from `fusion/generation`.

    Source: huggingface.co/papers/2412.18387, section on training: 1000 steps of 256 samples, two epochs of 2560, a
    tenth of the data for every other number. Its training scripts are not public, so what the paper leaves open is
    decided here: the tower is frozen and the language model too, everything between them learns.
    """
    question = find_question(column)
    generation = _generate("fusion/generation", tower_rate, tokens[0])
    tuned = tokens[1:] if question else tokens
    last = [replace(_generate(f"fusion/{n}", tower_rate, n, question), after=generation.name) for n in tuned]
    return [_warm_up("fusion", tower_rate, tokens[0]), generation, *last]


def fusion_nested(
    column: str = "with_question", tower_rate: Any = None, tokens: tuple[int, ...] = TOKENS
) -> list[Stage]:
    """One model for all numbers of tokens: the number is drawn anew for every optimizer step.

    Args:
        column, tower_rate, tokens: As in `fusion`; the question is switched off in the last stage.

    Returns:
        `fusion_nested/contrastive` (needs the objective `contrastive`) and `fusion_nested/generation`.

    Source: not of the paper. Its blocks are nested (a shorter one takes the first rows of a longer one), which makes
    this possible.
    """
    generation = _generate("fusion_nested/generation", tower_rate, list(tokens), find_question(column))
    return [_warm_up("fusion_nested", tower_rate, list(tokens)), generation]


def find_question(column: str) -> bool:
    """Whether a column reads the question."""
    if column not in QUESTIONS:
        raise ValueError(f"Unknown column {column!r} of the plan; known columns: {', '.join(QUESTIONS)}.")
    return QUESTIONS[column]


def _warm_up(plan: str, tower_rate: Any, tokens: int | list[int]) -> Stage:
    """The contrastive stage: the answer of the language model counts for nothing."""
    return Stage(
        f"{plan}/contrastive",
        {**_rates(tower_rate), "objectives.contrastive": RATE},
        loss_weights={"contrastive": 1.0, "generation": 0.0},
        batch_size=256,
        zero_stage=2,
        max_image_tokens=tokens,
        settings={QUESTION: True},
    )


def _generate(name: str, tower_rate: Any, tokens: int | list[int], question: bool = True) -> Stage:
    """A stage with the language loss."""
    settings = {QUESTION: question}
    return Stage(name, _rates(tower_rate), batch_size=2560, zero_stage=2, max_image_tokens=tokens, settings=settings)


def _rates(tower_rate: Any) -> dict[str, float]:
    """Rates of all stages: what lies between tower and language model."""
    return {**tower_rates(tower_rate), "connector": RATE}

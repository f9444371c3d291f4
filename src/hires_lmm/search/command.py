"""`hires-lmm ask --search`: from names and numbers to a policy, an answer and a picture of the walk."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..inference import find_unknown_words, open_images
from .base import Policy, Prompt
from .drawing import draw_walk
from .oracle import ModelOracle
from .policies import DescribeThenAnswer, ReasonThenSummarise, StepByStep
from .zoom_eye import ZoomEye, ZoomPrompts


POLICIES: dict[str, type] = {
    "zoom_eye": ZoomEye,
    "describe_then_answer": DescribeThenAnswer,
    "reason_then_summarise": ReasonThenSummarise,
    "step_by_step": StepByStep,
}
"""What `hires-lmm ask --search` knows, by name."""


def build_policy(name: str, **options: Any) -> Policy:
    """A policy from JSON values.

    Args:
        name (`str`): One of `POLICIES`.
        options: Its fields. Lists stand for tuples; `prompts` of `zoom_eye` is a dict of the fields of `ZoomPrompts`,
            each prompt a dict of the fields of `Prompt`, or the path of a JSON file with it.

    Raises:
        ValueError: If the name, an option or a value is wrong.
    """
    if name not in POLICIES:
        raise ValueError(f"search={name!r} is unknown; choose one of {', '.join(POLICIES)}.")
    known = [entry.name for entry in fields(POLICIES[name])]
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"{name} has no option {unknown[0]!r}; its options are {', '.join(known)}.")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        if "prompts" in values:
            values["prompts"] = _read_prompts(values["prompts"])
        policy: Policy = POLICIES[name](**values)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"The options {options} do not fit {name}: {error}.") from error
    return policy


def _read_prompts(given: Any) -> ZoomPrompts:
    if isinstance(given, str):
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"prompts={given!r} cannot be read as a JSON file: {error}.") from error
    made: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, dict):
            words: dict[str, Any] = {key: tuple(own) if isinstance(own, list) else own for key, own in value.items()}
            value = Prompt(**words)
        made[name] = value
    return ZoomPrompts(**made)


def answer_by_search(
    model: Any,
    processor: Any,
    search: tuple[str, dict[str, Any]],
    images: Sequence[Any],
    question: str,
    show: Path | None = None,
    **limits: Any,
) -> dict[str, Any]:
    """Answer a question by a policy, for the command line.

    Args:
        model, processor, limits: As in `ModelOracle`.
        search (`tuple`): Name and options of the policy, as `build_policy` takes them.
        images, question: As in `Policy.run`.
        show (`Path`, *optional*): A PNG to write: where was looked, and what was found.

    Returns:
        A record for JSON: question, words that the tokenizer does not know, answer, boxes, calls, steps.

    Raises:
        ValueError: If something does not fit, or there are no places to draw.
    """
    if show is not None and (show.suffix.lower() != ".png" or not show.absolute().parent.is_dir()):
        raise ValueError(f"show={show} must end in .png and lie in a folder that exists.")
    policy, opened = build_policy(search[0], **search[1]), open_images(list(images))
    oracle = ModelOracle(model, processor, **limits)
    result = policy.run(opened, question, oracle)
    if show is not None:
        draw_walk(opened[0], result.steps, result.boxes, title=f"{question} {result.answer}").save(show)
    return {
        "question": question,
        "unknown_words": find_unknown_words(processor.tokenizer, question),
        "answer": result.answer,
        "boxes": result.boxes,
        "calls": oracle.calls,
        "steps": [step.to_dict() for step in result.steps],
    }

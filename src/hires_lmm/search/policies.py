"""Policies that talk before they answer: describe, think, plan."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import Pipeline

from .base import Oracle, SearchResult, Step, check_texts, open_all


THOUGHTS = re.compile(r"<thoughts>(.*?)(?:</thoughts>|$)", re.DOTALL)


@dataclass(frozen=True)
class DescribeThenAnswer:
    """A model that sees describes; a model that reads answers from the description alone.

    Args:
        reader (`Callable`, *optional*): A text model: a pipeline of transformers for `"text-generation"`, or a
            function from text to text; by default the oracle, without the images.
        describe (`str`): What the model that sees is told.
        ask (`str`): What the model that reads is told, with `{description}` and `{question}`.

    Raises:
        ValueError: If the reader cannot be called, or the braces of `ask` hold anything else.

    Source: Prism (NeurIPS 2024).
    """

    reader: Callable[..., Any] | None = None
    describe: str = (
        "Describe the image in detail: what is shown, the objects and their attributes, how many there are, where "
        "they are and how they relate, and all text."
    )
    ask: str = (
        "This is a description of an image:\n{description}\n\nAnswer the question from it, in few words.\n"
        "Question: {question}"
    )

    def __post_init__(self) -> None:
        check_texts("description", "question", ask=self.ask)
        if self.reader is not None and not callable(self.reader):
            raise ValueError(f"reader={self.reader!r} cannot be called; in Python pass a pipeline or a function.")

    def run(self, images: Sequence[Any], question: str, oracle: Oracle) -> SearchResult:
        """See `Policy.run`; there are no boxes."""
        description = oracle.answer(open_all(images), [self.describe])
        asked = self.ask.format(description=description, question=question)
        answer = oracle.answer([], [asked]) if self.reader is None else _read(self.reader, asked)
        steps = [Step("describe", self.describe, said=description), Step("answer", asked, said=answer)]
        return SearchResult(answer, [], steps)


def _read(reader: Callable[..., Any], text: str) -> str:
    if not isinstance(reader, Pipeline):
        return str(reader(text))
    if reader.task != "text-generation":
        raise ValueError(f"The reader is a pipeline for {reader.task!r}; make one for 'text-generation'.")
    has_turns = getattr(reader.tokenizer, "chat_template", None) is not None
    said = reader([{"role": "user", "content": text}] if has_turns else text, return_full_text=False)
    return str(said[0]["generated_text"]).strip()


@dataclass(frozen=True)
class ReasonThenSummarise:
    """A reasoner thinks; a summariser sees images, question and thoughts, and may ignore the thoughts.

    Args:
        summariser (`Oracle`, *optional*): A second model; by default the one that thinks.
        reason (`str`): What the reasoner is told, with `{question}`.
        summarise (`str`): What the summariser is told, with `{thoughts}` and `{question}`.

    Raises:
        ValueError: If the summariser cannot answer, or the braces of a text hold anything else.

    Source: Insight-V (CVPR 2025); the words are ours, its tags `<thoughts>` are read.
    """

    summariser: Oracle | None = None
    reason: str = (
        "Think step by step about what is needed to answer the question, and write it between <thoughts> and "
        "</thoughts>. Do not answer yet.\nQuestion: {question}"
    )
    summarise: str = (
        "Question: {question}\nSomeone thought about it:\n{thoughts}\n\nThe thoughts may be wrong; use what agrees "
        "with the image. Answer in few words."
    )

    def __post_init__(self) -> None:
        check_texts("question", reason=self.reason)
        check_texts("thoughts", "question", summarise=self.summarise)
        if self.summariser is not None and not hasattr(self.summariser, "answer"):
            raise ValueError(f"summariser={self.summariser!r} cannot answer; in Python pass a ModelOracle.")

    def run(self, images: Sequence[Any], question: str, oracle: Oracle) -> SearchResult:
        """See `Policy.run`; there are no boxes."""
        opened = open_all(images)
        asked = self.reason.format(question=question)
        said = oracle.answer(opened, [asked])
        inside = THOUGHTS.search(said)
        thoughts = (inside[1] if inside else said).strip()
        then = self.summarise.format(question=question, thoughts=thoughts)
        answer = (self.summariser or oracle).answer(opened, [then])
        return SearchResult(answer, [], [Step("reason", asked, said=said), Step("answer", then, said=answer)])


@dataclass(frozen=True)
class StepByStep:
    """Four turns of one conversation, each by beam search: plan, caption, reasoning, answer.

    Args:
        num_beams (`int`): Beams of each turn.
        turns (`tuple` of `str`): What the model is told in turn; `{question}` may stand in any.

    Raises:
        ValueError: If there are no beams or no turns, or the braces of a turn hold anything else.

    Source: LlamaV-o1 (ACL 2025 findings); the words are ours.
    """

    num_beams: int = 4
    turns: tuple[str, ...] = (
        "{question}\nFirst say in a sentence how you will find the answer.",
        "Describe what in the image matters for the question.",
        "Reason step by step from what you described.",
        "Now answer the question, in few words.",
    )

    def __post_init__(self) -> None:
        if self.num_beams < 1 or not self.turns or isinstance(self.turns, str):
            raise ValueError(f"num_beams={self.num_beams}, turns={self.turns!r}: give a beam or more, and a list.")
        for turn in self.turns:
            check_texts("question", turn=turn)

    def run(self, images: Sequence[Any], question: str, oracle: Oracle) -> SearchResult:
        """See `Policy.run`; there are no boxes."""
        opened, said = open_all(images), ""
        turns: list[str] = []
        steps: list[Step] = []
        for number, turn in enumerate(self.turns, start=1):
            turns.append(turn.format(question=question))
            said = oracle.answer(opened, turns, num_beams=self.num_beams)
            turns.append(said)
            steps.append(Step(f"turn {number}", turns[-2], said=said))
        return SearchResult(said, [], steps)

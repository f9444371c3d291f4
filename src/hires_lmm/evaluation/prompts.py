"""Response formats, options to choose from, and when an answer counts as right."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace


WORD_FORMAT = "Answer the question using a single word or phrase."
LETTER_FORMAT = "Answer with the option's letter from the given choices directly."
"""Source: SliME, huggingface.co/papers/2406.08487, Table 6."""

LETTERS = "ABCDEFGHIJ"
NUM_OPTIONS = 4


@dataclass(frozen=True)
class AskedQuestion:
    """What is put behind the user's text, the answer that is then right, and the options to choose from, if any."""

    suffix: str
    answer: str
    num_options: int | None = None


def normalise_answer(text: str) -> str:
    """The form in which answers are compared: no case, no doubled white space, no full stop at the end."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def draw_options(
    answer: str, kind: str | None, answers: Sequence[str], key: str, num_options: int = NUM_OPTIONS
) -> list[str]:
    """The right answer and up to three of others, which are wrong; the same key gives the same options."""
    others = sorted({normalise_answer(other): other for other in answers}.items())
    wrong = [other for name, other in others if name != normalise_answer(answer)]
    if not wrong:
        raise ValueError(
            f"All questions of kind {kind!r} have the answer {answer!r}, so there are no options to choose from; "
            "leave out the format 'letter' or add questions."
        )
    rng = random.Random(f"options/{key}")
    options = [answer, *rng.sample(wrong, min(num_options - 1, len(wrong)))]
    rng.shuffle(options)
    return options


def ask(answer: str, response_format: str, options: Sequence[str] = ()) -> AskedQuestion:
    """What a response format puts behind a question, and the answer that is then right."""
    plain = AskedQuestion("", answer)
    if response_format == "plain":
        return plain
    if response_format == "word":
        return replace(plain, suffix=f"\n{WORD_FORMAT}")
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    suffix = "\n".join(["", *lines, LETTER_FORMAT])
    return AskedQuestion(suffix, LETTERS[list(options).index(answer)], len(options))

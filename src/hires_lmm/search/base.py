"""What policies and oracles say to each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from PIL import Image


Box = tuple[int, int, int, int]
"""Left, top, width and height in an image, pixels."""


@dataclass(frozen=True)
class Prompt:
    """A question that is answered with a confidence.

    Args:
        text (`str`): What the model is asked; `{}` stands for the subject, here and in the words.
        yes (`tuple` of `str`): Words that speak for it.
        no (`tuple` of `str`): Words that speak against it; those in `yes` do not count. Without any words the
            confidence is how sure the model is of the first token of its answer: for models that know no yes and no.
    """

    text: str
    yes: tuple[str, ...] = ("Yes",)
    no: tuple[str, ...] = ("No",)


@dataclass(frozen=True)
class Ask:
    """One question to an oracle about one place.

    Args:
        kind (`str`): What it is asked for: `existence`, `latent` or `answering`.
        subject (`str`): What stands in the prompt: a cue, or a question.
        prompt (`Prompt`): How it is asked.
        box (`tuple`): The place.
        depth (`int`): Its level in the tree; 0 is the whole image.
        views (`Callable`): Makes the pictures that show the place; the same objects at every call.
    """

    kind: str
    subject: str
    prompt: Prompt
    box: Box
    depth: int
    views: Callable[[], Sequence[Image.Image]]

    @property
    def text(self) -> str:
        """The question in full."""
        return self.prompt.text.format(self.subject)

    @property
    def words(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The words for it and against it."""
        yes, no = ([word.format(self.subject) for word in words] for words in (self.prompt.yes, self.prompt.no))
        return tuple(yes), tuple(word for word in no if word not in yes)


@dataclass(frozen=True)
class Step:
    """What a policy asked, and what came back: a confidence or a text."""

    kind: str
    asked: str
    box: Box | None = None
    depth: int = 0
    confidence: float | None = None
    said: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What there is of it, for JSON."""
        return {name: value for name, value in vars(self).items() if value is not None}


class SearchResult(NamedTuple):
    """The answer, the boxes that it was given for, and every question on the way, in order."""

    answer: str
    boxes: list[Box]
    steps: list[Step]


class Oracle(Protocol):
    """Who answers a policy: `ModelOracle`, or anything with these two methods."""

    @property
    def side(self) -> int:
        """Pixels of the vision tower's view along a side."""
        ...

    def confidences(self, asks: Sequence[Ask]) -> list[float]:
        """From -1, surely not, to 1, surely; one a question, in their order."""
        ...

    def answer(self, images: Sequence[Image.Image], turns: Sequence[str], **options: Any) -> str:
        """The model's next words; turns of user and model alternate, the first holds the images."""
        ...


class Policy(Protocol):
    """A way to an answer; `hires-lmm ask --search NAME` knows those of `POLICIES`."""

    def run(self, images: Sequence[Any], question: str, oracle: Oracle) -> SearchResult:
        """Answer a question about images, in any form that the processor takes."""
        ...

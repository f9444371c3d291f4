"""What policies and oracles say to each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from PIL import Image

from ..inference import open_images


Box = tuple[int, int, int, int]
"""Left, top, width and height in an image, pixels."""


def open_all(images: Sequence[Any]) -> list[Image.Image]:
    """Open the images of a policy, in any form that the processor takes.

    Raises:
        ValueError: If they are no list, or one cannot be read.
    """
    if isinstance(images, str) or not isinstance(images, Sequence):
        raise ValueError(f"images must be a list of images, not {type(images).__name__}; write [image] for one.")
    return open_images(list(images))


def check_texts(*names: str, **texts: Any) -> None:
    """Refuse texts whose braces hold anything but these names; without names, `{}`.

    Raises:
        ValueError: If one is no text, or has other braces.
    """
    for field, text in texts.items():
        try:
            text.format(*([] if names else [""]), **dict.fromkeys(names, ""))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            allowed = ", ".join(f"{{{name}}}" for name in names) or "{}"
            raise ValueError(
                f"{field}={text!r} must be a text with {allowed} and no other braces; other braces are doubled."
            ) from error


@dataclass(frozen=True)
class Prompt:
    """A question that is answered with a confidence.

    Args:
        text (`str`): What the model is asked; `{}` stands for the subject, here and in the words.
        yes (`tuple` of `str`): Words that speak for it.
        no (`tuple` of `str`): Words that speak against it; those in `yes` do not count. Without any words the
            confidence is how sure the model is of the first token of its answer: for models that know no yes and no.

    Raises:
        ValueError: If a field is of another type, braces hold more than `{}`, a word is empty, or words stand on one
            side alone.
    """

    text: str
    yes: tuple[str, ...] = ("Yes",)
    no: tuple[str, ...] = ("No",)

    def __post_init__(self) -> None:
        for name in ("yes", "no"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={getattr(self, name)!r} is one text; write {(getattr(self, name),)!r}.")
        if bool(self.yes) != bool(self.no):
            raise ValueError(f"yes={self.yes!r}, no={self.no!r}: give words on both sides, or none at all.")
        check_texts(prompt=self.text)
        for word in (*self.yes, *self.no):
            check_texts(word=word)
            if not word.strip():
                raise ValueError(f"yes={self.yes!r}, no={self.no!r} hold an empty word; leave it out.")


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
        against = tuple(word for word in no if word not in yes)
        if yes and not against:
            raise ValueError(f"Every word against {self.subject!r} speaks for it too: {yes}; name others.")
        return tuple(yes), against


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

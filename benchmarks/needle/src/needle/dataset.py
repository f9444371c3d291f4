"""The needle task as a stream of rows and as the questions of a sweep."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from .questions import QUESTION_KINDS, Question, ask_questions, chance_accuracy, constant_accuracy
from .scenes import NeedleOptions, Scene, render_scene, sample_scene
from .sprites import SPLITS
from .text_scenes import pick_questions


CONSTANT_SCENES = 500
"""Training scenes on which constant answers are measured."""


def needle_scene(index: int, split: str, seed: int = 0, options: NeedleOptions | None = None) -> Scene:
    """One scene of the task, without its pixels.

    Args:
        index (`int`): Number of the scene.
        split (`str`): `train`, `validation` or `test`.
        seed (`int`): Another seed, other scenes.
        options (`NeedleOptions`, *optional*): How scenes are drawn.

    Returns:
        The scene; `render_scene` draws it.

    Raises:
        ValueError: If the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
    return sample_scene(NeedleOptions() if options is None else options, split, f"{seed}/{index}")


def needle_row(image: Any, question: Question, scene: int) -> dict[str, Any]:
    """A question as a row of a conversational data set.

    Args:
        image (`Image.Image` or callable): The picture, or what draws it.
        question (`Question`): What is asked about it.
        scene (`int`): Number of the scene.

    Returns:
        `dict` with `images`, `messages` (user turn with the image, assistant turn with the answer), `answer`, `kind`,
        `fine`, `cut` and `scene`.
    """
    user = [{"type": "image"}, {"type": "text", "text": question.text}]
    return {
        "images": [image],
        "messages": [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
        ],
        "answer": question.answer,
        "kind": question.kind,
        "fine": question.fine,
        "cut": question.cut,
        "scene": scene,
    }


class NeedleDataset(IterableDataset):
    """Rows of the needle task, made while they are read; nothing is downloaded or stored.

    Args:
        split (`str`): `train`, `validation` or `test`; no scene and no handwritten digit is in two of them.
        num_scenes (`int`, *optional*): How many scenes; endless by default.
        seed (`int`): Another seed, other scenes.
        options (`NeedleOptions`, *optional*): How scenes are drawn.
        questions_per_scene (`int`): Most rows a scene; they share the picture.
        kinds (sequence of `str`): Question kinds that are asked, each equally often where a scene has it.
        first_scene (`int`): Where to start, to continue an interrupted pass.

    The workers of a `DataLoader` share the scenes among them. With several processes, accelerate's data loader gives
    each its part.

    Raises:
        ValueError: If the split or a kind is unknown.
    """

    def __init__(
        self,
        split: str = "train",
        num_scenes: int | None = None,
        seed: int = 0,
        options: NeedleOptions | None = None,
        questions_per_scene: int = 4,
        kinds: Sequence[str] = QUESTION_KINDS,
        first_scene: int = 0,
    ):
        super().__init__()
        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
        unknown = sorted(set(kinds) - set(QUESTION_KINDS))
        if unknown:
            raise ValueError(f"Unknown question kinds {unknown}: kinds are {', '.join(QUESTION_KINDS)}.")
        self.split, self.num_scenes, self.seed = split, num_scenes, seed
        self.options = NeedleOptions() if options is None else options
        self.questions_per_scene, self.kinds, self.first_scene = questions_per_scene, tuple(kinds), first_scene

    def scene(self, index: int) -> Scene:
        """The scene of that number."""
        return needle_scene(index, self.split, self.seed, self.options)

    def questions(self, index: int) -> tuple[Scene, list[Question]]:
        """The scene of that number and what `rows` asks about it."""
        scene = self.scene(index)
        rng = random.Random(f"rows/{self.split}/{self.seed}/{index}")
        return scene, pick_questions(ask_questions(scene), self.kinds, self.questions_per_scene, rng)

    def rows(self, index: int) -> list[dict[str, Any]]:
        """The rows of one scene."""
        scene, questions = self.questions(index)
        if not questions:
            return []
        image = draw(scene)
        return [needle_row(image, question, index) for question in questions]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        step = 1 if worker is None else worker.num_workers
        index = self.first_scene + (0 if worker is None else worker.id)
        while self.num_scenes is None or index < self.num_scenes:
            yield from self.rows(index)
            index += step


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene.

    Args:
        scene (`Scene`): The scene.
    """
    return Image.fromarray(render_scene(scene))


def needle_rows(
    split: str = "validation",
    scenes: int = 100,
    questions: int = 8,
    seed: int = 0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Questions for `hires-lmm sweep`, with what guessing gets; pictures are drawn when they are needed.

    Args:
        split (`str`): `train`, `validation` or `test`.
        scenes (`int`): Number of scenes.
        questions (`int`): Most questions a scene.
        seed (`int`): Another seed, other scenes.
        options: Fields of `NeedleOptions`: how scenes are drawn.

    Returns:
        The rows of `NeedleDataset` with functions in place of pictures, `chance` and `constant`: what the best
        constant answer to questions of the kind gets on training scenes.

    Raises:
        ValueError: If the split or an option is unknown, or a value of another type.
    """
    known = {entry.name for entry in fields(NeedleOptions)}
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"NeedleOptions has no field {unknown[0]!r}; its fields are {', '.join(sorted(known))}.")
    for name, value in options.items():
        kind = list if isinstance(getattr(NeedleOptions, name), tuple) else type(getattr(NeedleOptions, name))
        if type(value) is not kind and (kind is not list or not isinstance(value, tuple)):
            raise ValueError(
                f"{name}={value!r} is of type {type(value).__name__}; it must be of type {kind.__name__}."
            )
    try:
        drawing = NeedleOptions(**options)
        needle_scene(0, "train", seed, drawing)
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"The options {options} do not fit NeedleOptions: {error}.") from error
    dataset = NeedleDataset(split, scenes, seed, drawing, questions)
    chance = chance_accuracy(dataset.options)
    drawn = (needle_scene(index, "train", seed, dataset.options) for index in range(CONSTANT_SCENES))
    constant = constant_accuracy([question for scene in drawn for question in ask_questions(scene)])
    rows = []
    for index in range(scenes):
        scene, asked = dataset.questions(index)
        picture = partial(draw, scene)
        for question in asked:
            extra = {"chance": chance[question.kind], "constant": constant[question.kind]}
            rows.append({**needle_row(picture, question, index), **extra})
    return rows

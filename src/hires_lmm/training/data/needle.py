"""The needle task as a stream: generated scenes with small objects, and questions with exact answers.

    from hires_lmm.training.data.needle import NeedleDataset

    for row in NeedleDataset(split="validation", num_scenes=2):
        row["images"][0], row["messages"], row["kind"]

See docs/needle.md. Scenes come from `scenes`, questions from `questions`.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from .questions import (
    FINE_KINDS,
    QUESTION_KINDS,
    SCENE_KINDS,
    Question,
    ask_questions,
    chance_accuracy,
    constant_accuracy,
)
from .scenes import NeedleOptions, Scene, SceneObject, render_scene, sample_scene
from .sprites import SPLITS
from .text_scenes import pick_questions


__all__ = [
    "FINE_KINDS",
    "QUESTION_KINDS",
    "SCENE_KINDS",
    "SPLITS",
    "NeedleDataset",
    "NeedleOptions",
    "Question",
    "Scene",
    "SceneObject",
    "ask_questions",
    "chance_accuracy",
    "constant_accuracy",
    "needle_row",
    "needle_scene",
    "render_scene",
]


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


def needle_row(image: Image.Image, question: Question, scene: int) -> dict[str, Any]:
    """A question as a row of a conversational data set.

    Args:
        image (`Image.Image`): The picture.
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
        image = Image.fromarray(render_scene(scene))
        return [needle_row(image, question, index) for question in questions]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        step = 1 if worker is None else worker.num_workers
        index = self.first_scene + (0 if worker is None else worker.id)
        while self.num_scenes is None or index < self.num_scenes:
            yield from self.rows(index)
            index += step

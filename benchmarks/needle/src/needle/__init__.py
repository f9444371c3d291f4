"""The needle task: large generated scenes with small objects and questions with exact answers.

    from needle import NeedleDataset

    for row in NeedleDataset(split="validation", num_scenes=2):
        row["images"][0], row["messages"], row["kind"]

See docs/needle.md. `halves` pretrains a small vision tower and language model, `runs` joins and trains them.
"""

from .dataset import NeedleDataset, needle_row, needle_rows, needle_scene
from .questions import (
    FINE_KINDS,
    QUESTION_KINDS,
    SCENE_KINDS,
    Question,
    ask_questions,
    chance_accuracy,
    constant_accuracy,
)
from .scenes import NeedleOptions, Scene, SceneObject, render_scene
from .sprites import SPLITS


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
    "needle_rows",
    "needle_scene",
    "render_scene",
]

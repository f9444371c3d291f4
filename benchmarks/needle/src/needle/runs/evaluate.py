"""Fast scoring of a model on needle scenes: answers are compared under teacher forcing."""

from pathlib import Path
from typing import Any

import torch

from ..questions import QUESTION_KINDS as KINDS
from ..questions import Question
from .collator import NO_IMAGE, SceneCollator
from .scenes import SceneSet, cache_scenes


@torch.inference_mode()
def evaluate_packed(
    model: Any,
    processor: Any,
    scenes: SceneSet,
    cache: str | Path,
    views: str = "all",
    questions: int = 20,
    batch_size: int = 4,
    kinds: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """Exact answers by question kind. An answer is right if every token of it, its end included, is the most likely
    one after the right tokens before it, which is when greedy decoding gives it.

    Args:
        model (`HiResLmmForConditionalGeneration`): The model.
        processor (`HiResLmmProcessor`): Its processor.
        scenes (`SceneSet`): Scenes.
        cache (`str` or `Path`): Parent of the feature caches.
        views (`str`): `"all"`, `"global"`, `"crops"`, or `"none"`: without the picture.
        questions (`int`): Most questions a scene.
        batch_size (`int`): Scenes at once.
        kinds (`tuple` of `str`, *optional*): Kinds to ask; all by default, whatever the views.

    Returns:
        Name -> `{"questions", "right", "accuracy"}` for each kind, `all`, `fine`, `scene`, `fine_whole`, `fine_cut`.
    """
    was_training = model.training
    model.eval()
    store = None if views == NO_IMAGE else cache_scenes(model, processor, scenes, cache)
    asked = KINDS if kinds is None else kinds
    packed = model.model.connector.is_count_static and not model.model.connector.reads_question
    collator = SceneCollator(processor, scenes, store, views, questions, packed, kinds={views: asked})
    counts: dict[str, list[int]] = {}
    for start in range(0, scenes.count, batch_size):
        batch = collator.build([{"scene": i} for i in range(start, min(start + batch_size, scenes.count))])
        inputs = {name: value.to(model.device) for name, value in batch.inputs.items()}
        labels = inputs.pop("labels")
        wrong = (model(**inputs).logits[:, :-1].argmax(-1) != labels[:, 1:]) & (labels[:, 1:] != -100)
        wrong, number = wrong.cpu(), batch.number[:, 1:]
        for row, group in enumerate(batch.questions):
            for place, question in enumerate(group, start=1):
                right = not wrong[row][number[row] == place].any()
                for name in _names(question):
                    entry = counts.setdefault(name, [0, 0])
                    entry[0] += 1
                    entry[1] += right
    model.train(was_training)
    return {
        name: {"questions": total, "right": right, "accuracy": right / total}
        for name, (total, right) in sorted(counts.items())
    }


def _names(question: Question) -> list[str]:
    """The scores a question counts for."""
    if not question.fine:
        return ["all", "scene", question.kind]
    return ["all", "fine", "fine_cut" if question.cut else "fine_whole", question.kind]

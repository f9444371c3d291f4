"""Fast scoring of a model on needle scenes: answers are compared under teacher forcing."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from hires_lmm.training.collator import GEOMETRY

from ..questions import QUESTION_KINDS as KINDS
from ..questions import Question
from .collator import NO_IMAGE, PackedBatch, SceneCollator
from .scenes import SceneSet, cache_scenes


class Graded(NamedTuple):
    """A question about a scene, and whether it was answered."""

    scene: int
    question: Question
    right: bool


def can_pack(model: Any) -> bool:
    """Whether questions can share a picture: no part reads them, nor lets tokens leave inside the language model.

    Args:
        model (`HiResLmmForConditionalGeneration`): The model.
    """
    connector = model.model.connector
    leaves = any(op.options.of == "language_model" for op in connector.layer_ops)
    return connector.is_count_static and not connector.reads_question and not leaves


def grade(batch: PackedBatch, labels: torch.Tensor, logits: torch.Tensor) -> list[list[bool]]:
    """Which questions of a batch are answered: every token of the answer, its end included, is the most likely one.

    Args:
        batch (`PackedBatch`): The batch.
        labels (`torch.Tensor` of shape `(B, S)`): Its answers; -100 where there is none.
        logits (`torch.Tensor` of shape `(B, S, V)`): What the model gave.

    Returns:
        One list a row.
    """
    wrong = (logits[:, :-1].argmax(-1) != labels[:, 1:]) & (labels[:, 1:] != -100)
    wrong, number = wrong.cpu(), batch.number[:, 1:]
    return [
        [not wrong[row][number[row] == place].any() for place in range(1, len(group) + 1)]
        for row, group in enumerate(batch.questions)
    ]


def encode_once(model: Any, inputs: dict[str, Any], scenes: list[int]) -> dict[str, Any]:
    """Inputs of a batch of one question a row with the features of its pictures, each encoded once.

    Args:
        model (`HiResLmmForConditionalGeneration`): Encodes them.
        inputs (`dict`): Of the batch; square pictures, as many views in each row.
        scenes (`list[int]`): The scene of each row.
    """
    first = [scenes.index(scene) for scene in dict.fromkeys(scenes)]
    views = {name: inputs[name] for name in inputs if name in (*GEOMETRY, "vision_features", "pixel_values")}
    if not views:
        return inputs
    own = {name: value.unflatten(0, (len(scenes), -1))[first].flatten(0, 1) for name, value in views.items()}
    features = model.model.get_image_features(**own)
    chosen = features.select_images([first.index(scenes.index(scene)) for scene in scenes])
    rest = {name: value for name, value in inputs.items() if name not in views}
    return {**rest, "mm_encoder_outputs": {"image": chosen}}


@torch.inference_mode()
def answer_scenes(
    model: Any,
    processor: Any,
    scenes: SceneSet,
    cache: str | Path | None,
    views: str = "all",
    questions: int = 20,
    batch_size: int = 4,
    kinds: tuple[str, ...] | None = None,
    budget: int | None = None,
) -> list[Graded]:
    """Ask all questions about some scenes. An answer is right if every token of it, its end included, is the most
    likely one after the right tokens before it, which is when greedy decoding gives it.

    Args:
        model (`HiResLmmForConditionalGeneration`): The model.
        processor (`HiResLmmProcessor`): Its processor.
        scenes (`SceneSet`): Scenes.
        cache (`str` or `Path`, *optional*): Parent of the feature caches; None: pictures pass the tower, for parts
            that read what features do not hold.
        views (`str`): `"all"`, `"global"`, `"crops"`, or `"none"`: without the picture.
        questions (`int`): Most questions a scene.
        batch_size (`int`): Scenes at once.
        kinds (`tuple` of `str`, *optional*): Kinds to ask; all by default, whatever the views.
        budget (`int`, *optional*): Visual tokens of a picture.
    """
    was_training = model.training
    model.eval()
    store = None if views == NO_IMAGE or cache is None else cache_scenes(model, processor, scenes, cache)
    asked = KINDS if kinds is None else kinds
    collator = SceneCollator(
        processor,
        scenes,
        store,
        views,
        questions,
        can_pack(model),
        kinds={views: asked},
        max_image_tokens=budget,
    )
    found = []
    for start in range(0, scenes.count, batch_size):
        batch = collator.build([{"scene": i} for i in range(start, min(start + batch_size, scenes.count))])
        inputs = {name: value.to(model.device) for name, value in batch.inputs.items()}
        labels = inputs.pop("labels")
        inputs = inputs if collator.packed else encode_once(model, inputs, batch.scenes)
        rights = grade(batch, labels, model(**inputs).logits)
        for number, group, right in zip(batch.scenes, batch.questions, rights, strict=True):
            found += [Graded(number, *pair) for pair in zip(group, right, strict=True)]
    model.train(was_training)
    return found


def evaluate_packed(*args: Any, **options: Any) -> dict[str, Any]:
    """Exact answers by question kind.

    Args:
        args, options: As of `answer_scenes`.

    Returns:
        Name -> `{"questions", "right", "accuracy"}` for each kind, `all`, `fine`, `scene`, `fine_whole`, `fine_cut`.
    """
    counts: dict[str, list[int]] = {}
    for answer in answer_scenes(*args, **options):
        for name in score_names(answer.question):
            entry = counts.setdefault(name, [0, 0])
            entry[0] += 1
            entry[1] += answer.right
    return {
        name: {"questions": total, "right": right, "accuracy": right / total}
        for name, (total, right) in sorted(counts.items())
    }


def score_names(question: Question) -> list[str]:
    """The scores a question counts for.

    Args:
        question (`Question`): The question.
    """
    if not question.fine:
        return ["all", "scene", question.kind]
    return ["all", "fine", "fine_cut" if question.cut else "fine_whole", question.kind]

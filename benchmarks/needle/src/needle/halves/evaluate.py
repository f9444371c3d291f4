"""What the halves know: recognition on held-out views, retrieval on held-out texts."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ..patch_labels import (
    COLOUR_INDEX,
    NAMED_SHARE,
    VALUE_INDEX,
    Box,
    crop_boxes,
    global_box,
    patch_shares,
    visible_share,
)
from ..scenes import NeedleOptions, Scene, SceneObject, render_scene, sample_scene
from ..text_scenes import TextStyle
from .text import TextRow, answer_logits, build_batch, sample_row
from .vision import BACKGROUND_INDEX, LabelledView, VisionHalf, labelled_view, normalise


Scores = dict[str, float]
BATCH = 64


class Tally:
    """Right answers by name."""

    def __init__(self) -> None:
        self.right: dict[str, int] = defaultdict(int)
        self.asked: dict[str, int] = defaultdict(int)

    def add(self, names: Sequence[str], right: bool) -> None:
        """Count one answer under each name."""
        for name in names:
            self.right[name] += int(right)
            self.asked[name] += 1

    def scores(self) -> Scores:
        """Name -> share of right answers."""
        return {name: round(self.right[name] / self.asked[name], 4) for name in sorted(self.asked)}


@torch.no_grad()
def _predict(half: VisionHalf, views: Sequence[LabelledView]) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    for start in range(0, len(views), BATCH):
        logits = half(normalise(np.stack([view.pixels for view in views[start : start + BATCH]])))
        for name, values in logits.items():
            parts[name].append(values.argmax(-1).numpy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _shown(scene: Scene) -> list[tuple[Box, list[SceneObject]]]:
    """The crops that show at least half of some object, and the first of those that show none."""
    shown = [
        (box, [item for item in scene.objects if visible_share(item, box) >= NAMED_SHARE]) for box in crop_boxes(scene)
    ]
    return [entry for entry in shown if entry[1]] + [entry for entry in shown if not entry[1]][:1]


def vision_scores(
    half: VisionHalf, num_scenes: int, split: str = "validation", options: NeedleOptions | None = None, seed: int = 0
) -> dict[str, Scores]:
    """Recognition on views of held-out scenes, read at the patch that an object covers most.

    Args:
        half (`VisionHalf`): Tower and heads.
        num_scenes (`int`): Scenes.
        split (`str`): Split of scenes and digit images.
        options (`NeedleOptions`, *optional*): Of the scenes; free placement by default.
        seed (`int`): Of the scenes.

    Returns:
        `crop`: objects that lie wholly in a crop, by kind, `all` kinds, their `colour`, and `empty`, the share of
        patches without object that are called so; `cut`: objects of which a crop shows at least half but not all;
        `global`: the global view, with `background` and `count`.
    """
    options = NeedleOptions() if options is None else options
    tallies = {name: Tally() for name in ("crop", "cut", "global")}
    views: list[LabelledView] = []
    readers: list[Callable[[dict[str, np.ndarray], int], None]] = []

    def reader(scene: Scene, box: Box, items: Sequence[SceneObject], view: LabelledView) -> Callable:
        whole_scene = box == global_box(scene)

        def read(predicted: dict[str, np.ndarray], row: int) -> None:
            for item in items:
                patch = patch_shares(item, box, options.view_size // options.patch_size).argmax()
                tally = tallies["global" if whole_scene else "cut" if item.cut else "crop"]
                right = predicted["value"][row, patch] == VALUE_INDEX[item.kind, item.value]
                tally.add((item.kind, "all"), right)
                tally.add(("colour",), predicted["colour"][row, patch] == COLOUR_INDEX[item.colour])
            if whole_scene:
                votes = np.bincount(predicted["background"][row])
                tallies["global"].add(("background",), votes.argmax() == BACKGROUND_INDEX[scene.background])
                tallies["global"].add(("count",), predicted["count"][row] == len(scene.objects))
            else:
                for kind in predicted["kind"][row][view.labels.kind == 0]:
                    tallies["crop"].add(("empty",), kind == 0)

        return read

    for index in range(num_scenes):
        scene = sample_scene(options, split, f"{seed}/{index}")
        image = render_scene(scene)
        for box, items in [*_shown(scene), (global_box(scene), list(scene.objects))]:
            views.append(labelled_view(scene, image, box))
            readers.append(reader(scene, box, items, views[-1]))
    predicted = _predict(half, views)
    for row, read in enumerate(readers):
        read(predicted, row)
    return {name: tally.scores() for name, tally in tallies.items()}


@torch.no_grad()
def _row_results(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, row: TextRow) -> list[bool]:
    batch = build_batch([row], tokenizer)
    logits, labels = answer_logits(model, batch)
    right = (logits.argmax(-1) == labels).tolist()
    question = batch.question[batch.labels != -100].tolist()
    return [
        all(ok for ok, number in zip(right, question, strict=True) if number == wanted)
        for wanted in range(1, len(row.questions) + 1)
    ]


def text_scores(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    num_scenes: int,
    split: str = "validation",
    style: TextStyle | None = None,
    seed: int = 0,
) -> Scores:
    """Exact answers, end token included, about held-out scenes written as text.

    The argmax is taken behind the true words, which for exact match is the same as greedy decoding.

    Args:
        model (`LlamaForCausalLM`): The language half.
        tokenizer: Its tokenizer.
        num_scenes (`int`): Scenes.
        split (`str`): Split of the scenes.
        style (`TextStyle`, *optional*): How scenes are written; sampled as in training by default.
        seed (`int`): Of the scenes.

    Returns:
        Question kind -> share of right answers, and `all` questions.
    """
    tally = Tally()
    for index in range(num_scenes):
        row = sample_row(f"{seed}/{index}", split, NeedleOptions(), 16, style)
        for question, right in zip(row.questions, _row_results(model, tokenizer, row), strict=True):
            tally.add((question.kind, "all"), right)
    return tally.scores()

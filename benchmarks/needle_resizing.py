"""Do torch and Pillow give the shipped checkpoint the same answers? Every question about validation scenes, both ways.

    python benchmarks/needle_resizing.py             512 scenes; about 10 minutes of one core
    python benchmarks/needle_resizing.py --scenes 8

Each scene is drawn once and resized by each backend; nothing is cached. An answer is right if greedy decoding gives
it. The row says how many questions only one of the two answers, and how far apart the pixels of the views are (levels
of 255, the largest, and the mean over all scenes).
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from measure import print_table, report_path, say
from record import write_result
from transformers import AutoModelForImageTextToText, AutoProcessor

from hires_lmm.processing.resizing_hires_lmm import RESIZE_BACKENDS
from needle.runs import SceneSet, answer_scenes


ROOT = Path(__file__).parents[1]
STEP = 8
COLUMNS = {
    "scenes": "scenes",
    "questions": "questions",
    "right_torch": "right, torch",
    "right_pillow": "right, Pillow",
    "differ": "answered by one alone",
    "most_levels": "levels, most",
    "mean_levels": "mean",
}


class Window:
    """Some scenes of a set, counted from 0."""

    def __init__(self, scenes: SceneSet, start: int):
        self.scenes, self.start = scenes, start
        self.count, self.options = min(STEP, scenes.count - start), scenes.options

    def picture(self, index: int) -> Any:
        """The picture of a scene."""
        return self.scenes.picture(self.start + index)

    def questions(self, index: int, *args: Any) -> Any:
        """Questions about a scene."""
        return self.scenes.questions(self.start + index, *args)


def compare(model: Any, processor: Any, scenes: SceneSet) -> dict[str, Any]:
    """Ask the same questions under both backends.

    Args:
        model (`HiResLmmForConditionalGeneration`): The checkpoint.
        processor (`HiResLmmProcessor`): Its processor.
        scenes (`SceneSet`): The scenes.
    """
    right: dict[str, list[bool]] = {name: [] for name in RESIZE_BACKENDS}
    most, total = 0.0, 0.0
    deviation = 255 * torch.tensor(processor.image_processor.image_std)[:, None, None]
    for start in range(0, scenes.count, STEP):
        part = Window(scenes, start)
        views: dict[str, list[torch.Tensor]] = {}
        for name in RESIZE_BACKENDS:
            processor.image_processor.resize_backend = name
            views[name] = [
                processor.image_processor(part.picture(i), return_tensors="pt")["pixel_values"]
                for i in range(part.count)
            ]
            right[name] += [graded.right for graded in answer_scenes(model, processor, part, None)]  # type: ignore[arg-type]
        for pair in zip(*views.values(), strict=True):
            levels = (pair[0] - pair[1]).abs() * deviation
            most, total = max(most, levels.max().item()), total + levels.mean().item()
        say(f"{start + part.count} of {scenes.count} scenes")
    return {
        "scenes": scenes.count,
        "questions": len(right["torch"]),
        **{f"right_{name}": sum(own) for name, own in right.items()},
        "differ": sum(one != other for one, other in zip(*right.values(), strict=True)),
        "most_levels": most,
        "mean_levels": total / scenes.count,
    }


def main() -> None:
    """Compare, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "needle-slime")
    parser.add_argument("--scenes", type=int, default=512)
    arguments = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(arguments.checkpoint)
    processor = AutoProcessor.from_pretrained(arguments.checkpoint)
    rows = [compare(model.eval(), processor, SceneSet("validation", arguments.scenes))]
    print_table(rows, COLUMNS, "answers of needle-slime by what resizes")
    report_path(write_result("needle_resizing", rows, [0]))


if __name__ == "__main__":
    main()

"""ZoomEye on scenes whose objects are too small for the crops of one look, against the plain answer.

    python -m needle.runs.search CHECKPOINT FILE [--minutes 15]

Scenes of 4096 pixels a side with objects of 32 to 36: about 3 pixels in a crop of the shipped checkpoint. FILE takes a
row a question as it is answered; started again, the run goes on behind the last one.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hires_lmm.evaluation.statistics import wilson_interval
from hires_lmm.files import write_text
from hires_lmm.inference import load_model, load_processor
from hires_lmm.search import ModelOracle, Prompt, ZoomEye, ZoomPrompts

from ..dataset import draw, needle_scene
from ..questions import Question, ask_questions
from ..scenes import COLOURS, NeedleOptions, Scene


OPTIONS = NeedleOptions(scene_size=4096, object_height=(0.5, 0.5625))
KINDS = ("read_digit", "read_number", "read_word", "shape", "chart")
"""Questions that name the object by its colour."""

PROMPTS = ZoomPrompts(
    existence=Prompt("what colour is the object ?", yes=("{}",), no=tuple(COLOURS)),
    latent=Prompt("where is the {} object ?", yes=(), no=()),
    answering=Prompt("{}", yes=(), no=()),
)
"""The model knows no yes and no. Chosen on validation scenes: a colour against the others, and how sure it is."""


def colour_of(question: str) -> list[str]:
    """The cue of a question: the colour that it names."""
    return [word for word in question.split() if word in COLOURS]


POLICY = ZoomEye(PROMPTS, cues=colour_of, crop_only=True)
"""Thresholds and weights as published; one view, as the model was trained with one image."""


def ask_all(split: str, seed: int, done: int) -> Iterator[tuple[int, Scene, Image.Image, Question]]:
    """Two questions a scene, without end: number, scene, picture and question."""
    number, index = 0, 0
    while True:
        scene = needle_scene(index, split, seed, OPTIONS)
        asked = [question for question in ask_questions(scene) if question.kind in KINDS][:2]
        picture = draw(scene) if number + len(asked) > done else None
        for question in asked:
            if picture is not None and number >= done:
                yield number, scene, picture, question
            number += 1
        index += 1


def answer(model: Any, processor: Any, scene: Scene, picture: Image.Image, question: Question) -> dict[str, Any]:
    """A row: both answers, how much was asked, and whether a box shows the object whole."""
    plain = ModelOracle(model, processor, max_new_tokens=8, progress=False)
    oracle = ModelOracle(model, processor, max_new_tokens=8, progress=False)
    found = POLICY.run([picture], question.text, oracle)
    (item,) = (each for each in scene.objects if each.colour in question.text.split())
    covers = [
        left <= item.left
        and top <= item.top
        and item.left + item.width <= left + width
        and item.top + item.height <= top + height
        for left, top, width, height in found.boxes
    ]
    return {
        "kind": question.kind,
        "question": question.text,
        "answer": question.answer,
        "plain": plain.answer([picture], [question.text]),
        "zoom_eye": found.answer,
        "questions": len(found.steps),
        "image_sets": oracle.encoded,
        "visits": sum(step.kind == "answering" for step in found.steps),
        "boxes": found.boxes,
        "box_shows_object": any(covers),
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies with 95 % intervals, and means of what was asked."""
    count = len(rows)
    summary: dict[str, Any] = {"questions": count}
    for name in ("plain", "zoom_eye"):
        right = sum(row[name] == row["answer"] for row in rows)
        summary[name] = {"right": right, "accuracy": right / count, "interval": wilson_interval(right, count)}
    for name in ("questions", "image_sets", "visits", "box_shows_object"):
        summary[f"mean_{name}"] = sum(row[name] for row in rows) / count
    found = [row for row in rows if row["boxes"]]
    summary["ended_with_a_box"] = len(found)
    summary["right_with_a_box"] = sum(row["zoom_eye"] == row["answer"] for row in found)
    return summary


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("file", type=Path)
    parser.add_argument("--minutes", type=float, default=15, help="of processor time; no question begins later")
    parser.add_argument("--questions", type=int, default=200, help="most questions in all")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_model(given.checkpoint, device="cpu"), load_processor(given.checkpoint)
    settings: dict[str, Any] = {"scenes": {"split": given.split, "seed": given.seed, "side": OPTIONS.scene_size}}
    settings["command"] = f"python -m needle.runs.search CHECKPOINT FILE --split {given.split} --seed {given.seed}"
    record = json.loads(given.file.read_text()) if given.file.is_file() else {**settings, "rows": []}
    if record["scenes"] != settings["scenes"]:
        raise ValueError(f"{given.file} holds answers about {record['scenes']}; name another file.")
    rows: list[dict[str, Any]] = record["rows"]
    end = time.process_time() + 60 * given.minutes
    for number, scene, picture, question in ask_all(given.split, given.seed, len(rows)):
        if time.process_time() > end or number >= given.questions:
            break
        rows.append(answer(model, processor, scene, picture, question))
        write_text(given.file, json.dumps({**settings, "rows": rows, "summary": summarise(rows)}, indent=1) + "\n")


if __name__ == "__main__":
    main()

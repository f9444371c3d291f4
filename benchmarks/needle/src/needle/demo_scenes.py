"""Draw the five scenes of the demonstration, 1536 x 1536 pixels each, with a question and its answer.

    python -m needle.demo_scenes            writes examples/images/needle_*.jpg and needle_scenes.json

They are scenes of the needle task with another seed than those that models are trained and scored on. Objects are 48
to 54 pixels high: at most 2.25 pixels in the global view of the shipped checkpoint.
"""

import json
import sys
from pathlib import Path

from PIL import Image

from .dataset import draw, needle_scene
from .questions import ask_questions
from .scenes import NeedleOptions


FOLDER = Path(__file__).parents[4] / "examples" / "images"
LIST = "needle_scenes.json"
OPTIONS = NeedleOptions(scene_size=1536)
SEED = 2026
KINDS = ("read_digit", "shape", "read_word", "larger_digit", "place_of_colour")
STEPS = ("background", "count")
"""Questions of the steps before the last, in the entries."""


def pick_scenes() -> list[dict]:
    """For each kind of question the first scene that answers it, no scene twice: file, question, answer and steps."""
    entries: list[dict] = []
    index = 0
    for kind in KINDS:
        while True:
            scene = needle_scene(index, "validation", SEED, OPTIONS)
            asked = {question.kind: question for question in reversed(ask_questions(scene))}
            index += 1
            if kind in asked:
                break
        entry = {"image": f"needle_{len(entries) + 1}.jpg", "scene": index - 1, "kind": kind}
        steps = [[asked[step].text, asked[step].answer] for step in (*STEPS, kind)]
        entries.append({**entry, "question": steps[-1][0], "answer": steps[-1][1], "steps": steps})
    return entries


def picture_of(entry: dict) -> Image.Image:
    """The picture of an entry of `pick_scenes`.

    Args:
        entry (`dict`): One of the list.
    """
    return draw(needle_scene(entry["scene"], "validation", SEED, OPTIONS))


def main() -> None:
    """Write pictures and list."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    entries = pick_scenes()
    for entry in entries:
        picture_of(entry).save(folder / entry["image"], quality=90)
    (folder / LIST).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

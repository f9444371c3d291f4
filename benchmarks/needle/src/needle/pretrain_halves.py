"""Plan `pretrain_halves`: make the small vision tower and language model that the staged training starts from.

    python -m needle.pretrain_halves --out checkpoints/halves --seed 0

The halves train side by side, one process and one thread each. An interrupted run, started again with the same
arguments, continues from its last checkpoint (`OUT/unfinished`, removed at the end). See docs/needle.md.
"""

import argparse
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hires_lmm.files import write_text

from .halves.evaluate import text_scores, vision_scores
from .halves.files import RECORD_FILE, Halves, load_halves, save_weights
from .halves.loop import Clock
from .halves.text import TextPlan, train_text
from .halves.tokenizer import build_tokenizer
from .halves.vision import FEATURE_LAYER, SCENES, VisionPlan, train_vision
from .text_scenes import TextStyle


logger = logging.getLogger(__name__)

PARTS = ("vision", "language")
UNFINISHED = "unfinished"
ONE_SLOT = TextStyle(views="both", joined=False, listed=False, fillers=6, repeats=False)
"""The style nearest to visual tokens: one slot an object and block."""

PACKAGES = ("torch", "transformers", "tokenizers", "scikit-learn", "pillow", "numpy", "matplotlib")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        arguments (sequence of `str`, *optional*): `sys.argv` by default.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the halves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vision-steps", type=int, default=VisionPlan.steps, help="steps of 36 views")
    parser.add_argument("--language-steps", type=int, default=TextPlan.steps, help="steps of 16 scenes")
    parser.add_argument("--scenes", type=int, default=300, help="held-out scenes of the closing evaluation")
    parser.add_argument("--machine", default=f"{os.cpu_count()} CPU cores", help="for the record")
    parser.add_argument("--note", default="", help="a remark, for the record")
    parser.add_argument("--only", choices=PARTS, help="train one half and stop; used for the two processes")
    return parser.parse_args(arguments)


def train_half(part: str, options: argparse.Namespace) -> tuple[Any, Clock]:
    """Train one half, or continue it, or just load it if it is finished.

    Args:
        part (`str`): `vision` or `language`.
        options (`argparse.Namespace`): From `parse_arguments`.

    Returns:
        The model and the time spent.
    """
    torch.set_num_threads(1)
    folder = options.out / UNFINISHED / part
    if part == "vision":
        return train_vision(options.seed, VisionPlan(steps=options.vision_steps), folder)
    return train_text(options.seed, TextPlan(steps=options.language_steps), folder)


def train_side_by_side(options: argparse.Namespace) -> None:
    """Run one process a half and wait for both.

    Args:
        options (`argparse.Namespace`): From `parse_arguments`.

    Raises:
        RuntimeError: If a process fails; the other one is left to finish first.
    """
    command = [sys.executable, "-m", "needle.pretrain_halves", "--out", str(options.out)]
    command += ["--seed", str(options.seed), "--vision-steps", str(options.vision_steps)]
    command += ["--language-steps", str(options.language_steps), "--only"]
    processes = {part: subprocess.Popen([*command, part]) for part in PARTS}
    failed = [part for part, process in processes.items() if process.wait() != 0]
    if failed:
        raise RuntimeError(f"Training of {' and '.join(failed)} failed; its error stands above.")


def measure(halves: Halves, num_scenes: int, split: str = "validation") -> dict[str, Any]:
    """Held-out accuracies.

    Args:
        halves (`Halves`): As loaded from disk.
        num_scenes (`int`): Scenes of each evaluation.
        split (`str`): Split of scenes and digit images.

    Returns:
        The numbers for `halves.json`.
    """
    vision = vision_scores(halves.vision, num_scenes, split)
    text = text_scores(halves.language, halves.tokenizer, num_scenes, split)
    one_slot = text_scores(halves.language, halves.tokenizer, num_scenes, split, ONE_SLOT)
    return {"split": split, "scenes": num_scenes, "vision": vision, "language": text, "language_one_slot": one_slot}


def build_record(options: argparse.Namespace, clocks: dict[str, Clock]) -> dict[str, Any]:
    """How the halves were made.

    Args:
        options (`argparse.Namespace`): From `parse_arguments`.
        clocks (`dict`): Part -> time spent.

    Returns:
        The record without the accuracies.
    """
    command = f"python -m needle.pretrain_halves --out OUT --seed {options.seed}"
    command += f" --vision-steps {options.vision_steps} --language-steps {options.language_steps}"
    return {
        "command": command,
        "seed": options.seed,
        "machine": options.machine,
        "note": options.note,
        "wall_seconds": {part: round(clock.wall) for part, clock in clocks.items()},
        "processor_seconds": {part: round(clock.processor) for part, clock in clocks.items()},
        "view_size": SCENES.view_size,
        "patch_size": SCENES.patch_size,
        "vision_feature_layer": FEATURE_LAYER,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def finish(options: argparse.Namespace) -> dict[str, Any]:
    """Write the finished halves, read them back, measure them, and write `halves.json`.

    Args:
        options (`argparse.Namespace`): From `parse_arguments`.

    Returns:
        The content of `halves.json`.
    """
    vision, vision_clock = train_half("vision", options)
    language, language_clock = train_half("language", options)
    file = options.out / RECORD_FILE
    file.unlink(missing_ok=True)  # the mark of a whole folder
    save_weights(options.out, vision, language, build_tokenizer())
    record = build_record(options, {"vision": vision_clock, "language": language_clock})
    record["parameters"] = {
        "vision": sum(parameter.numel() for parameter in vision.tower.parameters()),
        "language": sum(parameter.numel() for parameter in language.parameters()),
    }
    write_text(file, json.dumps(record, indent=2) + "\n")
    record["held_out"] = measure(load_halves(options.out), options.scenes)
    write_text(file, json.dumps(record, indent=2) + "\n")
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    """Train both halves, or one of them.

    Args:
        arguments (sequence of `str`, *optional*): `sys.argv` by default.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse_arguments(arguments)
    if options.only:
        train_half(options.only, options)
        return
    train_side_by_side(options)
    record = finish(options)
    shutil.rmtree(options.out / UNFINISHED)
    logger.info("%s", json.dumps(record["held_out"], indent=2))


if __name__ == "__main__":
    main()

"""Needle clips: what the shipped weights learn of videos in minutes, with the parts of published video models.

    python benchmarks/needle_clips.py train      every method that is not trained, a few minutes of one core each
    python benchmarks/needle_clips.py score      answers on test clips of every method that is not scored
    python benchmarks/needle_clips.py report     JSON and the table of docs/needle-clips.md

A method is a preset's parts at the size of the halves: views of 64 pixels, eight frames. Language model, adapter and
compressor start from the shipped checkpoint, all else is new; tower features are frozen. `one frame` is shown the
middle frame of the same clips, as often. An interrupted command goes on when it is started again.
"""

import argparse
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from needle_report import markdown, put
from record import RESULTS, surroundings
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as library_logging

from hires_lmm.evaluation.statistics import score
from hires_lmm.files import write_text
from needle.clips import CLIP_CHANCE, CLIP_KINDS, STEPS
from needle.runs import RunOptions
from needle.runs.clips import ClipSet, answer_clips, join_clips, train_clips
from needle.runs.run import DONE, MODEL


ROOT = Path(__file__).parents[1]
FILE = RESULTS / "needle" / "clips.json"
PAGE = ROOT / "docs" / "needle-clips.md"
CLIPS, VISITS, BATCH_SIZE = 2_400, 4_800, 8
NUM_QUERIES = 4
"""As in the shipped checkpoint."""

GRID = 4
"""Rows and columns of a pooled frame of 8 x 8 patches, half of it as in PLLaVA."""


@dataclass(frozen=True)
class Method:
    """A preset with the sizes that follow the halves, and which frame alone is shown, if one is."""

    preset: str
    changes: dict[str, Any] = field(default_factory=dict)
    frame: int | None = None


ORDER = {"order": ["global", "crops", "frames"]}
MLP = {"part": "mlp"}
SQUEEZED = {"part": "query_compressor", "on": ["crops", "frames"], "num_queries": NUM_QUERIES}
POOL = {"part": "pool3d", "shape": [STEPS, GRID, GRID]}
SAMPLE = {"part": "sample_tokens", "number": STEPS * GRID * GRID}
METHODS = {
    "one frame": Method("llava_next", {"connector_config": {"adapter": MLP, "layout": {}}}, STEPS // 2),
    "slime_video": Method(
        "slime",
        {
            "connector_config": {"view_ops": [{"part": "mean_global"}, SQUEEZED], "layout": ORDER},
            "video_planner": {"name": "frames", "grid": [2, STEPS // 2], "overview": True},
        },
    ),
    "pllava": Method("llava_next", {"connector_config": {"adapter": MLP, "map_ops": [POOL], "layout": ORDER}}),
    "ts_llava": Method(
        "llava_next",
        {
            "connector_config": {
                "adapter": MLP,
                "view_ops": [SAMPLE],
                "layout": {"order": ["frames", "global", "crops"]},
            },
            "video_planner": {"name": "thumbnail", "collage": STEPS},
        },
    ),
}
"""The frames of TS-LLaVA come first and its collage last, as in its version V2; as many tokens are sampled as PLLaVA's
pool leaves."""


def folder_of(options: argparse.Namespace, name: str, seed: int) -> Path:
    """Where a run lies."""
    return options.work / "clips" / f"{name.replace(' ', '_')}-{seed}"


def train(options: argparse.Namespace) -> None:
    """Train what is not trained."""
    for seed in options.seeds:
        for name, method in METHODS.items():
            folder = folder_of(options, name, seed)
            if (folder / DONE).is_file() or name not in (options.methods or METHODS):
                continue
            model, processor = join_clips(
                options.checkpoint, options.halves, method.preset, NUM_QUERIES, seed, **method.changes
            )
            logging.info("%s, seed %d: %d parameters", name, seed, model.num_parameters())
            settings = RunOptions(cache="", visits=(options.visits,), batch_size=BATCH_SIZE, seed=seed, save_every=100)
            train_clips(model, processor, ClipSet("train", options.clips, frame=method.frame), folder, settings)


def score_models(options: argparse.Namespace) -> None:
    """Ask every trained model about the clips of the split; one file of answers each."""
    for seed in options.seeds:
        for name, method in METHODS.items():
            folder = folder_of(options, name, seed)
            file = folder / f"{options.split}.json"
            if file.is_file() or not (folder / DONE).is_file():
                continue
            model = AutoModelForImageTextToText.from_pretrained(folder / MODEL)
            processor = AutoProcessor.from_pretrained(folder / MODEL)
            clips = ClipSet(options.split, options.count, frame=method.frame)
            answers = answer_clips(model, processor, clips)
            tokens = (
                processor.image_tokens(64, 64, views="global")
                if method.frame is not None
                else processor.video_tokens(STEPS, 64, 64)
            )
            rows = [[answer.scene, answer.question.kind, answer.right] for answer in answers]
            write_text(file, json.dumps({"tokens": tokens, "answers": rows}))
            logging.info("%s, seed %d: %.3f", name, seed, sum(row[2] for row in rows) / len(rows))


def report(options: argparse.Namespace) -> None:
    """Write the JSON, if all is scored, and the table of the page."""
    rows = []
    for name in METHODS:
        for seed in options.seeds:
            folder = folder_of(options, name, seed)
            file = folder / f"{options.split}.json"
            if not file.is_file():
                continue
            found, done = json.loads(file.read_text()), json.loads((folder / DONE).read_text())
            scores = {}
            for kind in ("all", *CLIP_KINDS):
                own = [each for each in found["answers"] if kind in ("all", each[1])]
                scores[kind] = score([each[2] for each in own], [str(each[0]) for each in own]).to_dict()
            row = {"method": name, "seed": seed, "tokens": found["tokens"], "scores": scores}
            rows.append({**row, "steps": done["steps"], "seconds": done["seconds"], "loss": done["loss"][-1][1]})
    if rows:
        facts = {"split": options.split, "clips": options.count, "training_clips": options.clips}
        facts |= {"visits": options.visits, "batch_size": BATCH_SIZE, "seeds": options.seeds}
        where = {**surroundings(), "machine": options.note}
        write_text(FILE, json.dumps({**where, **facts, "rows": rows}, indent=1) + "\n")
    table = build_table(json.loads(FILE.read_text())["rows"])
    PAGE.write_text(put(PAGE.read_text(), "clips", table, "needle_clips.py"))


def build_table(rows: list[dict[str, Any]]) -> str:
    """Methods with their tokens and accuracies."""
    head = ["method", "seed", "visual tokens", "all", *CLIP_KINDS, "processor minutes"]
    guessed = ["guessing", "", "", "", *(f"{100 * CLIP_CHANCE[kind]:.1f}" for kind in CLIP_KINDS), ""]
    lines = []
    for row in rows:
        shown = [row["scores"][kind] for kind in ("all", *CLIP_KINDS)]
        ends = [*shown[0]["wilson"], *(shown[0]["bootstrap"] or ())]
        first = f"{100 * shown[0]['accuracy']:.1f} ({100 * min(ends):.1f}–{100 * max(ends):.1f})"
        rest = [f"{100 * each['accuracy']:.1f}" for each in shown[1:]]
        minutes = f"{row['seconds']['processor'] / 60:.1f}"
        lines.append([f"`{row['method']}`", str(row["seed"]), str(row["tokens"]), first, *rest, minutes])
    return markdown(head, [guessed, *lines])


def main() -> None:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "score", "report"))
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "needle")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "needle-slime")
    parser.add_argument("--halves", type=Path, default=ROOT / "checkpoints" / "halves")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--count", type=int, default=400, help="clips that are asked about")
    parser.add_argument("--clips", type=int, default=CLIPS, help="different training clips")
    parser.add_argument("--visits", type=int, default=VISITS, help="clips that are shown in training")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--methods", nargs="*", choices=tuple(METHODS), help="to train; all by default")
    parser.add_argument("--note", default="1 of 2 CPU cores")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    library_logging.disable_progress_bar()
    torch.set_num_threads(1)
    begin = time.process_time()
    {"train": train, "score": score_models, "report": report}[options.action](options)
    logging.info("%.1f processor minutes", (time.process_time() - begin) / 60)


if __name__ == "__main__":
    main()

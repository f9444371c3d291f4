"""Accuracy against the number of tokens n on needle scenes: fusion with the question, without it, switched off.

    python benchmarks/fusion_scaling.py --out RUNS --seed 0        half an hour on one undisturbed core, see docs

Three short runs from the pretrained halves (checkpoints/halves), tower and language model frozen:

* align: merge and adapter alone; the language model reads all visual tokens. Both runs below start from it, as those
  of the paper start from a contrastive warm-up.
* with, without: the fusion transformer begins as a copy of the language half (a choice of this benchmark: from scratch
  it would learn little in minutes), merge and mark as `align` left them; n is drawn for every optimizer step.

Then the same validation questions are asked at every n: with the question, trained without it, and trained with it but
switched off. S = (c / n)^alpha is fitted to the accuracies in percent. Interrupted runs and sweeps go on. Scenes are
as small as still makes sense: 128 pixels, 2 x 2 crops, 2 to 4 objects of the usual size on the patch lattice, 85
visual tokens; scores are not those of the needle task. Run several seeds one after another; results are merged.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, surroundings
from rich.console import Console
from rich.table import Table

from hires_lmm.evaluation import AnswerStore, SweepSetting, evaluate
from hires_lmm.extras import import_pyplot
from hires_lmm.files import write_text
from hires_lmm.scaling import fit_scaling_law
from hires_lmm.training import Stage, set_options
from hires_lmm.training.plans_fusion import QUESTION
from needle import NeedleOptions, needle_rows
from needle.halves.files import Halves, load_halves
from needle.runs import RunOptions, join_halves, train


NAME = "fusion_scaling"
TOKENS = [1, 2, 4, 8, 16, 32, 64]
SCENES = NeedleOptions(scene_size=128, grid=2, object_height=(6.0, 6.75), num_objects=(2, 4), placement="aligned")
GROUPS = ("all", "fine", "scene")
LABELS = {"with": "with the question", "without": "trained without it", "off": "trained with it, switched off"}
REFERENCE = "align"
"""All visual tokens before the language model, without a fusion transformer."""

ALIGN_RATE, FUSION_RATE = 2e-3, 6e-4


def fusion_like(language: Any, question: bool) -> dict:
    """The token op with a transformer of the size of the language half."""
    config = language.config
    return {
        "part": "fusion",
        "num_queries": max(TOKENS),
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": float(config.rope_parameters["rope_theta"]),
        "question": question,
    }


def join(halves: Halves, seed: int, question: bool | None = None) -> tuple[Any, Any]:
    """A model of the preset `fusion` from the halves; without token op where `question` is None."""
    ops = [] if question is None else [fusion_like(halves.language, question)]
    planner = {"max_crops": SCENES.grid**2}
    model, processor = join_halves(halves, "fusion", seed=seed, planner=planner, connector_config={"token_ops": ops})
    if question is not None:
        model.model.connector.token_ops[0].model.load_state_dict(halves.language.model.state_dict())
    return model, processor


def start_from(model: Any, aligned: Any) -> None:
    """Copy merge and mark of the aligned model."""
    for name in ("view_ops", "layout"):
        getattr(model.model.connector, name).load_state_dict(getattr(aligned.model.connector, name).state_dict())


def run_options(options: argparse.Namespace, visits: int, batch_size: int, questions: int) -> RunOptions:
    """Data and length of one run."""
    return RunOptions(
        cache=str(options.cache or options.out / "cache"),
        visits=(visits,),
        scenes=options.scenes,
        batch_size=batch_size,
        questions=questions,
        seed=options.seed,
        options=SCENES,
        note=options.note,
    )


def train_all(halves: Halves, options: argparse.Namespace, console: Console) -> dict[str, tuple[Any, Any]]:
    """The aligned model and the two fusion models with their processors; finished runs are loaded."""
    folder = options.out / f"seed-{options.seed}"
    console.print("align")
    stage = Stage("scaling/align", {"connector": ALIGN_RATE})
    aligned, processor = join(halves, options.seed)
    aligned = train(aligned, processor, [stage], folder / "align", run_options(options, options.align_visits, 8, 8))
    models = {REFERENCE: (aligned, processor)}
    for name, question in (("with", True), ("without", False)):
        console.print(name)
        model, processor = join(halves, options.seed, question)
        start_from(model, aligned)
        stage = Stage(f"scaling/{name}", {"connector": FUSION_RATE}, max_image_tokens=TOKENS)
        settings = run_options(options, options.visits, 4, 4)
        models[name] = train(model, processor, [stage], folder / name, settings), processor
    return models


def measure(models: dict[str, tuple[Any, Any]], options: argparse.Namespace, console: Console) -> list[dict]:
    """One row a model, n and group of questions."""
    questions = needle_rows("validation", options.evaluate, **vars(SCENES))
    rows = []
    for name in (REFERENCE, *LABELS):
        console.print(f"asking: {LABELS.get(name, name)}")
        model, processor = models["with" if name == "off" else name]
        settings = [SweepSetting()] if name == REFERENCE else [SweepSetting(tokens=tokens) for tokens in TOKENS]
        if name != REFERENCE:
            set_options(model, {QUESTION: name == "with"})
        store = AnswerStore(
            options.out / f"seed-{options.seed}" / f"{name}.jsonl", {"model": name, "run": runs_of(options)}
        )
        for record in evaluate(model, processor, questions, settings, store=store).summary():
            for group in GROUPS:
                score = record["scores"][group]
                rows.append({"seed": options.seed, "model": name, "tokens": record["tokens"], "group": group, **score})
    return rows


def runs_of(options: argparse.Namespace) -> list:
    """What a model was trained with, so that answers of another run are not taken for its own."""
    return [options.seed, options.scenes, options.align_visits, options.visits, options.evaluate]


def fit(rows: list[dict]) -> list[dict]:
    """The law of each model and group, over all seeds; None where an accuracy of zero has no logarithm."""
    fits = []
    for name in LABELS:
        for group in GROUPS:
            points = [row for row in rows if row["model"] == name and row["group"] == group]
            scores = [100 * row["accuracy"] for row in points]
            law = fit_scaling_law([row["tokens"] for row in points], scores).to_dict() if all(scores) else None
            fits.append({"model": name, "group": group, "law": law})
    return fits


def draw(rows: list[dict], fits: list[dict], path: Path) -> None:
    """Accuracy and law against n, one panel a group."""
    figure, places = import_pyplot().subplots(1, len(GROUPS), figsize=(5 * len(GROUPS), 4), sharey=True)
    for place, group in zip(places, GROUPS, strict=True):
        for name, label in LABELS.items():
            points = [row for row in rows if row["model"] == name and row["group"] == group]
            dots = place.plot([p["tokens"] for p in points], [100 * p["accuracy"] for p in points], "o", markersize=4)
            law = next(entry["law"] for entry in fits if entry["model"] == name and entry["group"] == group)
            if law is not None:
                line = [torch.exp(torch.tensor(law["log_scale"])) * n ** -law["alpha"] for n in TOKENS]
                label = f"{label}: alpha {law['alpha']:.3f}"
                place.plot(TOKENS, line, color=dots[0].get_color(), label=label)
        place.axhline(100 * points[0]["chance"], color="grey", linestyle=":", label="chance")
        own = [100 * row["accuracy"] for row in rows if row["model"] == REFERENCE and row["group"] == group]
        place.axhline(sum(own) / len(own), color="black", linestyle="--", label="all visual tokens, no fusion")
        place.set(xscale="log", xlabel="tokens n", title=group, xticks=TOKENS, xticklabels=TOKENS)
        place.set_ylim(0, 90)
        place.legend(fontsize=8, loc="upper left")
    places[0].set_ylabel("right, %")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def show(rows: list[dict], fits: list[dict], console: Console) -> None:
    """Mean accuracy over seeds and the exponents."""
    table = Table(title="right answers in percent, by tokens n")
    for column in ("model", "questions", *map(str, TOKENS), "alpha", "95 %"):
        table.add_column(column, justify="right")
    for entry in fits:
        points = [row for row in rows if row["model"] == entry["model"] and row["group"] == entry["group"]]
        cells = []
        for tokens in TOKENS:
            found = [100 * row["accuracy"] for row in points if row["tokens"] == tokens]
            cells.append(f"{sum(found) / len(found):.1f}")
        law = entry["law"]
        ends = (
            ("-", "-") if law is None else (f"{law['alpha']:.3f}", "{:.3f} to {:.3f}".format(*law["alpha_interval"]))
        )
        table.add_row(LABELS[entry["model"]], entry["group"], *cells, *ends)
    for group in GROUPS:
        found = [row for row in rows if row["model"] == REFERENCE and row["group"] == group]
        mean = 100 * sum(row["accuracy"] for row in found) / len(found)
        table.add_row("no fusion", group, f"{found[0]['tokens']:.0f} tokens", f"{mean:.1f}")
    console.print(table)


def main() -> None:
    """Train, ask, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the runs")
    add("--halves", default="checkpoints/halves")
    add("--cache", type=Path, help="folder of tower features; default OUT/cache")
    add("--seed", type=int, default=0)
    add("--scenes", type=int, default=3000, help="different training scenes")
    add("--align-visits", type=int, default=12_000, help="scene visits of 8 questions")
    add("--visits", type=int, default=6000, help="scene visits of 4 questions, each fusion model")
    add("--evaluate", type=int, default=100, help="validation scenes of 8 questions")
    add("--threads", type=int, default=1)
    add("--note", default="")
    add("--results", type=Path, default=RESULTS, help="where the JSON file and the picture go")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=150)
    models = train_all(load_halves(options.halves), options, console)
    rows = measure(models, options, console)
    merge(rows, options, console)


def merge(rows: list[dict], options: argparse.Namespace, console: Console) -> None:
    """Write results; rows of other seeds that are there already stay."""
    file = options.results / f"{NAME}.json"
    others = json.loads(file.read_text())["rows"] if file.is_file() else []
    rows = [row for row in others if row["seed"] != options.seed] + rows
    fits = fit(rows)
    show(rows, fits, console)
    seeds = sorted({row["seed"] for row in rows})
    values = {**surroundings(), "seeds": seeds, "runs": runs_of(options), "fits": fits, "rows": rows}
    options.results.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(values, indent=1) + "\n")
    draw(rows, fits, options.results / f"{NAME}.png")
    console.print(f"wrote {file}")


if __name__ == "__main__":
    main()

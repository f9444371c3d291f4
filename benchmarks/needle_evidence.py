"""What the claims of SliME are worth at our scale: trained runs on the needle task, sweeps, and docs/evidence.md.

    python benchmarks/needle_evidence.py list                        runs, seeds, what is finished
    python benchmarks/needle_evidence.py run alternating --seed 0    one run: training, then validation scores
    python benchmarks/needle_evidence.py all                         every run and seed that is not finished
    python benchmarks/needle_evidence.py score --split test          scores of finished runs on test scenes, at the end
    python benchmarks/needle_evidence.py sweep                       inference sweeps of the shipped checkpoint
    python benchmarks/needle_evidence.py report                      tables and plots of docs/evidence.md

All runs see the same training scenes. Stages that train the connector alone learn captions of single tokens, the last
stage answers questions (see docs/needle.md); all runs see as many global views and crops with captions, and as many
scenes with questions. `--share 0.25` runs everything with a quarter of that; results of different shares are never
compared. Interrupted runs go on, and runs that begin alike share their first stages. Trained models and tower features
stay in `--work` (not committed), results in benchmarks/results/needle (committed).
"""

import argparse
import json
import logging
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from needle_report import write_evidence
from record import RESULTS, surroundings
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as library_logging

from hires_lmm import PRESETS
from hires_lmm.evaluation import SweepSetting
from hires_lmm.evaluation.command import SweepRun, run_sweep
from hires_lmm.files import replacing, write_text
from hires_lmm.training import get_plan
from needle.from_halves import CAPTION_NEAR, MIX
from needle.runs import RunOptions, SceneSet, evaluate_packed, join_halves, small_rates, train
from needle.runs.run import DONE, LOG, MODEL


ROOT = Path(__file__).parents[1]
FOLDER = RESULTS / "needle"
CAPTIONED, ASKED = 15_936, 800
"""Scenes whose global views, and scenes whose crops, are seen with captions; scenes with questions."""

SCENES, BATCH_SIZE, CAPTION_BATCH_SIZE = 6_000, 8, 32
NUM_QUERIES = 4
SEEDS = (0, 1, 2)
GAMMAS = (0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
BUDGETS = (80, 104, 136, 168, None)
IMAGE_SIZES = (128, 192, 256, 320, None)


@dataclass(frozen=True)
class Run:
    """A model and how it is trained.

    Args:
        text (`str`): For the tables.
        visits (`tuple` of `int`): Scenes of each stage.
        plan, preset (`str`): Of the library.
        num_queries (`int`): Queries a crop.
        views (`str`, *optional*): Views of the last stage, and of scoring.
        seeds (`tuple` of `int`): Seeds to run.
        connector (`dict`): Changes of the connector.
        router (`bool`): Whether the router runs in training, one question a row.
        start (`str`, *optional*): Run whose first stages are taken over.
        shared (`int`): How many.
        questions (`int`): Most questions of a visit.
    """

    text: str
    visits: tuple[int, ...] = (2 * CAPTIONED // 3, CAPTIONED // 3, CAPTIONED, ASKED)
    plan: str = "slime"
    preset: str = "slime"
    num_queries: int = NUM_QUERIES
    views: str | None = None
    seeds: tuple[int, ...] = (0,)
    connector: dict = field(default_factory=dict)
    router: bool = False
    start: str | None = None
    shared: int = 3
    questions: int = 8


def router(noise: float) -> list[dict]:
    """The token operations of the preset with another noise."""
    return [{**op, "noise": noise} for op in PRESETS["slime"]["connector_config"]["token_ops"]]


QUERY_FORMER = {"view_ops": [], "adapter": {"part": "query_former", "num_queries": 16}}
ROUTED = {"start": "alternating", "questions": 2}
RUNS: dict[str, Run] = {
    "alternating": Run("alternating: I-a, I-b, II, III", seeds=SEEDS),
    "end_to_end": Run("end-to-end: connector, then everything", (CAPTIONED, ASKED), "end_to_end", seeds=SEEDS),
    "global": Run("global view only", views="global", seeds=SEEDS, start="alternating"),
    "crops": Run("crops only", views="crops", seeds=SEEDS, start="alternating"),
    "twin": Run("global view only, to convergence", (48_000, 16_000, 0, 12_000), views="global"),
    "queries_9": Run("9 queries a crop (64 of 576)", num_queries=9, start="alternating", shared=2),
    "queries_16": Run("16 queries a crop (144 of 576)", num_queries=16, start="alternating", shared=2),
    "queries_25": Run("25 queries a crop (196 of 576)", num_queries=25, start="alternating", shared=2),
    "query_former": Run(
        "query former alone, 16 queries a view",
        (CAPTIONED // 2, CAPTIONED // 2, ASKED),
        "query_former",
        connector=QUERY_FORMER,
    ),
    "router_off": Run("stage III without router", **ROUTED),
    "router_noise": Run("stage III with router, noise", connector={"token_ops": router(0.1)}, router=True, **ROUTED),
    "router_quiet": Run(
        "stage III with router, no noise", connector={"token_ops": router(0.0)}, router=True, **ROUTED
    ),
}


def visits_of(run: Run, share: float) -> tuple[int, ...]:
    """Scene visits of each stage, whole batches."""
    sizes = [*[CAPTION_BATCH_SIZE] * (len(run.visits) - 1), BATCH_SIZE]
    return tuple(round(share * visits / size) * size for visits, size in zip(run.visits, sizes, strict=True))


def result_file(name: str, seed: int, split: str) -> Path:
    """Where the scores of a run are kept."""
    return FOLDER / f"{name}-{seed}-{split}.json"


def run_one(name: str, seed: int, options: argparse.Namespace) -> None:
    """Train and score a run, unless that is done.

    Args:
        name (`str`): Key of `RUNS`.
        seed (`int`): Seed of adapters, order and questions.
        options (`argparse.Namespace`): Of the command line.
    """
    run, out = RUNS[name], options.work / f"{options.share:g}" / f"{name}-{seed}"
    if result_file(name, seed, "validation").is_file():
        return
    if run.start is not None:
        run_one(run.start, seed, options)
        take_over(options.work / f"{options.share:g}" / f"{run.start}-{seed}", out, run.shared)
    settings = RunOptions(
        cache=str(options.work / "cache" if options.cache is None else options.cache),
        visits=visits_of(run, options.share),
        scenes=SCENES,
        batch_size=BATCH_SIZE,
        questions=run.questions,
        seed=seed,
        mix=None if run.views else MIX,
        near=CAPTION_NEAR,
        captions=True,
        caption_batch_size=CAPTION_BATCH_SIZE,
        note=options.note,
        command=f"python benchmarks/needle_evidence.py run {name} --seed {seed} --share {options.share:g}",
    )
    model, processor = join_halves(
        options.halves, run.preset, run.num_queries, run.router, seed, connector_config=run.connector
    )
    *early, last = small_rates(get_plan(run.plan))
    train(model, processor, [*early, replace(last, views=run.views or last.views)], out, settings)
    score(name, seed, "validation", options)


def take_over(source: Path, target: Path, count: int) -> None:
    """Copy the first finished stages of another run."""
    for stage in sorted(file.parent for file in source.glob(f"*/{DONE}"))[:count]:
        if not (target / stage.name / DONE).is_file():
            shutil.copytree(stage, target / stage.name, ignore=shutil.ignore_patterns(DONE), dirs_exist_ok=True)
            with replacing(target / stage.name / DONE) as partial:  # the mark of a whole stage comes last
                shutil.copyfile(stage / DONE, partial)


def score(name: str, seed: int, split: str, options: argparse.Namespace) -> None:
    """Score a trained run and write its result.

    Args:
        name (`str`): Key of `RUNS`.
        seed (`int`): Seed of the run.
        split (`str`): `validation`, or `test` at the very end.
        options (`argparse.Namespace`): Of the command line.
    """
    run, out = RUNS[name], options.work / f"{options.share:g}" / f"{name}-{seed}"
    file = result_file(name, seed, split)
    if file.is_file():
        return
    log = json.loads((out / LOG).read_text(encoding="utf-8"))
    model = AutoModelForImageTextToText.from_pretrained(out / MODEL)
    processor = AutoProcessor.from_pretrained(out / MODEL)
    scenes = SceneSet(split, options.score_scenes)
    cache = options.work / "cache" if options.cache is None else options.cache
    views = ["all", "global", "crops", "none"] if name == "alternating" else [run.views or "all"]
    scores = {view: evaluate_packed(model, processor, scenes, cache, view) for view in views}
    stages = [
        {"name": stage["stage"]["name"], "visits": stage["visits"], "loss": stage["loss"], **stage["seconds"]}
        for stage in log["stages"]
    ]
    result = {
        "name": name,
        "seed": seed,
        "run": asdict(run),
        "share": options.share,
        "split": split,
        "scenes": options.score_scenes,
        "scores": scores,
        "stages": stages,
        "training": {key: log[key] for key in ("command", "machine", "device", "threads", "versions")},
        "parameters": log["parameters"],
        **surroundings(),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(result, indent=1) + "\n")
    logging.getLogger(__name__).info("%s: %s", file.name, {v: s["all"]["accuracy"] for v, s in scores.items()})


def sweep(options: argparse.Namespace) -> None:
    """Sweep the shipped checkpoint over views, gamma, budgets and image size."""
    grids = {
        "views": [SweepSetting(views=views) for views in ("all", "global", "crops", "none")],
        "gamma": [SweepSetting(gamma=gamma) for gamma in GAMMAS],
        "tokens": [SweepSetting(tokens=tokens) for tokens in BUDGETS],
        "image_size": [SweepSetting(image_size=size) for size in IMAGE_SIZES],
    }
    for split, placement in ((options.split, "free"), (options.split, "aligned")):
        for name, settings in grids.items():
            target = FOLDER / "sweeps" / f"{name}-{placement}-{split}.json"
            if target.is_file() or (placement == "aligned" and name != "views"):
                continue
            data = {"scenes": options.score_scenes, "placement": placement}
            work = options.work / "sweeps" / f"{name}-{placement}-{split}"
            command = (
                f"python benchmarks/needle_evidence.py sweep --split {split} --score-scenes {options.score_scenes}"
            )
            checkpoint = str(options.checkpoint)
            run = SweepRun(checkpoint, f"needle:{split}", work, settings, data, command=command, plot=False)
            record = run_sweep(run)[1]
            target.parent.mkdir(parents=True, exist_ok=True)
            record = {**record, "checkpoint_name": options.checkpoint.name, "record": surroundings()}
            write_text(target, json.dumps(record, indent=1) + "\n")


def show(options: argparse.Namespace) -> None:
    """The runs and what is finished."""
    table = Table("run", "what", "seeds", "visits of the stages", "finished")
    for name, run in RUNS.items():
        done = [str(seed) for seed in run.seeds if result_file(name, seed, "validation").is_file()]
        visits = ", ".join(map(str, visits_of(run, options.share)))
        table.add_row(name, run.text, ", ".join(map(str, run.seeds)), visits, ", ".join(done))
    Console().print(table)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("list", "run", "all", "score", "sweep", "report"))
    parser.add_argument("name", nargs="?", choices=sorted(RUNS), help="for run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--halves", type=Path, default=ROOT / "checkpoints" / "halves")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "needle-slime", help="for sweep")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "needle")
    parser.add_argument("--cache", type=Path, help="folder of tower features; default WORK/cache")
    parser.add_argument("--share", type=float, default=1.0, help="of the visits")
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    parser.add_argument("--score-scenes", type=int, default=150)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="", help="about the machine, for the log")
    options = parser.parse_args()
    if options.action == "run" and options.name is None:
        parser.error(f"name a run: {', '.join(RUNS)}")
    return options


def main() -> None:
    """Do what the command line asks."""
    options = read_options()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    library_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    wanted = [(name, seed) for name, run in RUNS.items() for seed in run.seeds]
    if options.action == "list":
        show(options)
    elif options.action == "run":
        run_one(options.name, options.seed, options)
    elif options.action == "all":
        for name, seed in wanted:
            run_one(name, seed, options)
    elif options.action == "score":
        for name, seed in wanted:
            if result_file(name, seed, "validation").is_file():
                score(name, seed, options.split, options)
    elif options.action == "sweep":
        sweep(options)
    else:
        write_evidence(FOLDER, ROOT / "docs", options.split)


if __name__ == "__main__":
    main()

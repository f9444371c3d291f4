"""Does a teacher help? A student of two layers with the objective `mimic` against the same student without.

    python benchmarks/needle_mimic.py            every run that has no result yet; stopped and called again, it goes on
    python benchmarks/needle_mimic.py --split validation --seeds 0 --visits 800 --work WORK --results RESULTS
    python benchmarks/needle_mimic.py --report   the table of docs/distillation.md

The teacher is the shipped checkpoint with its router off: 208 visual tokens, four layers. The student is its tower,
its connector and the first two of its layers. Each run trains connector and language model on the same pictures and
questions, with the language loss alone (`alone`), with both losses (`mimic`), or, where it is named, with the
divergence alone (`only`). The seed orders scenes and chooses questions. Rate and length are the same for all and were
not searched. Test scenes are asked once.
"""

import argparse
import json
import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from needle_report import markdown, put
from record import RESULTS, surroundings
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as library_logging

from hires_lmm import HiResLmmForConditionalGeneration
from hires_lmm.evaluation.statistics import wilson_interval
from hires_lmm.files import write_text
from hires_lmm.training import Stage
from hires_lmm.training.objectives import Mimic
from needle.runs import RunOptions, SceneSet, evaluate_packed, train
from needle.runs.run import LOG


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "distillation.md"
METHODS: dict[str, dict[str, float]] = {
    "alone": {},
    "mimic": {"generation": 1.0, "mimic": 1.0},
    "only": {"generation": 0.0, "mimic": 1.0},
}
"""Name -> weights of the losses."""

LAYERS, BATCH_SIZE, QUESTIONS, SCENES = 2, 8, 8, 400
RATES = {"connector": 6e-4, "language_model": 4e-4, "lm_head": 4e-4}
GROUPS = ("fine", "scene", "all")
logger = logging.getLogger("needle_mimic")


def without_router(checkpoint: Path, layers: int | None = None) -> tuple[Any, Any]:
    """The checkpoint with its router off, maybe with its first layers alone; and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    config = deepcopy(model.config)
    config.connector_config.token_ops = []
    config.connector_config.resolve()
    config.text_config.num_hidden_layers = layers or config.text_config.num_hidden_layers
    changed = HiResLmmForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    changed.load_state_dict(model.state_dict(), strict=False)
    changed.tie_weights()
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.image_processor.token_layout = config.token_layout()
    return changed.eval(), processor


def write_teacher(options: argparse.Namespace) -> Path:
    """The folder of the teacher."""
    folder = options.work / "teacher"
    if not (folder / "processor_config.json").is_file():
        model, processor = without_router(options.checkpoint)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def ask(model: Any, processor: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Right answers on the scenes of the split."""
    scenes = SceneSet(options.split, options.scenes)
    return evaluate_packed(model.eval(), processor, scenes, options.work / "cache")


def run(method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: training, then exact answers."""
    if method == "teacher":
        return {"scores": ask(*without_router(options.checkpoint), options)}
    weights, folder = METHODS[method], options.work / f"{method}-{seed}-{options.visits}"
    model, processor = without_router(options.checkpoint, LAYERS)
    objectives = {"mimic": Mimic(str(write_teacher(options)), same_inputs=True)} if "mimic" in weights else {}
    settings = RunOptions(
        cache=str(options.work / "cache"),
        visits=(options.visits,),
        scenes=SCENES,
        batch_size=BATCH_SIZE,
        questions=QUESTIONS,
        seed=seed,
        note="1 of 2 CPU cores",
        command="python benchmarks/needle_mimic.py",
    )
    stage = Stage(f"mimic/{method}", RATES, loss_weights=weights, noise=False)
    train(model, processor, [stage], folder, settings, objectives)
    log = json.loads((folder / LOG).read_text())
    told = {name: log[name] for name in ("options", "seconds", "machine", "parameters")}
    return {"weights": weights, "training": told, "scores": ask(model, processor, options)}


def result_file(options: argparse.Namespace, method: str, seed: int) -> Path:
    """Where the result of a run is kept."""
    return options.results / f"mimic-{method}-{seed}-{options.split}.json"


def report(options: argparse.Namespace) -> str:
    """The table: one number a seed, and the interval of a single one."""
    rows = []
    for method in ("teacher", *METHODS):
        files = [result_file(options, method, seed) for seed in options.seeds]
        runs = [json.loads(file.read_text())["scores"] for file in files if file.is_file()]
        cells = []
        for group in GROUPS if runs else ():
            shares = [100 * scores[group]["accuracy"] for scores in runs]
            low, high = wilson_interval(runs[0][group]["right"], runs[0][group]["questions"])
            ends = f"{100 * low:.1f}–{100 * high:.1f}" if len(runs) == 1 else f"mean {sum(shares) / len(shares):.1f}"
            cells.append(f"{', '.join(f'{share:.1f}' for share in shares)} ({ends})")
        rows += [[f"`{method}`", *cells]] if runs else []
    return markdown(["run", *(f"{group} questions, %" for group in GROUPS)], rows)


def main() -> None:
    """Run what is not finished, or fill the table of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "needle" / "mimic")
    parser.add_argument("--results", type=Path, default=RESULTS / "needle")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "needle-slime")
    parser.add_argument("--methods", nargs="+", default=["teacher", "alone", "mimic"], choices=["teacher", *METHODS])
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--scenes", type=int, default=60, help="scenes that are asked about")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--visits", type=int, default=1600, help="pictures of a run, up to eight questions each")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if options.report:
        write_text(PAGE, put(PAGE.read_text(encoding="utf-8"), "mimic", report(options), "needle_mimic.py"))
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    library_logging.disable_progress_bar()
    torch.set_num_threads(1)
    options.results.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for method in options.methods:
            file = result_file(options, method, seed)
            if file.is_file() or (method == "teacher" and seed != options.seeds[0]):
                continue
            found = {"method": method, "seed": seed, "split": options.split, "scenes": options.scenes}
            write_text(file, json.dumps({**surroundings(), **found, **run(method, seed, options)}, indent=1) + "\n")
            logger.info("%s is done", file.name)


if __name__ == "__main__":
    main()

"""Join the pretrained halves into a model of any preset and train it on needle scenes through a plan.

    python -m needle.from_halves --preset slime --plan slime --out OUT --seed 0

An interrupted run continues when it is started again with the same options. See docs/needle.md.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging as library_logging

from hires_lmm.files import write_text
from hires_lmm.modeling.configuration_hires_lmm import PRESETS
from hires_lmm.training.parameters import VIEWS
from hires_lmm.training.plans import FORCED_EXPERT, PLANS, get_plan
from hires_lmm.training.stages import Stage

from .runs import Rates, RunOptions, SceneSet, evaluate_packed, join_halves, small_rates, train, with_token_ops
from .runs.run import LOG, MODEL
from .scenes import PLACEMENTS, NeedleOptions


HALVES = "checkpoints/halves"
VISITS = {"global": 8_000, "crops": 24_000, "all": 12_000}
"""Scene visits of a stage by its views, where none are given."""

MIX = {"all": 0.75, "crops": 0.1, "global": 0.15}
"""Share of the batches of the last stage that show all views, or one kind only."""

NEAR = {"global": 0.6, "all": 0.25}
"""Share of the batches with pictures that need no crops, by the views of stages that train the connector alone."""

CAPTION_NEAR = {"global": 0.6, "crops": 0.5, "all": 0.6}
"""The same where those stages learn captions: one view stands for a crop as well."""

TOWER_RATE_OFF = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments (sequence of `str`, *optional*): As in `sys.argv[1:]`.

    Returns:
        The exit status.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    library_logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        run(options, "python -m needle.from_halves " + " ".join(given))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m needle.from_halves", description=__doc__.splitlines()[0] if __doc__ else None
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the run: stages, training_log.json, model/")
    add("--halves", type=Path, default=Path(HALVES))
    add("--cache", type=Path, help="folder of tower features, shared by runs; default OUT/cache")
    add("--preset", default="slime", choices=sorted(PRESETS))
    add("--plan", default="slime", choices=sorted(PLANS))
    add("--num-queries", type=int, help="queries a view, a square number; default the share of the preset")
    add("--views", choices=VIEWS, help="views of every stage, instead of those of the plan")
    add("--router", action="store_true", help="train with the preset's token operations; one question at a time")
    add("--noise", type=float, help="noise of the router in training")
    add("--seed", type=int, default=0)
    add("--scenes", type=int, default=4000, help="different training scenes")
    add("--visits", help="scene visits of each stage, with commas; 0 skips a stage")
    add("--batch-size", type=int, default=8)
    add("--questions", type=int, default=8, help="most questions of a visit")
    add("--placement", default="free", choices=PLACEMENTS)
    add("--no-mix", action="store_true", help="all views in every batch of stages on all views")
    add("--captions", action="store_true", help="stages without language model learn captions of single tokens")
    add("--no-near", action="store_true", help="no pictures that need no crops in the first stages")
    for name, rate in vars(Rates()).items():
        default = TOWER_RATE_OFF if name == "tower" else rate
        add(f"--{name}-rate", type=float, default=default, help=f"learning rate, default {default:g}")
    add("--evaluate", type=int, default=300, help="validation scenes that are scored at the end; 0: none")
    add("--threads", type=int, help="of PyTorch")
    add("--note", default="", help="about the machine, for the log")
    return parser


def run(options: argparse.Namespace, command: str) -> None:
    """Join, train, score, save.

    Args:
        options (`argparse.Namespace`): As the command line gives them.
        command (`str`): For the log.

    Raises:
        ValueError: If options contradict each other.
    """
    stages = read_stages(options)
    settings = RunOptions(
        cache=str(options.cache or options.out / "cache"),
        visits=read_visits(options.visits, stages, options.views),
        scenes=options.scenes,
        batch_size=options.batch_size,
        questions=options.questions,
        seed=options.seed,
        options=NeedleOptions(placement=options.placement),
        views=options.views,
        mix=None if options.no_mix or options.views else MIX,
        near=None if options.no_near else (CAPTION_NEAR if options.captions else NEAR),
        captions=options.captions,
        note=options.note,
        command=command,
    )
    changes = {}
    token_ops = PRESETS[options.preset]["connector_config"].get("token_ops", [])
    if options.noise is not None:
        if not options.router:
            raise ValueError("--noise is for a router that is on in training; add --router.")
        token_ops = [{**op, "noise": options.noise} for op in token_ops]
        changes["connector_config"] = {"token_ops": token_ops}
    model, processor = join_halves(
        options.halves, options.preset, options.num_queries, options.router, options.seed, **changes
    )
    model = train(model, processor, stages, options.out, settings)
    if options.evaluate:
        scenes = SceneSet("validation", options.evaluate, options=settings.options)
        views = ["all", "global", "crops"] if options.views is None else [options.views]
        scores = {view: evaluate_packed(model, processor, scenes, settings.cache, view) for view in views}
        _add_scores(options.out, scores)
    if not options.router and token_ops:
        changed = with_token_ops(model, token_ops)
        processor.image_processor.token_layout = changed.config.token_layout()
        changed.save_pretrained(options.out / MODEL)
        processor.save_pretrained(options.out / MODEL)


def read_stages(options: argparse.Namespace) -> list[Stage]:
    """The stages of a plan at the rates of the command line.

    Args:
        options (`argparse.Namespace`): As the command line gives them.
    """
    rates = Rates(**{name: getattr(options, f"{name}_rate") for name in vars(Rates())})
    stages = small_rates(get_plan(options.plan, tower_rate=options.tower_rate or None), rates)
    if "mixture" in json.dumps(PRESETS[options.preset]["connector_config"]):
        return stages
    return [
        replace(stage, settings={path: value for path, value in stage.settings.items() if path != FORCED_EXPERT})
        for stage in stages
    ]


def read_visits(text: str | None, stages: Sequence[Stage], views: str | None) -> tuple[int, ...]:
    """Scene visits of each stage.

    Args:
        text (`str`, *optional*): Numbers with commas; by default `VISITS`, none for stages whose part the views do
            not use.
        stages (sequence of `Stage`): The stages.
        views (`str`, *optional*): Views of every stage.

    Returns:
        One number a stage.

    Raises:
        ValueError: If the text is wrong.
    """
    if text is None:
        return tuple(0 if _is_idle(stage, views) else VISITS[views or stage.views] for stage in stages)
    try:
        visits = tuple(int(part) for part in text.split(","))
    except ValueError:
        visits = ()
    if len(visits) != len(stages):
        names = ", ".join(stage.name for stage in stages)
        raise ValueError(f"--visits={text} must be one number for each of the stages {names}.")
    return visits


def _is_idle(stage: Stage, views: str | None) -> bool:
    """Whether a stage trains a part for one kind of view in a run that shows the other kind only."""
    if views in (None, "all") or stage.views == "all":
        return False
    return stage.views != views and stage.settings.get(FORCED_EXPERT) != "mlp"


def _add_scores(out: Path, scores: dict) -> None:
    """Write validation scores into the log."""
    file = out / LOG
    log = json.loads(file.read_text(encoding="utf-8"))
    log["validation"] = scores
    write_text(file, json.dumps(log, indent=1) + "\n")
    for views, names in scores.items():
        text = ", ".join(f"{name} {entry['accuracy']:.3f}" for name, entry in names.items())
        logging.getLogger(__name__).info("validation, views %s: %s", views, text)


if __name__ == "__main__":
    sys.exit(main())

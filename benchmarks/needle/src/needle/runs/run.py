"""A plan of training on needle scenes with the stock Trainer: stage after stage, resumable, with a log."""

import json
import logging
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hires_lmm.files import write_text
from hires_lmm.modeling.geometry_hires_lmm import Kind
from hires_lmm.training.callbacks import StageCallback
from hires_lmm.training.checkpoints import last_checkpoint
from hires_lmm.training.objectives.files import FOLDER as OBJECTIVES_FOLDER
from hires_lmm.training.objectives.files import WEIGHTS as OBJECTIVE_WEIGHTS
from hires_lmm.training.parameters import matches, part_name
from hires_lmm.training.stages import Stage

from ..scenes import NeedleOptions
from .captions import CaptionCollator, CaptionTrainer, SceneCaptions, can_learn_captions
from .collator import Near, SceneCollator
from .evaluate import can_pack
from .scenes import SceneFeatures, SceneSet, cache_scenes, near_options


logger = logging.getLogger(__name__)

LOG, DONE, MODEL = "training_log.json", "done.json", "model"
VERSIONS = ("torch", "transformers", "accelerate", "numpy", "scikit-learn", "pillow")
CAPTION_KINDS = (("digit", 0.3), ("number", 0.35), ("word", 0.15), ("shape", 0.1), ("chart", 0.1))
"""Kinds of objects in the near pictures that captions are learnt from: the 90 numbers need most examples."""

TOWER, LANGUAGE = "vision_tower", ("language_model", "lm_head")


@dataclass(frozen=True)
class Rates:
    """Learning rates at the size of the halves, where those of Table 7 would not move anything.

    Args:
        align (`float`): Parts of the connector in stages that train nothing else.
        connector (`float`): The connector in stages that train the language model too.
        language (`float`): Language model and head.
        tower (`float`): Vision tower, where a stage trains it.
        objective (`float`): Modules of objectives.
    """

    align: float = 2e-3
    connector: float = 6e-4
    language: float = 2e-4
    tower: float = 1e-4
    objective: float = 1e-3


def small_rates(stages: Sequence[Stage], rates: Rates | None = None) -> list[Stage]:
    """The stages of a plan with learning rates for models of a few million parameters.

    Args:
        stages (sequence of `Stage`): As `get_plan` gives them; parts, views and experts stay.
        rates (`Rates`, *optional*): The rates.

    Returns:
        New stages.
    """
    rates = rates or Rates()
    return [replace(stage, trainable=_rates_of(stage, rates)) for stage in stages]


def _rates_of(stage: Stage, rates: Rates) -> dict[str, float]:
    tunes = _tunes(stage)
    chosen = {}
    for pattern in stage.trainable:
        if matches(pattern, TOWER):
            chosen[pattern] = rates.tower
        elif any(matches(pattern, part) for part in LANGUAGE):
            chosen[pattern] = rates.language
        elif matches(pattern, "objectives"):
            chosen[pattern] = rates.objective
        else:
            chosen[pattern] = rates.connector if tunes else rates.align
    return chosen


@dataclass(frozen=True)
class RunOptions:
    """Data and length of a run.

    Args:
        cache (`str`): Parent folder of tower features, shared by all runs.
        scenes (`int`): Different training scenes.
        visits (`tuple` of `int`): Scene visits of each stage; a visit asks up to `questions` questions.
        batch_size (`int`): Scenes of an optimizer step.
        questions (`int`): Most questions of a visit.
        seed (`int`): Order of the scenes, choice of the questions, noise. Scenes are the same for all seeds.
        options (`NeedleOptions`): How scenes are drawn.
        views (`str`, *optional*): Views of every stage, instead of the stage's own: `"global"` or `"crops"`.
        mix (`dict`, *optional*): Views -> share of the batches, in stages on all views.
        near (`dict`, *optional*): Views of a stage -> share of the batches (with captions: of the rows) with pictures
            that need no crops, in stages that leave the language model alone; see `near_options`.
        kinds (`dict`, *optional*): Views -> question kinds, instead of what those views can answer.
        captions (`bool`): Whether stages that train the connector alone learn captions of single tokens instead of
            answers, see `captions`.
        caption_batch_size (`int`): Scenes of an optimizer step of such a stage.
        caption_views (`int`): Different near pictures of such stages.
        decay_share (`float`): Share of a stage, at its end, over which the rates fall.
        weight_decay (`float`): Of matrices.
        log_every, save_every (`int`): Optimizer steps.
        note (`str`): About the machine, for the log.
        command (`str`): For the log.
    """

    cache: str
    visits: tuple[int, ...]
    scenes: int = 4000
    batch_size: int = 8
    questions: int = 8
    seed: int = 0
    options: NeedleOptions = field(default_factory=NeedleOptions)
    views: str | None = None
    mix: dict[str, float] | None = None
    near: dict[str, float] | None = None
    kinds: dict[str, Sequence[str]] | None = None
    captions: bool = False
    caption_batch_size: int = 32
    caption_views: int = 16_000
    decay_share: float = 0.4
    weight_decay: float = 0.05
    log_every: int = 20
    save_every: int = 200
    note: str = ""
    command: str = ""


class Visits(Dataset):
    """Rows `{"scene", "visit"}`: every scene once, in random order, then all again with other questions.

    Args:
        scenes (`int`): Different scenes.
        count (`int`): Rows.
        seed (`int`): Order.
        first (`int`): Number of the first visit, so that stages ask different questions.
    """

    def __init__(self, scenes: int, count: int, seed: int, first: int = 0):
        rng = random.Random(f"visits/{seed}/{first}")
        self.rows: list[dict[str, int]] = []
        while len(self.rows) < count:
            visit = first + len(self.rows) // scenes
            self.rows += [{"scene": scene, "visit": visit} for scene in rng.sample(range(scenes), scenes)]
        del self.rows[count:]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, int]:
        return self.rows[index]


class Clock(TrainerCallback):
    """Adds up wall and processor time of a stage over interruptions.

    Args:
        file (`Path`): Holds the sums of what checkpoints contain.
    """

    def __init__(self, file: Path):
        self.file = file
        self.spent = json.loads(file.read_text()) if file.is_file() else {"wall": 0.0, "processor": 0.0}
        self._start = (time.time(), time.process_time())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        self._start = (time.time(), time.process_time())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the sums that belong to the checkpoint."""
        write_text(self.file, json.dumps(self.total()))

    def total(self) -> dict[str, float]:
        """Seconds up to now."""
        wall, processor = self._start
        return {
            "wall": round(self.spent["wall"] + time.time() - wall, 1),
            "processor": round(self.spent["processor"] + time.process_time() - processor, 1),
        }


def train(
    model: Any,
    processor: Any,
    stages: Sequence[Stage],
    out: str | Path,
    options: RunOptions,
    objectives: dict[str, Any] | None = None,
    columns: Sequence[Any] = (),
) -> Any:
    """Train a joined model through a plan.

    A finished stage is skipped, an interrupted one goes on from its last checkpoint. Stages that leave the tower
    frozen read its features from the cache.

    Args:
        model (`HiResLmmForConditionalGeneration`): From `join_halves`; trained in place.
        processor (`HiResLmmProcessor`): Its processor.
        stages (sequence of `Stage`): The plan, see `small_rates`.
        out (`str` or `Path`): Gets a folder a stage, `model/` and `training_log.json`.
        options (`RunOptions`): Data and length.
        objectives (`dict`, *optional*): Name -> objective, for `StageCallback`.
        columns (sequence, *optional*): Batch columns of the objectives, for the collator.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If stages and visits differ in number.
    """
    if len(stages) != len(options.visits):
        raise ValueError(f"{len(stages)} stages need as many numbers of visits, not {options.visits}.")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    first, records = 0, []
    for number, (stage, count) in enumerate(zip(stages, options.visits, strict=True)):
        stage = replace(stage, views=options.views) if options.views else stage
        folder = out / f"{number}-{stage.name.replace('/', '-')}"
        visits = Visits(options.scenes, count, options.seed, first)
        first += -(-count // options.scenes)
        if not (folder / DONE).is_file() and count:
            _run_stage(model, processor, stage, visits, folder, options, objectives or {}, columns)
        if count:
            records.append(_finished(model, stage, folder, objectives or {}))
        _write_log(out / LOG, model, options, records)
    model.model.connector.training_views = "all"
    model.eval()
    model.save_pretrained(out / MODEL)
    processor.save_pretrained(out / MODEL)
    return model


def _finished(model: Any, stage: Stage, folder: Path, objectives: dict[str, Any]) -> dict[str, Any]:
    """Load what a finished stage learnt; returns its record."""
    own = {pattern: rate for pattern, rate in stage.trainable.items() if not matches(pattern, "objectives")}
    replace(stage, trainable=own, loss_weights={}).apply(model)
    for name, objective in objectives.items():
        file = folder / "checkpoints" / OBJECTIVES_FOLDER / name / OBJECTIVE_WEIGHTS
        if file.is_file():
            objective.load_state_dict(load_file(file))
    weights = load_file(folder / "weights" / "model.safetensors")
    learnt = {key: weights[key] for key in weights if any(matches(part_name(key), pattern) for pattern in own)}
    model.load_state_dict(learnt, strict=False)
    model.tie_weights()
    return json.loads((folder / DONE).read_text(encoding="utf-8"))


def _run_stage(
    model: Any,
    processor: Any,
    stage: Stage,
    visits: Visits,
    folder: Path,
    options: RunOptions,
    objectives: dict[str, Any],
    columns: Sequence[Any],
) -> None:
    """One run of the Trainer."""
    checkpoints = folder / "checkpoints"
    learns_captions = options.captions and not _tunes(stage)
    batch_size = options.caption_batch_size if learns_captions else options.batch_size
    args = _arguments(checkpoints, len(visits), batch_size, options)
    clock = Clock(folder / "clock.json")
    make_collator, trainer_class = (_caption_collator, CaptionTrainer) if learns_captions else (_collator, Trainer)
    trainer = trainer_class(
        model,
        args,
        train_dataset=visits,
        data_collator=make_collator(model, processor, stage, options, columns),
        processing_class=processor,
        callbacks=[StageCallback(stage, objectives=objectives or None), clock],
        optimizer_cls_and_kwargs=stage.optimizer_cls_and_kwargs(args),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    model.save_pretrained(folder / "weights")
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    record = {
        "stage": stage.to_dict(),
        "steps": trainer.state.global_step,
        "visits": len(visits),
        "batch_size": batch_size,
        "loss_of": "captions" if learns_captions else "answers",
        "seconds": clock.total(),
        "loss": [[entry["step"], round(entry["loss"], 4)] for entry in history],
    }
    write_text(folder / DONE, json.dumps(record))


def _arguments(folder: Path, visits: int, batch_size: int, options: RunOptions) -> TrainingArguments:
    """Arguments of the Trainer for one stage."""
    steps = visits // batch_size
    warmup = max(1, min(100, steps // 20))
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        learning_rate=1e-3,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": round(options.decay_share * steps), "min_lr_ratio": 0.02},
        warmup_steps=warmup,
        adam_beta2=0.98,
        weight_decay=options.weight_decay,
        logging_steps=options.log_every,
        save_steps=options.save_every,
        save_total_limit=1,
        remove_unused_columns=False,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=options.seed,
        data_seed=options.seed,
    )


def _collator(model: Any, processor: Any, stage: Stage, options: RunOptions, columns: Sequence[Any]) -> SceneCollator:
    """The collator of a stage, over cached features where the tower is frozen."""
    scenes = SceneSet("train", options.scenes, options=options.options)
    learns = any(matches(TOWER, pattern) or matches(pattern, TOWER) for pattern in stage.trainable)
    store: SceneFeatures | None = None if learns else cache_scenes(model, processor, scenes, options.cache)
    return SceneCollator(
        processor,
        scenes,
        store,
        stage.views,
        options.questions,
        packed=can_pack(model),
        mix=options.mix if stage.views == "all" else None,
        near=_near(model, processor, stage, options, store is not None),
        kinds=options.kinds,
        max_image_tokens=stage.max_image_tokens,
        seed=options.seed,
        **({"columns": columns} if columns else {}),
    )


def _caption_collator(
    model: Any, processor: Any, stage: Stage, options: RunOptions, columns: Sequence[Any]
) -> CaptionCollator:
    """The collator of a stage that learns captions."""
    connector = model.model.connector
    if not can_learn_captions(connector):
        raise ValueError(
            f"Stage {stage.name!r} cannot learn captions: a part of {connector.config.to_dict()} joins views or makes "
            "its own tokens. Train it on answers: captions=False."
        )
    scenes = SceneSet("train", options.scenes, options=options.options)
    views = SceneSet(
        "train", options.caption_views, options=replace(near_options(options.options), kinds=CAPTION_KINDS)
    )
    return CaptionCollator(
        SceneCaptions(processor.tokenizer, *(connector.layout.grids[kind].size for kind in (Kind.GLOBAL, Kind.CROP))),
        scenes,
        cache_scenes(model, processor, scenes, options.cache),
        stage.views,
        _near(model, processor, stage, options, True, views),
    )


def _near(
    model: Any, processor: Any, stage: Stage, options: RunOptions, cached: bool, scenes: SceneSet | None = None
) -> Near | None:
    """Pictures that need no crops, where the stage has some."""
    share = (options.near or {}).get(stage.views, 0.0)
    if not share or _tunes(stage):
        return None
    scenes = scenes or SceneSet("train", options.scenes, options=near_options(options.options))
    return Near(scenes, cache_scenes(model, processor, scenes, options.cache) if cached else None, share)


def _tunes(stage: Stage) -> bool:
    """Whether a stage trains the language model."""
    return any(matches(pattern, part) for pattern in stage.trainable for part in LANGUAGE)


def _write_log(file: Path, model: Any, options: RunOptions, records: list[dict[str, Any]]) -> None:
    """Everything that is needed to repeat the run."""
    log = {
        "command": options.command,
        "machine": options.note,
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": str(model.device.type),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
        "options": {key: value for key, value in asdict(options).items() if key not in ("cache", "note", "command")},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": {key: round(sum(r["seconds"][key] for r in records), 1) for key in ("wall", "processor")},
        "stages": records,
    }
    write_text(file, json.dumps(log, indent=1) + "\n")

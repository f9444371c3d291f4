"""The callback that turns a run of the stock Trainer into one stage."""

from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import DefaultFlowCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from .collator import HiResLmmCollator
from .objectives.base import Objective
from .objectives.files import FOLDER, restore_objectives, save_objectives
from .objectives.run import (
    CarriedObjectives,
    StepHooks,
    attach,
    check_objectives,
    choose_objectives,
    needed_columns,
)
from .optimization import NO_DECAY, other_stage_message
from .parameters import find_base, learnable_parameters, part_name
from .stages import Stage, summarise
from .sums import Sums


COUNTS = ["kept", "tokens", "gate", "gated"]


class StageCallback(TrainerCallback, ExportableState):
    """Freezes what a stage does not train, carries its objectives, shows what it does, logs and guards resumes.

    Args:
        stage (`Stage` or `dict`): The stage, or its fields.
        show_table (`bool`): Write the table of parts to the standard error stream of the main process at the start.
        objectives (`dict[str, Objective]`, *optional*): The losses that `stage.loss_weights` weighs, by name. During
            the run they are submodules of the model (`objectives.<name>` in `stage.trainable`); their weights go to
            `objectives` in each checkpoint and, at the end, in the output folder.

    Raises:
        ValueError: From the Trainer's constructor or at the start of training, if stage, model, optimizer, checkpoint,
            objectives or arguments contradict each other.
    """

    def __init__(self, stage: Stage | dict, show_table: bool = True, objectives: dict[str, Objective] | None = None):
        self.stage = stage if isinstance(stage, Stage) else Stage.from_dict(stage)
        self.show_table = show_table
        self.objectives = choose_objectives(self.stage, objectives or {})
        self.run_id = uuid4().hex
        self._carried: CarriedObjectives | None = None
        self._handles: list = []
        self._sums = Sums(COUNTS)
        self._rates: dict[str, float] = {}
        self._written: int | None = None

    def state(self) -> dict:
        """What a checkpoint remembers of the callback: the stage and the run."""
        return {
            "args": {"stage": self.stage.to_dict(), "show_table": self.show_table},
            "attributes": {"stage_name": self.stage.name, "run_id": self.run_id},
        }

    # --- events of the Trainer ---

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Attach the objectives, freeze and switch before the optimizer exists."""
        check_arguments(args, self.stage)
        base = find_base(model)
        self._carried = attach(model, base, self.objectives)
        self.stage.apply(model)
        if self._carried is not None:
            check_objectives(self._carried, self.stage, base)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Compare checkpoint, optimizer and collator with the stage, show the table, start to listen."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        entries = [entry for entry in (saved if isinstance(saved, list) else [saved]) if entry is not None]
        for entry in entries:
            written = entry["attributes"]["stage_name"]
            if written != self.stage.name:
                raise ValueError(other_stage_message(written, self.stage.name))
        if state.global_step:
            self._restore(args, state.global_step, entries)
        state.stateful_callbacks[type(self).__name__] = self.state()
        check_optimizer(kwargs["optimizer"], model, self.stage)
        collator = find_collator(kwargs.get("train_dataloader"))
        check_collator(collator, self.stage, self._carried)
        if collator is not None:
            collator.start(state.global_step, args.gradient_accumulation_steps)
        if self.show_table and state.is_world_process_zero:
            Console(stderr=True).print(render_table(model, self.stage))
        self._listen(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the rates of the step, before the scheduler moves on; the Trainer logs the first group only."""
        groups = kwargs["optimizer"].param_groups
        self._rates = {f"learning_rate/{group.get('name', n)}": group["lr"] for n, group in enumerate(groups)}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Add the numbers of the stage to what the Trainer logs; its history has been written by then."""
        if logs is None or "loss" not in logs:
            return
        numbers: dict[str, Any] = shares_of(self._sums.take(args.device))
        if len(self._rates) > 1:
            numbers.update(self._rates)
        collator = find_collator(kwargs.get("train_dataloader"))
        if collator is not None:
            numbers.update(collator.counts())
        numbers["stage"] = self.stage.name
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the objectives into a checkpoint before the Trainer does: it may then delete the one before."""
        if control.should_save:
            self._write(Path(args.output_dir) / f"checkpoint-{state.global_step}", state)
            self._written = state.global_step

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the objectives into a checkpoint that nothing had announced."""
        if self._written != state.global_step:
            self._write(Path(args.output_dir) / f"checkpoint-{state.global_step}", state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop listening; leave the objectives in the output folder."""
        self._stop_listening()
        self._write(Path(args.output_dir), state)

    # --- objectives ---

    def _write(self, folder: Path, state: Any) -> None:
        """Write the objectives of the run below a folder."""
        save_objectives(folder / FOLDER, self.objectives, self.run_id, state.is_world_process_zero)

    def _restore(self, args: Any, step: int, entries: list[dict]) -> None:
        """Put back the objectives of the checkpoint that the Trainer goes on from; it does not say where that is."""
        named = args.resume_from_checkpoint
        folders = [Path(named)] if isinstance(named, str) and Path(named).is_dir() else []
        folders.append(Path(args.output_dir) / f"checkpoint-{step}")
        runs = [entry["attributes"].get("run_id") for entry in entries]
        restore_objectives(folders, self.objectives, runs[-1] if runs else None)

    # --- numbers ---

    def _listen(self, model: nn.Module) -> None:
        """Hook the model; this changes nothing unless the stage weighs a loss."""
        self._stop_listening()
        self._sums = Sums([*COUNTS, "share", "loss/generation", *(f"loss/{name}" for name in self.objectives)])
        carried = self._carried if self._carried is not None else CarriedObjectives({})
        self._handles = StepHooks(carried, self.stage.loss_weights, self._sums).install(model, find_base(model))

    def _stop_listening(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def shares_of(sums: dict[str, float]) -> dict[str, float]:
    """The logged numbers from their sums: shares, and losses as means over answer tokens."""
    numbers = {}
    if sums["tokens"]:
        numbers["kept_share"] = sums["kept"] / sums["tokens"]
    if sums["gated"]:
        numbers["gate_mlp_share"] = sums["gate"] / sums["gated"]
    if sums.get("share"):
        numbers.update({name: value / sums["share"] for name, value in sums.items() if name.startswith("loss/")})
    return numbers


def find_collator(dataloader: Any) -> HiResLmmCollator | None:
    """The collator of this package that a data loader uses, if it does."""
    collator = getattr(dataloader, "collate_fn", None)
    collator = getattr(collator, "data_collator", collator)
    return collator if isinstance(collator, HiResLmmCollator) else None


def check_collator(collator: HiResLmmCollator | None, stage: Stage, carried: CarriedObjectives | None) -> None:
    """Compare what a collator makes with what a stage and its objectives read."""
    if collator is None:
        return
    budgets = (stage.max_image_tokens, collator.max_image_tokens)
    wanted, given = (list(value) if isinstance(value, (list, tuple)) else value for value in budgets)
    if wanted is not None and wanted != given:
        raise ValueError(
            f"Stage {stage.name!r} trains with max_image_tokens={wanted}, but the collator has {given}; pass "
            "HiResLmmCollator(processor, views=stage.views, max_image_tokens=stage.max_image_tokens)."
        )
    if collator.views != stage.views:
        raise ValueError(
            f"Stage {stage.name!r} uses views={stage.views!r}, but the collator makes views={collator.views!r}; pass "
            "HiResLmmCollator(processor, views=stage.views)."
        )
    made = {column.name for column in collator.columns}
    missing = [column.name for column in needed_columns(carried) if column.name not in made]
    if missing:
        raise ValueError(
            f"The objectives of stage {stage.name!r} read the column {missing[0]!r}, which the collator does not "
            "make; pass HiResLmmCollator(processor, columns=objective.columns())."
        )


def check_arguments(args: Any, stage: Stage) -> None:
    """Refuse arguments that would train something else in silence."""
    if args.label_smoothing_factor and stage.loss_weights:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} is refused: the Trainer computes smoothed losses "
            f"itself, outside of the model, which adds the losses that stage {stage.name!r} weighs. Set it to 0."
        )
    if args.remove_unused_columns:
        raise ValueError("Set remove_unused_columns=False: the collator reads columns that the model does not know.")
    if stage.loss_weights and args.restore_callback_states_from_checkpoint:
        raise ValueError(
            "restore_callback_states_from_checkpoint=True would replace StageCallback by one without objectives; "
            "leave it off: the callback finds its state by itself."
        )
    if stage.loss_weights and any(cls.__module__.split(".")[0] == "trl" for cls in type(args).__mro__):
        raise ValueError(
            f"Stage {stage.name!r} weighs auxiliary losses, which TRL's SFTTrainer never computes; use Trainer."
        )


def check_optimizer(optimizer: Any, model: nn.Module, stage: Stage) -> None:
    """Compare the groups of an optimizer with a stage."""
    remedy = (
        "Pass optimizers=(stage.optimizer(model, args), None) or "
        "optimizer_cls_and_kwargs=stage.optimizer_cls_and_kwargs(args) to the Trainer."
    )
    for group in optimizer.param_groups:
        name = group.get("name")
        expected = stage.trainable.get(str(name).removesuffix(NO_DECAY)) if name is not None else None
        rate = group.get("initial_lr", group["lr"])
        if expected is None and len(set(stage.trainable.values())) == 1:
            expected = next(iter(stage.trainable.values()))
        if group["params"] and (expected is None or abs(rate - expected) > 1e-12 + 1e-6 * expected):
            raise ValueError(
                f"The optimizer has the group {name!r} with learning rate {rate}, but stage {stage.name!r} says "
                f"{stage.trainable}. {remedy}"
            )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters()):
        return  # sharded by FSDP1 or DeepSpeed, which keep parameters of their own
    wanted = {id(p): name for pairs in stage.parameters(model).values() for name, p in pairs}
    missing = [name for key, name in wanted.items() if key not in held]
    foreign = [name for name, p in learnable_parameters(model) if id(p) in held and id(p) not in wanted]
    if missing or foreign:
        what = "lacks" if missing else "also holds"
        raise ValueError(
            f"The optimizer {what} {part_name((missing or foreign)[0])} and {len(missing or foreign) - 1} more "
            f"parameters; stage {stage.name!r} trains {', '.join(stage.trainable)}. {remedy}"
        )


def render_table(model: nn.Module, stage: Stage) -> Table:
    """The table of parts of a run."""
    settings = ", ".join(f"{path}={value}" for path, value in stage.settings.items())
    table = Table(title=f"Stage {stage.name}: views {stage.views}, {settings or 'options as configured'}")
    table.add_column("part")
    for column in ("parameters", "trainable", "learning rate"):
        table.add_column(column, justify="right")
    rows = summarise(model, stage)
    for row in rows:
        rates = ", ".join(f"{rate:g}" for rate in row.learning_rates) or "frozen"
        table.add_row(row.part, f"{row.parameters:,}", f"{row.trainable:,}", rates)
    table.add_section()
    table.add_row("all", f"{sum(r.parameters for r in rows):,}", f"{sum(r.trainable for r in rows):,}", "")
    return table


def put_first(trainer: Any) -> None:
    """Move stage callbacks before all others, so that TensorBoard and the like see their numbers too."""
    first = (DefaultFlowCallback, StageCallback)  # the former decides when to log and to save
    trainer.callback_handler.callbacks.sort(key=lambda callback: [not isinstance(callback, kind) for kind in first])

"""The callback that turns a run of the stock Trainer into one stage."""

from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .collator import HiResLmmCollator
from .optimization import NO_DECAY, other_stage_message
from .stages import Stage, find_base, learnable_parameters, part_name, summarise


SUMS = ("kept", "tokens", "gate", "gated")


class StageCallback(TrainerCallback, ExportableState):
    """Freezes what a stage does not train, shows what it does, logs its numbers and guards resumes.

    Args:
        stage (`Stage` or `dict`): The stage, or its fields.
        show_table (`bool`): Write the table of parts to the standard error stream of the main process at the start.

    Raises:
        ValueError: From the Trainer's constructor or at the start of training, if stage, model, optimizer, checkpoint
            or arguments contradict each other.
    """

    def __init__(self, stage: Stage | dict, show_table: bool = True):
        self.stage = stage if isinstance(stage, Stage) else Stage.from_dict(stage)
        self.show_table = show_table
        self._handles: list = []
        self._sums: dict[str, Any] = {}
        self._gates: list[torch.Tensor] = []
        self._has_images = True
        self._rates: dict[str, float] = {}

    def state(self) -> dict:
        """What a checkpoint remembers of the callback: the stage."""
        return {
            "args": {"stage": self.stage.to_dict(), "show_table": self.show_table},
            "attributes": {"stage_name": self.stage.name},
        }

    # --- events of the Trainer ---

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Freeze and switch before the optimizer exists."""
        check_arguments(args, self.stage)
        self.stage.apply(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Compare checkpoint, optimizer and collator with the stage, show the table, start to listen."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        for entry in saved if isinstance(saved, list) else [saved]:
            written = self.stage.name if entry is None else entry["attributes"]["stage_name"]
            if written != self.stage.name:
                raise ValueError(other_stage_message(written, self.stage.name))
        state.stateful_callbacks[type(self).__name__] = self.state()
        check_optimizer(kwargs["optimizer"], model, self.stage)
        collator = find_collator(kwargs.get("train_dataloader"))
        if collator is not None and collator.views != self.stage.views:
            raise ValueError(
                f"Stage {self.stage.name!r} uses views={self.stage.views!r}, but the collator makes "
                f"views={collator.views!r}; pass HiResLmmCollator(processor, views=stage.views)."
            )
        if self.show_table and state.is_world_process_zero:
            Console(stderr=True).print(render_table(model, self.stage))
        self._listen(model)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the rates of the step, before the scheduler moves on; the Trainer logs the first group only."""
        groups = kwargs["optimizer"].param_groups
        self._rates = {f"learning_rate/{_group_name(group, n)}": group["lr"] for n, group in enumerate(groups)}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Add the numbers of the stage to what the Trainer logs; its history has been written by then."""
        if logs is None or "loss" not in logs:
            return
        numbers: dict[str, Any] = {**self._take_numbers(args.device)}
        if len(self._rates) > 1:
            numbers.update(self._rates)
        collator = find_collator(kwargs.get("train_dataloader"))
        if collator is not None:
            numbers.update(collator.counts())
        numbers["stage"] = self.stage.name
        logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # --- numbers ---

    def _listen(self, model: nn.Module) -> None:
        """Hook the modules whose numbers are logged; hooks change nothing unless the stage weighs a loss."""
        self.on_train_end(None, None, None)
        self._sums = {}
        base = find_base(model)
        self._handles.append(base.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        hooks = {"HiResLmmGate": self._after_gate, "HiResLmmRouter": self._after_router}
        for module in base.modules():
            hook = hooks.get(type(module).__name__.removeprefix("FSDP"))
            if hook is not None:
                self._handles.append(module.register_forward_hook(hook))
        if self.stage.loss_weights:
            top = next(m for m in model.modules() if hasattr(m, "lm_head"))
            self._handles.append(top.register_forward_hook(partial(_add_losses, self), with_kwargs=True))

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        views = kwargs.get("pixel_values")
        views = kwargs.get("vision_features") if views is None else views
        self._has_images = module.training and views is not None and views.shape[0] > 0
        self._gates = []

    def _after_router(self, module: nn.Module, args: tuple, output: tuple) -> None:
        kept = output[0].kept
        if self._has_images and kept is not None:
            self._add("tokens", kept.numel())
            self._add("kept", kept.sum())

    def _after_gate(self, module: nn.Module, args: tuple, gates: torch.Tensor) -> None:
        if self._has_images:
            self._gates.append(gates.flatten(0, -2))
            self._add("gate", gates[..., 0].detach().float().sum())
            self._add("gated", gates[..., 0].numel())

    def _add(self, name: str, value: Any) -> None:
        self._sums[name] = self._sums.get(name, 0) + value

    def _take_numbers(self, device: torch.device) -> dict[str, float]:
        """Sums over all processes since the last call, as shares."""
        sums = torch.stack([torch.as_tensor(self._sums.get(n, 0), dtype=torch.float64, device="cpu") for n in SUMS])
        self._sums = {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            sums = sums.to(device)
            torch.distributed.all_reduce(sums)
        kept, tokens, gate, gated = sums.tolist()
        numbers = {"kept_share": kept / tokens} if tokens else {}
        return {**numbers, **({"gate_mlp_share": gate / gated} if gated else {})}


def _group_name(group: dict, number: int) -> str:
    """Name of a group of the optimizer, or its number."""
    return str(group.get("name", number))


def _add_losses(callback: StageCallback, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Add the weighted auxiliary losses to the loss of a training step, as shares of the whole optimizer step."""
    if not module.training or not callback._gates:
        return output
    if output.loss is None:
        raise ValueError(
            "The stage weighs auxiliary losses, but the model returned no loss: this trainer computes its own, as "
            "TRL's SFTTrainer does. Use transformers.Trainer for this stage."
        )
    targets, total = (kwargs["labels"][:, 1:] != -100).sum(), kwargs.get("num_items_in_batch")
    share = 1.0 if total is None else targets / total
    losses = {"gate_balance": gate_balance(torch.cat(callback._gates))}
    output.loss = output.loss + share * sum(w * losses[name] for name, w in callback.stage.loss_weights.items())
    return output


def gate_balance(gates: torch.Tensor) -> torch.Tensor:
    """Squared coefficient of variation of the mean weights of the experts: 0 when they share evenly.

    Args:
        gates (`torch.Tensor` of shape `(n, E)`): Weights of the experts for each token.

    Returns:
        A scalar.

    Source: the importance loss of huggingface.co/papers/1701.06538.
    """
    mean = gates.float().mean(dim=0)
    return mean.var(unbiased=False) / mean.mean().square()


def find_collator(dataloader: Any) -> HiResLmmCollator | None:
    """The collator of this package that a data loader uses, if it does.

    Args:
        dataloader: A data loader or None.
    """
    collator = getattr(dataloader, "collate_fn", None)
    collator = getattr(collator, "data_collator", collator)
    return collator if isinstance(collator, HiResLmmCollator) else None


def check_arguments(args: Any, stage: Stage) -> None:
    """Refuse arguments that would train something else in silence.

    Args:
        args (`TrainingArguments`): The arguments of the run.
        stage (`Stage`): The stage.

    Raises:
        ValueError: For label smoothing, `remove_unused_columns`, and auxiliary losses under TRL's trainer.
    """
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} is refused: the Trainer smooths labels of models "
            "outside transformers without shifting them, so every token would learn to repeat itself. Set it to 0."
        )
    if args.remove_unused_columns:
        raise ValueError("Set remove_unused_columns=False: the collator reads columns that the model does not know.")
    if stage.loss_weights and any(cls.__module__.split(".")[0] == "trl" for cls in type(args).__mro__):
        raise ValueError(
            f"Stage {stage.name!r} weighs auxiliary losses, which TRL's SFTTrainer never computes; use Trainer."
        )


def check_optimizer(optimizer: Any, model: nn.Module, stage: Stage) -> None:
    """Compare the groups of an optimizer with a stage.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, wrapped or not.
        model (`nn.Module`): The model, wrapped or not.
        stage (`Stage`): The stage.

    Raises:
        ValueError: If a parameter of the stage is missing, a foreign one is present, or a learning rate differs.
    """
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
    """The table of parts of a run.

    Args:
        model (`nn.Module`): The model.
        stage (`Stage`): The stage.

    Returns:
        A table for `rich`.
    """
    table = Table(title=f"Stage {stage.name}: views {stage.views}, expert {stage.expert or 'as configured'}")
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
    """Move stage callbacks before all others, so that TensorBoard and the like see their numbers too.

    Args:
        trainer (`Trainer`): A trainer with a `StageCallback`.
    """
    trainer.callback_handler.callbacks.sort(key=lambda callback: not isinstance(callback, StageCallback))

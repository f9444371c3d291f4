"""Optimizers with one named group a part, and learning rates that alternate between groups."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, get_scheduler

from .stages import Stage, part_name


NO_DECAY = " (no decay)"


def parameter_groups(stage: Stage, model: nn.Module, weight_decay: float = 0.0) -> list[dict]:
    """Group the trainable parameters of a stage by pattern.

    Args:
        stage (`Stage`): The stage.
        model (`nn.Module`): The model, bare or wrapped.
        weight_decay (`float`): Decay of matrices; vectors (biases, norms) have none and a group of their own.

    Returns:
        Groups with `params`, `lr`, `weight_decay`, `name` (the pattern) and `stage`.
    """
    groups = []
    for pattern, pairs in stage.parameters(model).items():
        flat = [(name, p) for name, p in pairs if weight_decay and _is_vector(name, p)]
        rest = [(name, p) for name, p in pairs if not (weight_decay and _is_vector(name, p))]
        for members, decay, suffix in ((rest, weight_decay, ""), (flat, 0.0, NO_DECAY)):
            if members:
                groups.append(
                    {
                        "params": [parameter for _, parameter in members],
                        "lr": float(stage.trainable[pattern]),
                        "weight_decay": decay,
                        "name": pattern + suffix,
                        "stage": stage.name,
                    }
                )
    return groups


def _is_vector(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a bias, a norm weight or a learned mark."""
    return parameter.ndim < 2 or part_name(name).endswith("bias")


def build_optimizer(stage: Stage, model: nn.Module, args: Any) -> torch.optim.Optimizer:
    """Build the optimizer that `args` names over the groups of a stage.

    Args:
        stage (`Stage`): The stage; its learning rates replace `args.learning_rate`.
        model (`nn.Module`): The model, on the device it is trained on.
        args (`TrainingArguments`): `optim`, its arguments and `weight_decay` are read.

    Returns:
        The optimizer; it refuses states that another stage wrote.

    Raises:
        ValueError: If a pattern of the stage matches nothing.
    """
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    options = {key: value for key, value in options.items() if key != "lr"}
    optimizer = optimizer_class(parameter_groups(stage, model, args.weight_decay), lr=args.learning_rate, **options)
    optimizer.register_load_state_dict_pre_hook(partial(_refuse_other_stage, stage.name))
    return optimizer


def _refuse_other_stage(name: str, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Compare the stage that wrote an optimizer state with the one that reads it."""
    written = {group.get("stage") for group in state["param_groups"]} - {None}
    if written - {name}:
        raise ValueError(other_stage_message(str(written.pop()), name))


def other_stage_message(written: str, running: str) -> str:
    """The message for a resume into another stage.

    Args:
        written (`str`): Stage that wrote the checkpoint.
        running (`str`): Stage that was to go on.
    """
    return (
        f"This checkpoint was written in stage {written!r}, but stage {running!r} is running. A stage starts from the "
        "weights of the one before it, not from its optimizer: load the checkpoint with from_pretrained and train "
        "without resume_from_checkpoint."
    )


def optimizer_factory(stage: Stage, args: Any) -> tuple[Callable, dict]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes: the optimizer is built once the model is in place.

    Args:
        stage (`Stage`): The stage.
        args (`TrainingArguments`): As in `build_optimizer`.

    Returns:
        A factory of factories and no arguments, the form the Trainer knows for optimizers that need the model.
    """

    def factory() -> Callable:
        return lambda model: build_optimizer(stage, model, args)

    return factory, {}


def alternating_scheduler(
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    num_training_steps: int,
    name: str = "cosine",
    num_warmup_steps: int = 0,
    **options: Any,
) -> LambdaLR:
    """A schedule of transformers, switched to zero for the groups whose turn it is not.

    The switch follows the step count, which the scheduler stores: a resumed run goes on in the same turn. Gradients
    of all groups are computed, so every process does the same work; Adam goes on averaging them, and with a rate of
    zero neither they nor weight decay move a weight.

    Args:
        stage (`Stage`): A stage with `alternation`.
        optimizer (`torch.optim.Optimizer`): From `stage.optimizer`.
        num_training_steps (`int`): Optimizer steps of the run.
        name (`str`): Name of a schedule in transformers that is a `LambdaLR`.
        num_warmup_steps (`int`): Steps of linear warm-up.
        options: `scheduler_specific_kwargs` of the schedule.

    Returns:
        The scheduler, for `Trainer(..., optimizers=(optimizer, scheduler))`.

    Raises:
        ValueError: If the stage does not alternate, or the groups are not those of the stage.
    """
    if stage.alternation is None:
        raise ValueError(
            f"Stage {stage.name!r} has no alternation; give it one, or let the Trainer build the schedule."
        )
    names = [str(group.get("name", "")) for group in optimizer.param_groups]
    if "" in names:
        raise ValueError("The groups of the optimizer have no names; build it with stage.optimizer(model, args).")
    shape = get_scheduler(name, optimizer, num_warmup_steps, num_training_steps, scheduler_specific_kwargs=options)
    if not isinstance(shape, LambdaLR):
        raise ValueError(f"The schedule {name!r} is a {type(shape).__name__}, not a LambdaLR; use linear or cosine.")
    base, turns = shape.lr_lambdas[0], stage.alternation

    def rate(pattern: str, step: int) -> float:
        return base(step) if turns.is_on(pattern, step) else 0.0

    return LambdaLR(optimizer, [partial(rate, group.removesuffix(NO_DECAY)) for group in names])

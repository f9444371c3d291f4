"""Learning rates that alternate between groups of an optimizer."""

from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from .optimization import NO_DECAY
from .stages import Stage


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

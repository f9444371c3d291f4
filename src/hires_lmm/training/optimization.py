"""Optimizers with one named group a part."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .parameters import part_name


NO_DECAY = " (no decay)"


def parameter_groups(
    chosen: dict[str, list[tuple[str, nn.Parameter]]], rates: dict[str, float], stage: str, weight_decay: float = 0.0
) -> list[dict]:
    """Groups of an optimizer: one a pattern, and one for its vectors (biases, norms), which do not decay."""
    groups = []
    for pattern, pairs in chosen.items():
        flat = [p for name, p in pairs if weight_decay and _is_vector(name, p)]
        rest = [p for name, p in pairs if not (weight_decay and _is_vector(name, p))]
        for members, decay, suffix in ((rest, weight_decay, ""), (flat, 0.0, NO_DECAY)):
            if members:
                group = {"params": members, "lr": float(rates[pattern]), "weight_decay": decay}
                groups.append({**group, "name": pattern + suffix, "stage": stage})
    return groups


def _is_vector(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a bias, a norm weight or a learned mark."""
    return parameter.ndim < 2 or part_name(name).endswith("bias")


def build_optimizer(groups: list[dict], stage: str, model: nn.Module, args: Any) -> torch.optim.Optimizer:
    """The optimizer that `args` names over groups of a stage; it refuses states that another stage wrote."""
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    options = {key: value for key, value in options.items() if key != "lr"}
    optimizer = optimizer_class(groups, lr=args.learning_rate, **options)
    optimizer.register_load_state_dict_pre_hook(partial(_refuse_other_stage, stage))
    return optimizer


def _refuse_other_stage(name: str, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Compare the stage that wrote an optimizer state with the one that reads it."""
    written = {group.get("stage") for group in state["param_groups"]} - {None}
    if written - {name}:
        raise ValueError(other_stage_message(str(written.pop()), name))


def other_stage_message(written: str, running: str) -> str:
    """The message for a resume into another stage."""
    return (
        f"This checkpoint was written in stage {written!r}, but stage {running!r} is running. A stage starts from the "
        "weights of the one before it, not from its optimizer: load the checkpoint with from_pretrained and train "
        "without resume_from_checkpoint."
    )

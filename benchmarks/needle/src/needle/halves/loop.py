"""A small training loop: warm-up, constant, then falling rate; checkpoints that an interrupted run continues from."""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from hires_lmm.files import replacing


logger = logging.getLogger(__name__)

StepLoss = Callable[[int], tuple[torch.Tensor, dict[str, float]]]


@dataclass(frozen=True)
class LoopOptions:
    """How long and how fast.

    Args:
        steps (`int`): Optimizer steps.
        peak_rate (`float`): Learning rate after the warm-up.
        warmup (`int`): Steps over which the rate rises.
        decay_share (`float`): Share of the steps, at the end, over which the rate falls to a hundredth.
        save_every (`int`): Steps between checkpoints and lines of the log.
        restarts (`tuple` of `int`): Steps at which the rate, having fallen to its end there, stands at its peak again.
    """

    steps: int
    peak_rate: float
    warmup: int = 200
    decay_share: float = 0.3
    save_every: int = 100
    restarts: tuple[int, ...] = ()


@dataclass
class Clock:
    """Time spent, summed over interruptions: wall seconds and processor seconds of this process."""

    wall: float = 0.0
    processor: float = 0.0


def learning_rate(step: int, options: LoopOptions) -> float:
    """The learning rate of a step.

    Args:
        step (`int`): From 0.
        options (`LoopOptions`): The schedule.

    Returns:
        The rate. Two runs of different length agree until the shorter one begins to fall.
    """
    rise = min(1.0, (step + 1) / options.warmup)
    end = min((restart for restart in options.restarts if step < restart), default=options.steps)
    end = min(end, options.steps)
    left = (end - step) / max(1.0, options.decay_share * end)
    return options.peak_rate * rise * max(0.01, min(1.0, left))


def run_loop(name: str, model: nn.Module, step_loss: StepLoss, options: LoopOptions, folder: Path) -> Clock:
    """Train `model`; continues from `folder` if a run was interrupted there.

    Args:
        name (`str`): Shown by the progress bar.
        model (`nn.Module`): Changed in place.
        step_loss (callable): Step -> loss and numbers to log. Its batch must depend on the step alone.
        options (`LoopOptions`): Length, rate, checkpoints.
        folder (`Path`): Gets `checkpoint.pt` and `log.jsonl`.

    Returns:
        The time spent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(_groups(model), lr=options.peak_rate, betas=(0.9, 0.98))
    clock = Clock()
    first = _load(folder / "checkpoint.pt", model, optimizer, clock)
    wall, processor = time.time() - clock.wall, time.process_time() - clock.processor
    model.train()
    bar = tqdm(range(first, options.steps), name, options.steps, initial=first, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        loss, numbers = step_loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            clock.wall, clock.processor = time.time() - wall, time.process_time() - processor
            _log(folder / "log.jsonl", {"step": step + 1, "loss": loss.item(), **numbers, **vars(clock)})
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            _save(folder / "checkpoint.pt", model, optimizer, clock, step + 1)
    model.eval()
    return clock


def _groups(model: nn.Module) -> list[dict]:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]


def _log(file: Path, line: dict) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({key: round(value, 4) for key, value in line.items()}) + "\n")


def _save(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, clock: Clock, step: int) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "clock": vars(clock), "step": step}
    with replacing(file) as partial:
        torch.save(state, partial)


def _load(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, clock: Clock) -> int:
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    clock.wall, clock.processor = state["clock"]["wall"], state["clock"]["processor"]
    logger.info("%s continues at step %d.", file.parent, state["step"])
    return state["step"]

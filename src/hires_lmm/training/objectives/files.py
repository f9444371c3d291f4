"""Objectives on disk: one folder each, with what builds it anew and its weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ...files import replacing, write_text
from .base import Objective
from .registry import OBJECTIVES


FOLDER = "objectives"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def find_folder(checkpoint: str | Path) -> Path | None:
    """The folder of objectives that belongs to a checkpoint: in it, or beside it."""
    places = (Path(checkpoint) / FOLDER, Path(checkpoint).absolute().parent / FOLDER)
    return next((place for place in places if place.is_dir()), None)


def gather(module: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state of a module, sharded by FSDP2 or ZeRO-3 or not, on the CPU. To be called by all processes."""
    state = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        elif hasattr(tensor, "ds_id"):
            from deepspeed.zero import GatheredParameters

            with GatheredParameters([tensor]):
                tensor = tensor.detach().clone()
        state[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return state


def save_objectives(
    folder: str | Path, objectives: dict[str, Objective], run: str = "", is_main_process: bool = True
) -> None:
    """Write objectives that have weights. To be called by all processes."""
    for name, objective in objectives.items():
        state = gather(objective)
        if not state or not is_main_process:
            continue
        target = Path(folder) / name
        target.mkdir(parents=True, exist_ok=True)
        settings = {"objective": name, "settings": objective.settings()}
        write_text(target / CONFIG, json.dumps(settings, indent=2) + "\n")
        with replacing(target / WEIGHTS) as partial:
            save_file(state, partial, metadata={"format": "pt", "run": run})


def load_objectives(folder: str | Path) -> dict[str, Objective]:
    """Build the objectives of a folder, for the next stage or to look at what they learned.

    Args:
        folder (`str`): A folder that `StageCallback` wrote: `objectives` in the output folder of a run.

    Raises:
        ValueError: If the folder holds no objectives, or one that is not known.
    """
    found = sorted(Path(folder).glob(f"*/{CONFIG}"))
    if not found:
        raise ValueError(
            f"{str(folder)!r} holds no objectives; pass the folder 'objectives' that a run with objectives wrote."
        )
    objectives = {}
    for file in found:
        values = json.loads(file.read_text(encoding="utf-8"))
        name = values["objective"]
        if name not in OBJECTIVES:
            raise ValueError(f"{str(file)!r} is of the unknown objective {name!r}; known: {', '.join(OBJECTIVES)}.")
        objective = OBJECTIVES[name].from_settings(values["settings"])
        objective.load_state_dict(load_file(file.parent / WEIGHTS), assign=True)  # keeps the number format
        objectives[name] = objective
    return objectives


def restore_objectives(folders: list[Path], objectives: dict[str, Objective], run: str | None) -> None:
    """Put the weights of a checkpoint back, to go on with its run."""
    for name, objective in objectives.items():
        state = {
            key: tensor for key, tensor in objective.state_dict(keep_vars=True).items() if not _is_sharded(tensor)
        }
        if not state:
            continue
        files = [folder / FOLDER / name / WEIGHTS for folder in folders]
        files = [file for file in files if file.is_file() and _run_of(file) == run]
        if not files:
            places = " or ".join(repr(str(folder)) for folder in folders)
            raise ValueError(
                f"The run is to go on, but the objective {name!r} of its checkpoint is not in {places}. Name the "
                "checkpoint in TrainingArguments(resume_from_checkpoint=...) too, or, if that run was stopped while "
                "it wrote, go on from the checkpoint before."
            )
        saved = load_file(files[0])
        with torch.no_grad():
            for key, tensor in state.items():
                tensor.copy_(saved[key])


def _run_of(file: Path) -> str | None:
    """The run that wrote a file of weights."""
    with safe_open(file, framework="pt") as opened:
        return (opened.metadata() or {}).get("run")


def _is_sharded(tensor: Any) -> bool:
    """Whether FSDP2 or ZeRO-3 holds a tensor; their own checkpoints restore it."""
    return hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id")

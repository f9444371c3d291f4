"""Which checkpoint of an interrupted run is whole."""

import json
import logging
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)

TORCH_FILES = (".pt", ".pth", ".bin")
"""Files of `torch.save`: zip archives, whose table of contents stands at their end."""


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint of a run, for `trainer.train(resume_from_checkpoint=last_checkpoint(folder))`.

    The Trainer writes a checkpoint file by file into its final place. One that a killed process or a full disk left
    unfinished is passed over with a warning; `resume_from_checkpoint=True` would take it and fail.

    Args:
        folder (`str` or `Path`): Output folder of the run; need not exist.

    Returns:
        The folder of the checkpoint; None where there is no whole one.
    """
    found: dict[int, Path] = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal() and path.is_dir():
            found[int(step)] = path
    for number in sorted(found, reverse=True):
        damage = find_damage(found[number])
        if damage is None:
            return str(found[number])
        logger.warning("%s is passed over: %s.", found[number], damage)
    return None


def find_damage(checkpoint: str | Path) -> str | None:
    """What is wrong with a checkpoint of the Trainer, by what its files say about their own length.

    Args:
        checkpoint (`str` or `Path`): Its folder. Shards of FSDP and DeepSpeed are not looked into.

    Returns:
        A description, or None for a whole one.
    """
    checkpoint = Path(checkpoint)
    try:
        step = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{TRAINER_STATE_NAME}, which is written last, is missing or cut off"
    if checkpoint.name != f"{PREFIX_CHECKPOINT_DIR}-{step}":
        return f"{TRAINER_STATE_NAME} is that of step {step}"
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):
                    pass
            except SafetensorError as error:
                return f"{file.relative_to(checkpoint)} is cut off or damaged ({error})"
        elif file.suffix in TORCH_FILES and not zipfile.is_zipfile(file):
            return f"{file.relative_to(checkpoint)} is cut off or damaged"
        elif file.name.endswith(".index.json"):
            missing = _missing_shards(file)
            if missing is not None:
                return missing
    return None


def _missing_shards(index: Path) -> str | None:
    """What an index of weights names and the folder lacks."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{index.name} is cut off or damaged"
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    return f"{missing[0]} is missing" if missing else None

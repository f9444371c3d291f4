"""Which checkpoint of an interrupted run is whole."""

import logging
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint of a run, for `trainer.train(resume_from_checkpoint=last_checkpoint(folder))`.

    The Trainer writes a checkpoint file by file into its final place, its own state last. One that a killed process or
    a full disk left unfinished is passed over with a warning; `resume_from_checkpoint=True` would take it and fail.

    Returns:
        The folder of the checkpoint; None where there is no whole one.
    """
    steps = {path: path.name.rpartition("-")[2] for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    found = [path for path in steps if steps[path].isdecimal()]
    for path in sorted(found, key=lambda path: int(steps[path]), reverse=True):
        try:
            TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
            return str(path)
        except (OSError, ValueError, TypeError):
            logger.warning("%s is passed over: %s is missing or cut off.", path, TRAINER_STATE_NAME)
    return None

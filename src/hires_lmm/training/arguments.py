"""Arguments of the Trainer as recipes hold them."""

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..modeling.compat_hires_lmm import training_field


def build_arguments(folder: str | Path, **values: Any) -> TrainingArguments:
    """Build `TrainingArguments` for our collator, with `activation_checkpointing` at every minor of transformers.

    Args:
        folder (`str` or `Path`): The output folder.
        values: Fields of `TrainingArguments`; before 5.23 those of activation checkpointing had another name.

    Returns:
        The arguments.
    """
    named = {training_field(name): value for name, value in values.items()}
    return TrainingArguments(str(folder), **{"remove_unused_columns": False, **named})

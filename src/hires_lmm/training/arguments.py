"""Arguments of the Trainer as recipes hold them."""

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..modeling.compat_hires_lmm import training_field


def build_arguments(folder: str | Path, **values: Any) -> TrainingArguments:
    """`TrainingArguments` for our collator; before 5.23 activation checkpointing had another name."""
    named = {training_field(name): value for name, value in values.items()}
    return TrainingArguments(str(folder), **{"remove_unused_columns": False, **named})

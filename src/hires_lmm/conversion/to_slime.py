"""`convert to-slime`: a model of the slime_release family in the format of the released code."""

from pathlib import Path
from typing import Any

from .slime_source import SLIME
from .to_llava import convert_to_llava


def convert_to_slime(source: str | Path, destination: str | Path, **options: Any) -> dict:
    """Convert a checkpoint of ours to the released format; after `convert_slime` every tensor is as it was.

    Args:
        source (`str` or `Path`): A folder or a Hub repository.
        destination (`str` or `Path`): The folder to make; it appears only when it is whole.
        options: `progress` and `max_shard_bytes`, as in `convert`.

    Raises:
        ConversionError: If the model has parts that the released code does not have.
    """
    return convert_to_llava(SLIME, source, destination, **options)

"""Released checkpoints by the name of their format, in and out."""

from functools import partial
from pathlib import Path
from typing import Any

from .llava_formats import FORMATS
from .llava_source import convert_llava
from .mg_llava import convert_mg_llava, convert_to_mg_llava
from .to_llava import convert_to_llava


READERS: dict[str, Any] = {
    **{name: partial(convert_llava, form) for name, form in FORMATS.items()},
    "mg-llava": convert_mg_llava,
}
WRITERS: dict[str, Any] = {
    **{name: partial(convert_to_llava, form) for name, form in FORMATS.items()},
    "mg-llava": convert_to_mg_llava,
}


def convert_released(name: str, source: str | Path, destination: str | Path, **options: Any) -> dict:
    """Convert a released checkpoint.

    Args:
        name (`str`): Its format: `slime`, `mqt`, `llava-uhd`, `inf-llava`, `llava-mini` or `mg-llava`.
        source (`str` or `Path`): A folder or a Hub repository: a full checkpoint, a LoRA folder, or stage files; of
            `mg-llava` also the file itself.
        destination (`str` or `Path`): The folder to make; it appears only when it is whole.
        options: `vision_config`: the vision tower (a folder or a repository; but for `mg-llava` also a `config.json`),
            by default the one named. `base`: the language model under a LoRA, stage files or `mg-llava`. Of `mg-llava`
            also `extra_tower`, the ConvNeXt, and `chat_template`. `dtype`, `progress` and `max_shard_bytes` as in
            `convert`.

    Returns:
        The report, which is also saved as `conversion_report.json`; `unused` in it are keys that nobody reads.

    Raises:
        ValueError: If the format is unknown.
        ConversionError: If anything else is unknown, absent or does not fit; the destination is not made then.
    """
    return _found(READERS, name)(source, destination, **options)


def convert_to_released(name: str, source: str | Path, destination: str | Path, **options: Any) -> dict:
    """Convert a checkpoint of ours to a released format; after `convert_released` every tensor is as it was.

    Args:
        name, source, destination: As in `convert_released`.
        options: `progress` and `max_shard_bytes`, as in `convert`.

    Returns:
        The report, which is also saved as `conversion_report.json`.

    Raises:
        ValueError: If the format is unknown.
        ConversionError: If the model has parts that the released code does not have.
    """
    return _found(WRITERS, name)(source, destination, **options)


def _found(table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise ValueError(f"{name!r} is no released format; known ones are {', '.join(table)}.")
    return table[name]

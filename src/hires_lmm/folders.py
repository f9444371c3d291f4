"""The small files of a checkpoint folder, for whoever reads one; nothing heavy is imported here."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError


JSON_LIMIT = 100_000_000
"""Most bytes of a JSON or text file; a hundred times what configurations and indexes have."""

TEXTS = (".json", ".jinja", ".txt", ".model")
"""Endings of the files that libraries read as a whole."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder without any of them has no tokenizer."""

TOKENIZER_REMEDY = (
    "Put the tokenizer files of its language model (tokenizer.json or tokenizer.model, tokenizer_config.json) into "
    "the folder that it was converted from, and convert again."
)

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def check_texts(checkpoint: str) -> None:
    """Refuse a folder with a text file that is far too large to be what it should be.

    Args:
        checkpoint (`str`): A folder; anything else passes.

    Raises:
        ValueError: If there is one.
    """
    for pattern in ("*", "additional_chat_templates/*"):
        for path in Path(checkpoint).glob(pattern):
            if path.suffix in TEXTS and path.is_file() and path.stat().st_size > JSON_LIMIT:
                raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {JSON_LIMIT}; replace it.")


def check_tokenizer(checkpoint: str) -> None:
    """Refuse a folder without a tokenizer.

    Args:
        checkpoint (`str`): A folder; anything else passes.

    Raises:
        ValueError: If it has none.
    """
    folder = Path(checkpoint)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{checkpoint} has no tokenizer, so it cannot be asked. {TOKENIZER_REMEDY}")


def read_image_settings(checkpoint: str) -> dict[str, Any]:
    """The saved settings of the image processor of a hires_lmm checkpoint.

    Args:
        checkpoint (`str`): Folder or Hub id.

    Returns:
        What `HiResLmmImageProcessor.to_dict` gave when it was saved.

    Raises:
        ValueError: If the checkpoint is of another kind of model, or has no such file.
        OSError: If the Hub cannot be reached.
    """
    check_texts(checkpoint)
    kind = (_read_json(checkpoint, "config.json") or {}).get("model_type")
    if kind != "hires_lmm":
        raise ValueError(f"{checkpoint} holds a {kind!r} model; this command needs a 'hires_lmm' checkpoint.")
    for name in PROCESSOR_FILES:
        values = _read_json(checkpoint, name)
        if values is not None:
            return values.get("image_processor", values)
    raise ValueError(f"{checkpoint} has neither {' nor '.join(PROCESSOR_FILES)}; save its processor beside the model.")


def _read_json(checkpoint: str, name: str) -> dict[str, Any] | None:
    """A JSON object from a folder or a repository; None where it has no such file."""
    path = Path(checkpoint) / name
    if not Path(checkpoint).is_dir():
        try:
            path = Path(hf_hub_download(checkpoint, name))
        except LocalEntryNotFoundError:  # the Hub was not asked
            raise
        except EntryNotFoundError:
            return None
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} of {checkpoint} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{name} of {checkpoint} holds no JSON object.")
    return values

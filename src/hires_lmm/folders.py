"""The small files of a checkpoint folder, for whoever reads one; nothing heavy is imported here."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError


TOKENIZER_REMEDY = (
    "Put the tokenizer files of its language model (tokenizer.json or tokenizer.model, tokenizer_config.json) into "
    "the folder that it was converted from, and convert again."
)

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def check_tokenizer(checkpoint: str) -> None:
    """Refuse a folder without a tokenizer; anything but a folder passes."""
    folder = Path(checkpoint)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        raise ValueError(f"{checkpoint} has no tokenizer, so it cannot be asked. {TOKENIZER_REMEDY}")


def read_image_settings(checkpoint: str) -> dict[str, Any]:
    """The settings of the image processor in a hires_lmm checkpoint (folder or Hub id), as it saved them."""
    kind = (_read_json(checkpoint, "config.json") or {}).get("model_type")
    if kind != "hires_lmm":
        raise ValueError(f"{checkpoint} holds a {kind!r} model; this command needs a 'hires_lmm' checkpoint.")
    for name in PROCESSOR_FILES:
        values = _read_json(checkpoint, name) or {}
        settings = values.get("image_processor", values)
        if isinstance(settings, dict) and "planner" in settings:
            return settings
    raise ValueError(
        f"Neither {' nor '.join(PROCESSOR_FILES)} of {checkpoint} holds the settings of its image processor; save the "
        "processor beside the model."
    )


def check_planner(checkpoint: str, planner: Any) -> None:
    """Refuse to count with a planner that only runs as code of the checkpoint."""
    name = planner.get("name") if isinstance(planner, dict) else planner
    if isinstance(name, str) and "." in name:
        raise ValueError(
            f"{checkpoint} has a planner of its author's own, {name}, whose code does not run to count from sizes; "
            f"count in Python with AutoProcessor.from_pretrained({checkpoint!r}, trust_remote_code=True)"
            ".image_tokens(height, width)."
        )


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

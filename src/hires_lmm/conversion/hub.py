"""From a name to a folder: local, or downloaded from the Hub."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from .errors import ConversionError


REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]


def is_repository(name: str | Path | None) -> bool:
    """Whether a name means a repository on the Hub: of the form `owner/repository`, and no folder here."""
    return isinstance(name, str) and REPOSITORY.fullmatch(name) is not None and not Path(name).is_dir()


def resolve_folder(name: str | Path, what: str, with_code: bool = False) -> Path:
    """The folder of a checkpoint, downloaded if it is a repository; pickles only where there is nothing else."""
    wanted = [*SMALL_FILES, *(["*.py"] if with_code else [])]
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if not is_repository(name):
        raise ConversionError(f"{what} {str(name)!r} is neither a folder nor a Hub repository (owner/name).")
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=[*wanted, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(name), allow_patterns=[*wanted, "*.bin"]))
    except (OSError, ValueError, RuntimeError) as error:
        text = str(error).strip().partition("\n")[0]
        raise ConversionError(
            f"{what} {str(name)!r} is no local folder and cannot be had from the Hub ({text}); download it and pass "
            "the folder."
        ) from error
    return folder

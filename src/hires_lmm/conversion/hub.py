"""From a name to a folder: local, or downloaded from the Hub."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .errors import ConversionError
from .tensors import check_texts


REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]


def is_repository(name: str | Path) -> bool:
    """Whether a name looks like `owner/repository`.

    Args:
        name (`str` or `Path`): A name.
    """
    return isinstance(name, str) and REPOSITORY.fullmatch(name) is not None


def expanded(name: str | Path) -> Path:
    """A path with `~` replaced; one that names an unknown user stays as it is.

    Args:
        name (`str` or `Path`): A path.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def resolve_folder(name: str | Path, what: str, weights: bool = True) -> Path:
    """Find a checkpoint.

    Args:
        name (`str` or `Path`): A folder, or a repository on the Hub.
        what (`str`): What it is, for messages.
        weights (`bool`): Whether the weights are needed too; pickles are fetched only where there is nothing else.

    Returns:
        The folder.

    Raises:
        ConversionError: If it is neither, cannot be downloaded, or holds text files that are far too large or links
            that leave it.
    """
    path = expanded(name)
    if path.is_dir():
        check_texts(path)
        return path
    if not is_repository(name):
        raise ConversionError(f"{what} {str(name)!r} is neither a folder nor a Hub repository (owner/name).")
    try:
        patterns = [*SMALL_FILES, *(["*.safetensors"] if weights else [])]
        folder = Path(snapshot_download(str(name), allow_patterns=patterns))
        if weights and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(name), allow_patterns=[*SMALL_FILES, "*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, RuntimeError) as error:
        text = str(error).strip().partition("\n")[0]
        raise ConversionError(
            f"{what} {str(name)!r} is no local folder and cannot be had from the Hub ({text}); download it and pass "
            "the folder."
        ) from error
    check_texts(folder)
    return folder

"""Writing checkpoints: safetensors shards, tensor after tensor, into a folder that appears only when it is whole."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import ConversionError
from .tensors import DTYPES, Entries, Entry


MAX_SHARD_BYTES = 5_000_000_000
INDEX_NAME = "model.safetensors.index.json"

Progress = Callable[[int, int, str], None]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


@contextmanager
def new_folder(destination: str | Path) -> Iterator[Path]:
    """Fill a folder beside the destination and rename it at the end; on any failure it is removed.

    Args:
        destination (`str` or `Path`): The folder to make; it must not exist, or be empty.

    Yields:
        The folder to write into, named `DESTINATION.incomplete-…`.

    Raises:
        ConversionError: If the destination exists and is not empty.
    """
    target = Path(destination).expanduser()
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConversionError(f"{target} exists and is no folder; choose another destination.")
    if target.is_dir() and any(target.iterdir()):
        raise ConversionError(f"{target} is not empty; choose another destination or empty it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{target.name}.incomplete-", dir=target.parent))
    try:
        yield work
        work.chmod(0o755)
        if target.is_dir():
            target.rmdir()
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def plan_shards(entries: Entries, max_bytes: int = MAX_SHARD_BYTES) -> list[list[str]]:
    """Group tensors into files.

    Args:
        entries (`Entries`): The tensors, in order.
        max_bytes (`int`): Most bytes of tensors in one file; a larger tensor gets a file of its own.

    Returns:
        Names, file after file.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.num_bytes
    return shards


def write_tensors(
    folder: Path, entries: Entries, max_bytes: int = MAX_SHARD_BYTES, progress: Progress | None = None
) -> None:
    """Write the weights of a model: one file, or shards with an index.

    Args:
        folder (`Path`): Where to.
        entries (`Entries`): The tensors, in order; each is read, written and given up.
        max_bytes (`int`): Most bytes of tensors in one file.
        progress (`Callable`, *optional*): Called with tensors done, tensors in all and the name of the last one.

    Raises:
        ConversionError: If the disk is too small or a tensor is not what its entry says.
    """
    total = sum(entry.num_bytes for entry in entries.values())
    free = shutil.disk_usage(folder).free
    if total > free:
        raise ConversionError(f"The weights need {total / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free.")
    shards = plan_shards(entries, max_bytes)
    index, done = {}, 0
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for name in write_file(folder / file, {name: entries[name] for name in names}):
            done += 1
            if progress is not None:
                progress(done, len(entries), name)
        index.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, entries: Entries) -> Iterator[str]:
    """Write one safetensors file; the tensors are read one at a time.

    Args:
        path (`Path`): The file.
        entries (`Entries`): The tensors.

    Yields:
        The name of each tensor once it is written.

    Raises:
        ConversionError: If a tensor is not what its entry says, or the file cannot be read back.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in entries.items():
        end = offset + entry.num_bytes
        header[name] = {"dtype": _dtype_name(name, entry), "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, entry in entries.items():
            for part in _raw_parts(name, entry):
                file.write(part)
            yield name
    try:
        with safe_open(path, framework="pt") as written:
            complete = set(written.keys()) == set(entries)
    except SafetensorError as error:
        raise ConversionError(f"{path.name} was not written correctly: {error}") from error
    if not complete:
        raise ConversionError(f"{path.name} was not written correctly: tensors are missing.")


def _dtype_name(name: str, entry: Entry) -> str:
    if entry.dtype not in _NAMES:
        raise ConversionError(f"{name} has the dtype {entry.dtype}, which safetensors cannot hold here.")
    return _NAMES[entry.dtype]


def _raw_parts(name: str, entry: Entry) -> Iterator[memoryview]:
    """Read a tensor as raw bytes, piece by piece."""
    rows, size = 0, 0
    for part in entry.parts():
        rows, size = rows + (part.shape[0] if part.ndim else 0), size + part.nbytes
        if part.dtype != entry.dtype or tuple(part.shape[1:]) != entry.shape[1:]:
            break
        raw: Any = part.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield memoryview(raw)
    if size != entry.num_bytes or (entry.shape and rows != entry.shape[0]):
        raise ConversionError(f"{name} is not {tuple(entry.shape)} {entry.dtype}, as its file announced.")

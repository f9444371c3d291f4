"""Reading checkpoints one tensor at a time: nothing is held that is not being converted."""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import ConversionError, problem_table


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in safetensors headers."""

READ_ERRORS = (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError, ValueError)

JSON_LIMIT = 100_000_000
"""Most bytes of a JSON or text file; a hundred times what configurations and indexes have."""

TEXTS = (".json", ".jinja", ".txt", ".model")
"""Endings of the files that libraries read as a whole."""

SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")


@dataclass(frozen=True)
class Entry:
    """One tensor that can be read when it is needed.

    Args:
        shape (`tuple[int]`): Its shape.
        dtype (`torch.dtype`): Its dtype.
        read (`Callable`): Returns the tensor.
        origin (`str`): Name of the file it comes from, for reports.
        note (`str`): What was done to it, for reports.
        tail (`Callable`, *optional*): Gives, for the tensor read, further rows that follow it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    origin: str
    note: str = ""
    tail: Callable[[torch.Tensor], torch.Tensor] | None = None

    def parts(self) -> Iterator[torch.Tensor]:
        """The rows of the tensor in pieces that need not be joined in memory."""
        tensor = self.read()
        yield tensor
        if self.tail is not None:
            yield self.tail(tensor)

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return self.meta().numel() * self.dtype.itemsize

    def meta(self) -> torch.Tensor:
        """A tensor of this shape and dtype without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


Entries = dict[str, Entry]


def entry_of(tensor: torch.Tensor, origin: str, note: str = "") -> Entry:
    """Wrap a tensor that exists already.

    Args:
        tensor (`torch.Tensor`): The tensor.
        origin (`str`): Where it comes from.
        note (`str`): What was done to it.
    """
    return Entry(tuple(tensor.shape), tensor.dtype, lambda: tensor, origin, note)


def safe_path(folder: Path, name: str) -> Path:
    """The path of a file in a folder that somebody else filled.

    Args:
        folder (`Path`): The folder.
        name (`str`): File name, as an index or this package names it.

    Returns:
        The path.

    Raises:
        ConversionError: If the name or a link behind it leaves the folder, or there is no such file.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
        raise ConversionError(f"The index names {name!r}, which leaves the folder of the checkpoint; this is refused.")
    path = folder / name
    try:
        inside = any(path.resolve().is_relative_to(root) for root in _roots(folder))
        present = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # zero bytes, names too long, links that form a circle
        raise ConversionError(f"{name[:200]!r} names no file that can be opened ({error}); correct it.") from error
    if not inside:
        raise ConversionError(f"{name!r} is a link that leaves the folder of the checkpoint; this is refused.")
    if not present:
        raise ConversionError(f"{folder.name} has no such file as {name!r}; download it again.")
    return path


def _roots(folder: Path) -> list[Path]:
    """Where the files of a folder may really lie: in it, or among the blobs of the Hub's cache."""
    roots = [folder.resolve()]
    for above in list(folder.parents)[:3]:
        if above.name == "snapshots":  # the cache keeps files as links into a folder of its own
            roots.append((above.parent / "blobs").resolve())
    return roots


def check_texts(folder: Path) -> None:
    """Look at the text files of a folder before libraries read them: size, and links that leave it.

    Args:
        folder (`Path`): The folder.

    Raises:
        ConversionError: If one is far too large or lies elsewhere.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in TEXTS and path.is_file():
            _check_text(path)


def _check_text(path: Path) -> None:
    size = safe_path(path.parent, path.name).stat().st_size
    if size > JSON_LIMIT:
        raise ConversionError(f"{path.name} has {size} bytes, more than {JSON_LIMIT}; it is not what it should be.")


def read_text(path: Path) -> str:
    """Read a small text file of a checkpoint.

    Args:
        path (`Path`): The file; a link may not leave its folder.

    Raises:
        ConversionError: If there is no such file, it is far too large, or it holds no text.
    """
    try:
        _check_text(path)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path.name} cannot be read as text: {error}") from error


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Args:
        path (`Path`): The file; a link may not leave its folder.

    Raises:
        ConversionError: If there is no such file or it holds no JSON object.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path.name} cannot be read as JSON: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path.name} holds no JSON object.")
    return value


def read_object(values: dict, name: str, where: str) -> dict:
    """An object inside a JSON object; an absent one is empty.

    Args:
        values (`dict`): The outer object.
        name (`str`): Its key.
        where (`str`): Name of the file, for messages.

    Raises:
        ConversionError: If it is no object.
    """
    value = values.get(name)
    if value is not None and not isinstance(value, dict):
        raise ConversionError(f"{name}={shown(value)} of {where} must be an object; correct the file.")
    return value or {}


def read_integer(values: dict, name: str, where: str, least: int = 1, most: int = 1 << 31) -> int | None:
    """An integer of a JSON object; None where it is absent.

    Args:
        values (`dict`): The object.
        name (`str`): Its key.
        where (`str`): Name of the file, for messages.
        least, most (`int`): Smallest and largest value.

    Raises:
        ConversionError: If it is no integer in that range.
    """
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConversionError(
            f"{name}={shown(value)} of {where} must be an integer from {least} to {most}; correct the file."
        )
    return value


def shown(value: Any) -> str:
    """A value of a foreign file for a message, cut where it is long.

    Args:
        value: The value.
    """
    try:
        text = repr(value)
    except RecursionError:
        text = f"<{type(value).__name__}, deeply nested>"
    return text if len(text) <= 200 else text[:197] + "..."


def release() -> None:
    """Give up the old `.bin` file that is still held, if there is one."""
    _hold_pickle.cache_clear()


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin` file: mapped anew each time, so that no page of it stays in memory, or, where the format
    is too old for that, held until another file is read."""
    if _is_zip(path):
        return _load_pickle(path, mmap=True)
    stat = path.stat()
    return _hold_pickle(path, (stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=1)
def _hold_pickle(path: Path, stamp: tuple[int, int]) -> dict[str, torch.Tensor]:
    return _load_pickle(path, mmap=False)


def _load_pickle(path: Path, mmap: bool) -> dict[str, torch.Tensor]:
    """Read a pickle of tensors; anything else in it is refused."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path.name} holds more than tensors (a pickle can carry code) or is damaged; it is not opened any "
            "further. Get the checkpoint as safetensors, or from a source you trust."
        ) from error
    except Exception as error:  # torch's reader of pickles lets any type pass
        raise ConversionError(f"{path.name} is damaged or cut off: {_first_line(error)}") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ConversionError(f"{path.name} holds no table of tensors.")
    return loaded


def _refuse_compressed(path: Path) -> None:
    """The files of torch are not compressed; a small file that unpacks to a large one is a trap."""
    if not _is_zip(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
            size = sum(info.file_size for info in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ConversionError(f"{path.name} is damaged or cut off: {_first_line(error)}") from error
    if packed or size > path.stat().st_size:
        raise ConversionError(
            f"{path.name} is compressed inside ({len(packed)} parts, {size} bytes unpacked), which no file of torch "
            "is; it is not opened any further."
        )


def _check_tensor(path: Path, key: Any, tensor: torch.Tensor) -> None:
    """A tensor of a pickle must be plain numbers that the file really holds."""
    if not isinstance(key, str):
        raise ConversionError(f"{path.name} names a tensor {shown(key)}; names must be text.")
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.dtype not in DTYPES.values():
        raise ConversionError(
            f"{key} in {path.name} is a tensor of {tensor.dtype}, {tensor.layout} on {tensor.device}, which is not "
            "supported."
        )
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise ConversionError(
            f"{key} in {path.name} claims {tensor.numel() * tensor.itemsize} bytes of {tuple(tensor.shape)}, but the "
            f"file holds {tensor.untyped_storage().nbytes()} for it; it is damaged or a trap."
        )


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _pickle_entries(path: Path) -> Entries:
    def entry(key: str, tensor: torch.Tensor) -> Entry:
        return Entry(tuple(tensor.shape), tensor.dtype, lambda: _read_pickle(path)[key], path.name)

    _refuse_compressed(path)
    tensors = _read_pickle(path)
    for key, tensor in tensors.items():
        _check_tensor(path, key, tensor)
    return {key: entry(key, tensor) for key, tensor in tensors.items()}


def _safetensors_entries(path: Path) -> Entries:
    def entry(key: str, shape: Iterable[int], dtype: str) -> Entry:
        if dtype not in DTYPES:
            raise ConversionError(f"{key} in {path.name} has the dtype {dtype}, which is not supported.")
        return Entry(tuple(shape), DTYPES[dtype], lambda: _read_safetensor(path, key), path.name)

    try:
        with safe_open(path, framework="pt") as file:
            slices: dict[str, Any] = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: entry(key, part.get_shape(), part.get_dtype()) for key, part in slices.items()}
    except ConversionError:
        raise
    except READ_ERRORS as error:
        raise ConversionError(f"{path.name} is damaged or cut off: {_first_line(error)}") from error


def _read_safetensor(path: Path, key: str) -> torch.Tensor:
    """Read one tensor; the file is opened anew, so that no other page of it stays in memory."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)
    except READ_ERRORS as error:
        raise ConversionError(f"{key} cannot be read from {path.name}: {_first_line(error)}") from error


def file_entries(path: Path) -> Entries:
    """The tensors of one file.

    Args:
        path (`Path`): A `.safetensors` file, or a `.bin` file, which is read without running code.

    Raises:
        ConversionError: If the file is damaged or holds anything but tensors.
    """
    return _safetensors_entries(path) if path.suffix == ".safetensors" else _pickle_entries(path)


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Find the weights of a model in a folder; safetensors go before pickles.

    Args:
        folder (`Path`): The checkpoint.

    Returns:
        The files, in order, and the index (tensor -> file name) if there is one; no files if there are no weights.

    Raises:
        ConversionError: If a shard is absent or the index is wrong.
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            table = read_json(index).get("weight_map")
            if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
                raise ConversionError(f"{index.name} has no weight_map from tensors to files.")
            return [safe_path(folder, name) for name in sorted(set(table.values()))], table
        single = folder / f"{stem}{suffix}"
        if single.is_file():
            return [safe_path(folder, single.name)], None
        shards = sorted(path.name for path in folder.glob(f"{stem}-*-of-*{suffix}"))
        if shards:
            _check_shards(shards)
            return [safe_path(folder, name) for name in shards], None
    return [], None


def _check_shards(names: list[str]) -> None:
    found = [match.groups() for name in names if (match := SHARD.search(name))]
    totals = {int(total) for _, total in found}
    if len(found) != len(names) or len(totals) != 1 or {int(n) for n, _ in found} != set(range(1, max(totals) + 1)):
        raise ConversionError(f"The shards {', '.join(names)} are not one complete set; download the missing ones.")


def folder_entries(folder: Path) -> Entries:
    """All tensors of a checkpoint folder.

    Args:
        folder (`Path`): The folder.

    Returns:
        Name -> entry, in the order of the files.

    Raises:
        ConversionError: If there are no weights, a file is damaged, or index and files contradict each other.
    """
    files, index = weight_files(folder)
    if not files:
        raise ConversionError(f"{folder.name} has no model*.safetensors and no pytorch_model*.bin.")
    entries: Entries = {}
    problems = []
    for path in files:
        found = file_entries(path)
        problems += [("twice", key, f"in {entries[key].origin} and {path.name}") for key in found if key in entries]
        entries.update(found)
    if index is not None:
        for key, name in index.items():
            if key not in entries:
                problems.append(("missing", key, f"the index has it in {name}"))
            elif entries[key].origin != Path(name).name:
                problems.append(("misplaced", key, f"in {entries[key].origin}; the index has it in {name}"))
        problems += [("not listed", key, f"in {entry.origin}") for key, entry in entries.items() if key not in index]
    if problems:
        raise ConversionError(problem_table("The index and the files of the checkpoint disagree:", problems))
    return entries

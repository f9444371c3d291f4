"""Reading checkpoints one tensor at a time: nothing is held that is not being converted."""

import json
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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

SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")


@dataclass(frozen=True)
class Entry:
    """One tensor that can be read when it is needed; file it comes from and what was done to it are for reports."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]
    origin: str = ""
    note: str = ""

    def meta(self) -> torch.Tensor:
        """A tensor of this shape and dtype without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return self.meta().nbytes


Entries = dict[str, Entry]


def entry_of(tensor: torch.Tensor, origin: str = "", note: str = "") -> Entry:
    """Wrap a tensor that exists already."""
    return Entry(tuple(tensor.shape), tensor.dtype, lambda: tensor, origin, note)


def read_text(path: Path) -> str:
    """A small text file of a checkpoint."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConversionError(f"{path.parent.name} has no such file as {path.name!r}; download it again.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path.name} cannot be read as text: {error}") from error


def read_json(path: Path) -> dict:
    """A JSON object."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ConversionError(f"{path.name} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path.name} holds no JSON object.")
    return value


def read_if_present(path: Path) -> dict:
    """A JSON object; empty where there is no such file."""
    return read_json(path) if path.is_file() else {}


def file_entries(path: Path) -> Entries:
    """The tensors of a `.safetensors` file, or of a `.bin` file, which is read without running code."""
    return _safetensors_entries(path) if path.suffix == ".safetensors" else _pickle_entries(path)


def folder_entries(folder: Path) -> Entries:
    """All tensors of a checkpoint folder, in the order of the files, which must agree with the index."""
    files, index = weight_files(folder)
    if not files:
        raise ConversionError(f"{folder.name} has no model*.safetensors and no pytorch_model*.bin.")
    entries: Entries = {}
    problems = []
    for path in files:
        found = file_entries(path)
        problems += [("twice", key, f"in {entries[key].origin} and {path.name}") for key in found if key in entries]
        entries.update(found)
    for key, name in index.items():
        if key not in entries:
            problems.append(("missing", key, f"the index has it in {name}"))
        elif entries[key].origin != name:
            problems.append(("misplaced", key, f"in {entries[key].origin}; the index has it in {name}"))
    if index:
        problems += [("not listed", key, f"in {entry.origin}") for key, entry in entries.items() if key not in index]
    if problems:
        raise ConversionError(problem_table("The index and the files of the checkpoint disagree:", problems))
    return entries


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weights of a model in a folder, safetensors before pickles, and its index (tensor -> file name)."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        path = folder / f"{stem}{suffix}.index.json"
        index = read_if_present(path).get("weight_map") or {}
        if index:
            names = sorted(set(index.values()))
        elif path.is_file():
            raise ConversionError(f"{path.name} has no weight_map from tensors to files.")
        elif (folder / f"{stem}{suffix}").is_file():
            names = [f"{stem}{suffix}"]
        else:
            names = sorted(file.name for file in folder.glob(f"{stem}-*-of-*{suffix}"))
            _check_shards(names)
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ConversionError(f"{folder.name} has no such file as {absent[0]!r}; download it again.")
        if names:
            return [folder / name for name in names], index
    return [], {}


def _check_shards(names: list[str]) -> None:
    found = [match.groups() for name in names if (match := SHARD.search(name))]
    wanted = [(f"{number:05d}", total) for _, total in found[:1] for number in range(1, int(total) + 1)]
    if found != wanted or len(found) != len(names):
        raise ConversionError(f"The shards {', '.join(names)} are not one complete set; download the missing ones.")


def _safetensors_entries(path: Path) -> Entries:
    """Each tensor opens the file anew, so that no other page of it stays in memory."""

    def read(key: str) -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(key)

    def entry(key: str, shape: list[int], dtype: str) -> Entry:
        if dtype not in DTYPES:
            raise ConversionError(f"{key} in {path.name} has the dtype {dtype}, which is not supported.")
        return Entry(tuple(shape), DTYPES[dtype], lambda: read(key), path.name)

    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: entry(key, part.get_shape(), part.get_dtype()) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path.name} is damaged or cut off: {error}") from error


def _pickle_entries(path: Path) -> Entries:
    """Each tensor maps the file anew, so that no other page of it stays in memory; formats too old for that stay."""
    is_mapped = zipfile.is_zipfile(path)

    def entry(key: str, tensor: torch.Tensor) -> Entry:
        read = (lambda: _load_pickle(path)[key]) if is_mapped else (lambda: tensor)
        return Entry(tuple(tensor.shape), tensor.dtype, read, path.name)

    return {key: entry(key, tensor) for key, tensor in _load_pickle(path).items()}


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path.name} holds more than tensors (a pickle can carry code) or is damaged; it is not opened any "
            "further. Get the checkpoint as safetensors, or from a source you trust."
        ) from error
    except Exception as error:  # torch's reader of pickles lets any type pass
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConversionError(f"{path.name} is damaged or cut off: {reason}") from error
    if path.suffix == ".pth" and isinstance(loaded, dict):  # as trainers of OpenMMLab save
        loaded = loaded.get("state_dict", loaded)
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ConversionError(f"{path.name} holds no table of tensors.")
    return loaded

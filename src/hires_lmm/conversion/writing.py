"""Writing checkpoints: safetensors shards, one after another, into a folder that appears only when it is whole."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from .errors import ConversionError
from .tensors import Entries


MAX_SHARD_BYTES = 2_000_000_000
"""A shard is held in memory while it is written."""

Progress = Callable[[int, int, str], None]


@contextmanager
def new_folder(destination: str | Path) -> Iterator[Path]:
    """Fill a folder named `DESTINATION.incomplete-…` and rename it at the end; on any failure it is removed."""
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


def write_tensors(
    folder: Path,
    entries: Entries,
    max_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    stem: str = "model",
) -> None:
    """Write tensors in their order, as one file or shards with an index; those of a shard are read, written, given up.

    `progress` is called with tensors done, tensors in all and the name of the last one.
    """
    needed, free = sum(entry.num_bytes for entry in entries.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise ConversionError(f"The weights need {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free.")
    split = split_torch_state_dict_into_shards(
        {name: entry.meta() for name, entry in entries.items()},
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=max_bytes,
    )
    done = 0
    for file, names in split.filename_to_tensors.items():
        shard: dict[str, torch.Tensor] = {}
        for name in names:
            shard[name] = _alone(entries[name].read(), shard)
            done += 1
            if progress is not None:
                progress(done, len(entries), name)
        save_file(shard, folder / file, metadata={"format": "pt"})
        del shard
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _alone(tensor: torch.Tensor, others: dict[str, torch.Tensor]) -> torch.Tensor:
    """A tensor that shares no memory with others of its shard, as safetensors wants it."""
    tensor = tensor.contiguous()
    start = tensor.untyped_storage().data_ptr()
    shared = any(start == other.untyped_storage().data_ptr() for other in others.values())
    return tensor.clone() if shared else tensor

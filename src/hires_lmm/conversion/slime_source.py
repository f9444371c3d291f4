"""The three forms of a released SliME checkpoint as one table of tensors."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ..modeling.attention_hires_lmm import sincos_positions
from .errors import ConversionError
from .hub import is_repository, resolve_folder
from .lora import ADAPTER_CONFIG, adapter_entries, merge_adapter, plain_key, read_adapter_config
from .tensors import Entries, entry_of, file_entries, folder_entries, weight_files


TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
PROJECTOR_FILE, SAMPLER_FILE, TRAINED_FILE = "mm_projector.bin", "sampler.bin", "non_lora_trainables.bin"


@dataclass
class Released:
    """A released checkpoint.

    Args:
        form (`str`): `"full"`, `"lora"` or `"stage files"`.
        entries (`Entries`): All tensors, named as in a full checkpoint.
        base (`Path`, *optional*): Folder of the language model it builds on.
        base_name (`str`, *optional*): Its repository, where it came from the Hub.
    """

    form: str
    entries: Entries
    base: Path | None = None
    base_name: str | None = None


def read_released(folder: Path, config: dict, base: str | Path | None) -> Released:
    """Read a released checkpoint of any form.

    Args:
        folder (`Path`): The checkpoint.
        config (`dict`): Its `config.json`.
        base (`str` or `Path`, *optional*): The language model under a LoRA or under stage files; by default the one
            the checkpoint names.

    Raises:
        ConversionError: If files are absent, damaged or contradict each other.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return _read_lora(folder, config, base)
    if weight_files(folder)[0]:
        if base is not None:
            raise ConversionError(
                f"{folder.name} is a full checkpoint; a base is only for LoRA folders and stage files."
            )
        return Released("full", folder_entries(folder))
    if (folder / PROJECTOR_FILE).is_file() or (folder / SAMPLER_FILE).is_file():
        return _read_stage(folder, config, base)
    raise ConversionError(
        f"{folder.name} is no released SliME checkpoint: it has neither model weights, nor {ADAPTER_CONFIG}, nor "
        f"{PROJECTOR_FILE}."
    )


def _base(choice: str | Path | None, *named: str | None) -> tuple[Path, str | None]:
    name = next((str(name) for name in (choice, *named) if name), None)
    if name is None:
        raise ConversionError("The checkpoint needs the language model it was trained on; pass base.")
    folder = resolve_folder(name, "The base model")
    return folder, name if is_repository(name) and not Path(name).is_dir() else None


def _read_lora(folder: Path, config: dict, base: str | Path | None) -> Released:
    settings = read_adapter_config(folder)
    base_folder, base_name = _base(base, settings.get("base_model_name_or_path"), config.get("_name_or_path"))
    entries = folder_entries(base_folder)
    if (folder / TRAINED_FILE).is_file():
        entries.update(plain_entries(folder / TRAINED_FILE))
    elif not any("mm_projector" in key for key in entries):
        raise ConversionError(f"{folder.name} has no {TRAINED_FILE}, which holds the adapter of a LoRA checkpoint.")
    merged = merge_adapter(entries, adapter_entries(folder), settings)
    return Released("lora", with_positions(merged), base_folder, base_name)


def plain_entries(path: Path) -> Entries:
    """The tensors of a file of the released trainer, without the prefix of peft.

    Args:
        path (`Path`): The file.
    """
    return {plain_key(key): entry for key, entry in file_entries(path).items()}


def _read_stage(folder: Path, config: dict, base: str | Path | None) -> Released:
    entries: Entries = {}
    for name in (PROJECTOR_FILE, SAMPLER_FILE):
        if (folder / name).is_file():
            entries.update(plain_entries(folder / name))
        if name == PROJECTOR_FILE and any(".sampler." in f".{key}" for key in entries):
            raise ConversionError(
                f"{PROJECTOR_FILE} of {folder.name} holds tensors of the sampler. In the middle of a run "
                "(checkpoint-N) the released trainer overwrites the adapter's weights with the sampler's before it "
                "saves them, so the adapter is lost. Use the files written at the end of the run."
            )
    base_folder, base_name = _base(base, config.get("_name_or_path"))
    return Released("stage files", with_positions({**folder_entries(base_folder), **entries}), base_folder, base_name)


def with_positions(entries: Entries) -> Entries:
    """Add the position tables that the released trainer leaves out of partial files, because they are not trained.

    Args:
        entries (`Entries`): The released tensors.

    Returns:
        The entries with every query former's table.
    """
    added: Entries = {}
    for key, entry in entries.items():
        if key.endswith(("mm_projector.attn.query", "sampler.post_qformer.query")):
            name = key.removesuffix("query") + "pos_embed"
            if len(entry.shape) != 2 or entry.shape[1] % 4:
                raise ConversionError(f"{key} has the shape {entry.shape}; (queries, width) is expected, width by 4.")
            side = math.isqrt(entry.shape[0])
            if name not in entries and side * side == entry.shape[0]:
                table = sincos_positions(entry.shape[1], side).to(torch.float16)
                added[name] = entry_of(table, "", "computed, as the partial file does not hold it")
    return {**entries, **added}

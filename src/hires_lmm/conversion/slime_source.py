"""`convert slime`: a released SliME checkpoint, in any of its three forms, becomes one of ours."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..modeling.attention_hires_lmm import sincos_positions
from .configs import text_config_of
from .errors import ConversionError
from .hub import is_repository, resolve_folder
from .lora import ADAPTER_CONFIG, adapter_entries, merge_adapter, plain_key, read_adapter_config
from .pipeline import Source, convert
from .prompts import image_stats_of, load_tokenizer, released_template
from .slime import key_table
from .slime_options import connector_settings, option_notes
from .tensors import Entries, entry_of, file_entries, folder_entries, read_json, weight_files
from .towers import find_tower, tower_entries


RELEASED_TYPES = ("llava_llama", "llava")
TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
PROJECTOR_FILE, SAMPLER_FILE, TRAINED_FILE = "mm_projector.bin", "sampler.bin", "non_lora_trainables.bin"


@dataclass
class Released:
    """The tensors of a released checkpoint, named as in a full one, and the language model it builds on."""

    form: str
    entries: Entries
    base: Path | None = None
    base_name: str | None = None


def convert_slime(
    source: str | Path,
    destination: str | Path,
    vision_config: str | Path | None = None,
    base: str | Path | None = None,
    **options: Any,
) -> dict:
    """Convert a released SliME checkpoint.

    Args:
        source (`str` or `Path`): A folder or a Hub repository: a full checkpoint, a LoRA folder, or stage files.
        destination (`str` or `Path`): The folder to make; it appears only when it is whole.
        vision_config (`str` or `Path`, *optional*): The vision tower: a `config.json`, a folder or a repository; the
            latter two also give the weights where the checkpoint has none. By default the tower it names.
        base (`str` or `Path`, *optional*): The language model under a LoRA or stage files; by default the one named.
        options: `dtype`, `progress` and `max_shard_bytes`, as in `convert`, which also says what comes back.

    Raises:
        ConversionError: If anything is unknown, absent or does not fit; the destination is not made then.
    """
    return convert(partial(read_slime, source, vision_config, base), destination, **options)


def read_slime(source: str | Path, vision_config: str | Path | None, base: str | Path | None) -> Source:
    """Read a released checkpoint."""
    folder = resolve_folder(source, "The source")
    config = read_json(folder / "config.json")
    if config.get("model_type") not in RELEASED_TYPES or "mm_projector_type" not in config:
        raise ConversionError(
            f"config.json describes a model of type {config.get('model_type')!r} without mm_projector_type or of "
            f"another family; released SliME checkpoints are {' or '.join(RELEASED_TYPES)}."
        )
    settings = connector_settings(config)
    released = read_released(folder, config, base)
    tower, tower_folder, entries = add_tower(released.entries, config, vision_config, folder)
    tokenizer = load_tokenizer(folder) or (load_tokenizer(released.base) if released.base else None)
    base_name = released.base_name or (released.base.name if released.base else None)
    bases = {"language model": released.base_name, "vision tower": config.get("mm_vision_tower")}
    return Source(
        format="slime",
        name=folder.name,
        summary="A SliME model in the format of hires_lmm, converted from a checkpoint in the released format.",
        entries=entries,
        rules=key_table(config["mm_projector_type"], config.get("mm_resampler_type")),
        vision_config=tower,
        text_config=text_config_of(config, "llama"),
        settings=settings,
        dtype=config.get("torch_dtype"),
        tokenizer=tokenizer,
        chat_template=released_template(tokenizer) if tokenizer is not None else None,
        image_stats=image_stats_of(tower_folder),
        generation=folder if (folder / "generation_config.json").is_file() else released.base,
        keeps_unused=True,
        bases=[{"part": part, "name": name} for part, name in bases.items() if is_repository(name)],
        report={
            "form": released.form,
            "base": base_name,
            "options": option_notes(config),
            "source_config": config,
        },
    )


def add_tower(
    entries: Entries, config: dict, choice: str | Path | None, folder: Path
) -> tuple[Any, Path | None, Entries]:
    """The tower's configuration, its folder, and all tensors with those of the tower."""
    name = config.get("mm_vision_tower")
    vision_config, tower = find_tower(choice, name, folder)
    if vision_config.model_type != "clip_vision_model":
        raise ConversionError(f"Released SliME models have CLIP towers, not {vision_config.model_type!r}.")
    if config.get("mm_hidden_size") not in (None, vision_config.hidden_size):
        raise ConversionError(
            f"mm_hidden_size={config['mm_hidden_size']} of the released configuration is not the width "
            f"{vision_config.hidden_size} of the vision tower; pass the right one as vision_config."
        )
    if any(key.startswith(TOWER_PREFIX) for key in entries):
        return vision_config, tower, entries
    if tower is None:
        if name is None:
            raise ConversionError("The checkpoint holds no vision tower and names none; pass its folder.")
        tower = resolve_folder(name, "The vision tower")
    found = {TOWER_PREFIX + key: entry for key, entry in tower_entries(tower).items()}
    return vision_config, tower, {**entries, **found}


def read_released(folder: Path, config: dict, base: str | Path | None) -> Released:
    """The tensors of a released checkpoint of any form; `base` is the language model under a LoRA or stage files."""
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


def _read_lora(folder: Path, config: dict, base: str | Path | None) -> Released:
    settings = read_adapter_config(folder)
    base_folder, base_name = _base(base, settings.get("base_model_name_or_path"), config.get("_name_or_path"))
    entries = folder_entries(base_folder)
    if (folder / TRAINED_FILE).is_file():
        entries.update(_plain_entries(folder / TRAINED_FILE))
    elif not any("mm_projector" in key for key in entries):
        raise ConversionError(f"{folder.name} has no {TRAINED_FILE}, which holds the adapter of a LoRA checkpoint.")
    merged = merge_adapter(entries, adapter_entries(folder), settings)
    return Released("lora", with_positions(merged), base_folder, base_name)


def _read_stage(folder: Path, config: dict, base: str | Path | None) -> Released:
    projector, sampler = (
        _plain_entries(folder / name) if (folder / name).is_file() else {} for name in (PROJECTOR_FILE, SAMPLER_FILE)
    )
    if any(".sampler." in f".{key}" for key in projector):
        raise ConversionError(
            f"{PROJECTOR_FILE} of {folder.name} holds tensors of the sampler. In the middle of a run (checkpoint-N) "
            "the released trainer overwrites the adapter's weights with the sampler's before it saves them, so the "
            "adapter is lost. Use the files written at the end of the run."
        )
    base_folder, base_name = _base(base, config.get("_name_or_path"))
    entries = {**folder_entries(base_folder), **projector, **sampler}
    return Released("stage files", with_positions(entries), base_folder, base_name)


def _base(choice: str | Path | None, *named: str | None) -> tuple[Path, str | None]:
    """Folder of the language model, and its repository where it comes from the Hub."""
    name = next((str(name) for name in (choice, *named) if name), None)
    if name is None:
        raise ConversionError("The checkpoint needs the language model it was trained on; pass base.")
    return resolve_folder(name, "The base model"), name if is_repository(name) else None


def _plain_entries(path: Path) -> Entries:
    """The tensors of a file of the released trainer, without the prefix of peft."""
    return {plain_key(key): entry for key, entry in file_entries(path).items()}


def with_positions(entries: Entries) -> Entries:
    """Add every query former's position table, which the released trainer leaves out of partial files."""
    added: Entries = {}
    for key, entry in entries.items():
        if key.endswith(("mm_projector.attn.query", "sampler.post_qformer.query")):
            name = key.removesuffix("query") + "pos_embed"
            side = math.isqrt(entry.shape[0])
            if name not in entries and side * side == entry.shape[0]:
                table = sincos_positions(entry.shape[1], side).to(torch.float16)
                added[name] = entry_of(table, note="computed, as the partial file does not hold it")
    return {**entries, **added}

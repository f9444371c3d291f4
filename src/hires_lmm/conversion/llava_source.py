"""`convert FORMAT`: a released checkpoint built on the LLaVA code, in any of its three forms, becomes one of ours."""

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
from .llava_format import LlavaFormat
from .llava_keys import TOWER_PREFIX
from .lora import ADAPTER_CONFIG, adapter_entries, merge_adapter, plain_key, read_adapter_config
from .pipeline import Source, convert
from .prompts import image_stats_of, load_tokenizer
from .tensors import Entries, entry_of, file_entries, folder_entries, read_json, weight_files
from .towers import find_tower, tower_entries


TRAINED_FILE = "non_lora_trainables.bin"


@dataclass
class Released:
    """The tensors of a released checkpoint, named as in a full one, and the language model it builds on."""

    form: str
    entries: Entries
    base: Path | None = None
    base_name: str | None = None


def convert_llava(
    form: LlavaFormat,
    source: str | Path,
    destination: str | Path,
    vision_config: str | Path | None = None,
    base: str | Path | None = None,
    **options: Any,
) -> dict:
    """Convert a released checkpoint of a format; arguments as in `convert_released`."""
    return convert(partial(read_llava, form, source, vision_config, base), destination, **options)


def read_llava(
    form: LlavaFormat, source: str | Path, vision_config: str | Path | None, base: str | Path | None
) -> Source:
    """Read a released checkpoint."""
    folder = resolve_folder(source, "The source")
    config = read_json(folder / "config.json")
    if config.get("model_type") not in form.model_types or form.marker not in config:
        lack = "" if form.marker in config else f" without {form.marker}"
        raise ConversionError(
            f"config.json describes a model of type {config.get('model_type')!r}{lack}; released {form.title} "
            f"checkpoints are of type {' or '.join(form.model_types)} and have {form.marker}. Name the format that it "
            "has."
        )
    options, text_config = form.options.read(config), text_config_of(config, "llama")
    settings = form.settings(options, text_config)
    released = read_released(form, folder, config, base)
    tower, tower_folder, entries = add_tower(released.entries, config, vision_config, folder)
    tokenizer = load_tokenizer(folder) or (load_tokenizer(released.base) if released.base else None)
    base_name = released.base_name or (released.base.name if released.base else None)
    bases = {"language model": released.base_name, "vision tower": config.get("mm_vision_tower")}
    return Source(
        format=form.name,
        name=folder.name,
        summary=f"A {form.title} model in the format of hires_lmm, converted from the released format.",
        entries=entries,
        rules=form.rules(options),
        vision_config=tower,
        text_config=text_config,
        settings=settings,
        preset=form.preset,
        dtype=config.get("torch_dtype"),
        tokenizer=tokenizer,
        chat_template=form.template(tokenizer) if tokenizer is not None else None,
        image_stats=image_stats_of(tower_folder),
        generation=folder if (folder / "generation_config.json").is_file() else released.base,
        keeps_unused=True,
        bases=[{"part": part, "name": name} for part, name in bases.items() if is_repository(name)],
        report={
            "form": released.form,
            "keys_from": form.origin,
            "base": base_name,
            "options": form.options.notes(config),
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
        raise ConversionError(f"Models of the LLaVA code have CLIP towers here, not {vision_config.model_type!r}.")
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


def read_released(form: LlavaFormat, folder: Path, config: dict, base: str | Path | None) -> Released:
    """The tensors of a released checkpoint of any form; `base` is the language model under a LoRA or stage files."""
    if (folder / ADAPTER_CONFIG).is_file():
        return _read_lora(form, folder, config, base)
    if weight_files(folder)[0]:
        if base is not None:
            raise ConversionError(
                f"{folder.name} is a full checkpoint; a base is only for LoRA folders and stage files."
            )
        return Released("full", folder_entries(folder))
    if any((folder / name).is_file() for name in form.stage_files):
        return _read_stage(form, folder, config, base)
    raise ConversionError(
        f"{folder.name} is no released {form.title} checkpoint: it has neither model weights, nor {ADAPTER_CONFIG}, "
        f"nor {form.stage_files[0]}."
    )


def _read_lora(form: LlavaFormat, folder: Path, config: dict, base: str | Path | None) -> Released:
    settings = read_adapter_config(folder)
    base_folder, base_name = _base(base, settings.get("base_model_name_or_path"), config.get("_name_or_path"))
    entries = folder_entries(base_folder)
    if (folder / TRAINED_FILE).is_file():
        entries.update(_plain_entries(folder / TRAINED_FILE))
    elif not any("mm_projector" in key for key in entries):
        raise ConversionError(f"{folder.name} has no {TRAINED_FILE}, which holds the adapter of a LoRA checkpoint.")
    merged = merge_adapter(entries, adapter_entries(folder), settings)
    return Released("lora", with_positions(form, merged), base_folder, base_name)


def _read_stage(form: LlavaFormat, folder: Path, config: dict, base: str | Path | None) -> Released:
    found = [_plain_entries(folder / name) if (folder / name).is_file() else {} for name in form.stage_files]
    if len(found) > 1 and any(".sampler." in f".{key}" for key in found[0]):
        raise ConversionError(
            f"{form.stage_files[0]} of {folder.name} holds tensors of the sampler. In the middle of a run "
            "(checkpoint-N) the released trainer overwrites the adapter's weights with the sampler's before it saves "
            "them, so the adapter is lost. Use the files written at the end of the run."
        )
    base_folder, base_name = _base(base, config.get("_name_or_path"))
    entries = folder_entries(base_folder)
    for each in found:
        entries.update(each)
    return Released("stage files", with_positions(form, entries), base_folder, base_name)


def _base(choice: str | Path | None, *named: str | None) -> tuple[Path, str | None]:
    """Folder of the language model, and its repository where it comes from the Hub."""
    name = next((str(name) for name in (choice, *named) if name), None)
    if name is None:
        raise ConversionError("The checkpoint needs the language model it was trained on; pass base.")
    return resolve_folder(name, "The base model"), name if is_repository(name) else None


def _plain_entries(path: Path) -> Entries:
    """The tensors of a file of the released trainer, without the prefix of peft."""
    return {plain_key(key): entry for key, entry in file_entries(path).items()}


def with_positions(form: LlavaFormat, entries: Entries) -> Entries:
    """Add each table of positions that partial files of the released trainer leave out."""
    added: Entries = {}
    for key, entry in entries.items():
        for end, rounded in form.positions.items():
            name, side = key.removesuffix("query") + "pos_embed", math.isqrt(entry.shape[0] if entry.shape else 0)
            if key.endswith(end) and name not in entries and side * side == entry.shape[0]:
                table = sincos_positions(entry.shape[1], side, rounded=rounded).to(
                    torch.float16 if rounded else entry.dtype
                )
                added[name] = entry_of(table, note="computed, as the partial file does not hold it")
    return {**entries, **added}

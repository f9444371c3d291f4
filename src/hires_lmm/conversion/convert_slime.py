"""`convert slime`: a released SliME checkpoint becomes one of ours."""

from pathlib import Path
from typing import Any

import torch

from .checkpoint import (
    EMBEDDINGS,
    Speech,
    common_dtype,
    model_config,
    model_shapes,
    parse_dtype,
    text_config_of,
    write_checkpoint,
)
from .errors import ConversionError
from .hub import is_repository, resolve_folder
from .mapping import Mapped, cast, check_complete, grow_rows, map_forward
from .prompts import (
    generation_defaults,
    image_stats_of,
    load_tokenizer,
    place_image_token,
    prompt_settings,
    released_template,
)
from .slime import key_table
from .slime_options import connector_settings, option_notes
from .slime_source import TOWER_PREFIX, Released, read_released
from .tensors import Entries, read_json, release
from .towers import find_tower, tower_entries
from .writing import MAX_SHARD_BYTES, Progress, new_folder


RELEASED_TYPES = ("llava_llama", "llava")


def convert_slime(
    source: str | Path,
    destination: str | Path,
    vision_config: str | Path | None = None,
    base: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict:
    """Convert a released SliME checkpoint.

    Args:
        source (`str` or `Path`): A folder or a Hub repository: a full checkpoint, a LoRA folder, or stage files.
        destination (`str` or `Path`): The folder to make; it appears only when it is whole.
        vision_config (`str` or `Path`, *optional*): The vision tower: a `config.json`, a folder or a repository; the
            latter two also give the weights where the checkpoint has none. By default the tower it names.
        base (`str` or `Path`, *optional*): The language model under a LoRA or stage files; by default the one named.
        dtype (`str` or `torch.dtype`, *optional*): Dtype of all weights; by default every tensor keeps its own.
        progress (`Callable`, *optional*): Called with tensors done, tensors in all and a description.
        max_shard_bytes (`int`): Most bytes of tensors in one file.

    Returns:
        The report, which is also saved as `conversion_report.json`.

    Raises:
        ConversionError: If anything is unknown, absent or does not fit; the destination is not made then.
    """
    wanted = parse_dtype(dtype)
    with new_folder(destination) as work:
        try:
            folder, name = resolve_folder(source, "The source"), Path(destination).name
            return _convert(folder, work, vision_config, base, wanted, progress, max_shard_bytes, name)
        finally:
            release()


def read_released_config(folder: Path) -> dict:
    """Read the configuration of a released checkpoint.

    Args:
        folder (`Path`): The checkpoint.

    Raises:
        ConversionError: If it is not one of the released class.
    """
    released = read_json(folder / "config.json")
    if released.get("model_type") not in RELEASED_TYPES or "mm_projector_type" not in released:
        raise ConversionError(
            f"config.json describes a model of type {released.get('model_type')!r} without mm_projector_type or of "
            f"another family; released SliME checkpoints are {' or '.join(RELEASED_TYPES)}."
        )
    return released


def add_tower(
    released: Released, config: dict, choice: str | Path | None, folder: Path
) -> tuple[Any, Path | None, Entries]:
    """Find the tower's configuration, and its weights where the checkpoint does not hold them.

    Args:
        released (`Released`): The checkpoint.
        config (`dict`): Its `config.json`.
        choice (`str` or `Path`, *optional*): The caller's choice.
        folder (`Path`): Folder of the checkpoint.

    Returns:
        Configuration, folder of the tower where there is one, and all tensors.

    Raises:
        ConversionError: If they are nowhere.
    """
    name = config.get("mm_vision_tower")
    vision_config, tower = find_tower(choice, name, folder)
    if vision_config.model_type != "clip_vision_model":
        raise ConversionError(f"Released SliME models have CLIP towers, not {vision_config.model_type!r}.")
    if config.get("mm_hidden_size") not in (None, vision_config.hidden_size):
        raise ConversionError(
            f"mm_hidden_size={config['mm_hidden_size']} of the released configuration is not the width "
            f"{vision_config.hidden_size} of the vision tower; pass the right one as vision_config."
        )
    if any(key.startswith(TOWER_PREFIX) for key in released.entries):
        return vision_config, tower, released.entries
    if tower is None:
        if name is None:
            raise ConversionError("The checkpoint holds no vision tower and names none; pass its folder.")
        tower = resolve_folder(name, "The vision tower")
    entries = {TOWER_PREFIX + key: entry for key, entry in tower_entries(tower).items()}
    return vision_config, tower, {**released.entries, **entries}


def _convert(
    folder: Path,
    work: Path,
    choice: str | Path | None,
    base: str | Path | None,
    dtype: torch.dtype | None,
    progress: Progress | None,
    max_shard_bytes: int,
    name: str,
) -> dict:
    config = read_released_config(folder)
    settings = connector_settings(config)
    released = read_released(folder, config, base)
    vision_config, tower, entries = add_tower(released, config, choice, folder)
    text_config = text_config_of(config, "llama")
    tokenizer = load_tokenizer(folder) or (load_tokenizer(released.base) if released.base else None)
    image_token_id, rows = place_image_token(tokenizer, text_config.vocab_size)
    added = rows - text_config.vocab_size
    text_config.vocab_size = rows
    template = released_template(tokenizer) if tokenizer is not None else None
    ours = model_config(
        dtype or common_dtype(entries, config.get("torch_dtype")),
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=image_token_id,
        **prompt_settings(tokenizer, template),
        **settings,
    )
    rules = key_table(config["mm_projector_type"], config.get("mm_resampler_type"))
    mapped = grown(map_forward(rules, entries), added)
    check_complete(mapped, model_shapes(ours), rules, f"the source {folder.name}")
    generation_folder = folder if (folder / "generation_config.json").is_file() else released.base
    speech = Speech(
        tokenizer, image_stats_of(tower), generation_defaults(generation_folder, ours, tokenizer, template)
    )
    report = {
        "conversion": "slime",
        "form": released.form,
        "source": folder.name,
        "base": released.base_name or (released.base.name if released.base else None),
        "image_token_id": image_token_id,
        "added_rows": added,
        "options": option_notes(config),
        "source_config": config,
    }
    card = {
        "title": name,
        "summary": "A SliME model in the format of hires_lmm, converted from a checkpoint in the released format.",
        "bases": _bases(config, released),
    }
    ordered = {key: mapped.entries[key] for key in model_order(mapped, entries)}
    return write_checkpoint(work, ours, mapped, cast(ordered, dtype), speech, report, card, max_shard_bytes, progress)


def grown(mapped: Mapped, added: int) -> Mapped:
    """Give the tables of embeddings their new rows.

    Args:
        mapped (`Mapped`): The tensors; changed in place.
        added (`int`): Rows to add.
    """
    for name in EMBEDDINGS:
        if name in mapped.entries and mapped.entries[name].shape:
            mapped.entries[name] = grow_rows(mapped.entries[name], mapped.entries[name].shape[0] + added)
    return mapped


def model_order(mapped: Mapped, source: Entries) -> list[str]:
    """Our tensors in the order of the source, so that its files are read one after another.

    Args:
        mapped (`Mapped`): The tensors.
        source (`Entries`): The source, in the order of its files.
    """
    position = {key: number for number, key in enumerate(source)}
    ranks = {target: position[record["source"]] for record in mapped.records for target in record["targets"]}
    return sorted(mapped.entries, key=lambda name: ranks[name])


def _bases(config: dict, released: Released) -> list[dict]:
    bases = []
    if released.base_name is not None:
        bases.append({"part": "language model", "name": released.base_name})
    if is_repository(config.get("mm_vision_tower") or ""):
        bases.append({"part": "vision tower", "name": config["mm_vision_tower"]})
    return bases

"""`export`: a checkpoint of ours as a self-contained folder with the code of this package, a processor and a card."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..modeling.configuration_hires_lmm import AUTO_MAP, HiResLmmConfig
from ..processing.processing_hires_lmm import HiResLmmProcessor
from .cards import write_card
from .checkpoint import (
    ASIDE_NAME,
    REPORT_NAME,
    Speech,
    build_config,
    model_shapes,
    save_code,
    save_processor,
    versions,
)
from .errors import ConversionError
from .hub import is_repository, resolve_folder
from .mapping import Mapped, check_complete
from .prompts import TOKENIZER_FILES, check_vocabulary, image_stats_of, load_tokenizer
from .tensors import folder_entries, read_json, release, safe_path
from .writing import MAX_SHARD_BYTES, Progress, new_folder, write_tensors


def export(
    checkpoint: str | Path,
    destination: str | Path,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a folder that loads with `trust_remote_code=True` where this package is not installed.

    Args:
        checkpoint (`str` or `Path`): A folder or a Hub repository, for example one that a Trainer saved.
        destination (`str` or `Path`): The folder to make; it appears only when it is whole.
        progress (`Callable`, *optional*): Called with tensors done, tensors in all and a description.
        max_shard_bytes (`int`): Most bytes of tensors in one file.

    Returns:
        The folder.

    Raises:
        ConversionError: If the checkpoint is not one of ours, or not whole.
    """
    with new_folder(destination) as work:
        try:
            _export(resolve_folder(checkpoint, "The checkpoint"), str(checkpoint), work, progress, max_shard_bytes)
        finally:
            release()
    return Path(destination)


def _export(folder: Path, name: str, work: Path, progress: Progress | None, max_shard_bytes: int) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ConversionError(
            f"{folder.name} holds a LoRA adapter; merge it first (merge_and_unload) and export that."
        )
    if read_json(folder / "config.json").get("model_type") != "hires_lmm":
        raise ConversionError(f"{folder.name} is no hires_lmm checkpoint; convert it first.")
    config = build_config(HiResLmmConfig.from_pretrained, "The configuration", pretrained_model_name_or_path=folder)
    config.auto_map = dict(AUTO_MAP)  # a foreign entry would name code of somebody else
    mapped = Mapped(entries=folder_entries(folder))
    check_complete(mapped, model_shapes(config), [], f"the checkpoint {folder.name}")
    write_tensors(work, mapped.entries, max_shard_bytes, progress)
    image_processor = _copy_processor(folder, work, config)
    if (folder / "generation_config.json").is_file():
        safe_path(folder, "generation_config.json")
        build_config(
            lambda: GenerationConfig.from_pretrained(folder).save_pretrained(work), "The generation configuration"
        )
    save_code(work, config)
    for kept in (REPORT_NAME, ASIDE_NAME, "README.md"):
        if (folder / kept).is_file():
            shutil.copyfile(safe_path(folder, kept), work / kept)
    if not (work / "README.md").is_file():
        facts = {
            "chat": any((folder / file).is_file() for file in TOKENIZER_FILES),
            "versions": versions(),
            "title": Path(name).name,
            **({"repository": name} if is_repository(name) and not Path(name).is_dir() else {}),
        }
        write_card(work, config, image_processor, facts)


def _copy_processor(folder: Path, work: Path, config: Any) -> Any:
    """Save the checkpoint's own processor; where it has none, the one its configuration describes."""
    if (folder / "processor_config.json").is_file():
        processor = build_config(
            HiResLmmProcessor.from_pretrained,
            "The processor",
            pretrained_model_name_or_path=folder,
            trust_remote_code=False,
        )
        check_vocabulary(processor.tokenizer, folder.name)
        _check_layout(processor.image_processor.token_layout or {}, config, folder.name)
        processor.tokenizer.init_kwargs.pop("auto_map", None)
        processor.save_pretrained(work)
        return processor.image_processor
    return save_processor(work, config, Speech(load_tokenizer(folder), image_stats_of(folder)))


def _check_layout(layout: dict, config: HiResLmmConfig, name: str) -> None:
    """Refuse a processor that counts other tokens than the model makes."""
    wanted = json.loads(json.dumps(config.token_layout()))
    found = json.loads(json.dumps(layout))
    wrong = sorted(key for key in found.keys() & wanted.keys() if found[key] != wanted[key])
    if wrong:
        raise ConversionError(
            f"The processor of {name} counts tokens for another model: {wrong[0]} is {found[wrong[0]]} there and "
            f"{wanted[wrong[0]]} in config.json. Save HiResLmmProcessor.from_config(config, tokenizer) beside it."
        )

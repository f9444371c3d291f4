"""`export`: a checkpoint of ours as a self-contained folder with the code of this package, a processor and a card."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..modeling.configuration_hires_lmm import AUTO_MAP, HiResLmmConfig
from ..processing.processing_hires_lmm import HiResLmmProcessor
from .cards import write_card
from .checkpoint import REPORT_NAME, UNUSED_NAME, save_assets, save_code, versions
from .configs import model_shapes
from .errors import ConversionError, readable
from .hub import is_repository, resolve_folder
from .mapping import Mapped, check_complete
from .prompts import PromptAssets, has_tokenizer, image_stats_of, load_tokenizer
from .tensors import folder_entries, read_json
from .writing import MAX_SHARD_BYTES, Progress, new_folder, write_tensors


def export(
    checkpoint: str | Path,
    destination: str | Path,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    trust_remote_code: bool = False,
) -> Path:
    """Write a folder that loads with `trust_remote_code=True` where this package is not installed.

    Args:
        checkpoint (`str` or `Path`): A folder or a Hub repository, for example one that a Trainer saved.
        destination (`str` or `Path`): The folder to make; it appears only when it is whole.
        progress (`Callable`, *optional*): Called with tensors done, tensors in all and a description.
        max_shard_bytes (`int`): Most bytes of tensors in one file.
        trust_remote_code (`bool`): Whether the files of a user's own parts may run; they are written as well.

    Raises:
        ConversionError: If the checkpoint is not one of ours, or not whole.
        ValueError: If it has parts of its author's own that are neither trusted nor imported.
    """
    with new_folder(destination) as work:
        folder = resolve_folder(checkpoint, "The checkpoint", with_code=trust_remote_code)
        config = read_checkpoint_config(folder, trust_remote_code)
        entries = folder_entries(folder)
        check_complete(Mapped(entries), model_shapes(config), [], f"the checkpoint {folder.name}")
        write_tensors(work, entries, max_shard_bytes, progress)
        image_processor = copy_processor(folder, work, config, trust_remote_code)
        if (folder / "generation_config.json").is_file():
            with readable("The generation configuration"):
                GenerationConfig.from_pretrained(folder).save_pretrained(work)
        save_code(work, config)
        for kept in (REPORT_NAME, UNUSED_NAME):
            if (folder / kept).is_file():
                shutil.copyfile(folder / kept, work / kept)
        facts = {"chat": has_tokenizer(folder), "versions": versions(), "title": Path(checkpoint).name}
        repository = {"repository": str(checkpoint)} if is_repository(checkpoint) else {}
        earlier = folder / "README.md" if (folder / "README.md").is_file() else None
        write_card(work, config, image_processor, {**facts, **repository}, earlier)
    return Path(destination)


def read_checkpoint_config(folder: Path, trust_remote_code: bool) -> Any:
    """The configuration of a checkpoint of ours, its own parts found."""
    if (folder / "adapter_config.json").is_file():
        raise ConversionError(
            f"{folder.name} holds a LoRA adapter; merge it first (merge_and_unload) and export that."
        )
    if read_json(folder / "config.json").get("model_type") != "hires_lmm":
        raise ConversionError(f"{folder.name} is no hires_lmm checkpoint; convert it first.")
    with readable("The configuration"):
        config = HiResLmmConfig.from_pretrained(folder)
    config.load_parts(trust_remote_code, folder)
    config.auto_map = dict(AUTO_MAP)  # a foreign entry would name code of somebody else
    return config


def copy_processor(folder: Path, work: Path, config: Any, trust_remote_code: bool) -> Any:
    """Save the checkpoint's own processor; where it has none, the one its configuration describes."""
    if not (folder / "processor_config.json").is_file():
        return save_assets(work, config, PromptAssets(load_tokenizer(folder), image_stats_of(folder)))
    with readable("The processor"):
        processor = HiResLmmProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    _check_layout(processor.image_processor.token_layout or {}, config, folder.name)
    processor.tokenizer.init_kwargs.pop("auto_map", None)
    processor.save_pretrained(work)
    return processor.image_processor


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

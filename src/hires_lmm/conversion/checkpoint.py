"""What a checkpoint of ours holds beside its weights: processor, generation defaults, code, report."""

import platform
from copy import copy
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from .. import __version__
from ..modeling.modeling_hires_lmm import HiResLmmForConditionalGeneration
from ..processing.image_processing_hires_lmm import HiResLmmImageProcessor
from ..processing.processing_hires_lmm import HiResLmmProcessor
from ..processing.processor_options_hires_lmm import image_options
from ..processing.tower_table_hires_lmm import view_side
from .errors import readable
from .mapping import Mapped
from .prompts import PromptAssets
from .tensors import Entries


REPORT_NAME = "conversion_report.json"
UNUSED_STEM = "conversion_unused"
UNUSED_NAME = f"{UNUSED_STEM}.safetensors"
LIBRARIES = ("torch", "transformers", "safetensors", "huggingface_hub")


def save_assets(folder: Path, config: Any, assets: PromptAssets) -> HiResLmmImageProcessor:
    """Save processor and generation configuration; without a tokenizer the image processor is the processor."""
    if assets.generation is not None:
        with readable("The generation configuration"):
            GenerationConfig(**assets.generation).save_pretrained(folder)
    with readable("The processor"):
        processor = _processor(config, assets)
    processor.save_pretrained(folder)
    return processor if assets.tokenizer is None else processor.image_processor


def _processor(config: Any, assets: PromptAssets) -> Any:
    tokenizer, stats = assets.tokenizer, assets.image_stats
    changes = {} if assets.extra_stats is None else {"extra_towers": _extra_towers(config, assets.extra_stats)}
    if tokenizer is None:
        return HiResLmmImageProcessor(**image_options(config, stats, changes))
    config = copy(config)  # what could not be told of the template stays None in the model's own
    config.answer_prefix_ids = config.answer_prefix_ids or []
    config.question_prefix_ids = config.question_prefix_ids or []
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    return HiResLmmProcessor.from_config(config, tokenizer, stats, template, **changes)


def _extra_towers(config: Any, stats: dict[str, dict]) -> dict[str, dict]:
    """Sizes and numbers of the views of extra towers."""
    return {name: {"size": view_side(tower), **stats[name]} for name, tower in config.extra_tower_configs().items()}


def save_code(folder: Path, config: Any) -> None:
    """Save the configuration and all modules a checkpoint needs to load without this package."""
    for thing in (HiResLmmForConditionalGeneration, HiResLmmProcessor, HiResLmmImageProcessor):
        custom_object_save(thing, folder)
    config.save_pretrained(folder)


@cache
def versions() -> dict[str, str]:
    """Versions of everything that took part in a conversion."""
    found = {"hires_lmm": __version__, "python": platform.python_version()}
    return {**found, **{name: version(name) for name in LIBRARIES}}


def finish_report(report: dict, mapped: Mapped, entries: Entries) -> dict:
    """Complete a report with one record a source tensor; `entries` are the tensors of ours as they are written."""
    tensors = []
    for record in mapped.records:
        found = {name: entries[name] for name in record["targets"]}
        targets = [
            {"name": name, "shape": list(entry.shape), "dtype": str(entry.dtype).removeprefix("torch.")}
            for name, entry in found.items()
        ]
        notes = [record["transformation"], *(entry.note for entry in found.values())]
        if any(target["dtype"] != record["dtype"] for target in targets):
            notes.append("cast")
        text = "; ".join(dict.fromkeys(part for note in notes for part in note.split("; ") if part))
        tensors.append({**record, "targets": targets, "transformation": text})
    return {**report, "versions": versions(), "unused": sorted(mapped.unused), "tensors": tensors}

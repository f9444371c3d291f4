"""The last step of every conversion: a folder that loads anywhere, with code, processor, card and report."""

import json
import platform
from collections import Counter
from copy import copy
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from .. import __version__
from ..modeling.configuration_hires_lmm import HiResLmmConfig
from ..modeling.modeling_hires_lmm import HiResLmmForConditionalGeneration
from ..processing.image_processing_hires_lmm import HiResLmmImageProcessor
from ..processing.processing_hires_lmm import HiResLmmProcessor
from ..processing.tower_table_hires_lmm import known_stats
from .cards import write_card
from .errors import ConversionError, is_panic
from .mapping import Mapped
from .tensors import Entries
from .writing import Progress, write_file, write_tensors


REPORT_NAME = "conversion_report.json"
ASIDE_NAME = "conversion_leftovers.safetensors"
LIBRARIES = ("torch", "transformers", "safetensors", "huggingface_hub")
EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")

BOOKKEEPING = {
    "model_type",
    "architectures",
    "transformers_version",
    "dtype",
    "id2label",
    "label2id",
    "_name_or_path",
}
"""Fields of saved configurations that do not describe a model's shape."""


@dataclass
class Speech:
    """What belongs to a model besides its weights; each may be None.

    Args:
        tokenizer: The tokenizer, with image token and chat template.
        image_stats (`dict`): Mean, standard deviation and filter of the vision tower.
        generation (`dict`): Fields of the generation configuration.
    """

    tokenizer: Any | None = None
    image_stats: dict | None = None
    generation: dict | None = None


def build_config(config_class: Any, what: str, **fields: Any) -> Any:
    """Build a configuration; what it refuses becomes an error of the conversion.

    Args:
        config_class: A class or a function that returns a configuration.
        what (`str`): What is built, for the message.
        fields: Its fields.

    Raises:
        ConversionError: If the fields do not fit.
    """
    try:
        return config_class(**fields)
    except BaseException as error:  # strict dataclasses raise types of their own
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise ConversionError(f"{what} does not fit: {' '.join(str(error).split())[:1000]}") from error


def model_config(dtype: torch.dtype, **fields: Any) -> Any:
    """Build the configuration of a converted model.

    Args:
        dtype (`torch.dtype`): Dtype the model is loaded with by default.
        fields: Fields of `HiResLmmConfig`.

    Raises:
        ConversionError: If the parts do not fit together.
    """
    return stamped(build_config(HiResLmmConfig, "The configuration", **fields), dtype)


def stamped(config: Any, dtype: torch.dtype) -> Any:
    """Name class and dtype in a configuration.

    Args:
        config (`HiResLmmConfig`): The configuration; changed in place.
        dtype (`torch.dtype`): Dtype the model is loaded with by default.
    """
    config.architectures = ["HiResLmmForConditionalGeneration"]
    for part in (config, config.vision_config, config.text_config, config.connector_config):
        part.dtype = dtype
    return config


def text_config_of(values: dict, model_type: str) -> Any:
    """Build the configuration of a language model from a foreign `config.json`.

    Args:
        values (`dict`): The foreign configuration; keys that the class does not know are left out.
        model_type (`str`): Name of the family in transformers.
    """
    plain = build_config(AutoConfig.for_model, "The language model's configuration", model_type=model_type)
    known = {*plain.to_dict(), "rope_theta", "rope_scaling"}
    fields = {key: value for key, value in values.items() if key in known - BOOKKEEPING}
    return build_config(AutoConfig.for_model, "The language model's configuration", model_type=model_type, **fields)


def model_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model, without its memory.

    Args:
        config (`HiResLmmConfig`): The configuration.

    Returns:
        Shapes in the order of the model; tied tensors once.
    """
    try:
        with torch.device("meta"):
            model = HiResLmmForConditionalGeneration(config)
    except Exception as error:  # classes of many families, each with errors of its own
        raise ConversionError(f"No model can be built from the configuration: {str(error)[:1000]}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def common_dtype(entries: Entries, named: Any = None) -> torch.dtype:
    """The dtype a checkpoint is kept in.

    Args:
        entries (`Entries`): Its tensors.
        named (*optional*): What its configuration says, such as `"bfloat16"`.

    Returns:
        The named dtype, else the most frequent floating-point dtype, weighted by size.
    """
    dtype = parse_dtype(named) if named not in (None, "auto") else None
    if dtype is not None:
        return dtype
    sizes: Counter = Counter()
    for entry in entries.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] += entry.num_bytes
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def parse_dtype(value: Any) -> torch.dtype | None:
    """Read a dtype from a name.

    Args:
        value: A dtype, a name such as `"bfloat16"` or `"torch.bfloat16"`, or None.

    Raises:
        ConversionError: If it names no floating-point dtype of torch.
    """
    if value is None or isinstance(value, torch.dtype):
        return value
    name = str(value).removeprefix("torch.")
    dtype = torch.__dict__.get(name)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConversionError(f"dtype={value!r} is none; use float32, bfloat16 or float16.")
    return dtype


def save_processor(folder: Path, config: Any, speech: Speech) -> HiResLmmImageProcessor:
    """Save the processor; without a tokenizer the image processor alone.

    Args:
        folder (`Path`): The checkpoint.
        config (`HiResLmmConfig`): Its configuration.
        speech (`Speech`): Tokenizer and numbers of the tower.

    Returns:
        The image processor.
    """
    if speech.tokenizer is not None:
        template = speech.tokenizer.chat_template
        config = copy(config)  # what is not known stays so: a foreign template is rendered in a limited process only
        config.answer_prefix_ids = config.answer_prefix_ids or []
        config.question_prefix_ids = config.question_prefix_ids or []
        processor = build_config(
            HiResLmmProcessor.from_config,
            "The processor",
            config=config,
            tokenizer=speech.tokenizer,
            image_stats=speech.image_stats,
            **({"chat_template": template} if isinstance(template, str) else {}),
        )
        processor.save_pretrained(folder)
        return processor.image_processor
    options: dict[str, Any] = {"planner" if key == "name" else key: value for key, value in config.planner.items()}
    stats = speech.image_stats
    if stats is None:
        stats = known_stats(config.vision_config.model_type)
        if stats is None:
            raise ConversionError(f"Mean and deviation of {config.vision_config.model_type!r} towers are not known.")
    image_processor = build_config(
        HiResLmmImageProcessor,
        "The image processor",
        view_size=config.view_size,
        patch_size=config.patch_size,
        token_layout=config.token_layout(),
        **options,
        **stats,
    )
    image_processor.save_pretrained(folder)
    return image_processor


def save_code(folder: Path, config: Any) -> None:
    """Save the configuration and all modules a checkpoint needs to load without this package.

    Args:
        folder (`Path`): The checkpoint.
        config (`HiResLmmConfig`): Its configuration.
    """
    for thing in (HiResLmmForConditionalGeneration, HiResLmmProcessor, HiResLmmImageProcessor):
        custom_object_save(thing, folder)
    config.save_pretrained(folder)


@cache
def versions() -> dict[str, str]:
    """Versions of everything that took part in a conversion."""
    found = {"hires_lmm": __version__, "python": platform.python_version()}
    return {**found, **{name: version(name) for name in LIBRARIES}}


def finish_report(report: dict, mapped: Mapped, entries: Entries) -> dict:
    """Complete a report with one record a source tensor.

    Args:
        report (`dict`): What the conversion says about itself.
        mapped (`Mapped`): Its table.
        entries (`Entries`): The tensors as they are written.

    Returns:
        The report.
    """
    tensors = []
    for record in mapped.records:
        targets = [
            {
                "name": name,
                "shape": list(entries[name].shape),
                "dtype": str(entries[name].dtype).removeprefix("torch."),
            }
            for name in record["targets"]
        ]
        notes = [record["transformation"], *(entries[name].note for name in record["targets"])]
        if any(target["dtype"] != record["dtype"] for target in targets):
            notes.append("cast")
        text = "; ".join(dict.fromkeys(part for note in notes for part in note.split("; ") if part))
        tensors.append({**record, "targets": targets, "transformation": text})
    return {**report, "versions": versions(), "kept_aside": sorted(mapped.aside), "tensors": tensors}


def write_checkpoint(
    folder: Path,
    config: Any,
    mapped: Mapped,
    entries: Entries,
    speech: Speech,
    report: dict,
    card: dict,
    max_shard_bytes: int,
    progress: Progress | None,
) -> dict:
    """Write everything a checkpoint needs.

    Args:
        folder (`Path`): An empty folder.
        config (`HiResLmmConfig`): The configuration.
        mapped (`Mapped`): The key table applied.
        entries (`Entries`): The tensors to write.
        speech (`Speech`): Tokenizer, numbers of the tower, generation configuration.
        report (`dict`): What the conversion says about itself.
        card (`dict`): Facts for the model card.
        max_shard_bytes (`int`): Most bytes of tensors in one file.
        progress (`Callable`, *optional*): Called after each tensor.

    Returns:
        The report, as it is saved.
    """
    write_tensors(folder, entries, max_shard_bytes, progress)
    if mapped.aside:
        list(write_file(folder / ASIDE_NAME, mapped.aside))
    image_processor = save_processor(folder, config, speech)
    if speech.generation is not None:
        values = speech.generation
        build_config(lambda: GenerationConfig(**values).save_pretrained(folder), "The generation configuration")
    save_code(folder, config)
    report = finish_report(report, mapped, entries)
    write_card(folder, config, image_processor, {**card, "chat": speech.tokenizer is not None, "versions": versions()})
    (folder / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report

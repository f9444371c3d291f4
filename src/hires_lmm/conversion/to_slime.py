"""`convert to-slime`: a model of the slime_release family in the format of the released code."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from .checkpoint import ASIDE_NAME, EMBEDDINGS, REPORT_NAME, build_config, common_dtype, finish_report, model_shapes
from .errors import ConversionError, problem_table
from .hub import resolve_folder
from .mapping import Mapped, check_complete, cut_rows, map_backward
from .prompts import as_list, check_ids, load_tokenizer, without_image_token
from .slime import key_table
from .slime_options import released_options
from .tensors import (
    Entries,
    entry_of,
    file_entries,
    folder_entries,
    read_integer,
    read_json,
    read_object,
    release,
    safe_path,
)
from .writing import MAX_SHARD_BYTES, Progress, new_folder, write_tensors


UNUSED_ROUTER = "model.sampler.selector."


def convert_to_slime(
    source: str | Path,
    destination: str | Path,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict:
    """Convert a checkpoint of ours to the released format; after `convert_slime` every tensor is as it was.

    Args:
        source (`str` or `Path`): A folder or a Hub repository.
        destination (`str` or `Path`): The folder to make; it appears only when it is whole.
        progress (`Callable`, *optional*): Called with tensors done, tensors in all and a description.
        max_shard_bytes (`int`): Most bytes of tensors in one file.

    Returns:
        The report, which is also saved.

    Raises:
        ConversionError: If the model has parts that the released code does not have.
    """
    with new_folder(destination) as work:
        try:
            return _convert(resolve_folder(source, "The source"), work, progress, max_shard_bytes)
        finally:
            release()


def _convert(folder: Path, work: Path, progress: Progress | None, max_shard_bytes: int) -> dict:
    values = read_json(folder / "config.json")
    if values.get("model_type") != "hires_lmm":
        raise ConversionError(f"{folder.name} is of type {values.get('model_type')!r}, not a hires_lmm checkpoint.")
    config = build_config(
        AutoConfig.from_pretrained,
        "The configuration",
        pretrained_model_name_or_path=folder,
        trust_remote_code=False,
    )
    if config.text_config.model_type != "llama" or config.vision_config.model_type != "clip_vision_model":
        raise ConversionError("The released SliME code runs Llama language models with CLIP towers only.")
    report_file = folder / REPORT_NAME
    earlier = read_json(report_file) if report_file.is_file() else {}
    options = released_options(config)
    original = read_object(earlier, "source_config", REPORT_NAME)
    if original.get("mm_projector_type") == "mlp1x_gelu" and options["mm_projector_type"] == "linear":
        options["mm_projector_type"] = "mlp1x_gelu"
    entries = folder_entries(folder)
    check_complete(Mapped(entries=dict(entries)), model_shapes(config), [], f"the checkpoint {folder.name}")
    rows = config.text_config.vocab_size - _added_rows(config, earlier)
    for name in EMBEDDINGS:
        if name in entries and rows < entries[name].shape[0]:
            entries[name] = cut_rows(entries[name], rows)
    rules = key_table(options["mm_projector_type"], options["mm_resampler_type"])
    mapped = map_backward(rules, entries)
    if mapped.problems:
        raise ConversionError(problem_table("The checkpoint does not fit the released format:", mapped.problems))
    mapped.entries.update(_aside(folder, config, options))
    write_tensors(work, mapped.entries, max_shard_bytes, progress)
    written = {**_text_fields(config), **original, **options, **_named(config, entries, original), "vocab_size": rows}
    (work / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (work / "vision_config.json").write_text(config.vision_config.to_json_string(), encoding="utf-8")
    _copy_speech(folder, work, config, earlier)
    return _report(work, folder, mapped)


def _added_rows(config: Any, earlier: dict) -> int:
    """Rows that conversion added: from its report, else one if the image token is the last."""
    if "added_rows" in earlier and earlier.get("image_token_id") == config.image_token_id:
        return read_integer(earlier, "added_rows", REPORT_NAME, least=0, most=config.text_config.vocab_size) or 0
    return int(config.image_token_id == config.text_config.vocab_size - 1)


def _aside(folder: Path, config: Any, options: dict) -> Entries:
    """Tensors of the released format that ours does not use."""
    path = folder / ASIDE_NAME
    found = file_entries(safe_path(folder, path.name)) if path.is_file() else {}
    if options["mm_resampler_type"] == "qformer" and f"{UNUSED_ROUTER}query" not in found:
        raise ConversionError(
            f"The released attention router has tensors that it never uses; they were put into {ASIDE_NAME} at the "
            "conversion, and that file is absent. Copy it from the converted checkpoint into this folder."
        )
    return found


def _named(config: Any, entries: Entries, original: dict) -> dict:
    """Fields that name things."""
    dtype = common_dtype(entries, original.get("torch_dtype"))
    return {
        "model_type": original.get("model_type", "llava_llama"),
        "architectures": ["LlavaLlamaForCausalLM"],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "mm_vision_tower": original.get("mm_vision_tower", "vision_config.json"),
    }


def _text_fields(config: Any) -> dict:
    """The language model's configuration in the words of transformers 4.37."""
    fields = config.text_config.to_dict()
    rope = dict(fields.pop("rope_parameters", None) or {})
    fields["rope_theta"] = rope.pop("rope_theta", 10000.0)
    kind = rope.pop("rope_type", "default")
    fields["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
    for name in ("dtype", "_name_or_path", "transformers_version"):
        fields.pop(name, None)
    return fields


def _copy_speech(folder: Path, work: Path, config: Any, earlier: dict) -> None:
    """Tokenizer without the image token, and generation configuration without its suppression."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(work)
        if earlier.get("added_rows", 1):
            without_image_token(work)
    path = folder / "generation_config.json"
    if path.is_file():
        shutil.copyfile(safe_path(folder, path.name), work / path.name)
        values = read_json(work / path.name)
        check_ids("suppress_tokens", values.get("suppress_tokens"))
        kept = [token for token in as_list(values.pop("suppress_tokens", None)) if token != config.image_token_id]
        values = {**values, **({"suppress_tokens": kept} if kept else {})}
        (work / path.name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _report(work: Path, folder: Path, mapped: Mapped) -> dict:
    ours = {record["source"]: record["targets"] for record in mapped.records}
    entries = {
        **mapped.entries,
        **{name: entry_of(mapped.entries[key].meta(), "") for key in ours for name in ours[key]},
    }
    report = finish_report({"conversion": "to-slime", "source": folder.name}, mapped, entries)
    (work / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report

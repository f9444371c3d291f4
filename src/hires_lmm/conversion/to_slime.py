"""`convert to-slime`: a model of the slime_release family in the format of the released code."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from .checkpoint import REPORT_NAME, UNUSED_NAME, finish_report
from .configs import common_dtype, model_shapes
from .errors import ConversionError, problem_table, readable
from .hub import resolve_folder
from .mapping import Mapped, check_complete, cut_rows, map_backward
from .pipeline import EMBEDDINGS
from .prompts import as_list, load_tokenizer, without_image_token
from .slime import key_table
from .slime_options import released_options
from .tensors import Entries, entry_of, file_entries, folder_entries, read_if_present, read_json
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

    Raises:
        ConversionError: If the model has parts that the released code does not have.
    """
    with new_folder(destination) as work:
        folder = resolve_folder(source, "The source")
        config = _read_config(folder)
        earlier = read_if_present(folder / REPORT_NAME)
        options = _options(config, earlier)
        entries = folder_entries(folder)
        check_complete(Mapped(entries), model_shapes(config), [], f"the checkpoint {folder.name}")
        rows = config.text_config.vocab_size - _added_rows(config, earlier)
        cut = {name: cut_rows(entries[name], rows) for name in EMBEDDINGS if name in entries}
        rules = key_table(options["mm_projector_type"], options["mm_resampler_type"])
        mapped = map_backward(rules, {**entries, **cut})
        if mapped.problems:
            raise ConversionError(problem_table("The checkpoint does not fit the released format:", mapped.problems))
        mapped.entries.update(_unused(folder, options))
        write_tensors(work, mapped.entries, max_shard_bytes, progress)
        _write_configs(work, config, options, earlier, rows, common_dtype(entries))
        _write_prompt_assets(folder, work, config, earlier)
        report = _report(folder, mapped)
        _write_json(work / REPORT_NAME, report)
    return report


def _read_config(folder: Path) -> Any:
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != "hires_lmm":
        raise ConversionError(f"{folder.name} is of type {model_type!r}, not a hires_lmm checkpoint.")
    with readable("The configuration"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.text_config.model_type != "llama" or config.vision_config.model_type != "clip_vision_model":
        raise ConversionError("The released SliME code runs Llama language models with CLIP towers only.")
    return config


def _options(config: Any, earlier: dict) -> dict:
    """The multimodal options; of two released names of one adapter, that of the source."""
    options = released_options(config)
    original = earlier.get("source_config", {}).get("mm_projector_type")
    if (original, options["mm_projector_type"]) == ("mlp1x_gelu", "linear"):
        options["mm_projector_type"] = original
    return options


def _added_rows(config: Any, earlier: dict) -> int:
    """Rows that conversion added: from its report, else one if the image token is the last."""
    if "added_rows" in earlier and earlier.get("image_token_id") == config.image_token_id:
        return earlier["added_rows"]
    return int(config.image_token_id == config.text_config.vocab_size - 1)


def _unused(folder: Path, options: dict) -> Entries:
    """Tensors of the released format that ours does not use."""
    path = folder / UNUSED_NAME
    found = file_entries(path) if path.is_file() else {}
    if options["mm_resampler_type"] == "qformer" and f"{UNUSED_ROUTER}query" not in found:
        raise ConversionError(
            f"The released attention router has tensors that it never uses; they were put into {UNUSED_NAME} at the "
            "conversion, and that file is absent. Copy it from the converted checkpoint into this folder."
        )
    return found


def _write_configs(work: Path, config: Any, options: dict, earlier: dict, rows: int, dtype: Any) -> None:
    """`config.json` in the words of transformers 4.37, and the tower's configuration beside it."""
    original = earlier.get("source_config", {})
    fields = config.text_config.to_dict()
    rope = dict(fields.pop("rope_parameters", None) or {})
    fields["rope_theta"] = rope.pop("rope_theta", 10000.0)
    kind = rope.pop("rope_type", "default")
    fields["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
    for name in ("dtype", "_name_or_path", "transformers_version"):
        fields.pop(name, None)
    names = {
        "model_type": original.get("model_type", "llava_llama"),
        "architectures": ["LlavaLlamaForCausalLM"],
        "torch_dtype": original.get("torch_dtype") or str(dtype).removeprefix("torch."),
        "mm_vision_tower": original.get("mm_vision_tower", "vision_config.json"),
    }
    _write_json(work / "config.json", {**fields, **original, **options, **names, "vocab_size": rows}, sort_keys=True)
    (work / "vision_config.json").write_text(config.vision_config.to_json_string(), encoding="utf-8")


def _write_prompt_assets(folder: Path, work: Path, config: Any, earlier: dict) -> None:
    """Tokenizer without the image token, and generation configuration without its suppression."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(work)
        if earlier.get("added_rows", 1):
            without_image_token(work)
    if (folder / "generation_config.json").is_file():
        values = read_json(folder / "generation_config.json")
        kept = [token for token in as_list(values.pop("suppress_tokens", None)) if token != config.image_token_id]
        _write_json(work / "generation_config.json", {**values, **({"suppress_tokens": kept} if kept else {})})


def _write_json(path: Path, values: dict, sort_keys: bool = False) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")


def _report(folder: Path, mapped: Mapped) -> dict:
    """The records tell which of our tensors a released one was made of."""
    made = {record["source"]: record["targets"] for record in mapped.records}
    entries = {name: entry_of(mapped.entries[key].meta()) for key, names in made.items() for name in names}
    return finish_report({"conversion": "to-slime", "source": folder.name}, mapped, {**mapped.entries, **entries})

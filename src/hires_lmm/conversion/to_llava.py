"""`convert to-FORMAT`: a model of ours in the format of released code that is built on the LLaVA code."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..modeling.configuration_hires_lmm import HiResLmmConfig
from ..modeling.routers_hires_lmm import KeepOptions
from .checkpoint import REPORT_NAME, UNUSED_NAME, finish_report
from .configs import common_dtype, model_shapes
from .errors import ConversionError, problem_table, readable
from .hub import resolve_folder
from .keys import Rule, Unused, match_sources
from .llava_format import LlavaFormat
from .mapping import Mapped, check_complete, cut_rows, map_backward
from .pipeline import EMBEDDINGS
from .prompts import as_list, load_tokenizer, without_image_token
from .tensors import Entries, entry_of, file_entries, folder_entries, read_if_present, read_json
from .writing import MAX_SHARD_BYTES, Progress, new_folder, write_tensors


SYNONYMS = {"mm_projector_type": ({"mlp1x_gelu", "linear"},)}
"""Values of released options that mean the same: on the way back the one of the source counts."""

FIELDS = ("vision_feature_layer", "question_scope", "unequal_views")
"""Fields of a model of ours that options of a released one decide, besides planner and connector."""


def convert_to_llava(
    form: LlavaFormat,
    source: str | Path,
    destination: str | Path,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict:
    """Convert a checkpoint of ours to a released format; arguments as in `convert_to_released`."""
    with new_folder(destination) as work:
        folder = resolve_folder(source, "The source")
        config = read_own_config(folder)
        if config.text_config.model_type != "llama" or config.vision_config.model_type != "clip_vision_model":
            raise ConversionError(f"The released {form.title} code runs Llama models with CLIP towers only.")
        earlier = read_if_present(folder / REPORT_NAME)
        options = _options(form, config, earlier)
        rules, entries = form.rules(options), folder_entries(folder)
        rows = config.text_config.vocab_size - added_rows(config, earlier)
        mapped = map_back(entries, rules, config, rows, folder)
        write_tensors(work, mapped.entries, max_shard_bytes, progress)
        _write_config(form, work, config, options, earlier, rows, common_dtype(entries))
        _write_prompt_assets(folder, work, config, earlier)
        report = back_report(f"to-{form.name}", folder, mapped)
        write_json(work / REPORT_NAME, report)
    return report


def read_own_config(folder: Path) -> Any:
    """The configuration of a checkpoint of ours."""
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != "hires_lmm":
        raise ConversionError(f"{folder.name} is of type {model_type!r}, not a hires_lmm checkpoint.")
    with readable("The configuration"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def map_back(entries: Entries, rules: list[Rule], config: Any, rows: int, folder: Path) -> Mapped:
    """The released tensors of a checkpoint of ours, with those that conversion put aside."""
    check_complete(Mapped(entries), model_shapes(config), [], f"the checkpoint {folder.name}")
    cut = {name: cut_rows(entries[name], rows) for name in EMBEDDINGS if name in entries}
    mapped = map_backward(rules, {**entries, **cut})
    if mapped.problems:
        raise ConversionError(problem_table("The checkpoint does not fit the released format:", mapped.problems))
    mapped.entries.update(_unused(folder, rules))
    return mapped


def added_rows(config: Any, earlier: dict) -> int:
    """Rows that conversion added: from its report, else one if the image token is the last."""
    if "added_rows" in earlier and earlier.get("image_token_id") == config.image_token_id:
        return earlier["added_rows"]
    return int(config.image_token_id == config.text_config.vocab_size - 1)


def _unused(folder: Path, rules: list[Rule]) -> Entries:
    """Tensors of the released format that ours does not use."""
    path = folder / UNUSED_NAME
    found = file_entries(path) if path.is_file() else {}
    for rule in rules:
        if isinstance(rule, Unused) and rule.required and not match_sources([rule], found)[0]:
            raise ConversionError(
                f"The released model has tensors that it never uses ({rule.source}); they were put into {UNUSED_NAME} "
                "at the conversion, and that file is absent. Copy it from the converted checkpoint into this folder."
            )
    return found


def _options(form: LlavaFormat, config: Any, earlier: dict) -> dict:
    """The multimodal options, which must give the configuration they came from."""
    options = form.way_back(config)
    if options["mm_projector_type"] is None:
        raise ConversionError(
            f"The released {form.title} code has no counterpart to the adapter "
            f"{config.connector_config.adapter['part']!r}."
        )
    with readable(f"The format of {form.title} for this model"):
        settings = form.settings(form.options.read(options), config.text_config)
        halves = {"vision_config": config.vision_config, "text_config": config.text_config}
        values = {**halves, **settings, "image_token_id": config.image_token_id}
        again = HiResLmmConfig.from_preset(form.preset, **values) if form.preset else HiResLmmConfig(**values)
    for name, (ours, theirs) in _compared(form, config, again).items():
        if ours != theirs:
            raise ConversionError(
                f"The released {form.title} code cannot express {name} of this model: {ours!r}; there it is "
                f"{theirs!r}."
            )
    original = earlier.get("source_config", {})
    for name, groups in SYNONYMS.items():
        if any({original.get(name), options[name]} <= group for group in groups):
            options[name] = original[name]
    return options


def _compared(form: LlavaFormat, config: Any, again: Any) -> dict[str, tuple[Any, Any]]:
    """What must be alike, by name: in a configuration and in the one that its options give."""

    def plain_planner(planner: dict) -> dict:
        given = {key: value for key, value in planner.items() if value is not None}
        values = {"views": "all", "unpad": False, **form.planner, **given}
        return {key: value for key, value in values.items() if key != "max_crops" or values["views"] != "global"}

    ours, theirs = _plain(config.connector_config), _plain(again.connector_config)
    return {
        "the planner": (plain_planner(config.planner), plain_planner(again.planner)),
        **{name: (getattr(config, name), getattr(again, name)) for name in FIELDS},
        **{name: (values, theirs[name]) for name, values in ours.items()},
    }


def _plain(connector: Any) -> dict[str, Any]:
    """All options of a connector with their defaults filled in."""
    chain = connector.resolve()

    def options(part: Any) -> dict:
        values = {"part": part.part.__name__, **vars(part.options)}
        return {**values, "keep": vars(KeepOptions(**values["keep"]))} if "keep" in values else values

    return {
        "view_ops": [options(op) for op in chain.view_ops],
        "adapter": options(chain.adapter),
        "tower_adapters": {name: options(op) for name, op in chain.tower_adapters.items()},
        "map_ops": [options(op) for op in chain.map_ops],
        "token_ops": [options(op) for op in chain.token_ops],
        "layer_ops": [options(op) for op in chain.layer_ops],
        "position_plan": chain.position_plan and options(chain.position_plan),
        "heads": {name: options(op) for name, op in chain.heads.items()},
        "layout": vars(chain.layout),
    }


def _write_config(
    form: LlavaFormat, work: Path, config: Any, options: dict, earlier: dict, rows: int, dtype: Any
) -> None:
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
        "model_type": original.get("model_type", form.model_types[0]),
        "architectures": [form.architecture],
        "torch_dtype": original.get("torch_dtype") or str(dtype).removeprefix("torch."),
        "mm_vision_tower": original.get("mm_vision_tower", "vision_config.json"),
    }
    write_json(work / "config.json", {**fields, **original, **options, **names, "vocab_size": rows}, sort_keys=True)
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
        write_json(work / "generation_config.json", {**values, **({"suppress_tokens": kept} if kept else {})})


def write_json(path: Path, values: dict, sort_keys: bool = False) -> None:
    """Write a JSON file as others of its kind look."""
    path.write_text(json.dumps(values, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")


def back_report(conversion: str, folder: Path, mapped: Mapped) -> dict:
    """The records tell which of our tensors a released one was made of."""
    made = {record["source"]: record["targets"] for record in mapped.records}
    entries = {name: entry_of(mapped.entries[key].meta()) for key, names in made.items() for name in names}
    return finish_report({"conversion": conversion, "source": folder.name}, mapped, {**mapped.entries, **entries})

"""`convert llava-next`: any LLaVA-NeXT checkpoint in Hugging Face format becomes one of ours.

Views, order and numbers stay as they are. A budget (`max_image_tokens`) works afterwards without training, because the
`saliency` score has no parameters; anything that reads the question has to be trained.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..modeling.logits_hires_lmm import DIVIDERS, MULTIPLIERS
from .checkpoint import (
    Speech,
    build_config,
    common_dtype,
    model_config,
    model_shapes,
    parse_dtype,
    write_checkpoint,
)
from .convert_slime import grown, model_order
from .errors import ConversionError
from .hub import is_repository, resolve_folder
from .keys import Aside, Rename, Rule
from .mapping import cast, check_complete, map_forward
from .prompts import (
    choose_template,
    generation_defaults,
    image_stats_of,
    load_tokenizer,
    place_image_token,
    prompt_settings,
    source_template,
)
from .tensors import Entries, folder_entries, read_json, read_object, release, shown
from .writing import MAX_SHARD_BYTES, Progress, new_folder


PREFIX_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Tokens before the patches in the features of a tower."""

_PROJECTOR = "multi_modal_projector.linear_{}.{}"
_OURS = "model.connector.adapter.mlp.linear_{}.{}"
RULES: list[Rule] = [
    Aside("vision_tower.vision_model.embeddings.position_ids"),
    Aside("model.vision_tower.vision_model.embeddings.position_ids"),
    *(Aside(f"{name}.head.**") for name in ("model.vision_tower.vision_model", "model.vision_tower")),
    *(Aside(f"{name}.head.**") for name in ("vision_tower.vision_model", "vision_tower")),
    Aside("language_model.model.layers.{}.self_attn.rotary_emb.inv_freq"),
    Aside("model.language_model.layers.{}.self_attn.rotary_emb.inv_freq"),
    Rename("model.image_newline", "model.connector.layout.separators.newline"),
    Rename("model.vision_tower.vision_model.**", "model.vision_tower.**"),
    Rename("model.vision_tower.**", "model.vision_tower.**"),
    Rename(f"model.{_PROJECTOR}", _OURS),
    Rename("model.language_model.**", "model.language_model.**"),
    Rename("lm_head.weight", "lm_head.weight"),
    Rename("image_newline", "model.connector.layout.separators.newline"),
    Rename("vision_tower.vision_model.**", "model.vision_tower.**"),
    Rename("vision_tower.**", "model.vision_tower.**"),
    Rename(_PROJECTOR, _OURS),
    Rename("language_model.model.**", "model.language_model.**"),
    Rename("language_model.lm_head.weight", "lm_head.weight"),
]
"""Both layouts on disk: that of transformers 5 first, then that of the checkpoints published before."""

HEADS = ("lm_head.weight", "language_model.lm_head.weight")


def convert_llava_next(
    source: str | Path,
    destination: str | Path,
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict:
    """Convert a LLaVA-NeXT checkpoint in Hugging Face format.

    Args:
        source (`str` or `Path`): A folder or a Hub repository.
        destination (`str` or `Path`): The folder to make; it appears only when it is whole.
        dtype (`str` or `torch.dtype`, *optional*): Dtype of all weights; by default every tensor keeps its own.
        progress (`Callable`, *optional*): Called with tensors done, tensors in all and a description.
        max_shard_bytes (`int`): Most bytes of tensors in one file.

    Returns:
        The report, which is also saved as `conversion_report.json`.

    Raises:
        ConversionError: If the checkpoint uses an option without a counterpart here, or is damaged.
    """
    wanted = parse_dtype(dtype)
    with new_folder(destination) as work:
        try:
            folder = resolve_folder(source, "The source")
            return _convert(folder, work, str(source), wanted, progress, max_shard_bytes, Path(destination).name)
        finally:
            release()


def _convert(
    folder: Path,
    work: Path,
    source: str,
    dtype: torch.dtype | None,
    progress: Progress | None,
    max_shard_bytes: int,
    name: str,
) -> dict:
    values = read_json(folder / "config.json")
    if values.get("model_type") != "llava_next":
        raise ConversionError(
            f"config.json describes a model of type {values.get('model_type')!r}, not llava_next. Checkpoints of the "
            "original LLaVA code are not read; use the ones in Hugging Face format."
        )
    theirs = build_config(
        AutoConfig.from_pretrained,
        "The configuration",
        pretrained_model_name_or_path=folder,
        trust_remote_code=False,
    )
    settings = settings_of(theirs, folder)
    entries = folder_entries(folder)
    rules = tie_rules(theirs, entries)
    text_config = theirs.text_config
    plain_head(text_config)
    tokenizer = load_tokenizer(folder)
    image_token_id, rows = _image_token(theirs, tokenizer)
    added = rows - text_config.vocab_size
    text_config.vocab_size = rows
    template = source_template(folder) or (choose_template(tokenizer) if tokenizer is not None else None)
    ours = model_config(
        dtype or common_dtype(entries, values.get("dtype", values.get("torch_dtype"))),
        vision_config=theirs.vision_config,
        text_config=text_config,
        image_token_id=image_token_id,
        **prompt_settings(tokenizer, template),
        **settings,
    )
    mapped = grown(map_forward(rules, entries), added)
    check_complete(mapped, model_shapes(ours), rules, f"the source {folder.name}")
    mapped.aside.clear()
    speech = Speech(tokenizer, image_stats_of(folder), generation_defaults(folder, ours, tokenizer, template))
    report = {
        "conversion": "llava-next",
        "source": folder.name,
        "image_token_id": image_token_id,
        "added_rows": added,
        "source_config": values,
    }
    card = {
        "title": name,
        "summary": "A LLaVA-NeXT model in the format of hires_lmm. A budget per image works without training.",
        "bases": [{"part": "whole model", "name": source}] if is_repository(source) and folder != Path(source) else [],
    }
    ordered: Entries = {key: mapped.entries[key] for key in model_order(mapped, entries)}
    return write_checkpoint(work, ours, mapped, cast(ordered, dtype), speech, report, card, max_shard_bytes, progress)


def plain_head(text_config: Any) -> None:
    """Undo what a language model does to its logits; transformers' LLaVA-NeXT class takes them as the head gives them.

    Args:
        text_config (`PreTrainedConfig`): The language model's configuration; changed in place.
    """
    for name in (*MULTIPLIERS, *DIVIDERS):
        if getattr(text_config, name, None) is not None:
            setattr(text_config, name, 1.0)
    if getattr(text_config, "final_logit_softcapping", None) is not None:
        text_config.final_logit_softcapping = None


def settings_of(theirs: Any, folder: Path) -> dict:
    """Read the multimodal options of a LLaVA-NeXT configuration.

    Args:
        theirs (`LlavaNextConfig`): The configuration.
        folder (`Path`): Its folder, whose image processor must agree.

    Returns:
        Fields of `HiResLmmConfig`.

    Raises:
        ConversionError: If an option has no counterpart here.
    """
    tower = theirs.vision_config.model_type
    if tower not in PREFIX_TOKENS:
        raise ConversionError(f"The tower {tower!r} is not supported; known are {', '.join(PREFIX_TOKENS)}.")
    strategy, layer = theirs.vision_feature_select_strategy, theirs.vision_feature_layer
    fitting = "default" if PREFIX_TOKENS[tower] else "full"
    if strategy != fitting:
        raise ConversionError(
            f"vision_feature_select_strategy={strategy!r} with a {tower} tower gives features that are no grid of "
            f"patches; only {fitting!r} can be converted for this tower."
        )
    if isinstance(layer, (list, tuple)):
        raise ConversionError(f"vision_feature_layer={layer!r} joins several layers, which no part here does.")
    pinpoints = _plain_pinpoints(theirs.image_grid_pinpoints, "config.json")
    _compare_processor(folder, pinpoints, theirs.vision_config.image_size)
    adapter = {"part": "mlp", "hidden_act": theirs.projector_hidden_act, "bias": theirs.multimodal_projector_bias}
    return {
        "planner": {"name": "llava_next", "pinpoints": pinpoints},
        "connector_config": {
            "adapter": adapter,
            "layout": {"separators": {"newline": {"place": "token_row_end", "on": "crops"}}},
        },
        "vision_feature_layer": layer,
    }


def _plain_pinpoints(value: Any, where: str) -> list[list[int]]:
    """Canvas sizes as lists of two integers."""
    points = value if isinstance(value, (list, tuple)) else [value]
    if not points or not all(isinstance(point, (list, tuple)) and len(point) == 2 for point in points):
        raise ConversionError(f"image_grid_pinpoints={shown(value)} of {where} must be pairs of height and width.")
    return [list(point) for point in points]


def _compare_processor(folder: Path, pinpoints: list, image_size: int) -> None:
    """The saved image processor must cut images as the configuration says."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        values = read_json(folder / name) if (folder / name).is_file() else {}
        values = read_object(values, "image_processor", name) or values
        other = values.get("image_grid_pinpoints")
        if other is not None and _plain_pinpoints(other, name) != pinpoints:
            raise ConversionError(
                f"image_grid_pinpoints of config.json ({pinpoints}) and of {name} ({other}) differ; make them agree."
            )
        size = values.get("crop_size") or values.get("size") or {}
        sides = [side for side in size.values() if side is not None] if isinstance(size, dict) else [size]
        if any(side != image_size for side in sides):
            raise ConversionError(f"{name} makes views of {size}, but the vision tower reads {image_size} pixels.")


def tie_rules(theirs: Any, entries: Entries) -> list[Rule]:
    """The key table; where input and output embeddings are one tensor, a second copy of it is not used.

    Args:
        theirs (`LlavaNextConfig`): The configuration; `text_config.tie_word_embeddings` is set to what holds.
        entries (`Entries`): The tensors.
    """
    text = theirs.text_config
    has_head = any(name in entries for name in HEADS)
    tied = theirs.tie_word_embeddings or (text.tie_word_embeddings and not has_head)
    text.tie_word_embeddings = tied
    return [*(Aside(name) for name in HEADS), *RULES] if tied else RULES


def _image_token(theirs: Any, tokenizer: Any | None) -> tuple[int, int]:
    """Id of the image token and rows the embeddings need."""
    rows = theirs.text_config.vocab_size
    if tokenizer is None:
        return theirs.image_token_index, max(rows, theirs.image_token_index + 1)
    number, needed = place_image_token(tokenizer, rows)
    if number != theirs.image_token_index:
        raise ConversionError(
            f"The tokenizer has the image token as id {number}, but image_token_index={theirs.image_token_index}; one "
            "of the two belongs to another checkpoint."
        )
    return number, needed

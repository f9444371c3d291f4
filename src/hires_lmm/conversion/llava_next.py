"""`convert llava-next`: any LLaVA-NeXT checkpoint in Hugging Face format becomes one of ours.

Views, order and numbers stay as they are. A budget (`max_image_tokens`) works afterwards without training, because the
`saliency` score has no parameters; anything that reads the question has to be trained.
"""

from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..modeling.logits_hires_lmm import DIVIDERS, MULTIPLIERS
from ..processing.processor_options_hires_lmm import choose_template
from ..processing.tower_table_hires_lmm import TOWERS
from .errors import ConversionError, readable
from .hub import is_repository, resolve_folder
from .keys import Rename, Rule, Unused
from .pipeline import Source, convert
from .prompts import image_stats_of, load_tokenizer, source_template
from .tensors import Entries, folder_entries, read_if_present, read_json


TOWERS_READ = ("clip_vision_model", "siglip_vision_model")
_PROJECTOR = "multi_modal_projector.linear_{}.{}"
_OURS = "model.connector.adapter.mlp.linear_{}.{}"
RULES: list[Rule] = [
    Unused("vision_tower.vision_model.embeddings.position_ids"),
    Unused("model.vision_tower.vision_model.embeddings.position_ids"),
    *(Unused(f"{name}.head.**") for name in ("model.vision_tower.vision_model", "model.vision_tower")),
    *(Unused(f"{name}.head.**") for name in ("vision_tower.vision_model", "vision_tower")),
    Unused("language_model.model.layers.{}.self_attn.rotary_emb.inv_freq"),
    Unused("model.language_model.layers.{}.self_attn.rotary_emb.inv_freq"),
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


def convert_llava_next(source: str | Path, destination: str | Path, **options: Any) -> dict:
    """Convert a LLaVA-NeXT checkpoint in Hugging Face format.

    Args:
        source (`str` or `Path`): A folder or a Hub repository.
        destination (`str` or `Path`): The folder to make; it appears only when it is whole.
        options: `dtype`, `progress` and `max_shard_bytes`, as in `convert`, which also says what comes back.

    Raises:
        ConversionError: If the checkpoint uses an option without a counterpart here, or is damaged.
    """
    return convert(partial(read_llava_next, source), destination, **options)


def read_llava_next(source: str | Path) -> Source:
    """Read a LLaVA-NeXT checkpoint."""
    folder = resolve_folder(source, "The source")
    values = read_json(folder / "config.json")
    if values.get("model_type") != "llava_next":
        raise ConversionError(
            f"config.json describes a model of type {values.get('model_type')!r}, not llava_next. Checkpoints of the "
            "original LLaVA code are not read; use the ones in Hugging Face format."
        )
    with readable("The configuration"):
        theirs = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    settings, entries = settings_of(theirs, folder), folder_entries(folder)
    rules = tie_rules(theirs, entries)
    plain_head(theirs.text_config)
    tokenizer = load_tokenizer(folder)
    template = source_template(folder) or (choose_template(tokenizer) if tokenizer is not None else None)
    return Source(
        format="llava-next",
        name=folder.name,
        summary="A LLaVA-NeXT model in the format of hires_lmm. A budget per image works without training.",
        entries=entries,
        rules=rules,
        vision_config=theirs.vision_config,
        text_config=theirs.text_config,
        settings=settings,
        dtype=values.get("dtype", values.get("torch_dtype")),
        tokenizer=tokenizer,
        chat_template=template,
        image_token_id=theirs.image_token_index,
        image_stats=image_stats_of(folder),
        generation=folder,
        bases=[{"part": "whole model", "name": str(source)}] if is_repository(source) else [],
        report={"source_config": values},
    )


def plain_head(text_config: Any) -> None:
    """Undo what a language model does to its logits; transformers' LLaVA-NeXT takes them as the head gives them."""
    for name in (*MULTIPLIERS, *DIVIDERS):
        if getattr(text_config, name, None) is not None:
            setattr(text_config, name, 1.0)
    if getattr(text_config, "final_logit_softcapping", None) is not None:
        text_config.final_logit_softcapping = None


def settings_of(theirs: Any, folder: Path) -> dict:
    """The multimodal options as fields of `HiResLmmConfig`; the image processor in the folder must agree with them."""
    tower = theirs.vision_config.model_type
    if tower not in TOWERS_READ:
        raise ConversionError(f"The tower {tower!r} is not supported; known are {', '.join(TOWERS_READ)}.")
    strategy, layer = theirs.vision_feature_select_strategy, theirs.vision_feature_layer
    fitting = "default" if TOWERS[tower].prefix else "full"
    if strategy != fitting:
        raise ConversionError(
            f"vision_feature_select_strategy={strategy!r} with a {tower} tower gives features that are no grid of "
            f"patches; only {fitting!r} can be converted for this tower."
        )
    if isinstance(layer, (list, tuple)):
        raise ConversionError(f"vision_feature_layer={layer!r} joins several layers, which no part here does.")
    pinpoints = [list(point) for point in theirs.image_grid_pinpoints]
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


def _compare_processor(folder: Path, pinpoints: list, image_size: int) -> None:
    """The saved image processor must cut images as the configuration says."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        values = read_if_present(folder / name)
        values = values.get("image_processor") or values
        other = values.get("image_grid_pinpoints")
        if other is not None and [list(point) for point in other] != pinpoints:
            raise ConversionError(
                f"image_grid_pinpoints of config.json ({pinpoints}) and of {name} ({other}) differ; make them agree."
            )
        size = values.get("crop_size") or values.get("size") or {}
        sides = [side for side in size.values() if side is not None] if isinstance(size, dict) else [size]
        if any(side != image_size for side in sides):
            raise ConversionError(f"{name} makes views of {size}, but the vision tower reads {image_size} pixels.")


def tie_rules(theirs: Any, entries: Entries) -> list[Rule]:
    """The key table; where both embeddings are one tensor, a second copy is unused (and `text_config` is told so)."""
    text = theirs.text_config
    has_head = any(name in entries for name in HEADS)
    tied = theirs.tie_word_embeddings or (text.tie_word_embeddings and not has_head)
    text.tie_word_embeddings = tied
    return [*(Unused(name) for name in HEADS), *RULES] if tied else RULES

"""Checkpoints of the LLaVA family in Hugging Face format: a tower, a projector and a language model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..modeling.logits_hires_lmm import DIVIDERS, MULTIPLIERS
from ..processing.template_choice_hires_lmm import choose_template
from .errors import ConversionError, readable
from .hub import is_repository, resolve_folder
from .keys import Rename, Rule, Unused
from .pipeline import Source
from .prompts import image_stats_of, load_tokenizer, source_template
from .tensors import Entries, folder_entries, read_json


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


def read_hugging_face(
    source: str | Path, model_type: str, title: str, original: str, settings_of: Callable[[Any, Path], dict]
) -> Source:
    """Read a checkpoint that transformers loads as `model_type`.

    Args:
        source (`str` or `Path`): A folder or a Hub repository.
        model_type (`str`): What `config.json` has to say.
        title (`str`): The first sentences of the model card.
        original (`str`): Whose code writes checkpoints of that name that are not read.
        settings_of (`Callable`): From their configuration and the folder to settings of `HiResLmmConfig`; the adapter
            is added.

    Raises:
        ConversionError: If the checkpoint is of another kind, or is damaged.
    """
    folder = resolve_folder(source, "The source")
    values = read_json(folder / "config.json")
    if values.get("model_type") != model_type:
        raise ConversionError(
            f"config.json describes a model of type {values.get('model_type')!r}, not {model_type}. Checkpoints of "
            f"{original} code are not read; use the ones in Hugging Face format."
        )
    with readable("The configuration"):
        theirs: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    settings, entries = settings_of(theirs, folder), folder_entries(folder)
    connector = settings.setdefault("connector_config", {})
    connector["adapter"] = {
        "part": "mlp",
        "hidden_act": theirs.projector_hidden_act,
        "bias": theirs.multimodal_projector_bias,
    }
    rules = _tie_rules(theirs, entries)
    _plain_head(theirs.text_config)
    tokenizer = load_tokenizer(folder)
    template = source_template(folder) or (choose_template(tokenizer).template if tokenizer is not None else None)
    return Source(
        format=model_type.replace("_", "-"),
        name=folder.name,
        summary=title,
        entries=entries,
        rules=rules,
        vision_config=theirs.vision_config,
        text_config=theirs.text_config,
        settings=settings,
        dtype=values.get("dtype", values.get("torch_dtype")),
        tokenizer=tokenizer,
        chat_template=template,
        image_token_id=theirs.image_token_id,
        image_stats=image_stats_of(folder),
        generation=folder,
        bases=[{"part": "whole model", "name": str(source)}] if is_repository(source) else [],
        report={"source_config": values},
    )


def _tie_rules(theirs: Any, entries: Entries) -> list[Rule]:
    """The key table; where both embeddings are one tensor, a second copy is unused (and `text_config` is told so)."""
    text = theirs.text_config
    has_head = any(name in entries for name in HEADS)
    tied = theirs.tie_word_embeddings or (text.tie_word_embeddings and not has_head)
    text.tie_word_embeddings = tied
    return [*(Unused(name) for name in HEADS), *RULES] if tied else RULES


def _plain_head(text_config: Any) -> None:
    """Undo what a language model does to its logits; transformers' LLaVAs take them as the head gives them."""
    for name in (*MULTIPLIERS, *DIVIDERS):
        if getattr(text_config, name, None) is not None:
            setattr(text_config, name, 1.0)
    if getattr(text_config, "final_logit_softcapping", None) is not None:
        text_config.final_logit_softcapping = None

"""`convert fusion`: a released checkpoint of the token-scaling paper becomes one of ours.

Source: github.com/tenghuilee/ScalingCapFusedVisionLM at 42a2596.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from .errors import ConversionError
from .fusion_source import QUESTION_FOLDER, Released, question_tokens, read_released
from .fusion_template import LLAMA2_VISION
from .hub import is_repository, resolve_folder
from .keys import Rename, Rule, Squeeze, TakeRows, Unused
from .pipeline import Source, convert
from .prompts import image_stats_of, load_tokenizer
from .tensors import Entries, entry_of, folder_entries, read_json


_VISION = "imgque_backbone.clip_model.vision_model."
_FUSION = "imgque_backbone.imgque_model."
_OURS = "model.connector."
_OP = f"{_OURS}token_ops.0."
UNUSED_NORM = "model.vision_tower.post_layernorm."


def key_table(slots: list[int]) -> list[Rule]:
    """The key table of a released checkpoint, whose slots stand in these rows of its table of words."""
    words = TakeRows(
        f"{_FUSION}embed_tokens.weight", (f"{_OP}model.embed_tokens.weight", f"{_OP}queries"), tuple(slots)
    )
    return [
        Unused(f"{_VISION}embeddings.position_ids"),
        Unused("llm_backbone.model.layers.{}.self_attn.rotary_emb.inv_freq"),
        Unused(f"{_FUSION}layers.{{}}.self_attn.rotary_emb.inv_freq"),
        Squeeze(f"{_VISION}token_LF", f"{_OURS}layout.separators.view_end", axes=2),
        Rename(f"{_VISION}pos_layrnorm.{{}}", f"{_OURS}view_ops.0.norm.{{}}"),
        Rename(f"{_VISION}vision_embed_merge.weight", f"{_OURS}view_ops.0.conv.weight"),
        Rename(f"{_VISION}**", "model.vision_tower.**"),
        words,
        Rename(f"{_FUSION}layers.**", f"{_OP}model.layers.**"),
        Rename(f"{_FUSION}norm.weight", f"{_OP}model.norm.weight"),
        Rename("fusion_backbone.imgque_proj.weight", f"{_OP}output.weight"),
        Rename("llm_backbone.model.**", "model.language_model.**"),
        Rename("llm_backbone.lm_head.weight", "lm_head.weight"),
    ]


def convert_fusion(source: str | Path, destination: str | Path, **options: Any) -> dict:
    """Convert a released checkpoint of the token-scaling paper.

    Args:
        source (`str` or `Path`): A folder, with the tokenizer of questions in its folder `clip`.
        destination (`str` or `Path`): The folder to make; it appears only when it is whole.
        options: `dtype`, `progress` and `max_shard_bytes`, as in `convert`, which also says what comes back.

    Raises:
        ConversionError: If the checkpoint uses an option without a counterpart here, or is damaged.
    """
    return convert(partial(read_fusion, source), destination, **options)


def read_fusion(source: str | Path) -> Source:
    """Read a released checkpoint."""
    folder = resolve_folder(source, "The source")
    values, released = read_json(folder / "config.json"), read_released(folder)
    question_tokenizer, slots = question_tokens(folder, released)
    return Source(
        format="fusion",
        name=folder.name,
        summary=f"A fusion model in the format of hires_lmm, {released.num_queries} tokens an image that have read "
        "the question, converted from a checkpoint in the released format.",
        entries=folder_entries(folder),
        rules=key_table(slots),
        vision_config=released.vision_config,
        text_config=released.text_config,
        settings=settings_of(released),
        dtype=values.get("torch_dtype"),
        tokenizer=load_tokenizer(folder),
        chat_template=LLAMA2_VISION,
        image_stats=image_stats_of(folder),
        generation=folder,
        new_tensors=unused_norm,
        tokenizers={QUESTION_FOLDER: question_tokenizer},
        bases=[{"part": "whole model", "name": str(source)}] if is_repository(source) else [],
        report={"slots": slots, "source_config": values},
    )


def settings_of(released: Released) -> dict:
    """The multimodal options of a released checkpoint, as fields of `HiResLmmConfig`."""
    sizes, width = released.fusion, released.vision_config.hidden_size
    if sizes["hidden_size"] != width:
        raise ConversionError(
            f"The fusion transformer has width {sizes['hidden_size']}, the vision tower {width}; released ones agree."
        )
    fusion = {
        "part": "fusion",
        "num_queries": released.num_queries,
        "later_queries": released.later_queries,
        "num_layers": sizes["num_hidden_layers"],
        "num_heads": sizes["num_attention_heads"],
        "intermediate_size": sizes["intermediate_size"],
        "vocab_size": sizes["vocab_size"],
        "rms_norm_eps": sizes["rms_norm_eps"],
        "rope_theta": float(sizes["rope_theta"]),
    }
    return {
        "planner": {"name": "hd", "max_crops": released.max_crops},
        "vision_feature_layer": -1,
        "connector_config": {
            "view_ops": [{"part": "conv_merge", "norm_eps": released.vision_config.layer_norm_eps}],
            "adapter": {"part": "identity"},
            "layout": {"crop_order": "views", "separators": {"view_end": {"place": "view_end"}}},
            "token_ops": [fusion],
        },
    }


def unused_norm(config: Any) -> Entries:
    """The last norm that the tower's class has and that only its pooled output passes."""
    width, note = config.vision_config.hidden_size, "the release has none; it is not used"
    values = {"weight": torch.ones(width), "bias": torch.zeros(width)}
    return {UNUSED_NORM + name: entry_of(value.to(config.dtype), note=note) for name, value in values.items()}

"""`convert fusion`: a released checkpoint of the token-scaling paper becomes one of ours.

Source: github.com/tenghuilee/ScalingCapFusedVisionLM at 42a2596.
"""

from pathlib import Path
from typing import Any

import torch

from .checkpoint import Speech, common_dtype, model_config, model_shapes, parse_dtype, write_checkpoint
from .convert_slime import grown, model_order
from .errors import ConversionError
from .fusion_source import QUESTION_FOLDER, Released, question_tokens, read_released
from .fusion_template import LLAMA2_VISION
from .hub import is_repository, resolve_folder
from .keys import Aside, Rename, Rule, Squeeze, TakeRows
from .mapping import Mapped, cast, check_complete, map_forward
from .prompts import generation_defaults, image_stats_of, load_tokenizer, place_image_token, prompt_settings
from .tensors import Entries, entry_of, folder_entries, read_json, release
from .writing import MAX_SHARD_BYTES, Progress, new_folder


_VISION = "imgque_backbone.clip_model.vision_model."
_FUSION = "imgque_backbone.imgque_model."
_OURS = "model.connector."
_OP = f"{_OURS}token_ops.0."
UNUSED_NORM = "model.vision_tower.post_layernorm."


def key_table(slots: list[int]) -> list[Rule]:
    """The key table of a released checkpoint.

    Args:
        slots (`list[int]`): Row of each slot in the released table of word embeddings.

    Returns:
        Rules that cover every tensor of the checkpoint.
    """
    words = TakeRows(
        f"{_FUSION}embed_tokens.weight", (f"{_OP}model.embed_tokens.weight", f"{_OP}queries"), tuple(slots)
    )
    return [
        Aside(f"{_VISION}embeddings.position_ids"),
        Aside("llm_backbone.model.layers.{}.self_attn.rotary_emb.inv_freq"),
        Aside(f"{_FUSION}layers.{{}}.self_attn.rotary_emb.inv_freq"),
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


def settings_of(released: Released) -> dict:
    """The multimodal options of a released checkpoint.

    Args:
        released (`Released`): Its configuration.

    Returns:
        Fields of `HiResLmmConfig`.

    Raises:
        ConversionError: If widths do not fit.
    """
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


def add_unused_norm(mapped: Mapped, config: Any) -> None:
    """Give the tower the last norm that its class has and that only its pooled output passes.

    Args:
        mapped (`Mapped`): The tensors; changed in place.
        config (`HiResLmmConfig`): The configuration.
    """
    width, dtype = config.vision_config.hidden_size, config.dtype
    for name, tensor in (("weight", torch.ones(width)), ("bias", torch.zeros(width))):
        key = UNUSED_NORM + name
        mapped.entries[key] = entry_of(tensor.to(dtype), "")
        mapped.records.append(
            {
                "source": None,
                "file": "",
                "shape": [width],
                "dtype": str(dtype).removeprefix("torch."),
                "targets": [key],
                "transformation": "the release has none; it is not used",
            }
        )


def convert_fusion(
    source: str | Path,
    destination: str | Path,
    dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict:
    """Convert a released checkpoint of the token-scaling paper.

    Args:
        source (`str` or `Path`): A folder, with the tokenizer of questions in its folder `clip`.
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
    values, released = read_json(folder / "config.json"), read_released(folder)
    question_tokenizer, slots = question_tokens(folder, released)
    entries = folder_entries(folder)
    tokenizer, text_config = load_tokenizer(folder), released.text_config
    image_token_id, rows = place_image_token(tokenizer, text_config.vocab_size)
    added = rows - text_config.vocab_size
    text_config.vocab_size = rows
    ours = model_config(
        dtype or common_dtype(entries, values.get("torch_dtype")),
        vision_config=released.vision_config,
        text_config=text_config,
        image_token_id=image_token_id,
        **prompt_settings(tokenizer, LLAMA2_VISION),
        **settings_of(released),
    )
    rules = key_table(slots)
    mapped = grown(map_forward(rules, entries), added)
    ordered: Entries = {key: mapped.entries[key] for key in model_order(mapped, entries)}
    add_unused_norm(mapped, ours)
    check_complete(mapped, model_shapes(ours), rules, f"the source {folder.name}")
    ordered |= {key: entry for key, entry in mapped.entries.items() if key not in ordered}
    mapped.aside.clear()
    speech = Speech(tokenizer, image_stats_of(folder), generation_defaults(folder, ours, tokenizer, LLAMA2_VISION))
    report = {
        "conversion": "fusion",
        "source": folder.name,
        "image_token_id": image_token_id,
        "added_rows": added,
        "slots": slots,
        "source_config": values,
    }
    card = {
        "title": name,
        "summary": f"A fusion model in the format of hires_lmm, {released.num_queries} tokens an image that have read "
        "the question, converted from a checkpoint in the released format.",
        "bases": [{"part": "whole model", "name": source}] if is_repository(source) and folder != Path(source) else [],
    }
    question_tokenizer.save_pretrained(work / QUESTION_FOLDER)
    return write_checkpoint(work, ours, mapped, cast(ordered, dtype), speech, report, card, max_shard_bytes, progress)

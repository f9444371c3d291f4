"""Released checkpoints of the token-scaling paper: their configuration and their two tokenizers.

Source: github.com/tenghuilee/ScalingCapFusedVisionLM at 42a2596.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import text_config_of
from .errors import ConversionError
from .prompts import load_tokenizer
from .tensors import read_integer, read_json, read_object, shown
from .towers import tower_config


RELEASED_TYPE = "modeling_query_adapt_clip_llm"
INNER_TYPE = "modeling_image_hd_multi_query_clip"
FUSION_NAME = "img_multi_que_clip_fusion_linear"
QUESTION_FOLDER = "clip"
PLACEHOLDER = "<|placeholder_qed_{}|>"
HEAD_WIDTH = 64
SLOTS_LIMIT = 65_536
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Integers of the fusion transformer."""


@dataclass(frozen=True)
class Released:
    """The configuration of a released checkpoint, read.

    Args:
        vision_config: The tower.
        text_config: The language model.
        fusion (`dict`): Sizes of the fusion transformer, by their names in a Llama configuration.
        num_queries (`int`): Slots of the block of the first turn, the end slot included.
        later_queries (`int`): Slots of the block of later turns.
        has_placeholders (`bool`): Whether every slot has a token of its own; otherwise all are the padding token.
        max_crops (`int`): Most crops of an image.
    """

    vision_config: Any
    text_config: Any
    fusion: dict
    num_queries: int
    later_queries: int
    has_placeholders: bool
    max_crops: int


def read_released(folder: Path) -> Released:
    """Read the configuration of a released checkpoint.

    Args:
        folder (`Path`): The checkpoint.

    Raises:
        ConversionError: If it is of another class, or uses an option without a counterpart here.
    """
    values = read_json(folder / "config.json")
    inner = read_object(values, "imgque_config", "config.json")
    found = (values.get("model_type"), inner.get("model_type"), values.get("fusion_name"))
    if found != (RELEASED_TYPE, INNER_TYPE, FUSION_NAME):
        raise ConversionError(
            f"config.json describes {' with '.join(map(repr, found))}; released fusion checkpoints are "
            f"{RELEASED_TYPE!r} with {INNER_TYPE!r} with {FUSION_NAME!r}."
        )
    vision, language = _present(inner, "vision_config"), _present(values, "llm_config")
    _check_vision(vision)
    num_queries = read_integer(values, "length_que_end", "config.json", most=SLOTS_LIMIT)
    later = read_integer(values, "length_que_end_short", "config.json", most=SLOTS_LIMIT)
    if num_queries is None:
        raise ConversionError("config.json has no length_que_end, the number of slots; use the published file.")
    return Released(
        vision_config=tower_config({**vision, "model_type": "clip_vision_model"}, "vision_config"),
        text_config=text_config_of(language, _llm_type(language)),
        fusion=_fusion_sizes(inner),
        num_queries=num_queries,
        later_queries=num_queries if later is None else min(later, num_queries),
        has_placeholders=bool(values.get("append_special_padding", False)),
        max_crops=_max_crops(folder),
    )


def _present(values: dict, name: str) -> dict:
    found = read_object(values, name, "config.json")
    if not found:
        raise ConversionError(f"config.json has no {name}; use the published file.")
    return found


def _llm_type(values: dict) -> str:
    name = values.get("model_type")
    if not isinstance(name, str):
        raise ConversionError("llm_config of config.json names no model_type.")
    return name


def _check_vision(vision: dict) -> None:
    """The released switches of the tower have one setting with a counterpart."""
    width = vision.get("vembed_hidden_size")
    wanted = {
        "enable_token_crlf": True,
        "enable_local_merge": True,
        "vembed_merge_kernel_size": 3,
        "vembed_merge_stride": 2,
    }
    for name, value in wanted.items():
        if vision.get(name, value) != value:
            raise ConversionError(f"{name}={vision[name]!r} has no counterpart here; only {value!r} can be converted.")
    if width not in (None, vision.get("hidden_size", 768)):
        raise ConversionError(
            f"vembed_hidden_size={shown(width)} changes the width of the tower, which no part here does."
        )


def _fusion_sizes(inner: dict) -> dict:
    """Sizes of the fusion transformer: as saved, else as the released class derives them."""
    vision, text = _present(inner, "vision_config"), read_object(inner, "text_config", "config.json")
    width, inside = (read_integer(vision, name, "vision_config") for name in ("hidden_size", "intermediate_size"))
    if width is None or inside is None:
        raise ConversionError("vision_config of config.json lacks hidden_size or intermediate_size; add them.")
    derived = {
        "vocab_size": inner.get("vocab_size") or text.get("vocab_size"),
        "hidden_size": width,
        "intermediate_size": inside,
        "num_hidden_layers": inner.get("num_hidden_layers") or text.get("num_hidden_layers"),
        "num_attention_heads": width // HEAD_WIDTH,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
    }
    saved = read_object(inner, "imgque_config", "config.json")
    sizes = {name: saved.get(name, value) for name, value in derived.items()}
    for name in SIZES:
        read_integer(sizes, name, "imgque_config")
    for name in ("rms_norm_eps", "rope_theta"):
        size = sizes[name]
        if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 < size < 1e30:
            raise ConversionError(f"{name}={shown(size)} of imgque_config must be a number above 0.")
    keys = saved.get("num_key_value_heads") or sizes["num_attention_heads"]
    if keys != sizes["num_attention_heads"] or saved.get("rope_scaling") is not None or saved.get("attention_bias"):
        raise ConversionError(
            f"The fusion transformer has num_key_value_heads={shown(keys)}, rope_scaling="
            f"{shown(saved.get('rope_scaling'))}, attention_bias={shown(saved.get('attention_bias'))}; released ones "
            "have equal heads, none and no bias."
        )
    absent = [name for name in SIZES if sizes[name] is None]
    if absent:
        raise ConversionError(
            f"imgque_config of config.json does not say {', '.join(absent)}; use the published file."
        )
    return sizes


def _max_crops(folder: Path) -> int:
    """Most crops that the saved image processor cuts; 9 where there is none, as published."""
    path = folder / "preprocessor_config.json"
    return (read_integer(read_json(path), "num_crops", path.name) if path.is_file() else None) or 9


def question_tokens(folder: Path, released: Released) -> tuple[Any, list[int]]:
    """The tokenizer of questions and the ids of the slots.

    Args:
        folder (`Path`): The checkpoint, with the folder `clip`.
        released (`Released`): Its configuration.

    Returns:
        The tokenizer, and one id a slot: those of the placeholders, or of the padding token, and the end token last.

    Raises:
        ConversionError: If there is no such tokenizer, or it has fewer tokens than the slots need.
    """
    tokenizer = load_tokenizer(folder / QUESTION_FOLDER)
    if tokenizer is None:
        raise ConversionError(
            f"{folder.name} has no tokenizer in its folder {QUESTION_FOLDER!r}, with which its questions are read; "
            "download the whole checkpoint."
        )
    others, ids = released.num_queries - 1, (tokenizer.pad_token_id, tokenizer.eos_token_id)
    if not all(isinstance(number, int) for number in ids):
        raise ConversionError(f"The tokenizer in {QUESTION_FOLDER!r} has no padding or end token, which slots need.")
    if not released.has_placeholders:
        return tokenizer, [tokenizer.pad_token_id] * others + [tokenizer.eos_token_id]
    vocabulary, first = tokenizer.get_vocab(), len(tokenizer)
    names = [PLACEHOLDER.format(number) for number in range(others)]
    new = [name for name in names if name not in vocabulary]
    rows = {**vocabulary, **{name: first + number for number, name in enumerate(new)}}
    found = [rows[name] for name in names]
    if found and max(found) >= released.fusion["vocab_size"]:
        raise ConversionError(
            f"The slots need tokens up to id {max(found)}, but the fusion transformer has "
            f"{released.fusion['vocab_size']}; the tokenizer in {QUESTION_FOLDER!r} is that of another checkpoint."
        )
    return tokenizer, [*found, tokenizer.eos_token_id]

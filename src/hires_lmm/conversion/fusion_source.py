"""Released checkpoints of the token-scaling paper: their configuration and their two tokenizers.

Source: github.com/tenghuilee/ScalingCapFusedVisionLM at 42a2596.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .configs import text_config_of
from .errors import ConversionError
from .prompts import load_tokenizer
from .tensors import read_if_present, read_json
from .towers import tower_config


RELEASED_TYPE = "modeling_query_adapt_clip_llm"
INNER_TYPE = "modeling_image_hd_multi_query_clip"
FUSION_NAME = "img_multi_que_clip_fusion_linear"
QUESTION_FOLDER = "clip"
PLACEHOLDER = "<|placeholder_qed_{}|>"
HEAD_WIDTH = 64
MAX_CROPS = 9
"""Most crops of an image where no image processor says it, as published."""

TOWER_SWITCHES = {
    "enable_token_crlf": True,
    "enable_local_merge": True,
    "vembed_merge_kernel_size": 3,
    "vembed_merge_stride": 2,
}
"""The released switches of the tower have one setting with a counterpart."""


@dataclass(frozen=True)
class Released:
    """The configuration of a released checkpoint, read.

    `fusion` has the sizes of the fusion transformer by their names in a Llama configuration; `num_queries` and
    `later_queries` are the slots of the first turn's block and of later ones, the end slot counted.
    `has_placeholders`: every slot has a token of its own; otherwise all are the padding token.
    """

    vision_config: Any
    text_config: Any
    fusion: dict
    num_queries: int
    later_queries: int
    has_placeholders: bool
    max_crops: int


def read_released(folder: Path) -> Released:
    """Read the configuration of a released checkpoint; options without a counterpart here are refused."""
    values = read_json(folder / "config.json")
    inner = values.get("imgque_config") or {}
    found = (values.get("model_type"), inner.get("model_type"), values.get("fusion_name"))
    if found != (RELEASED_TYPE, INNER_TYPE, FUSION_NAME):
        text = "model_type={!r}, imgque_config.model_type={!r}, fusion_name={!r}"
        raise ConversionError(
            f"config.json has {text.format(*found)}; that of a released fusion checkpoint has "
            f"{text.format(RELEASED_TYPE, INNER_TYPE, FUSION_NAME)}."
        )
    absent = [name for name in ("length_que_end", "llm_config") if not values.get(name)]
    absent += [name for name in ("vision_config",) if not inner.get(name)]
    if absent:
        raise ConversionError(f"config.json has no {absent[0]}; use the published file.")
    vision, language, slots = inner["vision_config"], values["llm_config"], values["length_que_end"]
    _check_tower(vision)
    return Released(
        vision_config=tower_config({**vision, "model_type": "clip_vision_model"}, "vision_config"),
        text_config=text_config_of(language, language.get("model_type")),
        fusion=_fusion_sizes(inner),
        num_queries=slots,
        later_queries=min(values.get("length_que_end_short") or slots, slots),
        has_placeholders=bool(values.get("append_special_padding", False)),
        max_crops=read_if_present(folder / "preprocessor_config.json").get("num_crops") or MAX_CROPS,
    )


def _check_tower(vision: dict) -> None:
    for name, value in TOWER_SWITCHES.items():
        if vision.get(name, value) != value:
            raise ConversionError(f"{name}={vision[name]!r} has no counterpart here; only {value!r} can be converted.")
    width = vision.get("vembed_hidden_size")
    if width not in (None, vision.get("hidden_size", 768)):
        raise ConversionError(f"vembed_hidden_size={width!r} changes the width of the tower, which no part here does.")


def _fusion_sizes(inner: dict) -> dict:
    """Sizes of the fusion transformer: as saved, else as the released class derives them."""
    vision, text, saved = inner["vision_config"], inner.get("text_config") or {}, inner.get("imgque_config") or {}
    derived = {
        "vocab_size": inner.get("vocab_size") or text.get("vocab_size"),
        "hidden_size": vision["hidden_size"],
        "intermediate_size": vision["intermediate_size"],
        "num_hidden_layers": inner.get("num_hidden_layers") or text.get("num_hidden_layers"),
        "num_attention_heads": vision["hidden_size"] // HEAD_WIDTH,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }
    sizes = {name: saved.get(name, value) for name, value in derived.items()}
    absent = [name for name, value in sizes.items() if value is None]
    if absent:
        raise ConversionError(
            f"imgque_config of config.json does not say {', '.join(absent)}; use the published file."
        )
    keys = saved.get("num_key_value_heads") or sizes["num_attention_heads"]
    if keys != sizes["num_attention_heads"] or saved.get("rope_scaling") is not None or saved.get("attention_bias"):
        raise ConversionError(
            f"The fusion transformer has num_key_value_heads={keys!r}, rope_scaling={saved.get('rope_scaling')!r}, "
            f"attention_bias={saved.get('attention_bias')!r}; released ones have equal heads, none and no bias."
        )
    return sizes


def question_tokens(folder: Path, released: Released) -> tuple[Any, list[int]]:
    """The tokenizer of questions and one id a slot: placeholders (or the padding token), and the end token last."""
    tokenizer = load_tokenizer(folder / QUESTION_FOLDER)
    if tokenizer is None:
        raise ConversionError(
            f"{folder.name} has no tokenizer in its folder {QUESTION_FOLDER!r}, with which its questions are read; "
            "download the whole checkpoint."
        )
    others, end = released.num_queries - 1, tokenizer.eos_token_id
    if end is None or tokenizer.pad_token_id is None:
        raise ConversionError(f"The tokenizer in {QUESTION_FOLDER!r} has no padding or end token, which slots need.")
    if not released.has_placeholders:
        return tokenizer, [tokenizer.pad_token_id] * others + [end]
    names = [PLACEHOLDER.format(number) for number in range(others)]
    rows = tokenizer.get_vocab()
    new = [name for name in names if name not in rows]  # the released code adds them behind the others
    rows |= {name: len(tokenizer) + number for number, name in enumerate(new)}
    found = [rows[name] for name in names]
    if found and max(found) >= released.fusion["vocab_size"]:
        raise ConversionError(
            f"The slots need tokens up to id {max(found)}, but the fusion transformer has "
            f"{released.fusion['vocab_size']}; the tokenizer in {QUESTION_FOLDER!r} is that of another checkpoint."
        )
    return tokenizer, [*found, end]

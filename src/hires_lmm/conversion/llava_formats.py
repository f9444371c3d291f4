"""Released checkpoints of MQT-LLaVA, LLaVA-UHD v1, INF-LLaVA and LLaVA-Mini: one description each."""

from typing import Any

from .keys import Rename, Rule, Transpose
from .llava_format import LlavaFormat
from .llava_keys import (
    LLAVA,
    OURS,
    PROJECTOR,
    PROJECTORS,
    attention_rules,
    projector_part,
    projector_type,
    renames,
)
from .llava_options import COMMON, ReleasedOptions
from .llava_templates import LLAMA3_VICUNA, LLAMA31_MINI
from .prompts import released_template
from .slime_format import SLIME


VIEW_OP = f"{OURS}view_ops.0."
SQUARES = {"pad": "pad", "square": "crop"}
"""`image_aspect_ratio` -> what planners call `square`."""

ONE_VIEW = "an image is one view here, so only 'pad' and 'square' have a counterpart"


def _square(options: dict) -> dict:
    """How an image becomes a square."""
    return {"square": SQUARES[options["image_aspect_ratio"]]}


def _options(*absent: str, **own: Any) -> ReleasedOptions:
    """The options of the LLaVA code with further ones, of images that are one square."""
    defaults = {key: value for key, value in {**COMMON, **own}.items() if key not in absent}
    fixed: dict[str, tuple[Any, str]] = {"mm_patch_merge_type": ("flat", ONE_VIEW)}
    choices = {} if "image_aspect_ratio" in absent else {"image_aspect_ratio": (tuple(SQUARES), ONE_VIEW)}
    irrelevant = dict.fromkeys(absent, "the released code of these models does not read it")
    return ReleasedOptions(defaults, fixed, irrelevant, choices=choices)


def _way_back(config: Any, **own: Any) -> dict:
    """The options of the LLaVA code for a configuration of ours, and some more."""
    ratios = {ours: theirs for theirs, ours in SQUARES.items()}
    kept = ("mm_vision_select_feature", "mm_use_im_start_end", "use_mm_proj", "mm_patch_merge_type")
    return {
        **{name: COMMON[name] for name in kept},
        "mm_projector_type": projector_type(config.connector_config.adapter),
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_hidden_size": config.vision_config.hidden_size,
        "image_aspect_ratio": ratios.get(config.planner.get("square"), "pad"),
        **own,
    }


# ---- MQT-LLaVA

MQT_RULES: list[Rule] = [
    *LLAVA,
    *renames(
        "model.query_abstractor.",
        VIEW_OP,
        {
            "query": "queries",
            "pos_embed": "positions",
            "ln_q.{}": "query_norm.{}",
            "ln_k.{}": "key_norm.{}",
            "ln_v.{}": "value_norm.{}",
        },
    ),
    *attention_rules("model.query_abstractor.attn.", f"{VIEW_OP}attention."),
    Transpose("model.query_abstractor.proj", f"{OURS}adapter.linear.weight"),
]

MQT = LlavaFormat(
    name="mqt",
    title="MQT-LLaVA",
    origin="gordonhu608/MQT-LLaVA at 92c35d0, llava/model/llava_arch.py and multimodal_projector/builder.py",
    model_types=("llava_llama",),
    architecture="LlavaLlamaForCausalLM",
    options=_options(),
    settings=lambda options, text_config: {
        "planner": {"views": "global", **_square(options)},
        "vision_feature_layer": options["mm_vision_select_layer"],
    },
    rules=lambda options: MQT_RULES,
    way_back=_way_back,
    preset="mqt",
    stage_files=("query_abstractor.bin",),
    positions={"query_abstractor.query": True},
)


# ---- LLaVA-UHD v1

UHD_RULES: list[Rule] = [
    *LLAVA,
    *renames(
        PROJECTOR,
        VIEW_OP,
        {
            "query": "queries",
            "pos_embed": "positions",
            "kv_proj.weight": "input_proj.weight",
            "ln_q.{}": "query_norm.{}",
            "ln_kv.{}": "key_norm.{}",
            "ln_post.{}": "output_norm.{}",
        },
    ),
    *attention_rules(f"{PROJECTOR}attn.", f"{VIEW_OP}attention."),
    Transpose(f"{PROJECTOR}proj", f"{VIEW_OP}output_proj.weight"),
]
RESAMPLER = "adapt_spatial_resampler"

UHD = LlavaFormat(
    name="llava-uhd",
    title="LLaVA-UHD v1",
    origin="thunlp/LLaVA-UHD at 30a3bc3, llava/model/multimodal_projector/adapt_spatial_resampler.py and builder.py",
    model_types=("llava_llama", "llava"),
    architecture="LlavaLlamaForCausalLM",
    options=_options("image_aspect_ratio", mm_projector_type="linear").only(
        "mm_projector_type", RESAMPLER, "another adapter belongs to another model"
    ),
    settings=lambda options, text_config: {"vision_feature_layer": options["mm_vision_select_layer"]},
    rules=lambda options: UHD_RULES,
    way_back=lambda config: _way_back(config, mm_projector_type=RESAMPLER),
    preset="llava_uhd",
    positions={"mm_projector.query": False},
)


# ---- INF-LLaVA

INF_RULES: list[Rule] = [
    *LLAVA,
    *renames(
        "model.spatial_embed.",
        VIEW_OP,
        {
            "attention.linears.0.{}": "attention.q_proj.{}",
            "attention.linears.1.{}": "attention.k_proj.{}",
            "attention.linears.2.{}": "attention.v_proj.{}",
            "attention.linears.3.{}": "attention.o_proj.{}",
            "attention.ln.{}": "attention_norm.{}",
            "ffn_crop.{}.{}": "local_mlp.{}.{}",
            "ffn_stride.{}.{}": "global_mlp.{}.{}",
            "ln_fuse.{}": "output_norm.{}",
        },
    ),
]

INF = LlavaFormat(
    name="inf-llava",
    title="INF-LLaVA",
    origin="WeihuangLin/INF-LLaVA at 4b2bde6, INF_llava/model/llava_arch.py",
    model_types=("llava_llama", "llava"),
    architecture="LlavaLlamaForCausalLM",
    options=_options(),
    settings=lambda options, text_config: {
        "planner": _square(options),
        "vision_feature_layer": options["mm_vision_select_layer"],
        "connector_config": {"adapter": projector_part(options["mm_projector_type"])},
    },
    rules=lambda options: [*INF_RULES, *PROJECTORS[options["mm_projector_type"]][1]],
    way_back=_way_back,
    preset="inf_llava",
    template=lambda tokenizer: _by_family(tokenizer, LLAMA3_VICUNA),
)


# ---- LLaVA-Mini

MINI_RULES: list[Rule] = [
    *LLAVA,
    *renames(
        "model.compressor.",
        VIEW_OP,
        {
            "query": "queries",
            "pos_embed": "positions",
            "ln_q.{}": "query_norm.{}",
            "ln_kv.{}": "key_norm.{}",
        },
    ),
    *attention_rules("model.compressor.attn.", f"{VIEW_OP}attention."),
    Rename("model.prefusion_layers.**", f"{OURS}token_ops.0.model.layers.**"),
]


def _mini_settings(options: dict, text: Any) -> dict:
    rope = dict(text.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.get("rope_type", "default")
    fuser = {
        "part": "prompt_fuser",
        "num_layers": options["prefusion_layer_num"],
        "num_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "intermediate_size": text.intermediate_size,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else rope,
        "compat": "release",
    }
    return {
        "planner": {"views": "global", **_square(options)},
        "question_scope": "prompt",
        "vision_feature_layer": options["mm_vision_select_layer"],
        "connector_config": {
            "view_ops": [{"part": "mini_compressor", "num_queries": options["compressor_size"] ** 2}],
            "adapter": projector_part(options["mm_projector_type"]),
            "token_ops": [fuser],
        },
    }


def _mini_back(config: Any) -> dict:
    connector = config.connector_config.resolve()
    return _way_back(
        config,
        compressor_size=round(connector.view_ops[0].options.num_queries ** 0.5) if connector.view_ops else 1,
        prefusion_layer_num=connector.token_ops[0].options.num_layers if connector.token_ops else 4,
        resolution_ratio=1,
    )


MINI = LlavaFormat(
    name="llava-mini",
    title="LLaVA-Mini",
    origin="ictnlp/LLaVA-Mini at 47da113, llavamini/model/llavamini_arch.py",
    model_types=("llava_mini_llama",),
    architecture="LlavaMiniLlamaForCausalLM",
    options=_options(compressor_size=2, prefusion_layer_num=4, resolution_ratio=1).only(
        "resolution_ratio",
        1,
        "with more the released code squares each block of the image by itself, which no planner here does",
    ),
    settings=_mini_settings,
    rules=lambda options: [*MINI_RULES, *PROJECTORS[options["mm_projector_type"]][1]],
    way_back=_mini_back,
    preset="llava_mini",
    template=lambda tokenizer: _by_family(tokenizer, LLAMA31_MINI),
    positions={"compressor.query": False},
    marker="compressor_size",
)


def _by_family(tokenizer: Any, llama3: str) -> str:
    """The published template for Llama-3; models on Vicuna were trained with its own."""
    template = released_template(tokenizer)
    return llama3 if template == "llama3" else template


FORMATS = {form.name: form for form in (SLIME, MQT, UHD, INF, MINI)}
"""The formats of the LLaVA code by the name of their command."""

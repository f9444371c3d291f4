"""Small checkpoints as MQT-LLaVA, LLaVA-UHD v1, INF-LLaVA, LLaVA-Mini and MG-LLaVA release theirs.

What lies between the halves has the weights of the golden sets, under the keys of the released code; the halves are
random. `RELEASED` holds the keys written out, not taken from the converters.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from builders import randomise
from builders.text import tiny_tokenizer
from golden.base import GoldenSet
from hires_lmm.modeling.attention_hires_lmm import sincos_positions


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Release:
    """One format: its golden set, widths, prefixes (golden -> released), options, and the family of its tokenizer."""

    golden: str
    vision: int
    text: dict
    prefixes: dict[str, str]
    options: dict
    queries: tuple[str, bool] | None = None
    family: str = "vicuna"
    model_type: str = "llava_llama"
    grid: int = 24
    others: dict[str, tuple] = field(default_factory=dict)


LLAVA_OPTIONS = {
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_patch_merge_type": "flat",
    "use_mm_proj": True,
    "tune_mm_mlp_adapter": False,
    "image_aspect_ratio": "pad",
    "tokenizer_model_max_length": 2048,
}

RELEASED = {
    "mqt": Release(
        "mqt",
        64,
        {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 32},
        {"": "model.query_abstractor."},
        {"mm_projector_type": "linear", "query_abstractor_type": "matry_query", "num_visual_tokens": "second_stage"},
        ("model.query_abstractor.", True),
    ),
    "llava-uhd": Release(
        "llava_uhd",
        20,
        {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 29900},
        {"resampler.": "model.mm_projector."},
        {"mm_projector_type": "adapt_spatial_resampler"},
        ("model.mm_projector.", False),
    ),
    "inf-llava": Release(
        "inf_llava",
        16,
        {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16},
        {"spatial_embed.": "model.spatial_embed.", "mm_projector.": "model.mm_projector."},
        {"mm_projector_type": "linear"},
        family="llama3",
    ),
    "llava-mini": Release(
        "llava_mini",
        32,
        {
            "hidden_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 80,
            "rms_norm_eps": 1e-6,
            "rope_theta": 500000.0,
        },
        {
            "compressor_c1.": "model.compressor.",
            "prefusion_layers.": "model.prefusion_layers.",
            "mm_projector.": "model.mm_projector.",
        },
        {
            "mm_projector_type": "mlp2x_gelu",
            "compressor_size": 1,
            "prefusion_layer_num": 2,
            "resolution_ratio": 1,
            "image_aspect_ratio": "square",
        },
        ("model.compressor.", False),
        family="llama3",
        model_type="llava_mini_llama",
        grid=8,
    ),
    "mg-llava": Release(
        "mg_convgate",
        48,
        {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 16},
        {"fuse_module.": "fuse_module."},
        {},
        others={
            "projector.model.0.weight": (32, 48),
            "projector.model.0.bias": (32,),
            "projector.model.2.weight": (32, 32),
            "projector.model.2.bias": (32,),
            "bbox_projector.model.0.weight": (32, 64),
            "bbox_projector.model.0.bias": (32,),
            "bbox_projector.model.2.weight": (32, 32),
            "bbox_projector.model.2.bias": (32,),
        },
    ),
}


@cache
def golden(name: str) -> GoldenSet:
    """The golden set of a format."""
    return GoldenSet(RELEASED[name].golden)


def tokenizer_of(name: str):
    """A tokenizer as the released checkpoint has it, without an image token."""
    return tiny_tokenizer(None, image_token=False, family=RELEASED[name].family)


def text_config(name: str) -> LlamaConfig:
    values = {"vocab_size": len(tokenizer_of(name)), "num_hidden_layers": 1, "max_position_embeddings": 4096}
    values |= RELEASED[name].text
    theta = values.pop("rope_theta", 10000.0)
    return LlamaConfig(
        **values, rope_parameters={"rope_type": "default", "rope_theta": theta}, bos_token_id=0, eos_token_id=1
    )


def vision_config(name: str) -> CLIPVisionConfig:
    width, side = RELEASED[name].vision, RELEASED[name].grid * 2
    sizes = {"hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionConfig(**sizes, image_size=side, patch_size=2, projection_dim=8)


def language_weights(name: str) -> dict[str, torch.Tensor]:
    return randomise(LlamaForCausalLM(text_config(name)), 1).state_dict()


def tower_weights(name: str) -> dict[str, torch.Tensor]:
    """Keys behind `vision_model.`, as transformers 4 saved them."""
    weights = randomise(CLIPVisionModel(vision_config(name)), 2).state_dict()
    return {key.removeprefix("vision_model."): value for key, value in weights.items()}


def between_weights(name: str) -> dict[str, torch.Tensor]:
    """The released weights between the halves."""
    release, found = RELEASED[name], {}
    for theirs, ours in release.prefixes.items():
        found |= {ours + key: value for key, value in golden(name).under(f"weight.{theirs}").items()}
    if release.queries is not None:
        prefix, rounded = release.queries
        number, width = found[f"{prefix}query"].shape
        found[f"{prefix}pos_embed"] = sincos_positions(width, round(number**0.5), rounded=rounded)
    torch.manual_seed(3)
    return found | {key: torch.randn(shape) for key, shape in release.others.items()}


def released_weights(name: str) -> dict[str, torch.Tensor]:
    """All tensors of a full checkpoint of the LLaVA code."""
    tower = {f"model.vision_tower.vision_tower.vision_model.{key}": v for key, v in tower_weights(name).items()}
    return {**language_weights(name), **between_weights(name), **tower}


def released_config(name: str, **changes) -> dict:
    """`config.json` as transformers 4 wrote it."""
    config = json.loads(text_config(name).to_json_string(use_diff=False))
    rope = dict(config.pop("rope_parameters"))
    names = {
        "model_type": RELEASED[name].model_type,
        "mm_vision_tower": "vision_config.json",
        "torch_dtype": "float32",
    }
    sizes = {"rope_theta": rope["rope_theta"], "rope_scaling": None, "mm_hidden_size": RELEASED[name].vision}
    return {**config, **LLAVA_OPTIONS, **RELEASED[name].options, **names, **sizes, **changes}


def write_config(folder: Path, name: str, **changes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(released_config(name, **changes)))
    vision_config(name).to_json_file(folder / "vision_config.json", use_diff=False)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    tokenizer_of(name).save_pretrained(folder)


def write_released(folder: Path, name: str, tensors: dict | None = None, **changes) -> Path:
    """A full checkpoint of the LLaVA code."""
    write_config(folder, name, **changes)
    tensors = released_weights(name) if tensors is None else tensors
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


# ---- MG-LLaVA


def mg_weights() -> dict[str, torch.Tensor]:
    """What xtuner saves: the language model and all projectors."""
    return {
        **{f"llm.{key}": value for key, value in language_weights("mg-llava").items()},
        **between_weights("mg-llava"),
    }


CONVNEXT = {"depths": [1, 2, 1], "hidden_sizes": [8, 16, 40], "num_stages": 3}
TIMM = {
    "embeddings.patch_embeddings.": "stem.0.",
    "embeddings.layernorm.": "stem.1.",
    "encoder.stages.": "stages.",
    ".layers.": ".blocks.",
    ".downsampling_layer.": ".downsample.",
    "layer_scale_parameter": "gamma",
    "dwconv": "conv_dw",
    ".layernorm.": ".norm.",
    "pwconv1": "mlp.fc1",
    "pwconv2": "mlp.fc2",
}


def convnext() -> ConvNextModel:
    return randomise(ConvNextModel(ConvNextConfig(**CONVNEXT, image_size=768)), 4).eval()


def write_open_clip(folder: Path) -> Path:
    """The ConvNeXt of a CLIP as open_clip saves it, with what is not the tower's trunk."""
    found = {"logit_scale": torch.ones(()), "visual.head.mlp.fc1.weight": torch.ones(4, 40)}
    for key, value in convnext().state_dict().items():
        if key.startswith("layernorm."):
            found[f"visual.trunk.head.norm.{key.removeprefix('layernorm.')}"] = value
            continue
        for ours, theirs in TIMM.items():
            key = key.replace(ours, theirs)
        found[f"visual.trunk.{key}"] = value
    folder.mkdir(parents=True)
    torch.save(found, folder / "open_clip_pytorch_model.bin")
    return folder


def write_mg(folder: Path, tensors: dict | None = None) -> dict[str, Path]:
    """The file of xtuner and the models beside it: `source`, `base`, `vision_config`, `extra_tower`."""
    name, folder = "mg-llava", Path(folder)
    base, clip = folder / "vicuna", folder / "clip"
    base.mkdir(parents=True)
    LlamaForCausalLM(text_config(name)).save_pretrained(base)
    tokenizer_of(name).save_pretrained(base)
    clip.mkdir()
    vision_config(name).to_json_file(clip / "config.json", use_diff=False)
    tower = {f"vision_model.{key}": value for key, value in tower_weights(name).items()}
    save_file({key: value.contiguous() for key, value in tower.items()}, clip / "model.safetensors", {"format": "pt"})
    torch.save({"state_dict": mg_weights() if tensors is None else tensors, "meta": {}}, folder / "mg.pth")
    second = write_open_clip(folder / "convnext")
    return {"source": folder / "mg.pth", "base": base, "vision_config": clip, "extra_tower": second}

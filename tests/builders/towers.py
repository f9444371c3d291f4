"""A tiny configuration of every family of vision towers."""

import pytest
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import is_timm_available, is_torchvision_available

from builders.tiny import tiny_convnext


_VIT = {
    "image_size": 56,
    "patch_size": 14,
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
}
_SQUARES = {**_VIT, "image_size": [56, 56], "patch_size": [14, 14]}
TOWERS: dict[str, dict] = {
    "CLIP": {**_VIT, "model_type": "clip_vision_model"},
    "SigLIP, SigLIP 2 (fixed size)": {**_VIT, "model_type": "siglip_vision_model"},
    "DINOv2": {**_VIT, "model_type": "dinov2"},
    "DINOv2 with registers": {**_VIT, "model_type": "dinov2_with_registers", "num_register_tokens": 4},
    "DINOv3 ViT": {**_VIT, "model_type": "dinov3_vit", "num_register_tokens": 4},
    "ViT": {**_VIT, "model_type": "vit"},
    "AIMv2": {**_VIT, "model_type": "aimv2_vision_model"},
    "MLCD": {**_VIT, "model_type": "mlcd_vision_model"},
    "InternViT": {**_SQUARES, "model_type": "internvl_vision", "use_mask_token": True},
    "ConvNeXt": tiny_convnext("convnext"),
    "ConvNeXt v2": tiny_convnext("convnextv2"),
    "DINOv3 ConvNeXt": tiny_convnext("dinov3_convnext"),
}
"""Every family of transformers, three layers or two stages each."""

_MAP = {"model_type": "timm_wrapper", "view_size": 64}
_PATCHES = {"model_type": "timm_wrapper", "view_size": 56, "patch_size": 14, "hidden_size": 32}
_SMALL = {"img_size": 56, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
_STATS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
TIMM_TOWERS: dict[str, dict] = {
    "timm FastViTHD": {
        **_MAP,
        "view_size": 128,
        "hidden_size": 128,
        "architecture": "fastvit_mci3",
        "model_args": {
            "inference_mode": True,
            "layers": [1, 1, 1, 1, 1],
            "embed_dims": [16, 16, 32, 32, 64],
            "mlp_ratios": [1, 1, 1, 1, 1],
        },
    },
    "timm ConvNeXt": {
        **_MAP,
        "patch_size": 32,
        "hidden_size": 32,
        "architecture": "convnext_atto",
        "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 32]},
        "pretrained_cfg": _STATS,
    },
    "timm ViT": {**_PATCHES, "architecture": "vit_tiny_patch16_224", "model_args": _SMALL, "pretrained_cfg": _STATS},
    "timm EVA": {**_PATCHES, "architecture": "eva02_tiny_patch14_224", "model_args": _SMALL, "pretrained_cfg": _STATS},
    "timm PE": {
        **_PATCHES,
        "architecture": "vit_pe_core_tiny_patch16_384",
        "model_args": {**_SMALL, "ref_feat_shape": [4, 4]},
        "pretrained_cfg": _STATS,
    },
}
"""Towers of timm, in transformers' wrapper."""


def tiny_tower(name: str) -> PreTrainedConfig:
    """The configuration of a tiny tower by its name above; a test of one of timm is skipped without timm."""
    if name in TIMM_TOWERS and not has_timm():
        pytest.skip("timm is not installed")
    values = {**TOWERS, **TIMM_TOWERS}[name]
    config = AutoConfig.for_model(**values)
    if hasattr(config, "layerscale_value"):
        config.layerscale_value = 1.0  # as tests see nothing of a layer that adds a millionth
    return config


def has_timm() -> bool:
    """Whether transformers can use timm, which needs torchvision; see tests/README.md."""
    return is_timm_available() and is_torchvision_available()

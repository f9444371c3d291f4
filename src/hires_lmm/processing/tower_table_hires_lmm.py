"""What is known of each family of vision towers: the one table that image processor and model read.

Stands in `processing/` and, as a link, in `modeling/`.
"""

from dataclasses import dataclass
from typing import Any

from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
)


@dataclass(frozen=True)
class TowerFamily:
    """One family of vision towers.

    Args:
        stats (`tuple`, *optional*): Mean and standard deviation of its image processors; None = they differ.
        prefix (`int`): Tokens before the patches, the class token first; registers behind it count.
        attention (`tuple[str, str, str]`, *optional*): Paths in a layer of the norm before attention, the query
            and the key projection, for `cls_logits`; None = it has no class token.
        is_map (`bool`): Whether hidden states are maps `(V, C, h, w)`, those of a convolutional tower.
    """

    stats: tuple | None = None
    prefix: int = 0
    attention: tuple[str, str, str] | None = None
    is_map: bool = False


TOWERS = {
    "clip_vision_model": TowerFamily(
        (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD), 1, ("layer_norm1", "self_attn.q_proj", "self_attn.k_proj")
    ),
    "siglip_vision_model": TowerFamily((IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)),
    "convnext": TowerFamily((IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), is_map=True),
    "convnextv2": TowerFamily((IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), is_map=True),
    "dinov3_convnext": TowerFamily((IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), is_map=True),
}
"""Families by `model_type`; others work where they give patches behind a prefix and name their `patch_size`."""


def tower_family(config: Any) -> TowerFamily:
    """The family of a tower's configuration; one that is not in the table has patches behind its prefix, if any."""
    return TOWERS.get(config.model_type, TowerFamily())


def known_stats(model_type: str) -> dict[str, Any] | None:
    """Mean, standard deviation and filter of the image processors of a family; None where they are not known."""
    family = TOWERS.get(model_type)
    if family is None or family.stats is None:
        return None
    return {"image_mean": family.stats[0], "image_std": family.stats[1], "resample": PILImageResampling.BICUBIC}


def view_side(config: Any) -> int:
    """Side of a view in pixels."""
    size = config.image_size
    return size[0] if isinstance(size, (list, tuple)) else size


def patch_side(config: Any) -> int:
    """Side of a patch in pixels; of a convolutional tower, of the stride of its last map."""
    size = config.patch_size if hasattr(config, "patch_size") else 4  # DINOv3's ConvNeXt does not name its own
    size = size[0] if isinstance(size, (list, tuple)) else size
    return size * 2 ** (len(config.depths) - 1) if tower_family(config).is_map else size


def tower_width(config: Any) -> int:
    """Channels of its features."""
    return config.hidden_sizes[-1] if tower_family(config).is_map else config.hidden_size


def tower_levels(config: Any) -> tuple[int, ...]:
    """Channels of the map of each stage, first to last; a tower that is not convolutional has one."""
    return tuple(config.hidden_sizes) if tower_family(config).is_map else (config.hidden_size,)


def tower_grid(config: Any) -> tuple[int, int]:
    """Patch rows and columns of a view of the tower's own size."""
    side = view_side(config) // patch_side(config)
    return side, side

"""What is known of each family of vision towers: the one table that image processor and model read.

Stands in `processing/` and, as a link, in `modeling/`.
"""

from copy import deepcopy
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


LAYERS_LIMIT = 1000
"""Most layers of a tower or language model; the deepest published ones have a few hundred."""

GRID_LIMIT = 1024
"""Most patches along a side of a view."""

_CLIP = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
_HALF = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
_IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
_MASK = "embeddings.mask_token"


@dataclass(frozen=True)
class TowerFamily:
    """One family of vision towers.

    Args:
        stats (`tuple`, *optional*): Mean and standard deviation of its image processors; None = they differ.
        resample (`PILImageResampling`): Filter of its image processors.
        prefix (`int`): Tokens before the patches, the class token first; registers (`num_register_tokens`) follow.
        attention (`tuple[str, str, str]`, *optional*): Paths in a layer of the norm before attention, the query
            and the key projection, for `cls_logits`; None = it has no class token, or positions turn its queries.
        is_map (`bool`): Whether hidden states are maps `(V, C, h, w)`, those of a convolutional tower.
        reads_last (`bool`): Whether what the tower returns last is read, not one of its hidden states.
        is_fixed (`bool`): Whether it takes views of its own size alone.
        unread (`tuple[str, ...]`): Its modules and parameters behind the layers, or that only its own training uses.
        head (`str`, *optional*): The field that switches its pooling head, which older minors do not name.
        refused (`str`, *optional*): Why it cannot be a tower here.
    """

    stats: tuple | None = None
    resample: PILImageResampling = PILImageResampling.BICUBIC
    prefix: int = 0
    attention: tuple[str, str, str] | None = None
    is_map: bool = False
    reads_last: bool = False
    is_fixed: bool = False
    unread: tuple[str, ...] = ("post_layernorm", "layernorm", "norm", "head", "pooler", _MASK)
    head: str | None = None
    refused: str | None = None

    @property
    def has_layers(self) -> bool:
        """Whether each of its layers can be read."""
        return not self.is_map and not self.reads_last


_PLAIN = TowerFamily()
_PACKED = TowerFamily(
    refused="it reads patches of images of any shape in one sequence, not views of one size; use a tower of fixed size"
)
_SHRINKING = TowerFamily(
    refused="its last grid is not image_size / patch_size, as it merges patches on the way; use a ViT or a ConvNeXt"
)
_DINO = ("norm1", "attention.q_proj", "attention.k_proj")

TOWERS = {
    "clip_vision_model": TowerFamily(
        _CLIP, prefix=1, attention=("layer_norm1", "self_attn.q_proj", "self_attn.k_proj"), unread=("post_layernorm",)
    ),
    "siglip_vision_model": TowerFamily(_HALF, unread=("post_layernorm", "head"), head="vision_use_head"),
    "dinov2": TowerFamily(_IMAGENET, prefix=1, attention=_DINO, unread=("layernorm", _MASK)),
    "dinov2_with_registers": TowerFamily(_IMAGENET, prefix=1, attention=_DINO, unread=("layernorm", _MASK)),
    "dinov3_vit": TowerFamily(_IMAGENET, PILImageResampling.BILINEAR, prefix=1, unread=("norm", _MASK)),
    "vit": TowerFamily(
        _HALF,
        PILImageResampling.BILINEAR,
        prefix=1,
        attention=("layernorm_before", "attention.q_proj", "attention.k_proj"),
        unread=("layernorm", "pooler", _MASK),
    ),
    "aimv2_vision_model": TowerFamily(_CLIP, is_fixed=True, unread=("rms_norm", "head"), head="use_head"),
    "mlcd_vision_model": TowerFamily(_CLIP, prefix=1, unread=("post_layernorm",)),
    "internvl_vision": TowerFamily(_IMAGENET, prefix=1, unread=("layernorm", _MASK)),
    "convnext": TowerFamily(_IMAGENET, is_map=True, unread=("layernorm",)),
    "convnextv2": TowerFamily(_IMAGENET, is_map=True, unread=("layernorm",)),
    "dinov3_convnext": TowerFamily(_IMAGENET, PILImageResampling.BILINEAR, is_map=True, unread=("layer_norm",)),
    "timm_wrapper": TowerFamily(
        reads_last=True, unread=("timm_model.head", "timm_model.fc_norm", "timm_model.attn_pool")
    ),
    "siglip2_vision_model": TowerFamily(
        refused="it reads patches of images of any shape, not views of one size. The SigLIP 2 checkpoints of a fixed "
        "resolution (siglip2-so400m-patch14-384, ...) are siglip_vision_model"
    ),
    "pixtral": _PACKED,
    "swin": _SHRINKING,
    "swinv2": _SHRINKING,
}
"""Families by `model_type`; others work where they give patches behind a prefix and name their `patch_size`."""

TIMM = {
    name: {"image_size": 1024, "patch_size": 64, "hidden_size": width, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    for name, width in (("fastvit_mci3", 3072), ("fastvit_mci4", 4096))
}
"""What timm's architectures leave out of their configuration: FastViTHD, as FastVLM has it, and its larger sibling."""


def tower_family(tower: Any) -> TowerFamily:
    """The family of a tower's configuration; one that is not in the table has patches behind its prefix, if any.

    Qwen's towers, and others that merge patches, show it by a field.
    """
    other = _PACKED if hasattr(tower, "spatial_merge_size") else _SHRINKING if hasattr(tower, "depths") else _PLAIN
    return TOWERS.get(tower.model_type, other)


def known_stats(tower: Any) -> dict[str, Any] | None:
    """Mean, standard deviation and filter of the image processors of a tower; None where they are not known."""
    family = tower_family(tower)
    stats, resample = family.stats, family.resample
    if family.reads_last:
        said = _of_timm(tower)
        stats = tuple(tuple(said[name]) for name in ("mean", "std")) if {"mean", "std"} <= said.keys() else None
        resample = PILImageResampling[str(said.get("interpolation", resample.name)).upper()]
    if stats is None:
        return None
    return {"image_mean": stats[0], "image_std": stats[1], "resample": resample}


def _of_timm(tower: Any) -> dict[str, Any]:
    """What a timm checkpoint says of its pixels, else what is known of its architecture."""
    said = dict(tower.pretrained_cfg or {}) if hasattr(tower, "pretrained_cfg") else {}
    if "input_size" in said:
        said["image_size"] = said["input_size"][-1]
    if hasattr(tower, "num_features"):
        said["hidden_size"] = tower.num_features
    return {**TIMM.get(tower.architecture.partition(".")[0], {}), **said}


def complete_tower(tower: Any, view_size: int | None = None, patch_size: int | None = None) -> Any:
    """A tower's configuration with what its class leaves out, without the pooling head and without noise of positions.

    Args:
        tower (`PreTrainedConfig`): Of the tower; it is not changed.
        view_size (`int`, *optional*): Side of views in pixels, where it is not the tower's own.
        patch_size (`int`, *optional*): Pixels from one feature to the next, for towers that do not name theirs.
    """
    tower, family = deepcopy(tower), tower_family(tower)
    if family.head is not None:  # it gets no gradients, and offloading breaks it
        setattr(tower, family.head, False)
    for noise in ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"):  # DINOv3's, in training
        if hasattr(tower, noise):
            setattr(tower, noise, None)
    known = _of_timm(tower) if family.reads_last else {}
    for name in ("image_size", "patch_size", "hidden_size") if family.reads_last else ():
        if getattr(tower, name, None) is None and name in known:
            setattr(tower, name, known[name])
    if family.reads_last and not hasattr(tower, "num_channels"):
        tower.num_channels = 3
    if view_size is not None:
        tower.view_size = view_size
    if patch_size is not None:
        if getattr(tower, "patch_size", None) not in (None, patch_size):
            raise ValueError(
                f"vision_patch_size={patch_size}, but a tower of type {tower.model_type!r} has patches of "
                f"{tower.patch_size}; leave it out."
            )
        tower.patch_size = patch_size
    return tower


def check_tower(tower: Any, where: str) -> None:
    """Refuse towers that cannot be, before anyone builds them layer by layer.

    Args:
        where (`str`): What the configuration is called in messages.

    Raises:
        ValueError: If its kind does not fit, or sizes are missing or out of range.
    """
    family = tower_family(tower)
    if family.refused is not None:
        raise ValueError(f"{where}: a tower of type {tower.model_type!r} does not work here: {family.refused}.")
    sizes = {"image_size": view_side(tower), "patch_size": _first(getattr(tower, "patch_size", None))}
    if family.is_map:
        sizes = {"image_size": sizes["image_size"], "hidden_sizes": _first(tower.hidden_sizes)}
        sizes["depths"] = _first(tower.depths)
    else:
        sizes["hidden_size"] = getattr(tower, "hidden_size", None)
        if not family.reads_last:
            sizes["num_hidden_layers"] = getattr(tower, "num_hidden_layers", None)
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            remedy = ""
            if family.reads_last:
                remedy = f"; name it in {where} (of the main tower also as vision_view_size and vision_patch_size)"
            raise ValueError(f"{where}.{name}={value!r} of a {tower.model_type!r} must be an integer above 0{remedy}.")
    if tower_depth(tower) > LAYERS_LIMIT:
        raise ValueError(f"{where}.num_hidden_layers={tower_depth(tower)} is more than {LAYERS_LIMIT}.")
    for name in ("image_size", "patch_size"):
        value = getattr(tower, name, None)
        if isinstance(value, (list, tuple)) and len(set(value)) > 1:
            raise ValueError(f"{where}.{name}={value} is no square; views and patches are square.")
    if family.is_fixed and view_side(tower) != own_side(tower):
        raise ValueError(
            f"{where} has views of {view_side(tower)} pixels, but a tower of type {tower.model_type!r} takes views "
            f"of {own_side(tower)} alone."
        )
    if not 1 <= tower_grid(tower)[0] <= GRID_LIMIT:
        raise ValueError(
            f"{where} has image_size={view_side(tower)} and patch_size={patch_side(tower)}; a view must have 1 to "
            f"{GRID_LIMIT} patches a side."
        )


def _first(value: Any) -> Any:
    """The first of several values, or the only one."""
    return value[0] if isinstance(value, (list, tuple)) and value else value


def own_side(tower: Any) -> Any:
    """Side in pixels of the views that a tower was made for; None where it names none."""
    return _first(getattr(tower, "image_size", None))


def view_side(tower: Any) -> Any:
    """Side of a view in pixels: that which was chosen, else the tower's own."""
    size = tower.view_size if hasattr(tower, "view_size") else None
    return own_side(tower) if size is None else size


def patch_side(tower: Any) -> int:
    """Side of a patch in pixels; of a convolutional tower, of the stride of its last map."""
    size = tower.patch_size if hasattr(tower, "patch_size") else 4  # DINOv3's ConvNeXt does not name its own
    return _first(size) * 2 ** (len(tower.depths) - 1) if tower_family(tower).is_map else _first(size)


def tower_width(tower: Any) -> int:
    """Channels of its features."""
    return tower.hidden_sizes[-1] if tower_family(tower).is_map else tower.hidden_size


def tower_levels(tower: Any) -> tuple[int, ...]:
    """Channels of the map of each stage, first to last; a tower that is not convolutional has one."""
    return tuple(tower.hidden_sizes) if tower_family(tower).is_map else (tower.hidden_size,)


def tower_depth(tower: Any) -> int:
    """Layers whose hidden states can be read; of a tower of which the last alone can be read, 0."""
    family = tower_family(tower)
    return sum(tower.depths) if family.is_map else 0 if family.reads_last else tower.num_hidden_layers


def tower_grid(tower: Any) -> tuple[int, int]:
    """Patch rows and columns of a view of the tower's own size."""
    side = view_side(tower) // patch_side(tower)
    return side, side


def prefix_tokens(tower: Any) -> int:
    """Tokens before the patches: the class token and registers."""
    registers = tower.num_register_tokens if hasattr(tower, "num_register_tokens") else 0
    return tower_family(tower).prefix + registers

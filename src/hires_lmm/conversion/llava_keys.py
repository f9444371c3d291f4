"""Rules of keys that released checkpoints built on the LLaVA code share."""

from .keys import Rename, Rule, SplitRows, Unused
from .llava_options import refuse


OURS = "model.connector."
PROJECTOR = "model.mm_projector."
TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."

LLAVA: list[Rule] = [
    Unused("model.layers.{}.self_attn.rotary_emb.inv_freq"),
    Unused(f"{TOWER_PREFIX}embeddings.position_ids"),
    Rename("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
    Rename("model.layers.**", "model.language_model.layers.**"),
    Rename("model.norm.weight", "model.language_model.norm.weight"),
    Rename("lm_head.weight", "lm_head.weight"),
    Rename(f"{TOWER_PREFIX}**", "model.vision_tower.**"),
]
"""Language model and vision tower."""


def renames(source: str, target: str, names: dict[str, str]) -> list[Rule]:
    """One rule a name, theirs and ours, behind two beginnings."""
    return [Rename(source + theirs, target + ours) for theirs, ours in names.items()]


def attention_rules(source: str, target: str) -> list[Rule]:
    """Rules of one `nn.MultiheadAttention`."""
    projections = tuple(f"{target}{name}_proj." for name in "qkv")
    return [
        SplitRows(source + "in_proj_weight", tuple(name + "weight" for name in projections)),
        SplitRows(source + "in_proj_bias", tuple(name + "bias" for name in projections)),
        Rename(source + "out_proj.{}", target + "o_proj.{}"),
    ]


def mlp_rules(source: str, target: str) -> list[Rule]:
    """Rules of the two-layer perceptron."""
    return renames(source, target, {"0.{}": "linear_1.{}", "2.{}": "linear_2.{}"})


PROJECTORS: dict[str, tuple[str, list[Rule]]] = {
    "identity": ("identity", []),
    "linear": ("linear", [Rename(PROJECTOR + "{}", OURS + "adapter.linear.{}")]),
    "mlp1x_gelu": ("linear", [Rename(PROJECTOR + "0.{}", OURS + "adapter.linear.{}")]),
    "mlp2x_gelu": ("mlp", mlp_rules(PROJECTOR, OURS + "adapter.mlp.")),
}
"""`mm_projector_type` -> our adapter, and its rules."""


def projector_part(kind: str, *others: str) -> dict:
    """Our adapter for a `mm_projector_type`; `others` are types that the caller knows besides."""
    if kind not in PROJECTORS:
        raise refuse("mm_projector_type", kind, f"the known types are {', '.join([*PROJECTORS, *others])}")
    return {"part": PROJECTORS[kind][0]}


def projector_type(adapter: dict) -> str | None:
    """The way back; None where the LLaVA code has no such adapter."""
    names = {"identity": "identity", "linear": "linear", "mlp": "mlp2x_gelu"}
    return names.get(adapter["part"])

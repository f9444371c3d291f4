"""Released SliME checkpoints: their key table. Source: github.com/yfzhang114/SliME at 5c89ec9."""

import torch

from .keys import Constant, Rename, Rule, SplitRows, Unused


_MM = "model.mm_projector."
_SAMPLER = "model.sampler."
_OURS = "model.connector."
_UNUSED = [
    Unused("model.layers.{}.self_attn.rotary_emb.inv_freq"),
    Unused("model.vision_tower.vision_tower.vision_model.embeddings.position_ids"),
]
_LANGUAGE = [
    Rename("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
    Rename("model.layers.**", "model.language_model.layers.**"),
    Rename("model.norm.weight", "model.language_model.norm.weight"),
    Rename("lm_head.weight", "lm_head.weight"),
]
_TOWER = [Rename("model.vision_tower.vision_tower.vision_model.**", "model.vision_tower.**")]


def _query_former(source: str, target: str) -> list[Rule]:
    """Rules of one `Resampler` of the released code."""
    renames = {
        "query": "queries",
        "pos_embed": "positions",
        "ln_q.{}": "query_norm.{}",
        "ln_kv.{}": "key_norm.{}",
        "ln_post.{}": "output_norm.{}",
    }
    return [
        *(Rename(source + theirs, target + ours) for theirs, ours in renames.items()),
        *_attention(source + "attn.", target + "attention."),
    ]


def _attention(source: str, target: str) -> list[Rule]:
    """Rules of one `nn.MultiheadAttention`."""
    projections = tuple(f"{target}{name}_proj." for name in "qkv")
    return [
        SplitRows(source + "in_proj_weight", tuple(name + "weight" for name in projections)),
        SplitRows(source + "in_proj_bias", tuple(name + "bias" for name in projections)),
        Rename(source + "out_proj.{}", target + "o_proj.{}"),
    ]


def _mlp(source: str, target: str) -> list[Rule]:
    """Rules of the two-layer perceptron."""
    return [Rename(f"{source}0.{{}}", f"{target}linear_1.{{}}"), Rename(f"{source}2.{{}}", f"{target}linear_2.{{}}")]


def _gated() -> list[Rule]:
    """Rules of the gated adapter."""
    return [
        *_query_former(_MM + "attn.", _OURS + "adapter.query_former."),
        *_mlp(_MM + "projection.", _OURS + "adapter.mlp."),
        Rename(_MM + "w_gate", _OURS + "adapter.gate.gate_weight"),
        Rename(_MM + "w_noise", _OURS + "adapter.gate.noise_weight"),
        Constant(_MM + "mean", (0.0,), torch.bfloat16),
        Constant(_MM + "std", (1.0,), torch.bfloat16),
    ]


def _selector() -> list[Rule]:
    """Rules of the attention router; the released forward pass uses neither its query nor its self-attention."""
    source, target = _SAMPLER + "selector.", _OURS + "token_ops.0.attention_score."
    return [
        Unused(source + "query"),
        Unused(source + "self_attn.**"),
        *_attention(source + "cross_attn.", target + "attention."),
        Rename(source + "ln_q.{}", target + "image_norm.{}"),
        Rename(source + "ln_kv.{}", target + "text_norm.{}"),
        Rename(source + "ln_post.{}", target + "output_norm.{}"),
        *_mlp(source + "prob_proj.", target),
    ]


ADAPTERS: dict[str, list[Rule]] = {
    "gated": _gated(),
    "identity": [],
    "linear": [Rename(_MM + "{}", _OURS + "adapter.linear.{}")],
    "mlp1x_gelu": [Rename(_MM + "0.{}", _OURS + "adapter.linear.{}")],
    "mlp2x_gelu": _mlp(_MM, _OURS + "adapter.mlp."),
}


def key_table(adapter: str, resampler: str | None = "cosine") -> list[Rule]:
    """The key table of a released checkpoint with this `mm_projector_type` and `mm_resampler_type`."""
    if adapter not in ADAPTERS:
        raise ValueError(f"mm_projector_type {adapter!r} is not known; known types: {', '.join(ADAPTERS)}.")
    rules = [*_UNUSED, *_LANGUAGE, *_TOWER, *ADAPTERS[adapter]]
    if resampler not in (None, "identity"):
        rules += _query_former(_SAMPLER + "post_qformer.", _OURS + "view_ops.0.query_former.")
    return rules + (_selector() if resampler == "qformer" else [])

"""Released SliME checkpoints: their key table. Source: github.com/yfzhang114/SliME at 5c89ec9."""

import torch

from .keys import Constant, Rename, Rule, Unused
from .llava_keys import LLAVA, OURS, PROJECTOR, PROJECTORS, attention_rules, mlp_rules, renames


_SAMPLER = "model.sampler."


def _query_former(source: str, target: str) -> list[Rule]:
    """Rules of one `Resampler` of the released code."""
    names = {
        "query": "queries",
        "pos_embed": "positions",
        "ln_q.{}": "query_norm.{}",
        "ln_kv.{}": "key_norm.{}",
        "ln_post.{}": "output_norm.{}",
    }
    return [*renames(source, target, names), *attention_rules(source + "attn.", target + "attention.")]


def _gated() -> list[Rule]:
    """Rules of the gated adapter."""
    return [
        *_query_former(PROJECTOR + "attn.", OURS + "adapter.query_former."),
        *mlp_rules(PROJECTOR + "projection.", OURS + "adapter.mlp."),
        Rename(PROJECTOR + "w_gate", OURS + "adapter.gate.gate_weight"),
        Rename(PROJECTOR + "w_noise", OURS + "adapter.gate.noise_weight"),
        Constant(PROJECTOR + "mean", (0.0,), torch.bfloat16),
        Constant(PROJECTOR + "std", (1.0,), torch.bfloat16),
    ]


def _selector() -> list[Rule]:
    """Rules of the attention router; the released forward pass uses neither its query nor its self-attention."""
    source, target = _SAMPLER + "selector.", OURS + "token_ops.0.attention_score."
    return [
        Unused(source + "query", required=True),
        Unused(source + "self_attn.**", required=True),
        *attention_rules(source + "cross_attn.", target + "attention."),
        Rename(source + "ln_q.{}", target + "image_norm.{}"),
        Rename(source + "ln_kv.{}", target + "text_norm.{}"),
        Rename(source + "ln_post.{}", target + "output_norm.{}"),
        *mlp_rules(source + "prob_proj.", target),
    ]


ADAPTERS: dict[str, list[Rule]] = {"gated": _gated(), **{name: rules for name, (_, rules) in PROJECTORS.items()}}


def key_table(adapter: str, resampler: str | None = "cosine") -> list[Rule]:
    """The key table of a released checkpoint with this `mm_projector_type` and `mm_resampler_type`."""
    if adapter not in ADAPTERS:
        raise ValueError(f"mm_projector_type {adapter!r} is not known; known types: {', '.join(ADAPTERS)}.")
    rules = [*LLAVA, *ADAPTERS[adapter]]
    if resampler not in (None, "identity"):
        rules += _query_former(_SAMPLER + "post_qformer.", OURS + "view_ops.0.query_former.")
    return rules + (_selector() if resampler == "qformer" else [])

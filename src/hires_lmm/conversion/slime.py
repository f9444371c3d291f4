"""Released SliME checkpoints: what their configuration means, and their key table."""

import torch

from .keys import Constant, Rename, Rule, SplitRows


_MM = "model.mm_projector."
_OURS = "model.connector."
_LANGUAGE = [
    Rename("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
    Rename("model.layers.**", "model.language_model.layers.**"),
    Rename("model.norm.weight", "model.language_model.norm.weight"),
    Rename("lm_head.weight", "lm_head.weight"),
]
_TOWER = [
    Rename("model.vision_tower.vision_tower.vision_model.**", "model.vision_tower.**"),
]


def _query_former(source: str, target: str) -> list[Rule]:
    """Rules of one `Resampler` of the released code."""
    projections = tuple(f"{target}attention.{name}_proj." for name in "qkv")
    renames = {
        "query": "queries",
        "pos_embed": "positions",
        "ln_q.{}": "query_norm.{}",
        "ln_kv.{}": "key_norm.{}",
        "ln_post.{}": "output_norm.{}",
        "attn.out_proj.{}": "attention.o_proj.{}",
    }
    return [
        *(Rename(source + ours, target + theirs) for ours, theirs in renames.items()),
        SplitRows(source + "attn.in_proj_weight", tuple(name + "weight" for name in projections)),
        SplitRows(source + "attn.in_proj_bias", tuple(name + "bias" for name in projections)),
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


ADAPTERS = {
    "gated": ({"part": "mixture", "gate": "release"}, _gated()),
    "linear": ({"part": "linear"}, [Rename(_MM + "{}", _OURS + "adapter.linear.{}")]),
    "mlp2x_gelu": ({"part": "mlp"}, _mlp(_MM, _OURS + "adapter.mlp.")),
}

_COMPRESSOR = _query_former("model.sampler.post_qformer.", _OURS + "view_ops.0.query_former.")


def key_table(adapter: str) -> list[Rule]:
    """The key table of a released checkpoint.

    Args:
        adapter (`str`): `mm_projector_type` of its configuration.

    Returns:
        Rules that cover every tensor of the checkpoint.

    Raises:
        ValueError: If the adapter type is unknown.
    """
    if adapter not in ADAPTERS:
        raise ValueError(f"mm_projector_type {adapter!r} is not known; known types: {', '.join(ADAPTERS)}.")
    return [*_LANGUAGE, *_TOWER, *ADAPTERS[adapter][1], *_COMPRESSOR]


def connector_settings(config: dict) -> dict:
    """Read the `mm_*` options of a released configuration.

    Args:
        config (`dict`): The released `config.json`.

    Returns:
        Fields of `HiResLmmConfig`: `planner`, `connector_config`, `question_scope` and `vision_feature_layer`.

    Raises:
        ValueError: If an option has a value that is not known.
    """
    adapter = config["mm_projector_type"]
    options = dict(ADAPTERS[adapter][0])
    forced = config.get("mm_learnable_gated", -1)
    if adapter == "gated" and forced >= 0:
        options["forced_expert"] = ("mlp", "query_former")[forced]
    return {
        "planner": {"name": "slime_release", "global_view": "squeeze"},
        "question_scope": "prompt",
        "vision_feature_layer": config["mm_vision_select_layer"],
        "connector_config": {
            "view_ops": [{"part": "query_compressor", "on": "crops", "num_queries": config["mm_resampler_dim"]}],
            "adapter": options,
            "layout": {"crop_order": "raster", "between_views": config["seperator"]},
            "token_ops": [
                {
                    "part": "router",
                    "on": "crops",
                    "score": "cosine",
                    "keep": {
                        "rule": "threshold",
                        "gamma": config["mm_resampler_topp"],
                        "temperature": config["mm_resampler_temp"],
                    },
                }
            ],
        },
    }



"""What the configuration of a released SliME checkpoint means, option by option; nothing is guessed."""

from typing import Any

from .llava_keys import projector_part
from .llava_options import COMMON, ReleasedOptions, refuse


OPTIONS = ReleasedOptions(
    defaults={
        **COMMON,
        "mm_learnable_gated": -1,
        "mm_resampler_type": None,
        "mm_resampler_dim": 64,
        "mm_resampler_topp": 0.9,
        "mm_resampler_temp": 0.5,
        "use_local_only": False,
        "use_global_only": False,
        "seperator": 1919,
    },
    fixed={"image_aspect_ratio": ("anyres", "only 'anyres', the published rule, has a planner here")},
    kinds={
        "mm_resampler_type": (str, type(None)),
        "mm_resampler_topp": (float, int),
        "mm_resampler_temp": (float, int),
    },
)
ROUTERS = {"cosine": "cosine", "qformer": "attention"}
NO_ROUTER = (None, "identity")
REFUSED_ADAPTERS = {
    "qformer": "its query former has no perceptron behind it, as our query_former has",
    "qformer_text": "its queries read the question before the image, which no part here does",
}


def connector_settings(config: dict) -> dict:
    """The options of a released `config.json` as fields of `HiResLmmConfig`; others are refused."""
    options = OPTIONS.read(config)
    router = _router(options)
    compressor = {"part": "query_compressor", "on": "crops", "num_queries": options["mm_resampler_dim"]}
    return {
        "planner": _planner(options),
        "question_scope": "prompt",
        "vision_feature_layer": options["mm_vision_select_layer"],
        "connector_config": {
            "view_ops": [compressor] if router else [],
            "adapter": _adapter(options),
            "layout": _layout(options, bool(router)),
            "token_ops": [router] if router else [],
        },
    }


def _planner(options: dict) -> dict:
    planner = {"name": "slime_release", "global_view": "squeeze"}
    if options["use_local_only"] and options["use_global_only"]:
        raise refuse("use_local_only", True, "use_global_only is set too, and the two exclude each other")
    if options["use_local_only"]:
        planner["views"] = "crops"
    if options["use_global_only"]:
        planner["views"] = "global"
    return planner


def _adapter(options: dict) -> dict:
    kind = options["mm_projector_type"]
    if kind in REFUSED_ADAPTERS:
        raise refuse("mm_projector_type", kind, REFUSED_ADAPTERS[kind])
    if kind != "gated":
        return projector_part(kind, "gated")
    forced = options["mm_learnable_gated"]
    if forced not in (-1, 0, 1):
        raise refuse("mm_learnable_gated", forced, "-1 mixes, 0 and 1 name one of two experts")
    if options["mm_resampler_type"] in NO_ROUTER and forced != 0:
        raise refuse("mm_projector_type", kind, "without a sampler it mixes on crops too; here on one kind of view")
    adapter = {"part": "mixture", "gate": "release"}
    return adapter if forced < 0 else {**adapter, "forced_expert": ("mlp", "query_former")[forced]}


def _router(options: dict) -> dict | None:
    kind = options["mm_resampler_type"]
    if kind in NO_ROUTER:
        return None
    if kind not in ROUTERS:
        known = ", ".join([*ROUTERS, "identity"])
        reason = "the released code builds it without using it" if kind == "spatial" else f"known types are {known}"
        raise refuse("mm_resampler_type", kind, reason)
    keep = {"rule": "threshold", "gamma": options["mm_resampler_topp"], "temperature": options["mm_resampler_temp"]}
    router = {"part": "router", "on": "crops", "score": ROUTERS[kind], "keep": keep}
    return {**router, "double_softmax": True} if kind == "qformer" else router


def _layout(options: dict, routed: bool) -> dict:
    merge = options["mm_patch_merge_type"]
    orders = {"spatial": "raster", "flat": "views"}
    if merge not in orders:
        raise refuse("mm_patch_merge_type", merge, f"known values are {', '.join(orders)}")
    single = not routed or options["use_local_only"] or options["use_global_only"]
    if merge == "flat" and not single:
        raise refuse("mm_patch_merge_type", merge, "one separator before crops in view order has no layout here")
    between = {"separator": {"place": "between_views", "value": [options["seperator"]]}}
    return {"crop_order": orders[merge], **({} if single else {"separators": between})}


def _separator(layout: dict) -> int:
    """The token between views; that of the released configuration without one."""
    separators = (layout.get("separators") or {}).values()
    ids = [each["value"][0] for each in separators if each["place"] == "between_views"]
    return ids[0] if ids else OPTIONS.defaults["seperator"]


def released_options(config: Any) -> dict:
    """The way back: the released options that compute what a model of ours does."""
    connector = config.connector_config
    routers = [op for op in connector.token_ops if op.get("part") == "router"]
    router = routers[0] if routers else {"score": None, "keep": {}}
    kinds = {ours: theirs for theirs, ours in ROUTERS.items()}
    adapter = connector.adapter
    names = {"identity": "identity", "linear": "linear", "mlp": "mlp2x_gelu", "mixture": "gated"}
    experts = {None: -1, "mlp": 0, "query_former": 1}
    views = config.planner.get("views", "all")
    return {
        **{key: OPTIONS.defaults[key] for key in ("mm_vision_select_feature", "mm_use_im_start_end", "use_mm_proj")},
        "mm_projector_type": names.get(adapter["part"]),
        "mm_learnable_gated": experts[adapter.get("forced_expert")],
        "mm_resampler_type": kinds.get(router["score"], "identity"),
        "mm_resampler_dim": connector.view_ops[0].get("num_queries", 144) if connector.view_ops else 64,
        "mm_resampler_topp": router["keep"].get("gamma", 0.75),
        "mm_resampler_temp": router["keep"].get("temperature", 1.0),
        "mm_patch_merge_type": "flat" if connector.layout.get("crop_order") == "views" else "spatial",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_hidden_size": config.vision_config.hidden_size,
        "seperator": _separator(connector.layout),
        "use_local_only": views == "crops",
        "use_global_only": views == "global",
        "image_aspect_ratio": "anyres",
    }

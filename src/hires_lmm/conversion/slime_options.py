"""What the configuration of a released SliME checkpoint means, option by option; nothing is guessed."""

from typing import Any

from ..modeling.routers_hires_lmm import KeepOptions
from .errors import ConversionError


DEFAULTS: dict[str, Any] = {
    "mm_projector_type": "linear",
    "mm_learnable_gated": -1,
    "mm_resampler_type": None,
    "mm_resampler_dim": 64,
    "mm_resampler_topp": 0.9,
    "mm_resampler_temp": 0.5,
    "mm_patch_merge_type": "flat",
    "mm_vision_select_layer": -1,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "use_mm_proj": True,
    "use_local_only": False,
    "use_global_only": False,
    "seperator": 1919,
    "image_aspect_ratio": "square",
}
"""What the released code takes for an option that the configuration leaves out."""

ELSEWHERE = {
    "mm_vision_tower": "names the vision tower",
    "mm_hidden_size": "compared with the width of the vision tower",
}
"""Options that the converter reads in other places."""

IRRELEVANT = {
    "image_grid_pinpoints": "written, but not read by the released slicing rule",
    "freeze_mm_mlp_adapter": "training only",
    "tune_mm_mlp_adapter": "training only",
    "unfreeze_mm_vision_tower": "training only",
    "mm_projector_lr": "training only",
    "mm_use_im_patch_token": "only adds a token to the tokenizer that no prompt contains",
    "tokenizer_model_max_length": "the released code cuts longer sequences silently; here they are an error or run",
    "tokenizer_padding_side": "the processor pads on the left",
}
"""Options without influence on what a converted model computes, with the reason."""

KINDS: dict[str, type | tuple[type, ...]] = {
    **{key: type(value) for key, value in DEFAULTS.items()},
    "mm_resampler_type": (str, type(None)),
    "mm_resampler_topp": (float, int),
    "mm_resampler_temp": (float, int),
}

FIXED = {
    "mm_vision_select_feature": ("patch", "views are grids of patches here, without the class token"),
    "image_aspect_ratio": ("anyres", "only 'anyres', the published rule, has a planner here"),
    "mm_use_im_start_end": (False, "no published model was trained with tokens around the image"),
    "use_mm_proj": (True, "a model without an adapter sees no images"),
}
"""Options of which the parts here can express one value, and why."""

ROUTERS = {"cosine": "cosine", "qformer": "attention"}
NO_ROUTER = (None, "identity")
REFUSED_ADAPTERS = {
    "qformer": "its query former has no perceptron behind it, as our query_former has",
    "qformer_text": "its queries read the question before the image, which no part here does",
}


def refuse(option: str, value: Any, reason: str) -> ConversionError:
    """The error for a value that has no counterpart here."""
    return ConversionError(f"{option}={value!r} of the released configuration cannot be converted: {reason}.")


def option_notes(config: dict) -> dict[str, str]:
    """How each multimodal option was taken, for the report: `read`, `absent; …` or why it does not matter."""
    notes = {key: "read" if key in config else f"absent; taken as {value!r}" for key, value in DEFAULTS.items()}
    notes.update({key: text for key, text in {**ELSEWHERE, **IRRELEVANT}.items() if key in config})
    return notes


def connector_settings(config: dict) -> dict:
    """The options of a released `config.json` as fields of `HiResLmmConfig`; others are refused."""
    options = {key: config.get(key, default) for key, default in DEFAULTS.items()}
    _check_options(config, options)
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


def _check_options(config: dict, options: dict) -> None:
    """Refuse options that nobody here knows, that are of another type, or that have no counterpart."""
    known = {*DEFAULTS, *ELSEWHERE, *IRRELEVANT}
    unknown = sorted(key for key in config if key.startswith("mm_") and key not in known)
    if unknown:
        raise ConversionError(
            f"The released configuration has the unknown option {unknown[0]!r} (value {config[unknown[0]]!r}); the "
            "converter does not guess what it means."
        )
    for name, value in options.items():
        if not isinstance(value, KINDS[name]) or (isinstance(value, bool) and KINDS[name] is not bool):
            raise refuse(name, value, f"a value such as {DEFAULTS[name]!r} is expected")
    for name, (value, reason) in FIXED.items():
        if options[name] != value:
            raise refuse(name, options[name], reason)


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
    plain = {"identity": "identity", "linear": "linear", "mlp1x_gelu": "linear", "mlp2x_gelu": "mlp"}
    if kind in plain:
        return {"part": plain[kind]}
    if kind != "gated":
        known = ", ".join([*plain, "gated"])
        raise refuse("mm_projector_type", kind, f"the known types are {known}")
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
    return ids[0] if ids else DEFAULTS["seperator"]


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
    options = {
        **{key: DEFAULTS[key] for key in ("mm_vision_select_feature", "mm_use_im_start_end", "use_mm_proj")},
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
    _check_way_back(config, options)
    return options


def _check_way_back(config: Any, options: dict) -> None:
    """The options, read again, must give the configuration they came from."""
    planner = {key: value for key, value in config.planner.items() if value is not None}
    planner = {"global_view": "squeeze", "views": "all", "max_crops": 6, "unpad": False, **planner}
    views = planner.pop("views")
    if planner != {"name": "slime_release", "global_view": "squeeze", "max_crops": 6, "unpad": False}:
        raise ConversionError(f"The released SliME code cannot cut images as this model does: {config.planner!r}.")
    if options["mm_projector_type"] is None or config.question_scope != "prompt":
        raise ConversionError(
            "The released SliME code has no counterpart to the adapter "
            f"{config.connector_config.adapter['part']!r} with question_scope={config.question_scope!r}."
        )
    again = type(config.connector_config)(**connector_settings(options)["connector_config"])
    ours, theirs = _plain(config.connector_config), _plain(again)
    for name, values in ours.items():
        if values != theirs[name]:
            raise ConversionError(
                f"The released SliME code cannot express {name} of this model (views={views!r}): {values!r}."
            )


def _plain(connector: Any) -> dict[str, Any]:
    """All options of a connector with their defaults filled in."""
    chain = connector.resolve()

    def options(part: Any) -> dict:
        values = {"part": part.part.__name__, **vars(part.options)}
        return {**values, "keep": vars(KeepOptions(**values["keep"]))} if "keep" in values else values

    return {
        "view_ops": [options(op) for op in chain.view_ops],
        "adapter": options(chain.adapter),
        "tower_adapters": {name: options(op) for name, op in chain.tower_adapters.items()},
        "map_ops": [options(op) for op in chain.map_ops],
        "token_ops": [options(op) for op in chain.token_ops],
        "layer_ops": [options(op) for op in chain.layer_ops],
        "position_plan": chain.position_plan and options(chain.position_plan),
        "heads": {name: options(op) for name, op in chain.heads.items()},
        "layout": vars(chain.layout),
    }

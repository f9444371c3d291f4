"""`apply_preset`: a model reads by the rules of another preset, with the weights that it has."""

from copy import deepcopy
from typing import Any

from ..modeling.configuration_hires_lmm import PRESETS, HiResLmmConfig, HiResLmmConnectorConfig
from ..modeling.connector_hires_lmm import HiResLmmConnector
from ..modeling.layer_ops_hires_lmm import install_layer_ops
from ..processing.processing_hires_lmm import HiResLmmProcessor


LISTS = ("view_ops", "map_ops", "token_ops")


def apply_preset(model: Any, processor: Any, preset: str) -> HiResLmmProcessor:
    """Give a model the planners and parts of a preset whose weights it has, such as one that reads videos.

    Parts that both have keep their options, but for the views `on` that they read; separators that both have stay.
    `save_pretrained` then writes a checkpoint of that preset.

    Args:
        model: A `HiResLmmForConditionalGeneration` or `HiResLmmModel`; its parts and configuration change, no weight
            does.
        processor: Its processor; stays as it is.
        preset (`str`): A name in `hires_lmm.PRESETS`, such as `"ts_llava"` on a LLaVA-NeXT checkpoint.

    Returns:
        The processor of the changed model, with the tokenizer and template of the old one.

    Raises:
        ValueError: If the preset has weights that the model lacks, or no place for some that it has; the model is then
            unchanged.
    """
    base = getattr(model, "model", model)
    config = _changed(base.config, preset)
    connector = HiResLmmConnector(config.connector_config, config.part_context())
    state = _renamed(base.connector.state_dict(), base.config.connector_config, config.connector_config)
    shapes = [{name: value.shape for name, value in own.items()} for own in (state, connector.state_dict())]
    unlike = sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    if unlike:
        raise ValueError(
            f"The preset {preset!r} needs other weights than this model has: {', '.join(unlike[:5])} differ or are on "
            "one side only. Use a preset with the same trained parts, or compose and train one."
        )
    like = next(base.connector.parameters())
    connector.load_state_dict(state)
    connector.to(like.device, like.dtype).train(base.connector.training)
    for name, value in (("planner", config.planner), ("video_planner", config.video_planner)):
        setattr(base.config, name, value)
    base.config.question_scope, base.config.connector_config = config.question_scope, config.connector_config
    base.connector = connector
    for hook in base.layer_hooks:
        hook.remove()
    install_layer_ops(base)
    stats = processor.image_processor
    return HiResLmmProcessor.from_config(base.config, processor.tokenizer, stats, processor.chat_template)


def _changed(config: HiResLmmConfig, preset: str) -> HiResLmmConfig:
    """The configuration with planners and parts of the preset, and what both have from the model."""
    changed, old = deepcopy(config), config.connector_config
    halves = deepcopy((config.vision_config, config.text_config))  # a new configuration changes those that it gets
    layout = PRESETS.get(preset, {}).get("connector_config", {}).get("layout", {})
    separators = {**layout.get("separators", {})}
    separators |= {name: value for name, value in old.layout.get("separators", {}).items() if name in separators}
    layout = {"layout": {**layout, "separators": separators}}
    fresh = HiResLmmConfig.from_preset(preset, *halves, connector_config=layout)
    new = fresh.connector_config
    made = changed.connector_config
    for slot in LISTS:
        known = {spec["part"]: spec for spec in getattr(old, slot)}
        setattr(made, slot, [_joined(known.get(spec["part"]), spec) for spec in getattr(new, slot)])
    made.adapter = old.adapter if new.adapter["part"] == old.adapter["part"] else new.adapter
    made.layout = new.layout
    if config.planner["name"] != fresh.planner["name"]:
        changed.planner = fresh.planner
    changed.question_scope, changed.video_planner = fresh.question_scope, fresh.video_planner
    changed.fitted_chain()
    return changed


def _joined(old: dict | None, new: dict) -> dict:
    """A part of both, by its trained options, on the views of the preset."""
    return new if old is None else {**new, **old, **{name: new[name] for name in ("on",) if name in new}}


def _renamed(state: dict, old: HiResLmmConnectorConfig, new: HiResLmmConnectorConfig) -> dict:
    """Weights by their names in the new connector: parts of a list keep their name and change their place."""
    places = {}
    for slot in LISTS:
        names = [spec["part"] for spec in getattr(new, slot)]
        for number, spec in enumerate(getattr(old, slot)):
            if spec["part"] in names:
                places[f"{slot}.{number}."] = f"{slot}.{names.index(spec['part'])}."
    found = {}
    for name, value in state.items():
        head = next((head for head in places if name.startswith(head)), "")
        found[places.get(head, "") + name.removeprefix(head)] = value
    return found


__all__ = ["apply_preset"]

"""Options of parts that may change in a live model, and its token and layer operations."""

from copy import deepcopy
from typing import Any, cast

import torch
from torch import nn

from ..modeling.connector_hires_lmm import HiResLmmConnector
from ..modeling.layer_ops_hires_lmm import install_layer_ops
from ..modeling.noise_hires_lmm import HiResLmmNoise
from ..modeling.parts_hires_lmm import SLOTS
from .parameters import find_base


REPLACED = ("token_ops", "layer_ops", "position_plan")
"""Slots that may change as a whole in a live model."""


def set_options(model: nn.Module, options: dict[str, Any]) -> None:
    """Set options of parts in a live model, in its modules and in its configuration alike.

    Args:
        model (`nn.Module`): A model of this package, bare or wrapped by PEFT.
        options (`dict[str, Any]`): Place of the part and name of the option -> value, such as
            `{"connector.adapter.forced_expert": "mlp", "connector.token_ops.0.question": False}`. What may change
            is named by the class of the part, in `switches`. Or the whole list of token or layer operations, or the
            position plan, where neither the old nor the new ones have weights:
            `{"token_ops": [{"part": "globalcom2"}]}`, `{"layer_ops": [{"part": "keep_after", "layers": 2}]}`,
            `{"position_plan": {"part": "temporal"}}`; None, as in a configuration, means none.

    Raises:
        ValueError: If there is no such switch, a value is wrong, operations have weights or do not fit the model, or a
            PEFT model would change, whose folder holds no configuration of the model. Nothing has changed then.
    """
    base = find_base(model)
    if not isinstance(options, dict):
        raise ValueError(f"set_options takes a dict, place -> value, not {options!r}.")
    for slot in REPLACED:
        if slot in options:
            return _replace(model, base, slot, options)
    config = deepcopy(base.config.connector_config)
    switches = find_switches(base, config)
    changes = {}
    for path, value in options.items():
        if path not in switches:
            raise ValueError(f"This model has no switch {path!r}; its switches: {', '.join(switches) or 'none'}.")
        part, name, spec = switches[path]
        if getattr(part, name) != value:
            changes[path] = value
        spec[name] = value
    config.resolve()
    if changes and hasattr(model, "peft_config"):
        raise ValueError(
            f"An adapter folder cannot hold {changes}. Call set_options(model, {changes}) and save the base model "
            "before get_peft_model."
        )
    for path, value in changes.items():
        setattr(switches[path][0], switches[path][1], value)
    _write(base, config)


def _write(base: Any, config: Any) -> None:
    """Write the parts of a configuration into those of a model and of its connector."""
    for own in (base.config.connector_config, base.connector.config):
        for slot in SLOTS:
            setattr(own, slot, getattr(config, slot))


def _replace(model: nn.Module, base: Any, slot: str, options: dict[str, Any]) -> None:
    """Replace the operations of a slot by others, all without weights; other modules stay the same objects."""
    if len(options) > 1:
        raise ValueError(f"Set {slot} in a call of its own, apart from {sorted(set(options) - {slot})}.")
    if hasattr(model, "peft_config"):
        raise ValueError(f"An adapter folder cannot hold {slot}; set them in the base model before get_peft_model.")
    config, old, given = deepcopy(base.config), base.connector, options[slot]
    if slot == "position_plan":
        if not (given is None or isinstance(given, dict)):
            raise ValueError(f"{slot}={given!r} must be a part, such as {{'part': name}}, or None.")
        config.connector_config.position_plan = deepcopy(given)
    elif given is None or isinstance(given, (list, tuple)):
        setattr(config.connector_config, slot, deepcopy(list(given or [])))
    else:
        raise ValueError(f"{slot}={given!r} must be a list of parts, such as [{{'part': name}}], or None.")
    config.fitted_chain()
    with torch.device("meta"):
        new = HiResLmmConnector(config.connector_config, config.part_context())
    for connector, what in ((new, "which this model lacks"), (old, "which would be lost")):
        weights = sorted(name for name, _ in connector.named_parameters() if name.startswith(f"{slot}."))
        if weights:
            raise ValueError(
                f"{getattr(connector.config, slot)} of {slot} have weights ({weights[0]}, …), {what}; make a "
                "model with the parts that you want (hires-lmm compose) and train it."
            )
    _write(base, config.connector_config)
    for name, module in old.named_children():
        if name not in (slot, "budget_router"):
            setattr(new, name, module)
    new.config, new.training_views = old.config, old.training_views
    base.connector = new.train(old.training)
    for handle in base.layer_hooks:
        handle.remove()
    install_layer_ops(base)


def find_switches(base: Any, config: Any) -> dict[str, tuple[Any, str, dict]]:
    """The options that may change in a live model: path -> part, name of the option, entry of the part in `config`."""
    specs: dict[str, dict] = {}
    for slot in SLOTS:
        own = getattr(config, slot) or {}
        if "part" in own:
            specs[slot] = own
        else:
            entries = own.items() if isinstance(own, dict) else enumerate(own)
            specs |= {f"{slot}.{name}": spec for name, spec in entries}
    parts = {place: base.connector.get_submodule(place) for place in specs}
    return {
        f"connector.{place}.{name}": (part, name, specs[place])
        for place, part in parts.items()
        for name in getattr(part, "switches", ())
    }


def set_noise(model: nn.Module, noise: bool) -> None:
    """Switch the noise that gates and routers add while training; dropout stays as it is."""
    for module in model.modules():
        if type(module).__name__ == HiResLmmNoise.__name__:  # by name: remote code brings a class of its own
            cast("HiResLmmNoise", module).p = 1.0 if noise else 0.0

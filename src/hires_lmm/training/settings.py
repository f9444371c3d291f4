"""Options of parts that may change in a live model."""

from copy import deepcopy
from typing import Any, cast

from torch import nn

from ..modeling.noise_hires_lmm import HiResLmmNoise
from ..modeling.parts_hires_lmm import SLOTS
from .parameters import find_base


def set_options(model: nn.Module, options: dict[str, Any]) -> None:
    """Set options of parts in a live model, in its modules and in its configuration alike.

    Args:
        model (`nn.Module`): A model of this package, bare or wrapped by PEFT.
        options (`dict[str, Any]`): Place of the part and name of the option -> value, such as
            `{"connector.adapter.forced_expert": "mlp", "connector.token_ops.0.question": False}`. What may change
            is named by the class of the part, in `switches`.

    Raises:
        ValueError: If there is no such switch, a value is wrong, or a PEFT model would change, whose folder holds no
            configuration of the model. Nothing has changed then.
    """
    base = find_base(model)
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
    for own in (base.config.connector_config, base.connector.config):
        for slot in SLOTS:
            setattr(own, slot, getattr(config, slot))


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

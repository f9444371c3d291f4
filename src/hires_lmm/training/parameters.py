"""Names of parameters and parts, whatever wraps a model, and which of them can learn."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..modeling.compat_hires_lmm import layers_of
from ..modeling.tower_table_hires_lmm import tower_family
from ..modeling.towers_hires_lmm import EXTRA_LAYER


VIEWS = ("all", "global", "crops")
CONNECTOR_PARTS = (
    *("view_ops", "adapter", "tower_adapters", "map_ops", "layout", "token_ops"),
    *("layer_ops", "position_plan", "heads"),
)
PARTS = (
    "vision_tower",
    "extra_towers",
    *(f"connector.{part}" for part in CONNECTOR_PARTS),
    "language_model",
    "lm_head",
)
"""Parts in the order of the data."""

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "modules_to_save.default.")
_PEFT_PREFIX = "base_model.model."


def part_name(name: str) -> str:
    """Name of a parameter without what wrappers add: `connector.adapter.mlp.linear_1.weight`, `lm_head.weight`."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.").removeprefix(_PEFT_PREFIX).removeprefix("model.")


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted pattern (`*` for any characters) names a part, as `part_name` gives it, or a module that holds
    it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def find_base(model: nn.Module) -> Any:
    """The `HiResLmmModel` inside a model, whatever wraps it."""
    for module in model.modules():
        if type(module).__name__ in ("HiResLmmModel", "FSDPHiResLmmModel"):
            return module
    raise ValueError(f"{type(model).__name__} holds no HiResLmmModel; stages train models of this package only.")


def learnable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that a stage may choose from, with all names of tied ones: in a PEFT model only adapters, the copies
    in `modules_to_save` and objectives."""
    unread = unread_parameters(find_base(model))
    pairs = [pair for pair in model.named_parameters(remove_duplicate=False) if id(pair[1]) not in unread]
    has_peft = any(_is_peft_parameter(name) for name, _ in pairs)
    for name, parameter in pairs:
        chosen = not has_peft or _is_peft_parameter(name) or part_name(name).startswith("objectives.")
        if parameter.is_floating_point() and chosen:
            yield name, parameter


def unread_parameters(base: Any) -> set[int]:
    """`id` of what gets no gradients: towers behind the layer that is read, and what parts call untrained."""
    unread: list[nn.Module | nn.Parameter] = []
    towers = [(base.vision_tower, base.config.vision_feature_layer)]
    for tower, layer in [*towers, *((tower, EXTRA_LAYER) for tower in base.extra_towers.values())]:
        family = tower_family(tower.config)
        if family.has_layers:
            layers = layers_of(tower)
            unread += layers[layer + len(layers) + 1 if layer < 0 else layer :]  # 0 are the embeddings
        named = (*tower.named_modules(), *tower.named_parameters())
        unread += [part for name, part in named if name.removeprefix("vision_model.") in family.unread]
    parts = [module for module in base.connector.modules() if hasattr(module, "untrained_parameters")]
    untrained = [parameter for part in parts for parameter in part.untrained_parameters()]
    for part in unread:
        untrained += [part] if isinstance(part, nn.Parameter) else part.parameters()
    return {id(parameter) for parameter in untrained}


def _is_peft_parameter(name: str) -> bool:
    """Whether PEFT added a parameter."""
    return ".lora_" in name or ".modules_to_save." in name


def list_parts(model: nn.Module) -> list[str]:
    """Parts of a model that hold parameters, in the order of the data."""
    heads = dict.fromkeys(part_of(name) for name, _ in learnable_parameters(model))
    return sorted(heads, key=place_of)


def part_of(name: str) -> str:
    """The part that a parameter belongs to: the first names of what `part_name` gives."""
    part = part_name(name)
    depth = 3 if part.startswith(("connector.", "objectives.")) else 2 if part.startswith("extra_towers.") else 1
    return ".".join(part.split(".")[:depth])


def place_of(part: str) -> int:
    """Place of a part in the order of the data."""
    return next((place for place, head in enumerate(PARTS) if part.startswith(head)), len(PARTS))

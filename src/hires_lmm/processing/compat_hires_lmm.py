"""All that depends on the minor of transformers: no other file asks for it. `modeling/` has a link to this one."""

import re
import warnings
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging


logger = logging.get_logger("transformers.hires_lmm")  # one name for every copy of this file, so that once is once

TESTED = ((5, 20), (5, 24))
"""First and last minor of transformers that the tests run with; config and image processor look at it."""

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the cache in calls, in outputs and in what `generate` hands on: `cache` since 5.24."""

CACHE_NAMES = ("cache", "past_key_values")
"""Every name that a caller may use for it."""


def training_field(name: str) -> str:
    """Name of a field of `TrainingArguments`: before 5.23 `activation_checkpointing` was `gradient_checkpointing`."""
    from transformers import TrainingArguments  # a training library behind it, which inference does without

    known = name in TrainingArguments.__dataclass_fields__
    return name if known else name.replace("activation_checkpointing", "gradient_checkpointing")


def warn_if_untested() -> None:
    """Say once that the installed minor is none of the tested ones."""
    installed = transformers.__version__
    minor = tuple(int(number) for number in re.findall(r"\d+", installed)[:2])
    if not TESTED[0] <= minor <= TESTED[1]:
        first, last = (".".join(map(str, each)) for each in TESTED)
        logger.warning_once(
            f"hires_lmm is tested with transformers {first} to {last}, and {installed} is installed. If something "
            f"fails, install a tested one: pip install 'transformers=={last}.*'"
        )


def takes_cache(forward: Callable) -> Callable:
    """Let a `forward` with the parameter `cache` be called by either name; outermost of its decorators.

    It shows the name of the installed minor, which `generate` reads; the older name is deprecated since 5.24.
    """
    known = signature(forward)
    shown = [each.replace(name=CACHE) if each.name == "cache" else each for each in known.parameters.values()]

    @wraps(forward)
    def call(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            if kwargs.get("cache") is not None:
                raise ValueError("cache and past_key_values are two names of one argument; pass cache alone.")
            if CACHE == "cache":
                name = f"{type(self).__name__}.forward"
                warnings.warn(f"`past_key_values` is deprecated for `{name}`; use `cache`.", FutureWarning, 2)
            kwargs["cache"] = past_key_values
        return forward(self, *args, **kwargs)

    call.__signature__ = known.replace(parameters=shown)  # type: ignore[attr-defined]  # ready made: generate reads it for every token
    return call


def layers_of(model: Any) -> nn.ModuleList:
    """The layers of a tower or language model: its list of that many modules."""
    depth = model.config.num_hidden_layers
    return next(part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == depth)


def runs_twice_without_graph(model: nn.Module) -> bool:
    """Whether checkpointing of a layer is reentrant: its first pass makes no graph."""
    for part in model.modules():
        options = getattr(getattr(part, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(part, "gradient_checkpointing", False) and options.get("use_reentrant"):
            return True
    return False


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention of a layer: what has groups of key heads, which every attention function asks for."""
    found = next((part for part in layer.modules() if hasattr(part, "num_key_value_groups")), None)
    if found is None:
        raise ValueError(
            f"{type(layer).__name__} has no attention that layer ops can read; use another language model."
        )
    return found


def feed_forward_of(layer: Any) -> nn.Module:
    """The feed-forward of a layer: gate, up and down projection.

    Raises:
        ValueError: If it has none of that form.
    """
    found: Any = getattr(layer, "mlp", None)
    if not all(hasattr(found, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        raise ValueError(
            f"{type(layer).__name__} has no gated feed-forward that layer ops can split; use another language model."
        )
    return found


def attention_window(text_config: Any, layer: int) -> int | None:
    """Positions that a query looks back in a layer, itself included; None = all."""
    window = getattr(text_config, "sliding_window", None)
    kinds = getattr(text_config, "layer_types", None)
    if kinds is None:
        return window
    if kinds[layer] not in ("full_attention", "sliding_attention"):
        raise ValueError(f"Layer ops work with full and sliding attention, and layer {layer} has {kinds[layer]}.")
    return window if kinds[layer] == "sliding_attention" else None

"""All that depends on the minor of transformers: no other file asks for it. `modeling/` has a link to this one."""

import re
import warnings
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging


logger = logging.get_logger("transformers.hires_lmm")  # one name for every copy of this file, so that once is once

TESTED = ((5, 20), (5, 24))
"""First and last minor of transformers that the tests run with; config and image processor look at it."""

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the cache in calls, in outputs and in what `generate` hands on: `cache` since 5.24."""

STATES_ALONE = {"linear_attention", "mamba", "conv"}
"""Kinds of layers whose cache is a state and holds no keys."""

STATE_KINDS = STATES_ALONE | {"hybrid", "hybrid_sliding"}
"""Kinds of layers whose cache has a state."""

STATE_BIASES = ("use_bias", "mamba_proj_bias", "conv_bias")
"""Fields of configurations that put a bias before a state, where padding then is not zero."""

FORGETFUL = ("MambaMixer",)
"""Ends of the class names of mixers that take no state with several positions."""

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


def router_layers(language_model: Any) -> list[int]:
    """The layers with experts, in order: those with a module of the class whose output is noted as router logits."""
    recorder: Any = (language_model._can_record_outputs or {}).get("router_logits")
    router, where = getattr(recorder, "target_class", recorder), getattr(recorder, "layer_name", None) or ""
    return [
        number
        for number, layer in enumerate(layers_of(language_model))
        if any(isinstance(part, router) and where in name for name, part in layer.named_modules())
    ]


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


def keeps_keys(text_config: Any) -> bool:
    """Whether any layer of a language model has attention, so that its cache knows how many positions it holds."""
    kinds = set(getattr(text_config, "layer_types", None) or ())
    return not kinds or not kinds <= STATES_ALONE


def keeps_state(text_config: Any) -> bool:
    """Whether any layer of a language model is recurrent: its cache cannot be cropped, and padding could reach it."""
    return bool(STATE_KINDS & set(getattr(text_config, "layer_types", None) or ()))


def forgets_state(language_model: Any) -> bool:
    """Whether it reads several positions behind a cache as if there were no state: the first form of Mamba."""
    return any(type(part).__name__.endswith(FORGETFUL) for part in language_model.modules())


def call_language_model(
    model: Any, embeds: torch.Tensor, mask: Any, positions: torch.Tensor | None, cache: Any, options: dict
) -> Any:
    """One pass of a language model."""
    if keeps_state(model.config):
        return _call_recurrent(model, embeds, mask, positions, cache, options)
    inputs: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
    return model(**inputs, **{CACHE: cache}, return_dict=True, **options)


def _call_recurrent(
    model: Any, embeds: torch.Tensor, mask: Any, positions: torch.Tensor | None, cache: Any, options: dict
) -> Any:
    """One pass of a state-space model or a hybrid.

    The former know no positions, want the mask of the call alone, and before 5.24 named their cache apart.

    Raises:
        ValueError: If the model would forget what it has read before, or padding would reach its state.
    """
    text_config, count, is_mask = model.config, embeds.shape[1], getattr(mask, "ndim", None) == 2
    family, has_keys = text_config.model_type, keeps_keys(text_config)
    if count > 1:
        goes_on = cache is not None and cache.has_previous_state()
        if goes_on and forgets_state(model):
            raise ValueError(
                f"The language model {family!r} goes on from a cache one position at a time, and the call has "
                f"{count}; pass the whole text without cache, and no prefill_chunk_size."
            )
        if goes_on and is_mask and bool((mask.long().diff(dim=1) < 0).any()):
            raise ValueError(
                f"Padding between what {family!r} has read and what comes would change its state; go on with rows of "
                "one length, or pass the whole text without cache."
            )
        bias = next((name for name in STATE_BIASES if getattr(text_config, name, False)), None)
        if bias is not None and is_mask and bool((mask[:, -count:].long().diff(dim=1) > 0).any()):
            raise ValueError(
                f"{bias}=True lets padding reach the states of {family!r}; pass rows of one length, or one at a time."
            )
    if has_keys and positions is None and cache is not None:  # Bamba would begin at 0 again
        past = cache.get_seq_length()
        positions = torch.arange(past, past + count, device=embeds.device)[None]
    if not has_keys:
        mask = mask[:, -count:] if is_mask and count > 1 else None
    known = signature(type(model).forward).parameters
    name = CACHE if CACHE in known else "cache_params"
    inputs = {"inputs_embeds": embeds, "attention_mask": mask, name: cache}
    inputs |= {"position_ids": positions} if "position_ids" in known else {}
    outputs = model(**inputs, return_dict=True, **options)
    if name != CACHE:
        outputs[CACHE] = outputs.get(name)
    if not has_keys:  # their norm may answer in float32
        outputs.last_hidden_state = outputs.last_hidden_state.to(embeds.dtype)
    return outputs

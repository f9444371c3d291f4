"""All that depends on the version of transformers."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast


CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the cache in calls, in the kwargs of `generate` and in outputs: `past_key_values` before 5.24."""


def takes_cache(forward: Callable) -> Callable:
    """Let a `forward` with the parameter `cache` be called by either name; outermost of its decorators."""
    known = signature(forward)
    shown = [each.replace(name=CACHE) if each.name == "cache" else each for each in known.parameters.values()]

    @wraps(forward)
    def call(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            kwargs["cache"] = past_key_values
        return forward(self, *args, **kwargs)

    call.__signature__ = known.replace(parameters=shown)  # type: ignore[attr-defined]  # ready made: generate reads it for every token
    return call

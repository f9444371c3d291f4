"""Cognition alignment from plain values, as recipes hold them."""

from collections.abc import Callable
from typing import Any

from .cognition import CognitionTransform
from .cognition_cache import CachedCodes
from .cognition_codes import Quantiser, load_quantiser
from .cognition_tasks import CodebookTask, PixelTask


TASK_KEYS = {
    "pixels": ("rate", "grid", "templates"),
    "codebook": ("rate", "block", "templates", "model", "image_size", "subfolder", "cache"),
}
TRANSFORM_KEYS = ("seed", "places")


def build_cognition(
    settings: dict[str, Any], processor: Any = None, rates: dict[str, float] | None = None
) -> CognitionTransform:
    """Build a transform from the `cognition` section of a recipe.

    Args:
        settings (`dict`): `pixels`: `rate` and the options of `PixelTask`; `codebook`: `rate`, the options of
            `CodebookTask`, and `cache`, a folder that `cache_codes` wrote, or `model` with `image_size` and
            `subfolder`, a VQ model of diffusers; `seed` and `places` of `CognitionTransform`.
        processor (`HiResLmmProcessor`, *optional*): Its background colour and size limit are used.
        rates (`dict[str, float]`, *optional*): Task -> rate in place of those of the settings: `stage.cognition`.
            Only its tasks are asked.

    Returns:
        The transform.

    Raises:
        ValueError: If a key is unknown or missing, or a value senseless.
    """
    _check_keys("cognition", settings, (*TASK_KEYS, *TRANSFORM_KEYS))
    for name in TASK_KEYS:
        _check_keys(f"cognition.{name}", settings.get(name, {}), TASK_KEYS[name])
    if rates is None:
        rates = {name: settings[name].get("rate") for name in TASK_KEYS if name in settings}
    _check_keys("The rates of cognition", rates, tuple(TASK_KEYS))
    if not rates or None in rates.values():
        raise ValueError(f"cognition={settings!r} must name a rate for pixels or codebook, such as rate: 0.5.")
    makers: dict[str, Callable] = {"pixels": PixelTask, "codebook": _codebook}
    tasks = {}
    for name, rate in rates.items():
        values = {key: value for key, value in settings.get(name, {}).items() if key != "rate"}
        tasks[makers[name](**values)] = rate
    options = {key: settings[key] for key in TRANSFORM_KEYS if key in settings}
    return CognitionTransform(tasks, processor=processor, **options)


def _codebook(cache: str | None = None, model: str | None = None, **options: Any) -> CodebookTask:
    """The task with its quantiser, from a cache or from a model."""
    loading = {key: options.pop(key) for key in ("image_size", "subfolder") if key in options}
    if (cache is None) == (model is None) or (cache is not None and loading):
        raise ValueError(
            f"cognition.codebook has cache={cache!r} and model={model!r}; name either cache, a folder of cache_codes, "
            "or model, a VQ model of diffusers, with image_size and subfolder where needed."
        )
    quantiser: Quantiser = load_quantiser(model, **loading) if model is not None else CachedCodes(str(cache))
    return CodebookTask(quantiser, **options)


def _check_keys(where: str, values: Any, known: tuple[str, ...]) -> None:
    """A mapping with no other keys."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}={values!r} must be a mapping with the keys {', '.join(known)}.")
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; keys are {', '.join(known)}.")

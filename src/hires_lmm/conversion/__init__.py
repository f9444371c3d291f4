"""Checkpoints in and out: one key table a format, read in both directions."""

from .compose import compose
from .errors import ConversionError
from .exporting import export
from .fusion import convert_fusion
from .llava_next import convert_llava_next
from .presets import apply_preset
from .random_model import compose_random, preset_processor
from .released import convert_released, convert_to_released


__all__ = [
    "ConversionError",
    "apply_preset",
    "compose",
    "compose_random",
    "convert_fusion",
    "convert_llava_next",
    "convert_released",
    "convert_to_released",
    "export",
    "preset_processor",
]

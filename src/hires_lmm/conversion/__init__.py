"""Checkpoints in and out: one key table a format, read in both directions."""

from .compose import compose, read_settings
from .errors import ConversionError
from .exporting import export
from .fast_vlm import convert_fast_vlm
from .fusion import convert_fusion
from .llava_next import convert_llava_next
from .presets import apply_preset
from .random_model import compose_random, preset_processor
from .released import convert_released, convert_to_released
from .upcycle import upcycle


__all__ = [
    "ConversionError",
    "apply_preset",
    "compose",
    "compose_random",
    "convert_fast_vlm",
    "convert_fusion",
    "convert_llava_next",
    "convert_released",
    "convert_to_released",
    "export",
    "preset_processor",
    "read_settings",
    "upcycle",
]

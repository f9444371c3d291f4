"""Loading in 4 bit: which modules stay in full precision."""

from typing import Any

import torch


HEAD = ("lm_head",)
CONNECTOR = ("model.connector", "connector")
TOWERS = ("model.vision_tower", "vision_tower", "model.extra_towers", "extra_towers")


def skip_modules(quantize_tower: bool = False) -> list[str]:
    """Names for `llm_int8_skip_modules`. They replace the list of transformers, so the head must be named too; names
    are compared from their start."""
    return [*HEAD, *CONNECTOR, *(() if quantize_tower else TOWERS)]


def four_bit_config(quantize_tower: bool = False, **options: Any) -> Any:
    """A `BitsAndBytesConfig` for NF4 with the right skip list.

    Args:
        quantize_tower (`bool`): Quantise the vision towers as well.
        options: Fields that replace the defaults: double quantisation, bfloat16 arithmetic.

    Returns:
        The configuration, for `from_pretrained(..., quantization_config=...)`.
    """
    from transformers import BitsAndBytesConfig

    defaults = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "llm_int8_skip_modules": skip_modules(quantize_tower),
    }
    return BitsAndBytesConfig(**{**defaults, **options})

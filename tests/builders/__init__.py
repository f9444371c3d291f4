"""What tests build: tiny models and pictures by their names here, the rest in a file for each subject."""

from builders.tiny import (
    GEOMETRY,
    LLAVA_NEXT_PINPOINTS,
    TEXT_FAMILIES,
    VISION_FAMILIES,
    geometry_of,
    make_batch,
    plain_tokenizer,
    random_image,
    randomise,
    scaled_pinpoints,
    tiny_config,
    tiny_convnext,
    tiny_model,
    tiny_processor,
    tiny_text_config,
    tiny_vision_config,
)


__all__ = [
    "GEOMETRY",
    "LLAVA_NEXT_PINPOINTS",
    "TEXT_FAMILIES",
    "VISION_FAMILIES",
    "geometry_of",
    "make_batch",
    "plain_tokenizer",
    "random_image",
    "randomise",
    "scaled_pinpoints",
    "tiny_config",
    "tiny_convnext",
    "tiny_model",
    "tiny_processor",
    "tiny_text_config",
    "tiny_vision_config",
]

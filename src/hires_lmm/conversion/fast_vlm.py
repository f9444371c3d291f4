"""`convert fast-vlm`: a FastVLM checkpoint in Hugging Face format becomes one of ours.

An image is one view of FastViTHD; its map has a 64th of the pixels a side, so 1024 pixels are 256 tokens.
"""

from functools import partial
from pathlib import Path
from typing import Any

from .hugging_face import read_hugging_face
from .pipeline import Source, convert
from .tensors import read_if_present


def convert_fast_vlm(source: str | Path, destination: str | Path, **options: Any) -> dict:
    """Convert a FastVLM checkpoint in Hugging Face format; timm has to be installed.

    Args:
        source (`str` or `Path`): A folder or a Hub repository.
        destination (`str` or `Path`): The folder to make; it appears only when it is whole.
        options: `dtype`, `progress` and `max_shard_bytes`, as in `convert`, which also says what comes back.

    Raises:
        ConversionError: If the checkpoint is none of FastVLM, or is damaged.

    Source: FastVLM (arXiv 2412.13303) as `FastVlmForConditionalGeneration` of transformers reads it.
    """
    return convert(partial(read_fast_vlm, source), destination, **options)


def read_fast_vlm(source: str | Path) -> Source:
    """Read a FastVLM checkpoint."""
    title = "A FastVLM model in the format of hires_lmm."
    return read_hugging_face(source, "fast_vlm", title, "Apple's own", settings_of)


def settings_of(theirs: Any, folder: Path) -> dict:
    """One view of the whole image, read from the last map of the tower."""
    return {
        "planner": {"name": "multiple", "views": "global", "square": "crop"},
        "vision_feature_layer": -1,
        "vision_view_size": view_size_of(folder),
    }


def view_size_of(folder: Path) -> int | None:
    """Side of the square that the image processor of a folder cuts; None = that of the tower."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        values = read_if_present(folder / name)
        size = (values.get("image_processor") or values).get("crop_size")
        if size is not None:
            return size["height"] if isinstance(size, dict) else size
    return None

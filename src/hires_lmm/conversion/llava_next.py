"""`convert llava-next`: any LLaVA-NeXT checkpoint in Hugging Face format becomes one of ours.

Views, order and numbers stay as they are. A budget (`max_image_tokens`) works afterwards without training, because the
`saliency` score has no parameters; anything that reads the question has to be trained.
"""

from functools import partial
from pathlib import Path
from typing import Any

from ..processing.tower_table_hires_lmm import TOWERS
from .errors import ConversionError
from .hugging_face import read_hugging_face
from .pipeline import Source, convert
from .tensors import read_if_present


TOWERS_READ = ("clip_vision_model", "siglip_vision_model")


def convert_llava_next(source: str | Path, destination: str | Path, **options: Any) -> dict:
    """Convert a LLaVA-NeXT checkpoint in Hugging Face format.

    Args:
        source (`str` or `Path`): A folder or a Hub repository.
        destination (`str` or `Path`): The folder to make; it appears only when it is whole.
        options: `dtype`, `progress` and `max_shard_bytes`, as in `convert`, which also says what comes back.

    Raises:
        ConversionError: If the checkpoint uses an option without a counterpart here, or is damaged.
    """
    return convert(partial(read_llava_next, source), destination, **options)


def read_llava_next(source: str | Path) -> Source:
    """Read a LLaVA-NeXT checkpoint."""
    title = "A LLaVA-NeXT model in the format of hires_lmm. A budget per image works without training."
    return read_hugging_face(source, "llava_next", title, "the original LLaVA", settings_of)


def settings_of(theirs: Any, folder: Path) -> dict:
    """The multimodal options as fields of `HiResLmmConfig`; the image processor in the folder must agree with them."""
    tower = theirs.vision_config.model_type
    if tower not in TOWERS_READ:
        raise ConversionError(f"The tower {tower!r} is not supported; known are {', '.join(TOWERS_READ)}.")
    strategy, layer = theirs.vision_feature_select_strategy, theirs.vision_feature_layer
    fitting = "default" if TOWERS[tower].prefix else "full"
    if strategy != fitting:
        raise ConversionError(
            f"vision_feature_select_strategy={strategy!r} with a {tower} tower gives features that are no grid of "
            f"patches; only {fitting!r} can be converted for this tower."
        )
    if isinstance(layer, (list, tuple)):
        raise ConversionError(f"vision_feature_layer={layer!r} joins several layers, which no part here does.")
    pinpoints = [list(point) for point in theirs.image_grid_pinpoints]
    _compare_processor(folder, pinpoints, theirs.vision_config.image_size)
    return {
        "planner": {"name": "llava_next", "pinpoints": pinpoints},
        "connector_config": {
            "layout": {"separators": {"newline": {"place": "token_row_end", "on": "crops"}}},
        },
        "vision_feature_layer": layer,
    }


def _compare_processor(folder: Path, pinpoints: list, image_size: int) -> None:
    """The saved image processor must cut images as the configuration says."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        values = read_if_present(folder / name)
        values = values.get("image_processor") or values
        other = values.get("image_grid_pinpoints")
        if other is not None and [list(point) for point in other] != pinpoints:
            raise ConversionError(
                f"image_grid_pinpoints of config.json ({pinpoints}) and of {name} ({other}) differ; make them agree."
            )
        size = values.get("crop_size") or values.get("size") or {}
        sides = [side for side in size.values() if side is not None] if isinstance(size, dict) else [size]
        if any(side != image_size for side in sides):
            raise ConversionError(f"{name} makes views of {size}, but the vision tower reads {image_size} pixels.")

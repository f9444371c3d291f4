"""`convert fast-vlm`: a FastVLM checkpoint in Hugging Face format becomes one of ours.

An image is one view of FastViTHD; its map has a 64th of the pixels a side, so 1024 pixels are 256 tokens.
"""

from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..processing.template_choice_hires_lmm import choose_template
from .errors import ConversionError, readable
from .hub import is_repository, resolve_folder
from .llava_next import plain_head, tie_rules
from .pipeline import Source, convert
from .prompts import image_stats_of, load_tokenizer, source_template
from .tensors import folder_entries, read_if_present, read_json


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
    folder = resolve_folder(source, "The source")
    values = read_json(folder / "config.json")
    if values.get("model_type") != "fast_vlm":
        raise ConversionError(
            f"config.json describes a model of type {values.get('model_type')!r}, not fast_vlm. Checkpoints of "
            "Apple's own code are not read; use the ones in Hugging Face format."
        )
    with readable("The configuration"):
        theirs: Any = AutoConfig.for_model(**values)
    entries = folder_entries(folder)
    rules = tie_rules(theirs, entries)
    plain_head(theirs.text_config)
    tokenizer = load_tokenizer(folder)
    template = source_template(folder) or (choose_template(tokenizer).template if tokenizer is not None else None)
    return Source(
        format="fast-vlm",
        name=folder.name,
        summary="A FastVLM model in the format of hires_lmm.",
        entries=entries,
        rules=rules,
        vision_config=theirs.vision_config,
        text_config=theirs.text_config,
        settings={
            "planner": {"name": "multiple", "views": "global", "square": "crop"},
            "vision_feature_layer": -1,
            "vision_view_size": view_size_of(folder),
            "connector_config": {
                "adapter": {
                    "part": "mlp",
                    "hidden_act": theirs.projector_hidden_act,
                    "bias": theirs.multimodal_projector_bias,
                }
            },
        },
        dtype=values.get("dtype", values.get("torch_dtype")),
        tokenizer=tokenizer,
        chat_template=template,
        image_token_id=theirs.image_token_id,
        image_stats=image_stats_of(folder),
        generation=folder,
        bases=[{"part": "whole model", "name": str(source)}] if is_repository(source) else [],
        report={"source_config": values},
    )


def view_size_of(folder: Path) -> int | None:
    """Side of the square that the image processor of a folder cuts; None = that of the tower."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        values = read_if_present(folder / name)
        size = (values.get("image_processor") or values).get("crop_size")
        if size is not None:
            return size["height"] if isinstance(size, dict) else size
    return None

"""`convert slime`: a released SliME checkpoint, in any of its three forms, becomes one of ours."""

from pathlib import Path
from typing import Any

from .llava_format import LlavaFormat
from .llava_source import convert_llava
from .slime import key_table
from .slime_options import OPTIONS, connector_settings, released_options


SLIME = LlavaFormat(
    name="slime",
    title="SliME",
    origin="yfzhang114/SliME at 5c89ec9, llava/model/llava_arch.py and multimodal_projector/builder.py",
    model_types=("llava_llama", "llava"),
    architecture="LlavaLlamaForCausalLM",
    options=OPTIONS,
    settings=lambda options, text_config: connector_settings(options),
    rules=lambda options: key_table(options["mm_projector_type"], options["mm_resampler_type"]),
    way_back=released_options,
    stage_files=("mm_projector.bin", "sampler.bin"),
    positions={"mm_projector.attn.query": True, "sampler.post_qformer.query": True},
    planner={"global_view": "squeeze", "max_crops": 6},
    marker="mm_projector_type",
)


def convert_slime(
    source: str | Path,
    destination: str | Path,
    vision_config: str | Path | None = None,
    base: str | Path | None = None,
    **options: Any,
) -> dict:
    """Convert a released SliME checkpoint.

    Args:
        source (`str` or `Path`): A folder or a Hub repository: a full checkpoint, a LoRA folder, or stage files.
        destination (`str` or `Path`): The folder to make; it appears only when it is whole.
        vision_config (`str` or `Path`, *optional*): The vision tower: a `config.json`, a folder or a repository; the
            latter two also give the weights where the checkpoint has none. By default the tower it names.
        base (`str` or `Path`, *optional*): The language model under a LoRA or stage files; by default the one named.
        options: `dtype`, `progress` and `max_shard_bytes`, as in `convert`, which also says what comes back.

    Raises:
        ConversionError: If anything is unknown, absent or does not fit; the destination is not made then.
    """
    return convert_llava(SLIME, source, destination, vision_config, base, **options)

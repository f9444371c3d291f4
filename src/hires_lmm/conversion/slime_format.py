"""Released SliME checkpoints, described."""

from .llava_format import LlavaFormat
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

"""The one table of what does not run. `python tests/upstream/skips.py` writes it into README.md."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import version
from pathlib import Path

from packaging.specifiers import SpecifierSet


README = Path(__file__).with_name("README.md")
PRESETS = ("slime", "slime_release", "llava_next", "vlsa", "fusion")
SHARDED = ("slime",)  # presets whose sharding is tested as well: 17 s a test, most of which start two processes
PACKED = ("slime", "slime_release")  # drop tokens inside the model


@dataclass(frozen=True)
class Row:
    """Tests that do not run as they stand.

    Args:
        tests (`str`): Patterns of names.
        reason (`str`): Why.
        fails (`str`): A pattern in the error of the test, which is run and must fail so; empty: transformers skips it.
        presets (`tuple[str, ...]`): Where.
        versions (`str`): With which transformers; empty: all.
    """

    tests: str
    reason: str
    fails: str = ""
    presets: tuple[str, ...] = PRESETS
    versions: str = ""

    @property
    def applies(self) -> bool:
        """Whether the row speaks of the installed transformers."""
        return _is_installed(self.versions)

    def matches(self, name: str, preset: str) -> bool:
        """Whether the row speaks of a test."""
        return preset in self.presets and any(fnmatchcase(name, pattern) for pattern in self.tests.split())


@cache
def _is_installed(versions: str) -> bool:
    return SpecifierSet(versions, prereleases=True).contains(version("transformers"))


ROWS = [
    # what the machine lacks, on purpose
    Row(
        "test_can_load_with_* test_cpu_offload test_disk_offload_* test_flex_attention_with_grads "
        "test_sdpa_can_compile_dynamic test_sdpa_can_dispatch_on_flash test_torch_compile_for_training",
        "A GPU is needed; the target hides one, so that the table holds everywhere.",
    ),
    Row("test_model_parallelism", "Two GPUs are needed."),
    Row("test_resize_*_with_deepspeed*", "DeepSpeed and a GPU are needed."),
    Row("test_flash_attn_* test_kernels_*", "A GPU and flash-attn or kernels are needed."),
    Row("test_tp_generation_quantized", "torchao is needed.", presets=SHARDED),
    Row(
        "test_hsdp_save_load* test_hsdp_grad_accumulation_vs_single_device_0_*",
        "Four processes are needed; the suite starts two.",
        presets=SHARDED,
        versions=">=5.23",
    ),
    Row("test_can_compile_torchvision_backend", "A GPU and torchvision are needed."),
    Row(
        "test_pil_can_run_without_torchvision",
        "Starts a program that does not import this package and may not run a checkpoint's code; "
        "`tests/hub` loads processors in such programs.",
        versions=">=5.23",
    ),
    Row(
        "test_pil_can_load_without_torchvision",
        "Looks for the code in a folder of transformers.",
        fails="No module named 'transformers.models.upstream'",
        versions="<5.21",
    ),
    Row(
        "test_can_init_all_missing_weights",
        "For files with a year in their head; `tests/unit/test_starting_weights.py` asks the same.",
        versions="<5.21",
    ),
    # what the model does not have
    Row(
        "test_eager_matches_batched_and_grouped_inference_* test_moe_models_* test_output_router_logits_from_config",
        "Mixtures of experts: a matter of the language model.",
    ),
    Row("test_fsdp2_expert_parallel_*", "Mixtures of experts: a matter of the language model.", presets=SHARDED),
    Row(
        "test_moe_parallel_plans_* test_hsdp_grad_accumulation_vs_single_device_2_*",
        "Mixtures of experts: a matter of the language model.",
        presets=SHARDED,
        versions=">=5.23",
    ),
    Row("test_ep_*", "Mixtures of experts: a matter of the language model.", presets=SHARDED, versions="<5.21"),
    Row("test_encoder_decoder_loss_no_double_shift", "There is no encoder-decoder."),
    Row(
        "test_resize_position_vector_embeddings test_sliding_window_mask test_vision_axial_rope "
        "test_model_rope_with_partial_rotation",
        "Positions and windows are a matter of the tower and of the language model.",
    ),
    Row("test_keep_in_fp32_modules*", "No part needs float32."),
    Row("test_sdpa_can_dispatch_non_composite_models", "For models of one part; the test for composite ones runs."),
    Row("test_reverse_loading_mapping", "Names in checkpoints are those in memory."),
    Row(
        "test_pipeline_a* test_pipeline_d* test_pipeline_f* test_pipeline_image_[cfs]* test_pipeline_[motvz]*",
        "Tasks of other models; `any-to-any` takes the same inputs as `image-text-to-text`, but needs torchvision.",
    ),
    Row(
        "test_apply_chat_template_audio* test_chat_template_audio* test_kwargs_*_audio "
        "test_overlapping_*_audio test_*structured_*_audio test_subprocessor_*_audio test_apply_chat_template_*video* "
        "test_*_videos test_*_call_video",
        "The processor reads no sound, and videos as images.",
    ),
    Row("test_get_*_audio", "The processor reads no sound, and videos as images.", versions=">=5.23"),
    Row("test_apply_chat_template_tool_calls_no_content", "The chat templates know no tools."),
    Row(
        "test_backends_equivalence* test_save_load_backends* test_fast_image_processor_explicit_none_preserved "
        "test_image_processor_preprocess_arguments",
        "There is one image processor, on Pillow, and it takes its options as `**kwargs`.",
    ),
    Row(
        "test_override_instance_attributes_does_not_affect_other_instances",
        "Means and deviations are tuples, which nobody can change in place.",
    ),
    # what fails outside of this package
    Row(
        "test_fsdp2_plan_vs_ddp_*",
        "The test trains the last layer of the tower as well, which is not read: it has no optimizer state to save. "
        "Stages leave it out; frozen by hand, `untied` equals DDP, and `tied` differs as LlamaForCausalLM does.",
        fails="ProcessExitedException|Missing key in checkpoint state_dict: optimizer",
        presets=SHARDED,
    ),
    # what is meant to differ
    Row(
        "test_attention_outputs test_hidden_states_output",
        "Hidden states and attentions of the layers have the packed length; `last_hidden_state` and logits keep that "
        "of the input.",
        fails="Lists differ",
        presets=PACKED,
    ),
    Row(
        "test_model_outputs_equivalence",
        "The test subtracts outputs for its message, and `kept_mask` is bool; "
        "`tests/integration/test_tower_outputs.py` compares tuples with dicts.",
        fails="two bool tensors is not supported",
    ),
    Row(
        "test_internal_model_config_and_subconfig_are_same",
        "The transformer of fusion is a Llama with a configuration of its own; the test takes any Llama for the "
        "language model.",
        fails="False is not true",
        presets=("fusion",),
    ),
    Row(
        "test_apply_chat_template_assistant_mask test_get_num_multimodal_tokens_matches_processor_call",
        "Fusion reads one image a conversation.",
        fails="this model reads one image a conversation",
        presets=("fusion",),
    ),
    Row(
        "test_new_models_require_torchvision_backend",
        "The image processor works with Pillow alone.",
        fails="must support the torchvision backend",
    ),
    Row(
        "test_call_numpy_4_channels test_image_processor_from_dict_with_kwargs_has_attributes",
        "Towers read RGB; an option that would have no effect is refused.",
        fails="do_convert_rgb=False must be True|must be finite, one number or one a channel",
    ),
    Row(
        "test_apply_chat_template_image_*",
        "`pixel_values` has a row a view, not an image; `tests/unit/test_chat_templates.py` has images in messages.",
        fails=r"AssertionError: \d+ != [12]|Unknown options .*num_frames",
    ),
    Row(
        "test_model_input_names test_flat_kwarg_applied_when_modality_dict_lacks_it",
        "The tests give a sound to every processor; ours refuses what it would have to leave out.",
        fails="audio=(list|ndarray) was passed",
    ),
    Row(
        "test_args_overlap_kwargs",
        "A saved option that nobody knows is refused.",
        fails="Unknown image options .*is_override",
    ),
    Row(
        "test_processor_from_and_save_pretrained*",
        "Saving a class with its code leaves `auto_map` on the processor in memory; transformers does so.",
        fails="'auto_map': .'AutoProcessor'",
    ),
]


def rows_of(name: str, preset: str) -> list[Row]:
    """The rows that speak of a test with the installed transformers; more than one is a mistake."""
    return [row for row in ROWS if row.applies and row.matches(name, preset)]


def render() -> str:
    """The table as Markdown."""
    lines = ["| Tests | Presets | transformers | What happens | Why |", "|---|---|---|---|---|"]
    for row in ROWS:
        tests = ", ".join(f"`{pattern}`" for pattern in row.tests.split())
        presets = "all" if row.presets == PRESETS else ", ".join(row.presets)
        happens = f"fails: `{row.fails}`".replace("|", "\\|") if row.fails else "skips itself"
        lines.append(f"| {tests} | {presets} | {row.versions or 'all'} | {happens} | {row.reason} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """README.md with the table as it is now."""
    return re.sub(r"(?s)(<!-- table -->\n).*(<!-- end -->)", lambda found: f"{found[1]}{render()}\n{found[2]}", text)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")

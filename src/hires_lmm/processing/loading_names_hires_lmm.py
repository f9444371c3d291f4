"""Names that say how something is loaded, apart from the options of what is loaded."""

LOADING_NAMES = """
adapter_kwargs adapter_name allow_all_kernels attn_implementation backend cache_dir code_revision config device_map
device_mesh disable_mmap distributed_config dtype experts_implementation force_download from_tf fusion_config
generation_config gguf_file ignore_mismatched_sizes image_processor_filename kernel_config key_mapping
local_files_only low_cpu_mem_usage max_memory mirror offload_buffers offload_folder offload_state_dict
output_loading_info proxies quantization_config resume_download return_unused_kwargs revision state_dict subfolder
token torch_dtype tp_plan tp_size tqdm_class trust_remote_code use_auth_token use_fast use_kernels use_safetensors
user_agent variant weights_only
"""
"""Options of `from_pretrained` itself; pipelines hand those of a model to all its parts."""

SERVICE_NAMES = {
    "auto_map",
    "feature_extractor_type",
    "image_processor_type",
    "processor_class",
    "transformers_version",
}
"""Keys of saved files that are no options."""


def is_service_name(name: str) -> bool:
    """Whether a key of a saved file is no option."""
    return name in SERVICE_NAMES or name.startswith("_")


def is_loading_name(name: str) -> bool:
    """Whether an option of `from_pretrained` says how to load, not what is loaded."""
    return name in LOADING_NAMES.split() or is_service_name(name)

"""What this package takes from transformers and its companions beyond their documented surface, each with its reason.

A place is `module:name`. `parameters` are those of the signature, None for what has none; `CACHE` is the name of the
cache, which `compat` knows. A mention is a text in the source of a place: a name that the library asks for or sets.
"""

from typing import NamedTuple

from hires_lmm.modeling.compat_hires_lmm import CACHE


class Use(NamedTuple):
    """One name, with the parameters it must have and what we do with it."""

    place: str
    parameters: str | None
    reason: str


class Mention(NamedTuple):
    """A text that the source of a place must hold, and what rests on it."""

    place: str
    text: str
    reason: str


GENERATION, MODEL, CONFIG = (
    "transformers.generation.utils:GenerationMixin",
    "transformers.modeling_utils:PreTrainedModel",
    "transformers.configuration_utils:PreTrainedConfig",
)
DPO = "trl.trainer.dpo_trainer:DPOTrainer"
PROCESSOR, IMAGES = "transformers.processing_utils:ProcessorMixin", "transformers.image_processing_backends:PilBackend"

USES = [
    # generate
    Use(
        f"{GENERATION}._maybe_prepare_encoder_kwargs_for_generation",
        "self, inputs_tensor, model_kwargs, model_input_name, generation_config",
        "the one place before beams and prefill: images are encoded once and told where the prompt ends",
    ),
    Use(
        f"{GENERATION}._validate_model_kwargs",
        "self, model_kwargs",
        "views of extra towers have names that only the configuration knows",
    ),
    Use(
        f"{GENERATION}._prepare_cache_for_generation",
        "self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length",
        "a cache of states alone is one that knows its length",
    ),
    Use(
        f"{GENERATION}.init_continuous_batching",
        "self, generation_config, continuous_batching_config, workload_hints",
        "continuous batching, which comes here however it is asked for, is refused",
    ),
    Use(
        f"{GENERATION}._expand_multimodal_outputs",
        "self, input_ids, mm_encoder_output, expand_size, inputs_embeds",
        "beams and returned sequences repeat images, whose features hold more than one list",
    ),
    Use(
        f"{GENERATION}.prepare_inputs_for_generation",
        f"self, input_ids, next_sequence_length, {CACHE}, attention_mask, inputs_embeds, is_first_iteration, **kwargs",
        "the first draft in a caller's cache reads the new ids alone",
    ),
    Use(
        f"{GENERATION}._update_model_kwargs_for_generation",
        "self, outputs, model_kwargs, is_encoder_decoder, num_new_tokens",
        "decoding goes on with the mask and positions of what was kept",
    ),
    Use(
        f"{GENERATION}._get_logits_processor",
        "self, generation_config, input_ids_seq_length, encoder_input_ids, prefix_allowed_tokens_fn, "
        "logits_processor, device, model_kwargs, negative_prompt_ids, negative_prompt_attention_mask",
        "what combines two contexts acts before penalties and temperature",
    ),
    Use(
        f"{GENERATION}._valid_auto_compile_criteria",
        "self, model_kwargs, generation_config",
        "layer ops change lengths from layer to layer, which is nothing to compile",
    ),
    Use(
        "transformers.masking_utils:create_masks_for_generate",
        f"config, inputs_embeds, attention_mask, {CACHE}, position_ids, or_mask_function, and_mask_function, "
        "block_sequence_ids, **kwargs",
        "masks of a static cache after the first step; our hook of that name leaves the first one two-dimensional",
    ),
    Use(
        "transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        None,
        "the Trainer shifts the labels that it smooths for classes in it",
    ),
    Use(
        "transformers.models.auto.modeling_auto:MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        None,
        "remote code is known as a model of images and text",
    ),
    # the model
    Use(
        f"{MODEL}._adjust_missing_and_unexpected_keys",
        "self, loading_info",
        "the base model does not report the head of a file",
    ),
    Use(f"{MODEL}.post_init", "self", "block classes that are absent leave `_no_split_modules` once all is built"),
    Use(f"{MODEL}.initialize_weights", "self", "each half starts its weights by its own rules"),
    Use(f"{MODEL}._init_weights", "self, module", "parts of the connector start their own weights"),
    Use(
        f"{MODEL}._finalize_model_loading",
        "model, load_config, loading_info",
        "the lists of missing tensors are kept where those of an adapter would replace them",
    ),
    Use("transformers.utils.loading_report:LoadStateDictInfo.to_dict", "self", "those lists, by name"),
    Use(
        f"{MODEL}._resize_token_embeddings",
        "self, new_num_tokens, pad_to_multiple_of, mean_resizing",
        "parts with word embeddings follow the vocabulary",
    ),
    Use(f"{MODEL}._no_split_modules", None, "blocks that FSDP and `device_map` keep whole"),
    Use(f"{MODEL}._skip_keys_device_placement", None, "the cache stays where it is under `device_map`"),
    Use(f"{MODEL}._tied_weights_keys", None, "the head may be the word embeddings"),
    Use(f"{MODEL}._is_stateful", None, "assisted decoding refuses language models with states by it"),
    Use(f"{MODEL}._can_record_outputs", None, "which module of a layer tells the router logits"),
    Use(
        "transformers.models.mixtral.modeling_mixtral:load_balancing_loss_func",
        "gate_logits, num_experts, top_k, attention_mask",
        "the loss that balances experts, which all families share",
    ),
    Use("transformers.cache_utils:Cache.is_linear", None, "whether a cache holds states alone"),
    Use("transformers.cache_utils:Cache.has_previous_state", "self, layer_idx, state_idx", "whether it holds any"),
    Use(
        "transformers.core_model_loading:revert_weight_conversion",
        "model, state_dict",
        "names of experts in files, which differ from those in the model",
    ),
    Use("peft.tuners.lora:LoraLayer", None, "the layers whose LoRA branch is weighed after training"),
    Use(f"{MODEL}._tp_plan", None, "the head under tensor parallelism"),
    Use(f"{MODEL}._fsdp_plan", None, "the head under FSDP"),
    Use(f"{MODEL}._keys_to_ignore_on_load_unexpected", None, "the base model loads from a file with a head"),
    Use(f"{MODEL}._keys_to_ignore_on_save", None, "weights of objectives stay out of checkpoints"),
    Use(f"{MODEL}._set_gradient_checkpointing", None, "towers of timm have a switch of their own"),
    Use(
        f"{MODEL}.supports_gradient_checkpointing",
        None,
        "whether a tower of timm has that switch",
    ),
    Use(f"{MODEL}.train", "self, mode", "batch norms of towers keep their statistics"),
    Use(f"{MODEL}._supports_flash_attn", None, "parts and language model take every backend of attention"),
    Use(f"{MODEL}._supports_sdpa", None, "as above"),
    Use(f"{MODEL}._supports_flex_attn", None, "as above"),
    Use(f"{MODEL}._supports_attention_backend", None, "as above; servers ask for it"),
    Use(f"{CONFIG}._attn_implementation", None, "the backend that the attention of our parts looks up"),
    Use("transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS", None, "the backends of attention by name"),
    Use(
        "transformers.modeling_utils:AttentionInterface.get_interface",
        "self, attn_implementation, default",
        "one of them, or our plain one",
    ),
    Use("transformers.utils.generic:can_return_tuple", "func", "`return_dict=False` of `forward`"),
    Use(
        "transformers.utils.generic:merge_with_config_defaults",
        "func",
        "`use_cache` and `vision_feature_layer` of the config",
    ),
    Use(
        "transformers.utils.generic:maybe_autocast",
        "device_type, dtype, enabled, cache_enabled",
        "position tables are stretched in float32",
    ),
    Use("transformers.utils:ModelOutput.to_tuple", "self", "features of images are a tuple in a tuple"),
    *(
        Use(f"transformers.utils:is_{name}_available", "", "which decoder of videos there is")
        for name in ("cv2", "decord", "torchcodec")
    ),
    Use(
        "transformers.video_utils:load_video",
        "video, num_frames, fps, backend, sample_indices_fn, **kwargs",
        "videos are decoded by it; PyAV's reader asks `number in indices` of each frame, by which frames are counted",
    ),
    Use("transformers.utils:TransformersKwargs", None, "the annotation of what `forward` hands on"),
    Use("transformers.processing_utils:Unpack", None, "as above"),
    Use("transformers.activations:ACT2FN", None, "activations by name"),
    Use("transformers.initialization:normal_", "tensor, mean, std, generator", "spares weights that were loaded"),
    Use("transformers.initialization:trunc_normal_", "tensor, mean, std, a, b, generator", "as above"),
    Use("transformers.initialization:zeros_", "tensor", "as above"),
    Use("transformers.initialization:copy_", "tensor, other", "as above"),
    Use("transformers.integrations:is_fsdp_enabled", "", "weights without storage are no fault then"),
    Use(
        "transformers.loss.loss_utils:ForCausalLMLoss",
        "logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs",
        "`shift_labels` spares the head positions without a label",
    ),
    Use("transformers.cache_utils:Cache.reorder_cache", "self, beam_idx", "a second context follows the beams"),
    Use("transformers.cache_utils:Cache.batch_repeat_interleave", "self, repeats", "and is repeated for them"),
    Use("transformers.cache_utils:Cache.get_seq_length", "self, layer_idx", "positions that the cache holds"),
    Use(
        "transformers.cache_utils:DynamicCache.update",
        "self, key_states, value_states, layer_idx, *args, **kwargs",
        "fusion fills a cache with what it has read before",
    ),
    Use(
        "transformers.cache_utils:Cache.batch_select_indices",
        "self, indices",
        "every question of a search goes on from rows of a copied cache",
    ),
    Use(
        "transformers.cache_utils:DynamicLayer.update",
        "self, key_states, value_states, *args, **kwargs",
        "as above; a layer has `keys` and `values`, which fusion cuts",
    ),
    # layer ops
    Use(
        "transformers:AttentionInterface.register",
        "key, value",
        "an attention function that gives the queries of a layer, with its scale and cap",
    ),
    Use(
        "transformers.models.mamba2.modeling_mamba2:Mamba2Mixer",
        "config, layer_idx, initialize_mixer_weights",
        "the block of `scan_mixer`, which calls it with hidden states alone",
    ),
    Use(
        "transformers.models.mamba2.modeling_mamba2:Mamba2Mixer.init_mamba2_weights",
        "self",
        "its own parameters start by their own rule",
    ),
    Use(
        "transformers.models.llama.modeling_llama:LlamaDecoderLayer.forward",
        f"self, hidden_states, attention_mask, position_ids, {CACHE}, use_cache, position_embeddings, **kwargs",
        "hooks before a layer change its mask and positions; what the model does not know reaches it",
    ),
    Use(
        "transformers.models.llama.modeling_llama:LlamaAttention.forward",
        f"self, hidden_states, position_embeddings, attention_mask, {CACHE}, **kwargs",
        "called again for the queries that an op asks for; it gives what the attention function returns",
    ),
    Use(
        "transformers.cache_utils:Cache.get_mask_sizes", "self, query_length, layer_idx", "keys that a layer will see"
    ),
    Use(
        "transformers.cache_utils:Cache.update",
        "self, key_states, value_states, layer_idx, *args, **kwargs",
        "as above",
    ),
    # the configuration
    Use(f"{CONFIG}.__post_init__", "self, **kwargs", "checks after the parts are configurations"),
    Use(f"{CONFIG}.sub_configs_defaults", None, "tower, language model and connector as parts"),
    Use(
        "transformers.configuration_utils:SubConfigSpec", "config_class, model_type, init_kwargs, optional", "as above"
    ),
    Use("huggingface_hub.dataclasses:strict", "cls, accept_kwargs", "wrong types of options are refused"),
    Use("huggingface_hub.dataclasses:validate_typed_dict", "schema, data", "as above, of processors"),
    # the processors
    Use(
        f"{PROCESSOR}._get_arguments_from_pretrained",
        "pretrained_model_name_or_path, processor_dict, **kwargs",
        "each part is loaded with its own options, and unknown ones are refused",
    ),
    Use(
        f"{PROCESSOR}.prepare_inputs_layout",
        "self, images, text, videos, audio, **kwargs",
        "audio is refused",
    ),
    Use(
        f"{PROCESSOR}.validate_inputs",
        "self, images, text, videos, audio, **kwargs",
        "images and `<image>` are compared by sample",
    ),
    Use(
        f"{PROCESSOR}._merge_kwargs",
        "self, ModelProcessorKwargs, tokenizer_init_kwargs, **kwargs",
        "unknown options are refused",
    ),
    Use(f"{PROCESSOR}._process_images", "self, images, **kwargs", "other threads may tokenise meanwhile"),
    Use(
        f"{PROCESSOR}.replace_image_token", "self, image_inputs, image_idx, **kwargs", "as many placeholders as tokens"
    ),
    Use(
        f"{PROCESSOR}.get_text_with_replacements",
        "self, text, images_replacements, videos_replacements, audio_replacements",
        "`<query>` of later turns, and videos among images",
    ),
    Use(
        f"{PROCESSOR}._check_special_mm_tokens",
        "self, text, text_inputs, modalities",
        "truncation names the length that is needed",
    ),
    Use(f"{PROCESSOR}.valid_processor_kwargs", None, "our options"),
    Use(
        "transformers.processing_utils:MultiModalData",
        "num_image_tokens, num_video_tokens, num_audio_tokens, num_image_patches",
        "counts for servers",
    ),
    Use(
        "transformers.models.llava_next.processing_llava_next:LlavaNextProcessor._get_num_multimodal_tokens",
        "self, image_sizes, **kwargs",
        "the name that servers call; the same of LLaVA-NeXT is what our counts are compared with",
    ),
    Use(IMAGES, "**kwargs", "an image processor without torchvision"),
    Use(f"{IMAGES}.fetch_images", "self, image_url_or_urls", "sources are opened with the limits of ours"),
    Use(
        f"{IMAGES}.preprocess", "self, images, *args, image_like_kwargs, **kwargs", "views in place of resized images"
    ),
    Use(f"{IMAGES}.from_dict", "image_processor_dict, **kwargs", "a `size` beside a saved file"),
    Use(f"{IMAGES}.valid_kwargs", None, "our options"),
    Use(
        f"{IMAGES}.get_image_processor_dict",
        "pretrained_model_name_or_path, **kwargs",
        "the class of a user's own planner, before the options are checked",
    ),
    Use(f"{IMAGES}.to_json_file", "self, json_file_path", "the files of a user's own planner lie beside it"),
    Use(f"{CONFIG}.to_json_file", "self, json_file_path, use_diff", "and those of the user's own parts"),
    Use(f"{PROCESSOR}.to_json_file", "self, json_file_path", "and those where a processor is saved alone"),
    # checkpoints and training
    Use(
        "transformers.dynamic_module_utils:custom_object_save",
        "obj, folder, config",
        "conversion writes our code into folders without a model",
    ),
    Use(
        "transformers.dynamic_module_utils:get_class_from_dynamic_module",
        "class_reference, pretrained_model_name_or_path, cache_dir, force_download, proxies, token, revision, "
        "local_files_only, repo_type, code_revision, **kwargs",
        "a user's own part is a file of the checkpoint",
    ),
    Use(
        "transformers.dynamic_module_utils:get_cached_module_file",
        "pretrained_model_name_or_path, module_file, cache_dir, force_download, proxies, token, revision, "
        "local_files_only, repo_type, **deprecated_kwargs",
        "whether the code that runs is that of a checkpoint, which the user has trusted then",
    ),
    Use("transformers.trainer:TRAINER_STATE_NAME", None, "the file that is written last tells a whole checkpoint"),
    Use("transformers.trainer_utils:PREFIX_CHECKPOINT_DIR", None, "the folders of checkpoints"),
    Use("transformers.trainer_callback:ExportableState", "", "the stage stands in `trainer_state.json`"),
    Use("transformers.trainer_callback:ExportableState.state", "self", "as above"),
    Use(f"{DPO}._compute_loss", "self, model, inputs, return_outputs", "a second pair, of images, adds to its loss"),
    Use(f"{DPO}._set_signature_columns_if_needed", "self", "columns about answers and tokens reach our collator"),
    Use(
        f"{DPO}.compute_ref_log_probs",
        "self, model, inputs",
        "runs the reference, whichever it is, through what keeps the log-probabilities of tokens",
    ),
    Use(
        "transformers.trainer:Trainer.get_optimizer_cls_and_kwargs",
        "args, model",
        "the optimizer of the arguments with our groups",
    ),
]

MENTIONS = [
    Mention(
        "trl.trainer.grpo_trainer:GRPOTrainer._get_per_token_logps_and_entropies",
        "pixel_attention_mask[start:end]",
        "the geometry of the dense layout is cut by sample",
    ),
    Mention(
        "trl.trainer.grpo_trainer:GRPOTrainer._get_per_token_logps_and_entropies",
        "pixel_values.size(0) == sum(num_images)",
        "batches with as many images as samples, but not one each, are refused",
    ),
    Mention(
        "trl.trainer.grpo_trainer:GRPOTrainer._generate_and_score_completions",
        'images=images, text=prompts_text, padding=True, return_tensors="pt"',
        "by such a call a processor that was told no layout knows that it will be cut",
    ),
    Mention(
        "trl.trainer.grpo_trainer:GRPOTrainer._generate_and_score_completions",
        "crop_to_patches=True",
        "the flat layout is refused there, with the remedy",
    ),
    Mention(
        "transformers.models.llama.modeling_llama:LlamaAttention.__init__",
        "self.num_key_value_groups",
        "by it the attention of a layer is found",
    ),
    Mention(
        "transformers.models.llama.modeling_llama:LlamaAttention.forward",
        "self.o_proj(attn_output)",
        "a layer op that changes attention projects what its heads give",
    ),
    Mention(
        "transformers.models.llama.modeling_llama:LlamaDecoderLayer.forward",
        "self.mlp(hidden_states)",
        "the feed-forward of a layer, which gets one argument, is found by its name",
    ),
    Mention(
        "transformers.models.llama.modeling_llama:LlamaMLP.forward",
        "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))",
        "visual tokens pass some of its neurons",
    ),
    Mention(
        f"{MODEL}._set_gradient_checkpointing",
        "_gradient_checkpointing_func",
        "whether checkpointing is reentrant, which layer ops that learn refuse",
    ),
    Mention(f"{GENERATION}.prepare_inputs_for_generation", '"create_masks_for_generate"', "our hook is asked"),
    Mention(
        f"{GENERATION}.generate", "generation_config._mask_length", "the length of a mask of ones that was dropped"
    ),
    Mention(f"{GENERATION}._expand_inputs_for_generation", '"mm_encoder_outputs"', "features wait there for beams"),
    Mention(
        f"{GENERATION}._supports_mm_encoder_outputs", '"mm_encoder_outputs"', "`forward` takes them under this name"
    ),
    Mention(
        f"{GENERATION}._prepare_multimodal_encoder_kwargs_for_generation",
        "get_{modality}_features",
        "our encoder is called",
    ),
    Mention(
        "transformers.generation.candidate_generator:AssistedCandidateGenerator.__init__",
        "is_assistant = True",
        "drafts may go on with a packed cache",
    ),
    Mention(
        "transformers.trainer:Trainer.prediction_step",
        '"keys_to_ignore_at_inference"',
        "evaluation gathers logits alone",
    ),
    Mention(f"{DPO}.__init__", "self._is_vision_dataset", "data without images has nothing to mask"),
    Mention(f"{DPO}._compute_loss", "self._metrics[mode]", "our terms are logged with its own"),
    Mention(f"{DPO}._compute_loss", "if self.precompute_ref_logps:", "the batch may bring the reference"),
    Mention(f"{DPO}._compute_loss", "model(**model_kwargs, labels=labels, fused_lm_head=True)", "the one call"),
    Mention(f"{DPO}._compute_loss", "outputs.log_probs[:, -seq_len:]", "of tokens; virtual ones stand before them"),
    Mention("transformers.trainer_utils:RemoveColumnsCollator", "self.data_collator", "our collator is found within"),
    Mention(
        "transformers.configuration_utils:PreTrainedConfig.save_pretrained",
        "_auto_class",
        "saved folders carry their code",
    ),
    Mention("transformers.dynamic_module_utils:custom_object_save", "auto_map", "and name its classes"),
    Mention(
        "transformers.models.auto.auto_factory:_BaseAutoModelClass.from_pretrained",
        'kwargs["trust_remote_code"] = trust_remote_code',
        "our `from_pretrained` hears whether a user's own parts may be read",
    ),
    Mention("accelerate.hooks:add_hook_to_module", "_hf_hook", "weights that an offload hook holds are no fault"),
]

"""What `generate` needs to know about a prompt that changes its length inside the model: four hooks."""

import copy
from typing import Any, cast

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import ModelOutput

from .compat_hires_lmm import CACHE, keeps_keys
from .conversation_hires_lmm import StateCache, cached_length
from .heads_hires_lmm import join_heads
from .inputs_hires_lmm import (
    IMAGE_ARGUMENTS,
    extra_arguments,
    placeholders_per_image,
    read_features,
    read_images,
    take_images,
)
from .outputs_hires_lmm import GeneratePrompt, HiResLmmImageFeatures


def images_after(placeholder: torch.Tensor, lengths: list[int], position: int) -> list[int]:
    """Indices of images whose placeholders come at or after a position; none may lie on both sides."""
    columns, chosen, start = placeholder.nonzero()[:, 1].tolist(), [], 0
    for index, length in enumerate(lengths):
        is_after = {column >= position for column in columns[start : start + length]}
        if len(is_after) > 1:
            raise ValueError(
                f"cache ends after {position} positions, in the middle of image {index}; crop it to before the image."
            )
        chosen += [index] if True in is_after else []
        start += length
    return chosen


def rows_after(placeholder: torch.Tensor, position: int) -> list[int]:
    """As `images_after`, where all placeholders of a row, in several runs, belong to one image."""
    rows = placeholder.any(dim=1).nonzero()[:, 0]
    before, after = placeholder[rows, position - 1], placeholder[rows, position:]
    cut = rows[before & after[:, :1].any(dim=1)].tolist()
    if cut:
        raise ValueError(
            f"cache ends after {position} positions, in the middle of the image tokens of conversation {cut[0]}; crop "
            "it to before them."
        )
    return after.any(dim=1).nonzero()[:, 0].tolist()


def mask_length(length: int, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> int:
    """Positions of the attention mask of `generate`; the library drops a mask of ones and notes its length."""
    mask = model_kwargs.get("attention_mask")
    return mask.shape[1] if mask is not None else vars(generation_config).get("_mask_length", length)


HEADS_AS_WRITTEN = (
    "output_heads=True reads tokens as they are written, but here some may be taken back; leave it out and read the "
    "finished ids by one call of the model."
)


class HiResLmmGenerationMixin(GenerationMixin):
    """The stock `generate` with hooks for encoded images, beams, masks and positions."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Write the name into the two tables by which the library knows what a class predicts and reads.

        The Trainer shifts the labels that it smooths for classes of the first alone; every token would learn itself.
        """
        super().__init_subclass__(**kwargs)
        for table in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
            table.setdefault(cls.__name__, cls.__name__)

    def generate(
        self, *args: Any, output_token_map: bool = False, output_heads: bool | None = None, **kwargs: Any
    ) -> Any:
        """The stock `generate`, which can also tell what became of every visual token, and what heads read.

        Args:
            args, kwargs: As in transformers.
            output_token_map (`bool`): Add `token_map`, a `TokenMap` of the images as passed, to the dict that
                `return_dict_in_generate=True` returns; None without images. Needs `view_boxes`.
            output_heads (`bool`, *optional*): Add `heads` to that dict: by name, for each sequence `(n, ...)`, what a
                head read where its token stands in the prompt or was written, but for a last token, which nothing
                reads. Greedy search and sampling.

        Raises:
            ValueError: If no dict is returned that could hold it, or tokens may be taken back once they were read.
        """
        asked = {"output_token_map": output_token_map, "output_heads": output_heads}
        found: dict[str, list] = {name: [] for name, wanted in asked.items() if wanted}
        if not found:
            return super().generate(*args, **kwargs)
        if output_heads and kwargs.get("assistant_model") is not None:
            raise ValueError(f"assistant_model: {HEADS_AS_WRITTEN}")
        output = super().generate(*args, **found, **kwargs)
        if not isinstance(output, ModelOutput):
            raise ValueError(
                f"{next(iter(found))}=True needs return_dict_in_generate=True, or there is no place for it."
            )
        if output_token_map:
            output["token_map"] = (found["output_token_map"] or [None])[0]
        if output_heads:
            output["heads"] = join_heads(found["output_heads"], len(output.sequences))
        return output

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse it: it passes token ids alone, and its cache knows no rows; `generate_batch` comes here, too."""
        raise ValueError(
            "Continuous batching (generate_batch, cache_implementation='paged') reads no images and cannot run this "
            "model; call generate without it."
        )

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """As in the library; `forward` does not name all that speaks of images."""
        known = [*IMAGE_ARGUMENTS, "output_token_map", "output_heads", "layer_options", *extra_arguments(self.config)]
        super()._validate_model_kwargs({key: value for key, value in model_kwargs.items() if key not in known})

    def _maybe_prepare_encoder_kwargs_for_generation(
        self,
        inputs_tensor: torch.Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: GenerationConfig,
    ) -> dict[str, Any]:
        """Encode images once; work on a copy of the caller's features and note where the prompt ends."""
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                f"assistant_early_exit={generation_config.assistant_early_exit} drafts with the first layers of a "
                "language model alone; leave it out, and pass an assistant_model or prompt_lookup_num_tokens."
            )
        if generation_config.is_assistant and self.model.counts_positions:
            raise ValueError(
                f"{self.config.text_config.model_type!r} cannot draft as an assistant: its states cannot be cropped."
            )
        takes_back = (generation_config.num_beams or 1) > 1 or generation_config.prompt_lookup_num_tokens
        if model_kwargs.get("output_heads") is not None and takes_back:
            raise ValueError(
                f"num_beams={generation_config.num_beams}, prompt_lookup_num_tokens="
                f"{generation_config.prompt_lookup_num_tokens}: {HEADS_AS_WRITTEN}"
            )
        if model_kwargs.get("output_heads") is not None and generation_config.use_cache is False:
            raise ValueError(
                "use_cache=False reads all tokens in each step, with output_heads=True too; leave it out."
            )
        token_maps = model_kwargs.pop("output_token_map", None)  # here, or an assistant would get it too
        ids = inputs_tensor if inputs_tensor.ndim == 2 else model_kwargs.get("input_ids")
        placeholder = self.model.get_placeholder_mask(ids if ids is not None and ids.shape[1] else None, inputs_tensor)
        cached = self._cached_history(inputs_tensor.shape[1], model_kwargs, placeholder, generation_config)
        mask, given = model_kwargs.get("attention_mask"), take_images(self.config, model_kwargs)
        image, inputs, flags = given.features, None, []
        if image is not None:
            flags = read_features(self.model, image, mask, placeholder)
        else:
            inputs = read_images(self.model, given, mask, placeholder)
        if inputs is None and image is None:
            if bool(placeholder[:, cached:].any()):
                raise ValueError(
                    f"The prompt holds {int(placeholder[:, cached:].sum())} image tokens, but no images were passed. "
                    "Pass all that the processor returned: model.generate(**inputs)."
                )
            return {**model_kwargs, "mm_encoder_outputs": {}}
        # `forward` cuts what is spliced: the library would cut the ids, before operations have read the whole prompt
        chunk_size, generation_config.prefill_chunk_size = generation_config.prefill_chunk_size, None
        if inputs is not None:
            image = self.model.encode_images(inputs)
            flags = [flag for flag in (inputs.is_unpadded, inputs.is_right_padded) if flag is not None]
        image = copy.copy(cast("HiResLmmImageFeatures", image))
        if cached:
            has_turns, lengths = self.model.connector.has_turns, placeholders_per_image(image)
            after = rows_after(placeholder, cached) if has_turns else images_after(placeholder, lengths, cached)
            image = image.select_images(after)
        if cached and model_kwargs.get("prompt_mask") is not None:
            model_kwargs["prompt_mask"] = model_kwargs["prompt_mask"][:, cached:]
        image.pooler_output = list(image.pooler_output)
        image.is_unpadded, is_right_padded = flags or (None, False)
        image.prompt = GeneratePrompt(
            length=inputs_tensor.shape[1] - cached,
            cached=cached,
            mask_length=mask_length(inputs_tensor.shape[1], model_kwargs, generation_config),
            is_right_padded=is_right_padded,
            keeps_cache=model_kwargs.get(CACHE) is not None or bool(generation_config.return_dict_in_generate),
            token_maps=token_maps,
            chunk_size=chunk_size,
        )
        return {**model_kwargs, "mm_encoder_outputs": {"image": image if image.pooler_output else None}}

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> Any:
        """As in the library; a cache of states alone has one size and one form."""
        text_config, given = self.config.get_text_config(), model_kwargs.get(CACHE)
        wanted = generation_config.cache_implementation
        if not keeps_keys(text_config) and wanted not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={wanted!r} is for keys and values, and {text_config.model_type!r} has states "
                "alone; leave it out."
            )
        prepared = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if not keeps_keys(text_config) and given is None and model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE] = StateCache(config=text_config)
        return prepared

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        """As in the library; what combines contexts acts first, on the model's own scores."""
        processors = super()._get_logits_processor(*args, **kwargs)
        processors.sort(key=lambda each: not getattr(each, "acts_first", False))
        return processors

    def _cached_history(
        self,
        length: int,
        model_kwargs: dict[str, Any],
        placeholder: torch.Tensor,
        generation_config: GenerationConfig,
    ) -> int:
        """Positions of the prompt that the caller's cache already holds; 0 if only new ids were passed.

        As in the library, a mask longer than the ids says that they are new. What an assistant drafts is checked by
        the main model, so it may go on with a packed cache.
        """
        cache = model_kwargs.get(CACHE)
        past = cached_length(cache) if isinstance(cache, Cache) else 0
        is_new = mask_length(length, model_kwargs, generation_config) != length
        if not past or is_new or generation_config.is_assistant:
            return 0
        if not keeps_keys(self.config.text_config):
            raise ValueError(
                f"The cache of {self.config.text_config.model_type!r} is a state, which does not tell the {past} "
                "positions that it has read; pass the new ids alone, with an attention_mask of all, or start without "
                "cache."
            )
        if not self.model.connector.is_count_static and bool(placeholder.any()):
            raise ValueError(
                f"The cache holds {past} positions of a model that may drop visual tokens, so the {length} ids of "
                "the whole conversation cannot be lined up with it. Pass only the new ids, with an attention_mask of "
                f"length {past} + the number of new ids; or start without cache."
            )
        return past

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.Tensor | None = None,  # named: the library looks for it before it takes embeddings
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in the library, whose first draft would read again what the caller's cache holds."""
        prompt = getattr((kwargs.get("mm_encoder_outputs") or {}).get("image"), "prompt", None)
        if next_sequence_length is None and prompt is not None and prompt.cached:
            next_sequence_length = input_ids.shape[1] - prompt.cached
        kwargs["inputs_embeds"] = inputs_embeds
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)

    def _expand_multimodal_outputs(
        self,
        input_ids: torch.Tensor | None,
        mm_encoder_output: dict,
        expand_size: int = 1,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict:
        """Repeat images for beams: the library regroups stand-ins of placeholder length, which are mapped back."""
        image = mm_encoder_output.get("image")
        if image is None:
            return mm_encoder_output
        if self.model.connector.has_turns:  # one image a row; later turns have placeholders too
            order = [index for index in range(len(image.pooler_output)) for _ in range(expand_size)]
            return {**mm_encoder_output, "image": image.select_images(order)}
        lengths = placeholders_per_image(image)
        stand_ins = [torch.full((length, 1), index) for index, length in enumerate(lengths)]
        regrouped = super()._expand_multimodal_outputs(
            input_ids,
            {"image": BaseModelOutputWithPooling(pooler_output=stand_ins)},
            expand_size=expand_size,
            inputs_embeds=inputs_embeds,
        )
        order = [int(stand_in[0, 0]) for stand_in in regrouped["image"].pooler_output]
        return {**mm_encoder_output, "image": image.select_images(order)}

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Any, is_first_iteration: bool = False, **kwargs: Any) -> Any:
        """Leave the mask of the first step two-dimensional: tokens may still be dropped inside `forward`."""
        is_linear = kwargs[CACHE].is_linear if kwargs.get(CACHE) is not None else []
        if is_first_iteration or (is_linear and all(is_linear)):
            return attention_mask
        return create_masks_for_generate(attention_mask=attention_mask, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        """Layer ops and position plans look at what is cached, so a static cache does not have the model compiled.

        Nor has a cache of states, which counts.
        """
        valid: Any = super()._valid_auto_compile_criteria
        connector = self.model.connector
        looks = connector.layer_ops or connector.position_plan is not None or self.model.counts_positions
        return not looks and valid(model_kwargs, generation_config)

    def _update_model_kwargs_for_generation(
        self,
        outputs: ModelOutput,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        """Go on with the mask and positions of what was kept."""
        mask = outputs.packed_attention_mask if "packed_attention_mask" in outputs else None
        if mask is not None and model_kwargs.get("use_cache", True):
            mask = mask[:, : mask.shape[1] - outputs.num_drafted]
            model_kwargs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
            model_kwargs["attention_mask"] = mask
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder, num_new_tokens)

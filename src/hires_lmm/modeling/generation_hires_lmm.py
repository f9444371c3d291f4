"""What `generate` needs to know about a prompt that changes its length inside the model: four hooks."""

import copy
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .outputs_hires_lmm import HiResLmmImageFeatures, compare_counts, placeholders_per_image


class HiResLmmGenerationMixin(GenerationMixin):
    """The stock `generate` with hooks for encoded images, beams, masks and positions."""

    def _maybe_prepare_encoder_kwargs_for_generation(
        self,
        inputs_tensor: torch.Tensor,
        model_kwargs: dict[str, Any],
        model_input_name: str | None,
        generation_config: GenerationConfig,
    ) -> dict[str, Any]:
        """Encode images once; work on a copy of the caller's features and note where the prompt ends."""
        model_kwargs["mm_encoder_outputs"] = dict(model_kwargs.get("mm_encoder_outputs") or {})
        ids = inputs_tensor if inputs_tensor.ndim == 2 else model_kwargs.get("input_ids")
        has_ids = ids is not None and ids.shape[1] > 0
        has_pixels = model_kwargs.get("pixel_values") is not None
        if has_pixels or model_kwargs["mm_encoder_outputs"].get("image") is not None:
            if generation_config.prefill_chunk_size is not None:
                raise ValueError("prefill_chunk_size is not supported with images; leave it unset.")
            placeholder = self.model.get_placeholder_mask(ids if has_ids else None, inputs_tensor)
        if has_pixels:
            self.model.check_placeholders(placeholder, model_kwargs.get("view_positions"))
        model_kwargs = super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )
        image = model_kwargs["mm_encoder_outputs"].get("image")
        if image is not None:
            if not has_pixels:
                compare_counts(int(placeholder.sum()), sum(placeholders_per_image(image)))
            image = copy.copy(image)
            if not isinstance(image, HiResLmmImageFeatures):
                image = HiResLmmImageFeatures(pooler_output=list(image.pooler_output))
            image.pooler_output, image.prompt_length = list(image.pooler_output), inputs_tensor.shape[1]
            mask = model_kwargs.get("attention_mask")
            image.is_right_padded = mask is not None and mask.ndim == 2 and bool((mask[:, -1] == 0).any())
            model_kwargs["mm_encoder_outputs"]["image"] = image
        return model_kwargs

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
        lengths = placeholders_per_image(image)
        stand_ins = [torch.full((length, 1), index) for index, length in enumerate(lengths)]
        regrouped = super()._expand_multimodal_outputs(
            input_ids,
            {"image": BaseModelOutputWithPooling(pooler_output=stand_ins)},
            expand_size=expand_size,
            inputs_embeds=inputs_embeds,
        )
        order = [int(stand_in[0, 0]) for stand_in in regrouped["image"].pooler_output]
        expanded = image.select_images(order)
        return {**mm_encoder_output, "image": expanded}

    @staticmethod
    def create_masks_for_generate(
        config: PreTrainedConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Leave the mask of the first step two-dimensional: tokens may still be dropped inside `forward`."""
        if is_first_iteration:
            return attention_mask
        return create_masks_for_generate(
            config, inputs_embeds, attention_mask, past_key_values, position_ids=position_ids, **kwargs
        )

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

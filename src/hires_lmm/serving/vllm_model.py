"""vLLM's Transformers backend, with the question in the image branch and requests that change the views."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageSize

from ..modeling.question_hires_lmm import PromptText, build_question
from ..modeling.serving_hires_lmm import PLUGIN_FLAG
from ..processing.geometry_hires_lmm import Column
from ..processing.messages_hires_lmm import QUERY_TOKEN


ROUTING_IDS = "routing_ids"
"""What `get_image_features` calls the text that an image is routed by."""

SIDES = (336, 1000, 2000, 4000)
"""Sides of the images among which the one with the most tokens is looked for: a strip may have more than a square."""


class Info(MultiModalProcessingInfo):
    """What vLLM asks about images before there are any."""

    def get_hf_processor(self, **kwargs: object) -> Any:
        """The processor, which now knows that the question is shown; options go to its calls, not to a new one."""
        processor = super().get_hf_processor()
        processor.hears_question = True
        return processor

    def _get_size_candidates(self, sub_processor: Any, divisors: tuple[int, ...]) -> list[ImageSize]:
        return [ImageSize(width=width, height=height) for width in SIDES for height in SIDES]


class Processor(MultiModalProcessor):
    """Adds the ids of its question to each image, as an option of the call.

    Options are part of the hash of an image, so the encoder's and the prefix cache keep questions apart.
    """

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Read the questions off the prompt, then go the usual way."""
        images = inputs.mm_data_items.get("image")
        if images:
            options = {**inputs.hf_processor_mm_kwargs, ROUTING_IDS: self._questions(inputs.prompt, len(images))}
            inputs = replace(inputs, hf_processor_mm_kwargs=options)
        return super().apply(inputs, timing_ctx)

    def _questions(self, prompt: list[int], number: int) -> list[list[int]]:
        """Ids of the text that each image is routed by, as the model itself finds it."""
        if QUERY_TOKEN in self.info.get_tokenizer().decode(prompt):
            raise ValueError("Fusion reads one turn in vLLM; send the question about the image without a history.")
        config, ids = self.info.get_hf_config(), torch.tensor([prompt])
        placeholder = ids == config.image_token_id
        if int(placeholder.sum()) != number:
            raise ValueError(
                f"The prompt has {int(placeholder.sum())} image tokens and {number} images; write one for each image, "
                "and none within a text."
            )
        question = build_question(
            PromptText(ids, ids[..., None].float()),
            placeholder,
            [1] * number,
            None,
            scope=config.question_scope,
            answer_prefix=config.answer_prefix_ids or [],
            question_prefix=config.question_prefix_ids or [],
            training=False,
        )
        return [ids[0][mask].tolist() for mask in question.image_mask()]

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Mapping[str, object]:
        options = dict(inputs.hf_processor_mm_kwargs)
        asked = options.get(ROUTING_IDS)
        if asked is not None:
            pairs = zip(asked, mm_is_cached["image"], strict=True)
            options[ROUTING_IDS] = [ids for ids, is_cached in pairs if not is_cached]
        return options

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        options = {name: value for name, value in hf_kwargs.items() if name != ROUTING_IDS}
        try:
            inputs = super()._apply_hf_processor_main(mm_items, options)
        except ValueError as error:  # vLLM tells the client the outer one of two errors
            raise ValueError(str(error.__cause__ or error)) from error
        if "num_image_patches" in inputs:
            views = torch.as_tensor(inputs["num_image_patches"])
            asked = hf_kwargs.get(ROUTING_IDS) or [[] for _ in views]
            rows = torch.zeros(len(asked), max(1, *map(len, asked)), dtype=torch.long)
            for row, ids in zip(rows, asked, strict=True):
                row[: len(ids)] = torch.tensor(ids, dtype=torch.long) + 1
            inputs[ROUTING_IDS] = rows.repeat_interleave(views, dim=0)
        return inputs

    def _get_field_config(self, modality: str, key: str, hf_inputs: Any, sizes: torch.Tensor) -> MultiModalFieldConfig:
        if key.startswith("pixel_values_"):  # of extra towers: one row an image
            return MultiModalFieldConfig.batched(modality)
        return super()._get_field_config(modality, key, hf_inputs, sizes)

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        return super()._get_prompt_updates(mm_items, {}, out_mm_kwargs)

    def _get_num_image_patches(self, hf_inputs: Any, mm_data: Mapping[str, object], num_images: int) -> torch.Tensor:
        starts = torch.as_tensor(hf_inputs["view_positions"])[:, Column.STARTS_IMAGE].nonzero()[:, 0]
        return torch.diff(torch.cat([starts, torch.tensor([len(hf_inputs["view_positions"])])]))


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=MultiModalDummyInputsBuilder)
class HiResLmmForVllm(TransformersMultiModalForCausalLM):
    """The checkpoint's own model, whose `get_image_features` is told the question of each image."""

    def _patch_config(self) -> None:
        super()._patch_config()
        setattr(self.config, PLUGIN_FLAG, True)

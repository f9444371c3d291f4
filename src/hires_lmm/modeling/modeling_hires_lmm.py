"""The model: vision tower, connector and language model, and the splice between them."""

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .carriers_hires_lmm import ImageGeometry, Question, ViewFeatures, read_geometry
from .compat_hires_lmm import CACHE, CACHE_NAMES, takes_cache
from .configuration_hires_lmm import HiResLmmConfig, HiResLmmConnectorConfig, check_fit
from .connector_hires_lmm import HiResLmmConnector, drop
from .generation_hires_lmm import HiResLmmGenerationMixin, check_context
from .inputs_hires_lmm import (
    ImageInputs,
    check_encoder_outputs,
    check_text,
    compare_counts,
    copy_to_host,
    placeholders_per_image,
    read_images,
    refuse_both,
    take_extra,
)
from .loading_hires_lmm import HiResLmmLoadingMixin
from .logits_hires_lmm import scale_logits, select_learned, select_positions
from .outputs_hires_lmm import (
    HiResLmmCausalLMOutputWithPast,
    HiResLmmImageFeatures,
    HiResLmmModelOutputWithPast,
    HiResLmmTrainingOutput,
    build_token_map,
)
from .packing_hires_lmm import expand, pack, plan_batch
from .question_hires_lmm import PromptText, build_question, recover_text
from .splice_hires_lmm import find_placeholders, splice
from .towers_hires_lmm import blank_groups, run_tower, run_towers


PEFT_EMBEDDINGS = "embeddings.word_embeddings"


class HiResLmmPreTrainedModel(HiResLmmLoadingMixin, PreTrainedModel):
    """Base of the two models: loading, saving and what the library may do with them."""

    config: HiResLmmConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: Any = None
    _skip_keys_device_placement = [*CACHE_NAMES]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    on_saved: Any = None  # called with model and folder after saving; the package writes the card there

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any) -> None:
        """See `PreTrainedModel.save_pretrained`."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process and self.on_saved is not None:
            self.on_saved(save_directory)

    def post_init(self) -> None:
        """Finish construction; keep only block classes that exist, since FSDP rejects the others."""
        super().post_init()
        for tower in getattr(self, "extra_towers", {}).values():  # the library looks at children alone
            self._no_split_modules = {*self._no_split_modules, *(tower._no_split_modules or ())}
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = {name for name in self._no_split_modules if name in present}

    def get_submodule(self, target: str) -> nn.Module:
        """A module by its path; under the name that PEFT's prompt tuning asks for, the word embeddings.

        It would take the first table of as many rows as the vocabulary, which may be that of a part.
        """
        return self.get_input_embeddings() if target == PEFT_EMBEDDINGS else super().get_submodule(target)

    def _resize_token_embeddings(
        self, new_num_tokens: int | None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        embeddings = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.base_model.connector.resize_vocabulary(embeddings.num_embeddings, mean_resizing)
        return embeddings


class HiResLmmModel(HiResLmmPreTrainedModel):
    """Vision tower, connector and language model without the head.

    Args:
        config (`HiResLmmConfig`): The configuration.
    """

    def __init__(self, config: HiResLmmConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.extra_towers = nn.ModuleDict(
            {name: AutoModel.from_config(tower) for name, tower in config.extra_tower_configs().items()}
        )
        self.connector = HiResLmmConnector(
            cast("HiResLmmConnectorConfig", config.connector_config), config.part_context()
        )
        self.language_model = AutoModel.from_config(config.text_config)
        check_fit(config, self.language_model)
        self.post_init()

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Leave the head out of what is reported: this class has none.

        A pattern in `_keys_to_ignore_on_load_unexpected` would do it here, but vLLM loads nothing that one names.
        """
        super()._adjust_missing_and_unexpected_keys(loading_info)
        loading_info.unexpected_keys = {key for key in loading_info.unexpected_keys if not key.startswith("lm_head.")}

    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        view_positions: torch.Tensor | None = None,
        view_spans: torch.Tensor | None = None,
        view_boxes: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_features: torch.Tensor | None = None,
        vision_chunk_size: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """Encode images up to the first operation that reads the question or whose count depends on content.

        Args:
            pixel_values (`torch.Tensor` of shape `(V, 3, H, W)`): Views of all images.
            view_positions (`torch.Tensor` of shape `(V, 9)`): See `Column`.
            view_spans (`torch.Tensor` of shape `(V, 4)`): Patch rows and columns of each view that enter the sequence.
            view_boxes (`torch.Tensor` of shape `(V, 4)`, *optional*): Boxes in 1/256 source pixel, for token maps.
            vision_feature_layer (`int`, *optional*): Layer of the tower; `config.vision_feature_layer` by default.
            vision_features (`torch.Tensor` of shape `(V, L, C)`, *optional*): What the tower gave for the views, in
                place of `pixel_values`; the tower does not run.
            vision_chunk_size (`int`, *optional*): Most views that pass the tower at once; `config.vision_chunk_size`
                by default.
            kwargs: `pixel_values_<name>` `(R, 3, H, W)`: views of an extra tower. `output_hidden_states`,
                `output_attentions`: keep those of the tower; others are not read.

        Returns:
            `HiResLmmImageFeatures`; its `pooler_output` holds one `(n_i, D)` tensor an image.

        Raises:
            ValueError: If the tensors do not belong together or do not fit the model.
        """
        options = dict(kwargs)
        extra = take_extra(self, options)
        images = read_images(self, pixel_values, vision_features, extra, view_positions, view_spans, view_boxes)
        if images is None:
            raise ValueError("There is nothing to encode: pass pixel_values or vision_features with their geometry.")
        wanted = {name: options.get(name) for name in ("output_hidden_states", "output_attentions")}
        return self.encode_images(images, vision_feature_layer, vision_chunk_size, **wanted)

    def encode_images(
        self, images: ImageInputs, layer: int | None = None, chunk_size: int | None = None, **wanted: Any
    ) -> HiResLmmImageFeatures:
        """What `get_image_features` does once the geometry is on the host; it never waits for the device."""
        groups, output = run_towers(self, images, layer, chunk_size, **wanted)
        tokens = self.connector.encode(ViewFeatures(groups, images.images), self._embed_token)
        is_done = self.connector.is_done_early
        placed = drop(tokens)[0].split(tokens.num_tokens) if is_done else tokens.per_image(tokens.features)
        return HiResLmmImageFeatures(
            **output,
            pooler_output=list(placed),
            tokens=tokens,
            view_boxes=images.view_boxes,
            is_unpadded=images.is_unpadded,
        )

    def encode_pixels(
        self, pixel_values: torch.Tensor, layer: int | None = None, chunk_size: int | None = None
    ) -> torch.Tensor:
        """Run the main tower: `(V, 3, H, W)` -> patch features of one layer `(V, L, C)`."""
        layer = self.config.vision_feature_layer if layer is None else layer
        chunk_size = self.config.vision_chunk_size if chunk_size is None else chunk_size
        return run_tower(self.vision_tower, pixel_values, layer, chunk_size=chunk_size).features

    def _embed_token(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up token embeddings; a function, because accelerate moves modules that are passed as arguments."""
        return self.get_input_embeddings()(ids)

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, prompt_length: int | None = None
    ) -> torch.Tensor:
        """Where the image placeholders are, `(B, S)` bool; see `find_placeholders`."""
        return find_placeholders(
            input_ids, inputs_embeds, self.config.image_token_id, self._embed_token, prompt_length
        )

    @takes_cache
    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        view_positions: torch.Tensor | None = None,
        view_boxes: torch.Tensor | None = None,
        view_spans: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        prompt_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        output_token_map: bool = False,
        vision_features: torch.Tensor | None = None,
        image_geometry: list[ImageGeometry] | None = None,
        question_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | HiResLmmModelOutputWithPast:
        """Run the model.

        Args:
            input_ids (`torch.Tensor` of shape `(B, S)`, *optional*): Token ids with expanded placeholders.
            pixel_values (`torch.Tensor` of shape `(V, 3, H, W)`, *optional*): Views of all images of the batch.
            view_positions (`torch.Tensor` of shape `(V, 9)`, *optional*): Geometry, see `get_image_features`.
            view_boxes (`torch.Tensor` of shape `(V, 4)`, *optional*): Boxes, needed by `output_token_map`.
            view_spans (`torch.Tensor` of shape `(V, 4)`, *optional*): Spans, see `get_image_features`.
            attention_mask (`torch.Tensor` of shape `(B, past + S)`, *optional*): 0 at padding.
            position_ids (`torch.Tensor` of shape `(B, S)`, *optional*): Positions; made anew where tokens are dropped.
            cache (`Cache`, *optional*): Cache of earlier positions; `past_key_values` means the same.
            inputs_embeds (`torch.Tensor` of shape `(B, S, D)`, *optional*): Instead of `input_ids`.
            use_cache (`bool`, *optional*): Return a cache.
            prompt_mask (`torch.Tensor` of shape `(B, S)`, *optional*): True where parts may read the question.
            mm_encoder_outputs (`dict`, *optional*): `{"image": features}` from `get_image_features`.
            output_token_map (`bool`): Return a record of every visual token.
            vision_features (`torch.Tensor` of shape `(V, L, C)`, *optional*): Cached output of the tower in place of
                `pixel_values`, for training; with no rows it says that the tower runs on no process.
            image_geometry (`list[ImageGeometry]`, *optional*): What `read_images` returned, in place of
                `view_positions` and `view_spans`: nothing is then read back from the device, so the call can be
                compiled whole (once a grid, `dynamic=False`) and captured. Numbers of placeholders are not compared.
            question_ids (`torch.Tensor` of shape `(B, turns, L)`, *optional*): Ids of the questions in another
                vocabulary, see `HiResLmmProcessor.question_ids`.
            kwargs: `pixel_values_<name>`: views of an extra tower. `question_labels` `(B, S)`: training labels, to
                keep answers unread. The rest goes to the language model.

        Returns:
            `HiResLmmModelOutputWithPast`.

        Raises:
            ValueError: If inputs contradict each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        labels = kwargs.pop("question_labels", None)
        text = PromptText(input_ids, embeds, attention_mask, prompt_mask, labels, question_ids)
        check_text(text, cache, kwargs, self.config.vision_feature_layer)
        features = self._see(
            text,
            mm_encoder_outputs,
            take_extra(self, kwargs),
            image_geometry,
            {name: kwargs.get(name) for name in ("output_hidden_states", "output_attentions")},
            pixel_values=pixel_values,
            vision_features=vision_features,
            view_positions=view_positions,
            view_spans=view_spans,
            view_boxes=view_boxes,
        )
        past = cache.get_seq_length() if cache is not None else 0
        packing, remember = None, None
        extra: dict[str, Any] = {}
        if features is not None:
            embeds, kept, remember, extra = self._splice(features, text, cache, output_token_map)
            if not self.connector.is_count_static or features.is_right_padded:
                packing, attention_mask, position_ids = plan_batch(
                    kept, attention_mask, past, features.prompt_length is not None
                )
                embeds = pack(embeds, packing)
                prompt = past + kept.shape[1] - extra.get("num_drafted", 0)
                extra["packed_attention_mask"] = attention_mask[:, features.num_virtual(prompt) :]
            elif features.is_unpadded and (position_ids is None or cache is not None):
                attention_mask = None  # all ones: the language model need not look
            if "num_drafted" in extra:
                length = past + embeds.shape[1] - extra["num_drafted"]
                check_context(length, attention_mask, extra["num_drafted"], self.config.text_config)
        elif self.training and cache is None:
            zero, extra["aux"] = self._idle(embeds.device, use_tower=vision_features is None)
            embeds = embeds + zero.to(embeds)
        outputs = self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            return_dict=True,
            **{CACHE: cache},
            **kwargs,
        )
        for memory, conversation in remember or []:
            memory.remember(outputs.get(CACHE), conversation)
        hidden = outputs.last_hidden_state
        return HiResLmmModelOutputWithPast(
            last_hidden_state=hidden if packing is None else expand(hidden, packing),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
            **extra,
        )

    def _see(
        self,
        text: PromptText,
        encoded: dict | None,
        extra: dict[str, torch.Tensor],
        geometry: list[ImageGeometry] | None,
        wanted: dict[str, Any],
        **given: torch.Tensor | None,
    ) -> HiResLmmImageFeatures | None:
        """Encode the images of a call, or take the caller's features, after comparing them with the placeholders."""
        encoded = check_encoder_outputs(encoded)
        refuse_both(encoded, given)
        features: Any = encoded.get("image")
        images: ImageInputs | None = None
        if features is None and geometry is not None:
            features_given = given["vision_features"]
            source = given["pixel_values"] if features_given is None else features_given
            images = ImageInputs(
                cast("torch.Tensor", source), geometry, extra, features_given is not None, given["view_boxes"]
            )
        elif features is None:
            placeholder = self.get_placeholder_mask(text.ids, text.embeds)
            images = read_images(
                self, extra=extra, attention_mask=text.attention_mask, placeholder=placeholder, **given
            )
        if features is None and images is not None:
            features = self.encode_images(images, **wanted)
            features.keep_nothing()
            return features
        if features is not None and not isinstance(features, HiResLmmImageFeatures):
            features = HiResLmmImageFeatures.of(features)
        if features is not None and features.prompt_length is None and not self.connector.has_turns:
            mask = self.get_placeholder_mask(text.ids, text.embeds)
            compare_counts(int(mask.sum()), sum(placeholders_per_image(features)))
        return features

    def read_images(self, view_positions: torch.Tensor, view_spans: torch.Tensor) -> list[ImageGeometry]:
        """Read the geometry of a batch, as `image_geometry` of `forward` wants it.

        Args:
            view_positions (`torch.Tensor` of shape `(V, 9)`): As the processor gives it.
            view_spans (`torch.Tensor` of shape `(V, 4)`): As the processor gives it.

        Returns:
            One record an image.
        """
        return read_geometry(*(part.tolist() for part in copy_to_host(view_positions, view_spans)))

    def _splice(
        self, features: HiResLmmImageFeatures, text: PromptText, cache: Cache | None, output_token_map: bool
    ) -> tuple[torch.Tensor, torch.Tensor, list | None, dict]:
        """Run what needs the question and write visual tokens over placeholders: embeddings, kept positions, what was
        read of conversations, and more outputs."""
        prompt_length = features.prompt_length
        if prompt_length is not None and text.ids is None:  # PEFT puts virtual tokens before what generate was given
            prompt_length = text.embeds.shape[1]
        placeholder = self.get_placeholder_mask(text.ids, text.embeds, prompt_length)
        tokens, question = features.tokens, None
        if not self.connector.is_done_early:
            if tokens is None:
                raise ValueError(
                    "These image features hold only pooler_output; pass what get_image_features returned."
                )
            if self.connector.reads_question or self.connector.has_turns:
                past = cache.get_seq_length() if cache is not None else 0
                question = self.read_question(text, placeholder, tokens.num_tokens, prompt_length, past)
                question.cache, question.earlier = cache, features.earlier
            tokens, question = self.connector.finish(tokens, question)
        parts = features.pooler_output if self.connector.is_done_early else tokens
        spliced = splice(text.embeds, placeholder, cast("Any", parts), question)
        counts = placeholders_per_image(features) if tokens is None else tokens.num_tokens
        image_outputs = copy.copy(features)
        image_outputs.pooler_output = list(spliced.placed.split(counts))
        extra: dict[str, Any] = {"image_outputs": image_outputs, "kept_mask": spliced.kept}
        if prompt_length is not None:
            extra["num_drafted"] = placeholder.shape[1] - prompt_length
        if tokens is not None and tokens.aux:
            extra["aux"] = tokens.aux
        if output_token_map or features.token_maps is not None:
            if tokens is None:
                raise ValueError("output_token_map=True needs the features that get_image_features returned.")
            extra["token_map"] = build_token_map(tokens, features.view_boxes)
            if features.token_maps == []:
                sources = features.sources or range(tokens.num_images)
                features.token_maps.append(extra["token_map"].merge_images(sources))
        return spliced.embeds, spliced.kept, None if tokens is None else tokens.read, extra

    def read_question(
        self, text: PromptText, placeholder: torch.Tensor, lengths: list[int], prompt_length: int | None, past: int = 0
    ) -> Question:
        """Collect the readable text of each image.

        Args:
            text (`PromptText`): The text of the call.
            placeholder (`torch.Tensor` of shape `(B, S)`): True at image placeholders.
            lengths (`list[int]`): Placeholders of each image.
            prompt_length (`int`, *optional*): Set by `generate`: positions beyond it are generated.
            past (`int`): Positions in the cache.
        """
        if text.ids is None and self.connector.reads_question:
            vocabulary = self.get_input_embeddings().num_embeddings
            text = recover_text(text, placeholder, self._embed_token, vocabulary)
        return build_question(
            text,
            placeholder,
            lengths,
            prompt_length,
            scope=self.config.question_scope,
            answer_prefix=self.config.answer_prefix_ids or [],
            question_prefix=self.config.question_prefix_ids or [],
            training=self.training and prompt_length is None and self.connector.reads_question,  # or no answer is read
            continues=past > 0,
            has_later=self.connector.has_turns,
        )

    def _idle(self, device: torch.device, use_tower: bool) -> tuple[torch.Tensor, dict]:
        """Zero and `aux`, computed from the visual modules of the stage, so that they train on every rank alike."""
        return self.connector.run_idle(blank_groups(self, device, use_tower), self._embed_token)


class HiResLmmForConditionalGeneration(HiResLmmPreTrainedModel, HiResLmmGenerationMixin):
    """The model with its language-modelling head.

    Args:
        config (`HiResLmmConfig`): The configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HiResLmmConfig):
        super().__init__(config)
        self.model = HiResLmmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, *args: Any, **kwargs: Any) -> tuple | BaseModelOutputWithPooling:
        """See `HiResLmmModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    @takes_cache
    @merge_with_config_defaults
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        view_positions: torch.Tensor | None = None,
        view_boxes: torch.Tensor | None = None,
        view_spans: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        prompt_mask: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        output_token_map: bool = False,
        vision_features: torch.Tensor | None = None,
        question_ids: torch.Tensor | None = None,
        return_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | HiResLmmCausalLMOutputWithPast:
        """Run the model and its head; see `HiResLmmModel.forward` for the inputs they share.

        Args:
            labels (`torch.Tensor` of shape `(B, S)`, *optional*): Targets; -100 where nothing is learned.
            logits_to_keep (`int` or `torch.Tensor`): Positions whose logits are wanted, see `select_positions`.
            return_logits (`bool`): In training mode, make and return the logits of all positions beside the loss;
                otherwise the head sees the positions with a label only and the output has no logits.

        Returns:
            `HiResLmmCausalLMOutputWithPast`, or `HiResLmmTrainingOutput` where it has no logits.

        Raises:
            ValueError: If inputs contradict each other.
        """
        outputs = self.model(
            input_ids,
            pixel_values=pixel_values,
            view_positions=view_positions,
            view_boxes=view_boxes,
            view_spans=view_spans,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            prompt_mask=prompt_mask,
            mm_encoder_outputs=mm_encoder_outputs,
            output_token_map=output_token_map,
            question_labels=labels,
            vision_features=vision_features,
            question_ids=question_ids,
            return_dict=True,
            **kwargs,
        )
        wants_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        learned = labels if self.training and wants_all and not return_logits else None
        if learned is not None:
            hidden, kwargs["shift_labels"] = select_learned(
                outputs.last_hidden_state, learned, kwargs.get("shift_labels")
            )
        else:
            hidden = select_positions(outputs.last_hidden_state, logits_to_keep)
        logits = scale_logits(self.lm_head(hidden), self.config.text_config)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        others = {
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
            "image_outputs": outputs.image_outputs,
            "kept_mask": outputs.kept_mask,
            "packed_attention_mask": outputs.packed_attention_mask,
            "num_drafted": outputs.num_drafted,
            "token_map": outputs.token_map,
            "aux": outputs.aux,
        }
        if learned is not None:
            return HiResLmmTrainingOutput(loss=loss, cache=outputs.get(CACHE), **others)
        return HiResLmmCausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: outputs.get(CACHE)}, **others)


__all__ = ["HiResLmmForConditionalGeneration", "HiResLmmModel", "HiResLmmPreTrainedModel"]

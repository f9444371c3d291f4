"""The model: vision tower, connector and language model, and the splice between them."""

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .compat_hires_lmm import CACHE, CACHE_NAMES, takes_cache
from .configuration_hires_lmm import HiResLmmConfig, HiResLmmConnectorConfig, check_fit
from .connector_hires_lmm import HiResLmmConnector, drop
from .generation_hires_lmm import HiResLmmGenerationMixin, check_context, check_encoder_outputs
from .loading_hires_lmm import HiResLmmLoadingMixin
from .logits_hires_lmm import scale_logits, select_learned, select_positions
from .outputs_hires_lmm import (
    HiResLmmCausalLMOutputWithPast,
    HiResLmmImageFeatures,
    HiResLmmModelOutputWithPast,
    HiResLmmTrainingOutput,
    build_token_map,
    check_call,
    check_placeholders,
    compare_counts,
    placeholders_per_image,
)
from .packing_hires_lmm import expand, pack, plan_batch
from .question_hires_lmm import PromptText, build_question, recover_text
from .tower_hires_lmm import run_tower
from .views_hires_lmm import (
    ImageGeometry,
    Question,
    ViewFeatures,
    all_finite,
    check_finite,
    check_views,
    copy_to_host,
    group_rows,
    idle_views,
    padding_flags,
    read_geometry,
)


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
        self.connector = HiResLmmConnector(
            cast("HiResLmmConnectorConfig", config.connector_config),
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
            config.patch_grid,
            config.text_config.vocab_size,
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

    def encode_views(
        self, pixel_values: torch.Tensor, layer: int | None = None, chunk_size: int | None = None, **wanted: Any
    ) -> tuple[torch.Tensor, BaseModelOutput]:
        """Run the tower: `(V, 3, S, S)` -> patch features of one layer `(V, L, C)` and its output, see `run_tower`."""
        layer = self.config.vision_feature_layer if layer is None else layer
        chunk_size = self.config.vision_chunk_size if chunk_size is None else chunk_size
        rows, cols = self.config.patch_grid
        return run_tower(self.vision_tower, pixel_values, layer, rows * cols, chunk_size, **wanted)

    @merge_with_config_defaults
    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        view_positions: torch.Tensor,
        view_spans: torch.Tensor,
        view_boxes: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_features: torch.Tensor | None = None,
        vision_chunk_size: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """Encode images up to the first operation that reads the question or whose count depends on content.

        Args:
            pixel_values (`torch.Tensor` of shape `(V, 3, S, S)`): Views of all images.
            view_positions (`torch.Tensor` of shape `(V, 6)`): Kind, grid rows and columns, row, column, num_tokens.
            view_spans (`torch.Tensor` of shape `(V, 4)`): Patch rows and columns of each view that enter the sequence.
            view_boxes (`torch.Tensor` of shape `(V, 4)`, *optional*): Boxes in 1/256 source pixel, for token maps.
            vision_feature_layer (`int`, *optional*): Layer of the tower; `config.vision_feature_layer` by default.
            vision_features (`torch.Tensor` of shape `(V, L, C)`, *optional*): What the tower gave for the views, in
                place of `pixel_values`; the tower does not run.
            vision_chunk_size (`int`, *optional*): Most views that pass the tower at once; `config.vision_chunk_size`
                by default.
            kwargs: `output_hidden_states`, `output_attentions`: keep those of the tower; others are not read.

        Returns:
            `HiResLmmImageFeatures`; its `pooler_output` holds one `(n_i, D)` tensor an image.

        Raises:
            ValueError: If the tensors do not belong together or do not fit the model.
        """
        source = pixel_values if vision_features is None else vision_features
        self._check_views(source, vision_features is not None, view_positions, view_spans)
        is_here = view_positions.device == source.device  # else looking would wait for the device once more
        flags = [all_finite(source)] if is_here else []
        positions, spans, *flags = copy_to_host(view_positions, view_spans, *flags)
        for flag in flags:
            check_finite(flag, source, "pixel_values" if vision_features is None else "vision_features")
        images = read_geometry(positions.tolist(), spans.tolist())
        return self._encode_images(
            source, images, view_boxes, vision_feature_layer, vision_features is not None, vision_chunk_size, **kwargs
        )

    def _encode_images(
        self,
        source: torch.Tensor,
        images: list[ImageGeometry],
        view_boxes: torch.Tensor | None,
        layer: int | None = None,
        is_encoded: bool = False,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> HiResLmmImageFeatures:
        """What `get_image_features` does once the geometry is on the host; it never waits for the device."""
        groups = self._group_rows(images, source.device)
        if groups[0] is None:
            source = source[groups[1]]
        if is_encoded:
            features, output = source.to(self.vision_tower.dtype), BaseModelOutput()
        else:
            wanted = {name: kwargs.get(name) for name in ("output_hidden_states", "output_attentions")}
            features, output = self.encode_views(source, layer, chunk_size, **wanted)
        views = self._group_views(features, images, groups)
        tokens = self.connector.encode(views, self._embed_token)
        placed = drop(tokens)[0].split(tokens.num_tokens) if self.connector.is_done_early else None
        return HiResLmmImageFeatures(
            **output,
            pooler_output=list(placed) if placed is not None else tokens.per_image(tokens.features),
            tokens=tokens,
            view_boxes=view_boxes,
        )

    def _embed_token(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up token embeddings; a function, because accelerate moves modules that are passed as arguments."""
        return self.get_input_embeddings()(ids)

    def _check_views(
        self,
        source: torch.Tensor | None,
        is_encoded: bool,
        view_positions: torch.Tensor | None,
        view_spans: torch.Tensor | None,
    ) -> None:
        """Check views or their features against the geometry that came with them."""
        side, (rows, cols) = self.config.view_size, self.config.patch_grid
        encoded = ("vision_features", (rows * cols, self.config.vision_config.hidden_size))
        name, shape = encoded if is_encoded else ("pixel_values", (3, side, side))
        check_views(source, name, shape, view_positions, view_spans)

    def _group_rows(
        self, images: list[ImageGeometry], device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Rows of global views and of crops; None for global views that a training stage leaves out."""
        global_rows, crop_rows = group_rows(tuple(kind for image in images for kind in image.kinds), str(device))
        if not (self.training and self.connector.training_views == "crops"):
            return global_rows, crop_rows
        if any(image.spans[0][1] > image.spans[0][0] for image in images):
            raise ValueError(
                "This training stage uses crops only, but global views enter the sequence; make the batch with "
                "views='crops'."
            )
        return None, crop_rows

    def _group_views(
        self, features: torch.Tensor, images: list[ImageGeometry], groups: tuple[torch.Tensor | None, torch.Tensor]
    ) -> ViewFeatures:
        """Separate global views from the others."""
        grid = self.config.patch_grid
        if groups[0] is None:
            return ViewFeatures(features[:0], features, grid, grid, images)
        glob, crops = (features[rows.to(features.device)] for rows in groups if rows is not None)
        return ViewFeatures(glob, crops, grid, grid, images)

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, prompt_length: int | None = None
    ) -> torch.Tensor:
        """Find the image placeholders.

        Args:
            input_ids (`torch.Tensor` of shape `(B, S)`, *optional*): Token ids; without them embeddings are compared.
            inputs_embeds (`torch.Tensor` of shape `(B, S, D)`): Token embeddings.
            prompt_length (`int`, *optional*): Positions beyond it are generated and hold no placeholders.

        Returns:
            `(B, S)` bool.
        """
        if input_ids is None:
            token = torch.full((), self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(dim=-1)
        else:
            mask = input_ids == self.config.image_token_id
        if prompt_length is not None:
            mask = mask & (torch.arange(mask.shape[1], device=mask.device) < prompt_length)
        return mask

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
        question_labels: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        vision_chunk_size: int | None = None,
        image_geometry: list[ImageGeometry] | None = None,
        question_ids: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | HiResLmmModelOutputWithPast:
        """Run the model.

        Args:
            input_ids (`torch.Tensor` of shape `(B, S)`, *optional*): Token ids with expanded placeholders.
            pixel_values (`torch.Tensor` of shape `(V, 3, S, S)`, *optional*): Views of all images of the batch.
            view_positions (`torch.Tensor` of shape `(V, 6)`, *optional*): Geometry, see `get_image_features`.
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
            question_labels (`torch.Tensor` of shape `(B, S)`, *optional*): Training labels, to keep answers unread.
            vision_features (`torch.Tensor` of shape `(V, L, C)`, *optional*): Cached output of the tower in place of
                `pixel_values`, for training; with no rows it says that the tower runs on no process.
            vision_chunk_size (`int`, *optional*): See `get_image_features`.
            image_geometry (`list[ImageGeometry]`, *optional*): What `read_images` returned, in place of
                `view_positions` and `view_spans`: nothing is then read back from the device, so the call can be
                compiled whole (once a grid, `dynamic=False`) and captured. Numbers of placeholders are not compared.
            question_ids (`torch.Tensor` of shape `(B, turns, L)`, *optional*): Ids of the questions in another
                vocabulary, see `HiResLmmProcessor.question_ids`.
            vision_feature_layer (`int`, *optional*): See `get_image_features`.

        Returns:
            `HiResLmmModelOutputWithPast`.

        Raises:
            ValueError: If inputs contradict each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        check_call(inputs_embeds, attention_mask, question_labels, cache, kwargs)
        features = self._image_features(
            input_ids,
            inputs_embeds,
            pixel_values,
            vision_features,
            view_positions,
            view_spans,
            view_boxes,
            mm_encoder_outputs,
            attention_mask,
            vision_chunk_size,
            image_geometry,
            vision_feature_layer,
            **{name: kwargs.get(name) for name in ("output_hidden_states", "output_attentions")},
        )
        extra: dict[str, Any] = {}
        packing, read = None, None
        if features is not None:
            past = cache.get_seq_length() if cache is not None else 0
            text = PromptText(input_ids, inputs_embeds, attention_mask, prompt_mask, question_labels, question_ids)
            inputs_embeds, kept, read, extra = self._splice(features, text, cache, output_token_map)
            if not self.connector.is_count_static or getattr(features, "is_right_padded", False):
                in_generate = getattr(features, "prompt_length", None) is not None
                packing, attention_mask, position_ids = plan_batch(kept, attention_mask, past, in_generate)
                inputs_embeds = pack(inputs_embeds, packing)
                virtual = 0  # positions that PEFT put in front, and will put in front of the mask again
                if getattr(features, "mask_length", None) is not None:
                    virtual = max(past + kept.shape[1] - extra["num_drafted"] - cast("int", features.mask_length), 0)
                extra["packed_attention_mask"] = attention_mask[:, virtual:]
            elif getattr(features, "is_unpadded", False) and (position_ids is None or cache is not None):
                attention_mask = None  # all ones: the language model need not look
            if "num_drafted" in extra:
                length = past + inputs_embeds.shape[1] - extra["num_drafted"]
                check_context(length, attention_mask, extra["num_drafted"], self.config.text_config)
        elif self.training and cache is None:
            idle = self._idle_connector(inputs_embeds.device, use_tower=vision_features is None)
            inputs_embeds = inputs_embeds + idle.to(inputs_embeds)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            return_dict=True,
            **{CACHE: cache},
            **kwargs,
        )
        for memory, conversation in read or []:
            memory.remember(outputs.get(CACHE), conversation)
        hidden = outputs.last_hidden_state
        return HiResLmmModelOutputWithPast(
            last_hidden_state=hidden if packing is None else expand(hidden, packing),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
            **extra,
        )

    def _image_features(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        pixel_values: torch.Tensor | None,
        vision_features: torch.Tensor | None,
        view_positions: torch.Tensor | None,
        view_spans: torch.Tensor | None,
        view_boxes: torch.Tensor | None,
        mm_encoder_outputs: dict | None,
        attention_mask: torch.Tensor | None,
        vision_chunk_size: int | None,
        images: list[ImageGeometry] | None,
        layer: int | None,
        **wanted: bool | None,
    ) -> HiResLmmImageFeatures | None:
        """Take the caller's features or encode the images, after comparing placeholders with promised tokens."""
        features = check_encoder_outputs(mm_encoder_outputs).get("image")
        given = [views for views in (pixel_values, vision_features) if views is not None]
        if len(given) + (features is not None) > 1:
            raise ValueError(
                "Pass one of pixel_values, vision_features and mm_encoder_outputs: they stand for the same images."
            )
        if view_positions is not None and view_positions.shape[0] and not given and features is None:
            raise ValueError(
                f"view_positions describes {view_positions.shape[0]} views, but pixel_values is missing; pass all "
                "that the processor returned."
            )
        if given and given[0].shape[0]:
            is_encoded, is_unpadded = vision_features is not None, None
            if images is None:
                placeholder = self.get_placeholder_mask(input_ids, inputs_embeds)
                is_finite = all_finite(given[0])
                positions, spans, count, is_finite, *flags = copy_to_host(
                    view_positions, view_spans, placeholder.sum(), is_finite, *padding_flags(attention_mask)
                )
                check_placeholders(count, positions, self.connector.makes_tokens)
                self._check_views(given[0], is_encoded, positions, spans)
                check_finite(is_finite, given[0], "vision_features" if is_encoded else "pixel_values")
                images = read_geometry(positions.tolist(), spans.tolist())
                is_unpadded = bool(flags[0]) if flags else None
            features = self._encode_images(
                given[0], images, view_boxes, layer, is_encoded, vision_chunk_size, **wanted
            )
            features.is_unpadded = is_unpadded
            features.keep_nothing()
            return features
        in_generate = getattr(features, "prompt_length", None) is not None
        if features is not None and not in_generate and not self.connector.makes_tokens:
            mask = self.get_placeholder_mask(input_ids, inputs_embeds)
            compare_counts(int(mask.sum()), sum(placeholders_per_image(features)))
        return features

    def read_images(self, view_positions: torch.Tensor, view_spans: torch.Tensor) -> list[ImageGeometry]:
        """Read the geometry of a batch, as `image_geometry` of `forward` wants it.

        Args:
            view_positions (`torch.Tensor` of shape `(V, 6)`): As the processor gives it.
            view_spans (`torch.Tensor` of shape `(V, 4)`): As the processor gives it.

        Returns:
            One record an image.
        """
        return read_geometry(*(part.tolist() for part in copy_to_host(view_positions, view_spans)))

    def _splice(
        self,
        features: HiResLmmImageFeatures,
        text: PromptText,
        cache: Cache | None,
        output_token_map: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, list | None, dict]:
        """Write visual tokens over placeholders: embeddings, kept positions `(B, S)`, what was read, more outputs."""
        prompt_length, inputs_embeds = getattr(features, "prompt_length", None), text.embeds
        if prompt_length is not None and text.ids is None:  # PEFT puts virtual tokens before what generate was given
            prompt_length = inputs_embeds.shape[1]
        placeholder = self.get_placeholder_mask(text.ids, inputs_embeds, prompt_length)
        tokens, kept, counts = getattr(features, "tokens", None), None, placeholders_per_image(features)
        if not self.connector.is_done_early:
            if tokens is None:
                raise ValueError(
                    "These image features hold only pooler_output; pass what get_image_features returned."
                )
            question = None
            if self.connector.reads_question or self.connector.makes_tokens:
                past = cache.get_seq_length() if cache is not None else 0
                question = self.read_question(text, placeholder, tokens.num_tokens, prompt_length, past)
                question.cache, question.earlier = cache, features.earlier
            tokens = self.connector.finish(tokens, question)
            (placed, kept), counts = drop(tokens), tokens.num_tokens
        else:
            placed = torch.cat([part.to(inputs_embeds.device) for part in features.pooler_output])
        placed = placed.to(inputs_embeds.device, inputs_embeds.dtype)
        spliced = inputs_embeds.masked_scatter(placeholder[..., None].to(inputs_embeds.device), placed)
        kept_positions = torch.ones_like(placeholder)
        if kept is not None:
            kept_positions = kept_positions.masked_scatter(placeholder, kept.to(placeholder.device))
        image_outputs = copy.copy(features)
        image_outputs.pooler_output = list(placed.split(counts))
        extra: dict[str, Any] = {"image_outputs": image_outputs, "kept_mask": kept_positions}
        if prompt_length is not None:
            extra["num_drafted"] = placeholder.shape[1] - prompt_length
        wanted = getattr(features, "token_maps", None)
        if output_token_map or wanted is not None:
            if tokens is None:
                raise ValueError("output_token_map=True needs the features that get_image_features returned.")
            extra["token_map"] = build_token_map(tokens, features.view_boxes)
            if wanted == []:
                sources = features.sources or range(tokens.num_images)
                wanted.append(extra["token_map"].merge_images(sources))
        return spliced, kept_positions, None if tokens is None else tokens.read, extra

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
            has_later=self.connector.makes_tokens,
        )

    def _idle_connector(self, device: torch.device, use_tower: bool) -> torch.Tensor:
        """Zero, computed from the visual modules of the stage, so that they train on every rank alike."""
        side, (rows, cols) = self.config.view_size, self.config.patch_grid
        if use_tower:
            pixels = torch.zeros(1, self.config.vision_config.num_channels, side, side, device=device)
            features, _ = self.encode_views(pixels.to(self.vision_tower.dtype))
        else:
            shape = (1, rows * cols, self.config.vision_config.hidden_size)
            features = torch.zeros(shape, device=device, dtype=self.vision_tower.dtype)
        return self.connector.run_idle(
            idle_views(features, (rows, cols), self.connector.training_views), self._embed_token
        )


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
        vision_chunk_size: int | None = None,
        vision_feature_layer: int | None = None,
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
            vision_chunk_size=vision_chunk_size,
            vision_feature_layer=vision_feature_layer,
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
        }
        if learned is not None:
            return HiResLmmTrainingOutput(loss=loss, cache=outputs.get(CACHE), **others)
        return HiResLmmCausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: outputs.get(CACHE)}, **others)


__all__ = ["HiResLmmForConditionalGeneration", "HiResLmmModel", "HiResLmmPreTrainedModel"]

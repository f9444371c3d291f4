"""The model: vision tower, connector and language model, and the splice between them."""

from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .configuration_hires_lmm import HiResLmmConfig, HiResLmmConnectorConfig, check_fit
from .connector_hires_lmm import HiResLmmConnector, drop
from .generation_hires_lmm import HiResLmmGenerationMixin, check_encoder_outputs
from .logits_hires_lmm import scale_logits, select_positions
from .outputs_hires_lmm import (
    HiResLmmCausalLMOutputWithPast,
    HiResLmmImageFeatures,
    HiResLmmModelOutputWithPast,
    build_token_map,
    compare_counts,
    placeholders_per_image,
)
from .packing_hires_lmm import Packing, expand, pack, plan_packing
from .question_hires_lmm import build_question
from .views_hires_lmm import (
    KIND_GLOBAL,
    NUM_POSITION_FIELDS,
    ImageGeometry,
    Question,
    ViewFeatures,
    read_geometry,
)


class HiResLmmPreTrainedModel(PreTrainedModel):
    """Base of the two models: loading, saving and what the library may do with them."""

    config: HiResLmmConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: Any = None
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def post_init(self) -> None:
        """Finish construction; keep only block classes that exist, since FSDP rejects the others."""
        super().post_init()
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = {name for name in self._no_split_modules if name in present}


class HiResLmmModel(HiResLmmPreTrainedModel):
    """Vision tower, connector and language model without the head.

    Args:
        config (`HiResLmmConfig`): The configuration.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head"]

    def __init__(self, config: HiResLmmConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.connector = HiResLmmConnector(
            cast("HiResLmmConnectorConfig", config.connector_config),
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
            config.patch_grid,
        )
        self.language_model = AutoModel.from_config(config.text_config)
        check_fit(config, self.language_model)
        self.post_init()

    def encode_views(self, pixel_values: torch.Tensor, layer: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the tower: `(V, 3, S, S)` -> patch features of one layer `(V, L, C)` and the last hidden state."""
        output = self.vision_tower(
            pixel_values.to(self.vision_tower.dtype), output_hidden_states=True, return_dict=True
        )
        features = output.hidden_states[self.config.vision_feature_layer if layer is None else layer]
        rows, cols = self.config.patch_grid
        return features[:, features.shape[1] - rows * cols :], output.last_hidden_state

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

        Returns:
            `HiResLmmImageFeatures`; its `pooler_output` holds one `(n_i, D)` tensor an image.

        Raises:
            ValueError: If the tensors do not belong together or do not fit the model.
        """
        source = pixel_values if vision_features is None else vision_features
        images = self._read_geometry(source, vision_features is not None, view_positions, view_spans)
        groups = self._group_rows(images)
        if groups[0] is None:
            source = source[groups[1].to(source.device)]
        if vision_features is None:
            features, last_hidden_state = self.encode_views(source, vision_feature_layer)
        else:
            features, last_hidden_state = source.to(self.vision_tower.dtype), None
        views = self._group_views(features, images, groups)
        tokens = self.connector.encode(views, self._embed_token)
        placed = drop(tokens)[0].split(tokens.num_tokens) if self.connector.is_done_early else None
        return HiResLmmImageFeatures(
            last_hidden_state=last_hidden_state,
            pooler_output=list(placed) if placed is not None else tokens.per_image(tokens.features),
            tokens=tokens,
            view_boxes=view_boxes,
        )

    def _embed_token(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up token embeddings; a function, because accelerate moves modules that are passed as arguments."""
        return self.get_input_embeddings()(ids)

    def _read_geometry(
        self,
        source: torch.Tensor | None,
        is_encoded: bool,
        view_positions: torch.Tensor | None,
        view_spans: torch.Tensor | None,
    ) -> list[ImageGeometry]:
        """Check views or their features against the geometry, and copy that to the host, once."""
        side, (rows, cols) = self.config.view_size, self.config.patch_grid
        name, shape = "pixel_values", f"3, {side}, {side}"
        if is_encoded:
            name, shape = "vision_features", f"{rows * cols}, {self.config.vision_config.hidden_size}"
        given = None if source is None else tuple(source.shape)
        if given is None or ", ".join(map(str, given[1:])) != shape:
            raise ValueError(
                f"{name} has the shape {given}, but this model reads views of shape (views, {shape}). Use the image "
                "processor that belongs to this checkpoint."
            )
        if view_positions is None or view_spans is None:
            raise ValueError(f"{name} came without view_positions and view_spans; pass all that the processor gives.")
        if view_positions.shape != (given[0], NUM_POSITION_FIELDS):
            raise ValueError(
                f"view_positions has the shape {tuple(view_positions.shape)}, expected "
                f"({given[0]}, {NUM_POSITION_FIELDS}): one row a view of {name}."
            )
        table = torch.cat([view_positions, view_spans], dim=1).tolist()
        positions = [row[:NUM_POSITION_FIELDS] for row in table]
        return read_geometry(positions, [row[NUM_POSITION_FIELDS:] for row in table])

    def _group_rows(self, images: list[ImageGeometry]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Rows of global views and of crops; None for global views that a training stage leaves out."""
        kinds = torch.tensor([kind for image in images for kind in image.kinds], dtype=torch.long)
        crop_rows = torch.nonzero(kinds != KIND_GLOBAL)[:, 0]
        if not (self.training and self.connector.training_views == "crops"):
            return torch.nonzero(kinds == KIND_GLOBAL)[:, 0], crop_rows
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
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(dim=-1)
        else:
            mask = input_ids == self.config.image_token_id
        if prompt_length is not None:
            mask = mask & (torch.arange(mask.shape[1], device=mask.device) < prompt_length)
        return mask

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
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        prompt_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        output_token_map: bool = False,
        question_labels: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
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
            past_key_values (`Cache`, *optional*): Cache of earlier positions.
            inputs_embeds (`torch.Tensor` of shape `(B, S, D)`, *optional*): Instead of `input_ids`.
            use_cache (`bool`, *optional*): Return a cache.
            prompt_mask (`torch.Tensor` of shape `(B, S)`, *optional*): True where parts may read the question.
            mm_encoder_outputs (`dict`, *optional*): `{"image": features}` from `get_image_features`.
            output_token_map (`bool`): Return a record of every visual token.
            question_labels (`torch.Tensor` of shape `(B, S)`, *optional*): Training labels, to keep answers unread.
            vision_features (`torch.Tensor` of shape `(V, L, C)`, *optional*): Cached output of the tower in place of
                `pixel_values`, for training; with no rows it says that the tower runs on no process.

        Returns:
            `HiResLmmModelOutputWithPast`.

        Raises:
            ValueError: If inputs contradict each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        features = self._image_features(
            input_ids,
            inputs_embeds,
            pixel_values,
            vision_features,
            view_positions,
            view_spans,
            view_boxes,
            mm_encoder_outputs,
        )
        extra: dict[str, Any] = {}
        packing = None
        if features is not None:
            inputs_embeds, kept, extra = self._splice(
                features, input_ids, inputs_embeds, attention_mask, prompt_mask, question_labels, output_token_map
            )
            if not self.connector.is_count_static or getattr(features, "is_right_padded", False):
                packing, attention_mask, position_ids = self._pack(kept, attention_mask, past_key_values, features)
                inputs_embeds = pack(inputs_embeds, packing)
                extra["packed_attention_mask"] = attention_mask
        elif self.training and past_key_values is None:
            idle = self._idle_connector(inputs_embeds.device, use_tower=vision_features is None)
            inputs_embeds = inputs_embeds + idle.to(inputs_embeds)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        return HiResLmmModelOutputWithPast(
            last_hidden_state=hidden if packing is None else expand(hidden, packing),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
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
            self.check_placeholders(self.get_placeholder_mask(input_ids, inputs_embeds), view_positions)
            return self.get_image_features(
                pixel_values,
                view_positions,
                view_spans,
                view_boxes,
                vision_features=vision_features,
                return_dict=True,
            )
        if features is not None and getattr(features, "prompt_length", None) is None:
            mask = self.get_placeholder_mask(input_ids, inputs_embeds)
            compare_counts(int(mask.sum()), sum(placeholders_per_image(features)))
        return features

    def check_placeholders(self, placeholder: torch.Tensor, view_positions: torch.Tensor | None) -> None:
        """Compare the placeholders of a batch with the tokens that `view_positions` promises.

        Args:
            placeholder (`torch.Tensor` of shape `(B, S)`): True at placeholders.
            view_positions (`torch.Tensor` of shape `(V, 6)`): Geometry of the batch.

        Raises:
            ValueError: If the two numbers differ.
        """
        if view_positions is None or view_positions.ndim != 2 or view_positions.shape[1] != NUM_POSITION_FIELDS:
            shape = None if view_positions is None else tuple(view_positions.shape)
            raise ValueError(f"view_positions has the shape {shape}, expected (views, {NUM_POSITION_FIELDS}).")
        promised = (view_positions[:, -1] * (view_positions[:, 0] == KIND_GLOBAL)).sum()
        counts = torch.stack([placeholder.sum().to(promised.device), promised]).tolist()
        compare_counts(*counts)

    def _splice(
        self,
        features: HiResLmmImageFeatures,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        prompt_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        output_token_map: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Write the visual tokens over the placeholders: new embeddings, kept positions `(B, S)`, extra outputs."""
        prompt_length = getattr(features, "prompt_length", None)
        placeholder = self.get_placeholder_mask(input_ids, inputs_embeds, prompt_length)
        tokens, kept = getattr(features, "tokens", None), None
        if not self.connector.is_done_early:
            if tokens is None:
                raise ValueError(
                    "These image features hold only pooler_output; pass what get_image_features returned."
                )
            question = None
            if self.connector.reads_question:
                question = self._question(
                    input_ids,
                    inputs_embeds,
                    placeholder,
                    tokens.num_tokens,
                    attention_mask,
                    prompt_mask,
                    labels,
                    prompt_length,
                )
            tokens = self.connector.finish(tokens, question)
            placed, kept = drop(tokens)
        else:
            placed = torch.cat([part.to(inputs_embeds.device) for part in features.pooler_output])
        placed = placed.to(inputs_embeds.device, inputs_embeds.dtype)
        spliced = inputs_embeds.masked_scatter(placeholder[..., None].to(inputs_embeds.device), placed)
        kept_positions = torch.ones_like(placeholder)
        if kept is not None:
            kept_positions = kept_positions.masked_scatter(placeholder, kept.to(placeholder.device))
        extra: dict[str, Any] = {"image_hidden_states": placed, "kept_mask": kept_positions}
        if prompt_length is not None:
            extra["num_drafted"] = placeholder.shape[1] - prompt_length
        if output_token_map:
            if tokens is None:
                raise ValueError("output_token_map=True needs the features that get_image_features returned.")
            extra["token_map"] = build_token_map(tokens, features.view_boxes)
        return spliced, kept_positions, extra

    def _question(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        placeholder: torch.Tensor,
        lengths: list[int],
        attention_mask: torch.Tensor | None,
        prompt_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        prompt_length: int | None,
    ) -> Question:
        """Collect the readable text of each image."""
        readable, length = torch.ones_like(placeholder), placeholder.shape[1]
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            readable = attention_mask[:, -length:].bool()
        if prompt_length is not None:
            readable = readable & (torch.arange(length, device=placeholder.device) < prompt_length)
            if prompt_mask is not None:  # `generate` does not lengthen it
                prompt_mask = nn.functional.pad(prompt_mask.bool(), (0, max(length - prompt_mask.shape[1], 0)))
        if prompt_mask is not None and prompt_mask.shape != placeholder.shape:
            raise ValueError(
                f"prompt_mask has the shape {tuple(prompt_mask.shape)}, expected that of input_ids: "
                f"{tuple(placeholder.shape)}."
            )
        return build_question(
            inputs_embeds,
            input_ids,
            placeholder,
            lengths,
            readable,
            prompt_mask,
            labels,
            scope=self.config.question_scope,
            answer_prefix=self.config.answer_prefix_ids or [],
            question_prefix=self.config.question_prefix_ids or [],
            training=self.training and prompt_length is None,  # in `generate` no answer can be read
        )

    def _pack(
        self,
        kept: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        features: HiResLmmImageFeatures,
    ) -> tuple[Packing, torch.Tensor, torch.Tensor]:
        """Plan the packing of a batch: the plan, the mask `(B, past + P)` and the positions `(B, P)`."""
        if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2):
            raise ValueError(
                "The threshold rule drops tokens inside the model and needs a two-dimensional attention_mask; "
                "pass (batch, length), or use the budget rule."
            )
        length, past = kept.shape[1], past_key_values.get_seq_length() if past_key_values is not None else 0
        prefix, side = kept.new_ones((kept.shape[0], past), dtype=torch.long), "left"
        if attention_mask is not None:
            mask = attention_mask.to(kept.device)
            kept, prefix = kept & mask[:, -length:].bool(), mask[:, :-length].long()
            in_generate = getattr(features, "prompt_length", None) is not None
            side = "right" if not in_generate and bool((mask[:, -1] == 0).any()) else "left"
        packing = plan_packing(kept, side)
        attention_mask = torch.cat([prefix, packing.mask.long()], dim=1)
        position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -packing.mask.shape[1] :]
        return packing, attention_mask, position_ids

    def _idle_connector(self, device: torch.device, use_tower: bool) -> torch.Tensor:
        """Zero, computed from the visual modules of the stage, so that they train on every rank alike."""
        side, (rows, cols) = self.config.view_size, self.config.patch_grid
        if use_tower:
            pixels = torch.zeros(1, self.config.vision_config.num_channels, side, side, device=device)
            features, _ = self.encode_views(pixels, self.config.vision_feature_layer)
        else:
            shape = (1, rows * cols, self.config.vision_config.hidden_size)
            features = torch.zeros(shape, device=device, dtype=self.vision_tower.dtype)
        span, used = (0, rows, 0, cols), self.connector.training_views
        spans = ((0, 0, 0, 0) if used == "crops" else span, span)
        image = ImageGeometry(0, (KIND_GLOBAL, 1), (1, 1), ((0, 0), (0, 0)), spans, 0)
        if used == "global":
            image = ImageGeometry(0, (KIND_GLOBAL,), (0, 0), ((0, 0),), (span,), 0)
        glob, crops = features[: used != "crops"], features[: used != "global"]
        views = ViewFeatures(glob, crops, self.config.patch_grid, self.config.patch_grid, [image])
        return self.connector.run_idle(views, self._embed_token)


class HiResLmmForConditionalGeneration(HiResLmmPreTrainedModel, HiResLmmGenerationMixin):
    """The model with its language-modelling head.

    Args:
        config (`HiResLmmConfig`): The configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: HiResLmmConfig):
        super().__init__(config)
        self.model = HiResLmmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, *args: Any, **kwargs: Any) -> tuple | BaseModelOutputWithPooling:
        """See `HiResLmmModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

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
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        prompt_mask: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        output_token_map: bool = False,
        vision_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | HiResLmmCausalLMOutputWithPast:
        """Run the model and its head; see `HiResLmmModel.forward` for the inputs they share.

        Args:
            labels (`torch.Tensor` of shape `(B, S)`, *optional*): Targets; -100 where nothing is learned.
            logits_to_keep (`int` or `torch.Tensor`): Positions whose logits are wanted, see `select_positions`.

        Returns:
            `HiResLmmCausalLMOutputWithPast`.

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
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            prompt_mask=prompt_mask,
            mm_encoder_outputs=mm_encoder_outputs,
            output_token_map=output_token_map,
            question_labels=labels,
            vision_features=vision_features,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(select_positions(outputs.last_hidden_state, logits_to_keep))
        logits = scale_logits(logits, self.config.text_config)
        loss = None
        if labels is not None:
            vocabulary = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **kwargs)
        return HiResLmmCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            kept_mask=outputs.kept_mask,
            packed_attention_mask=outputs.packed_attention_mask,
            num_drafted=outputs.num_drafted,
            token_map=outputs.token_map,
        )


__all__ = ["HiResLmmForConditionalGeneration", "HiResLmmModel", "HiResLmmPreTrainedModel"]

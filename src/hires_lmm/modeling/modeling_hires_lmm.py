"""The model: vision tower, connector and language model, and the splice between them."""

from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from .carriers_hires_lmm import ImageGeometry, ViewFeatures, drop, read_geometry
from .compat_hires_lmm import CACHE, keeps_keys, takes_cache
from .configuration_hires_lmm import HiResLmmConfig, HiResLmmConnectorConfig, check_fit
from .connector_hires_lmm import HiResLmmConnector
from .conversation_hires_lmm import Conversation
from .experts_hires_lmm import add_aux_loss, read_routers, wants_routers
from .generation_hires_lmm import HiResLmmGenerationMixin
from .heads_hires_lmm import add_head_losses, run_heads, take_heads
from .inputs_hires_lmm import (
    ImageArguments,
    ImageInputs,
    copy_to_host,
    count_objects,
    read_features,
    read_images,
    take_images,
    take_text,
)
from .layer_ops_hires_lmm import install_layer_ops, open_layers, ops_of
from .logits_hires_lmm import last_positions, scale_logits, select_learned, select_positions, soften_labels
from .outputs_hires_lmm import (
    HiResLmmCausalLMOutputWithPast,
    HiResLmmImageFeatures,
    HiResLmmModelOutputWithPast,
    HiResLmmTrainingOutput,
)
from .positions_hires_lmm import plan_positions
from .pretrained_hires_lmm import HiResLmmPreTrainedModel
from .question_hires_lmm import PromptText
from .serving_hires_lmm import asked_question, check_engine
from .splice_hires_lmm import Prompt, find_placeholders, splice_images
from .towers_hires_lmm import blank_groups, build_tower, run_tower, run_towers


logger = logging.get_logger(__name__)

TOWER_OUTPUTS = ("output_hidden_states", "output_attentions")
"""Keyword arguments that the tower reads as well as the language model."""


class HiResLmmModel(HiResLmmPreTrainedModel):
    """Vision tower, connector and language model without the head."""

    def __init__(self, config: HiResLmmConfig):
        super().__init__(config)
        check_engine(config)
        self.vision_tower = build_tower(config.vision_config, config.unequal_views)
        self.extra_towers = nn.ModuleDict(
            {name: build_tower(tower) for name, tower in config.extra_tower_configs().items()}
        )
        self.connector = HiResLmmConnector(
            cast("HiResLmmConnectorConfig", config.connector_config), config.part_context()
        )
        self.language_model = AutoModel.from_config(config.text_config)
        check_fit(config, self.language_model)
        self.counts_positions = not keeps_keys(config.text_config)
        self.layer_hooks: list[Any] = []
        install_layer_ops(self)
        self.post_init()

    def train(self, mode: bool = True) -> "HiResLmmModel":
        """As in torch; batch norms of towers keep their statistics, or images would depend on each other."""
        super().train(mode)
        for module in (*self.vision_tower.modules(), *self.extra_towers.modules()):
            if isinstance(module, _BatchNorm):
                module.train(False)
        return self

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
        routing_ids: torch.Tensor | None = None,
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
            routing_ids (`torch.Tensor` of shape `(V, L)`, *optional*): Text that each image is routed by, see
                `asked_question`; all operations run then, and what they drop is gone.
            kwargs: `pixel_values_<name>` `(R, 3, H, W)`: views of an extra tower. `image_boxes` `(I, N, 4)`: objects
                of each image, see the image processor. `output_hidden_states`, `output_attentions`: keep those of the
                tower; others are not read.

        Returns:
            `HiResLmmImageFeatures`; its `pooler_output` holds one `(n_i, D)` tensor an image, its `last_hidden_state`
            the layer of the tower that was read.

        Raises:
            ValueError: If the tensors do not belong together or do not fit the model.
        """
        options: dict[str, Any] = dict(kwargs)
        given = take_images(
            self.config,
            options,
            pixel_values=pixel_values,
            vision_features=vision_features,
            view_positions=view_positions,
            view_spans=view_spans,
            view_boxes=view_boxes,
        )
        images = read_images(self, given)
        if images is None:
            raise ValueError("There is nothing to encode: pass pixel_values or vision_features with their geometry.")
        wanted = {name: options.get(name) for name in TOWER_OUTPUTS}
        features = self.encode_images(images, vision_feature_layer, vision_chunk_size, **wanted)
        tokens = features.tokens
        if routing_ids is None or view_positions is None or tokens is None or self.connector.is_done_early:
            return features
        question = asked_question(self, routing_ids, view_positions, tokens.num_tokens)
        placed = drop(self.connector.finish(tokens, question)[0])[0]
        features.pooler_output = list(placed.split(tokens.num_tokens))
        return features

    def encode_images(
        self, images: ImageInputs, layer: int | None = None, chunk_size: int | None = None, **wanted: Any
    ) -> HiResLmmImageFeatures:
        """What `get_image_features` does once the geometry is on the host; it never waits for the device."""
        groups, output = run_towers(self, images, layer, chunk_size, **wanted)
        tokens = self.connector.encode(ViewFeatures(groups, images.images, boxes=images.boxes), self.embed_token)
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
        if ops_of(self, "vision_tower"):
            raise ValueError("A layer op runs in the vision tower and needs whole images: call get_image_features.")
        return run_tower(self.vision_tower, pixel_values, layer, chunk_size=chunk_size).features

    def embed_token(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up token embeddings; a function, because accelerate moves modules that are passed as arguments."""
        return self.get_input_embeddings()(ids)

    def embed_text(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of a text, in which parts may have tokens of their own."""
        embeds = self.embed_token(ids)
        for part in self.connector.vocabularies:
            embeds = part.embed(ids, embeds)
        return embeds

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, prompt_length: int | None = None
    ) -> torch.Tensor:
        """Where the image placeholders are, `(B, S)` bool; see `find_placeholders`."""
        return find_placeholders(input_ids, inputs_embeds, self.config.image_token_id, self.embed_token, prompt_length)

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
        mm_encoder_outputs: dict | None = None,
        output_token_map: bool = False,
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
            position_ids (`torch.Tensor` of shape `(B, S)`, *optional*): Positions; made anew where tokens are dropped
                and by a position plan.
            cache (`Cache`, *optional*): Cache of earlier positions; `past_key_values` means the same.
            inputs_embeds (`torch.Tensor` of shape `(B, S, D)`, *optional*): Instead of `input_ids`.
            use_cache (`bool`, *optional*): Return a cache.
            mm_encoder_outputs (`dict`, *optional*): `{"image": features}` from `get_image_features`.
            output_token_map (`bool`): Return a record of every visual token.
            kwargs: `pixel_attention_mask` `(B, Vmax, 18)`: geometry of the dense layout, where `pixel_values` are
                `(B, Vmax, 3, H, W)`; see `pack_samples` of the processor. `vision_features` `(V, L, C)`: cached output
                of the tower in place of `pixel_values`, for training; with no rows it says that the tower runs on no
                process. `pixel_values_<name>`: views of an extra tower. `image_boxes` `(I, N, 4)`: top, left, bottom,
                right of objects in 1/65536 of a side of the global view, zeros behind the last of an image.
                `image_geometry`: what `read_images` returned, in place of `view_positions` and `view_spans`; nothing
                is then read back from the device, so the call can be compiled whole (once a grid, `dynamic=False`) and
                captured, and numbers of placeholders are not compared. `prompt_mask` `(B, S)`: true where parts may
                read the question. `question_labels` `(B, S)`: training labels, to keep answers unread.
                `question_ids` `(B, turns, L)`: ids of the questions in another vocabulary, see
                `HiResLmmProcessor.question_ids`. `labels_<name>` `(N, ...)`: what a head should read at the
                occurrences of its token. `output_heads`: whether heads run; by default where no earlier positions are
                cached. `layer_options`: what layer ops are told in this call, such as
                `{"exit_after": 8}`. `output_router_logits`: what the routers of experts say, and their loss. The rest
                goes to the language model.

        Returns:
            `HiResLmmModelOutputWithPast`.

        Raises:
            ValueError: If inputs contradict each other.
        """
        text = take_text(self, input_ids, inputs_embeds, attention_mask, cache, kwargs)
        heads = take_heads(self, kwargs, cache)
        given = take_images(
            self.config,
            kwargs,
            pixel_values=pixel_values,
            view_positions=view_positions,
            view_spans=view_spans,
            view_boxes=view_boxes,
            mm_encoder_outputs=mm_encoder_outputs,
        )
        conversation = None
        parts, may_cache = self.connector, cache is not None or use_cache is not False
        remembers = parts.layer_ops or parts.position_plan is not None or self.counts_positions
        if remembers or (parts.has_turns and may_cache):
            conversation = Conversation.of(cache).follow(cache, len(text.embeds))
        features = self._see(given, text, **{name: kwargs.get(name) for name in TOWER_OUTPUTS})
        if features is not None:
            prompt = splice_images(self, text, features, cache, position_ids, conversation, output_token_map)
        else:
            prompt = Prompt(text.embeds, attention_mask, position_ids, conversation=conversation)
            if self.training and cache is None:
                prompt.embeds, prompt.outputs["aux"] = self._idle(text.embeds, given.vision_features is None)
        plan_positions(self, prompt, cache)
        prompt.layers = open_layers(self, prompt, cache, kwargs)
        outputs = prompt.read(self.language_model, cache, use_cache=use_cache, **kwargs)
        prompt.remember(outputs.get(CACHE))
        hidden = prompt.expand(outputs.last_hidden_state)
        if wants_routers(self.config.text_config, kwargs):
            prompt.outputs |= read_routers(self, prompt, attention_mask, outputs.get("router_logits"))
        if heads is not None:
            run_heads(self, text, hidden, heads, prompt.outputs)
        return HiResLmmModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=outputs.hidden_states,
            attentions=outputs.get("attentions"),
            **{CACHE: outputs.get(CACHE)},
            **prompt.outputs,
        )

    def _see(self, given: ImageArguments, text: PromptText, **wanted: Any) -> HiResLmmImageFeatures | None:
        """Encode the images of a call, or take the caller's features."""
        if given.features is not None and given.features.prompt is not None:
            return given.features  # `generate` has compared them
        placeholder = self.get_placeholder_mask(text.ids, text.embeds)
        if given.features is not None:
            read_features(self, given.features, None, placeholder)
            return given.features
        images = read_images(self, given, text.attention_mask, placeholder)
        if images is None:
            return None
        return self.encode_images(images, **wanted)

    def read_images(
        self, view_positions: torch.Tensor, view_spans: torch.Tensor, image_boxes: torch.Tensor | None = None
    ) -> list[ImageGeometry]:
        """The geometry of a batch, one record an image, as `image_geometry` of `forward` wants it."""
        positions, spans, boxes = copy_to_host(view_positions, view_spans, image_boxes)
        return read_geometry(positions.tolist(), spans.tolist(), count_objects(boxes))

    def _idle(self, embeds: torch.Tensor, use_tower: bool) -> tuple[torch.Tensor, dict]:
        """The embeddings plus zero, computed from the visual modules of the stage, so that they train on every rank
        alike; and `aux` of a blank image."""
        zero, aux = self.connector.run_idle(blank_groups(self, embeds.device, use_tower), self.embed_token)
        return embeds + zero.to(embeds), aux


class HiResLmmForConditionalGeneration(HiResLmmPreTrainedModel, HiResLmmGenerationMixin):
    """The model with its language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # what a model has: __init__
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HiResLmmConfig):
        super().__init__(config)
        self.model = HiResLmmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        words = next(name for name, part in self.named_modules() if part is self.get_input_embeddings())
        self._tied_weights_keys = {"lm_head.weight": f"{words}.weight"}
        self._is_stateful = bool(getattr(self.model.language_model, "_is_stateful", False))  # no assistant then
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
        logits, own = scale_logits(self.lm_head(hidden), self.config.text_config), self.model.connector.vocabularies
        for part in own:
            logits = part.score(hidden, logits, self.config.text_config)
        loss = None
        if labels is not None:
            lacking = soften_labels(own, logits, labels, kwargs) if own else 0.0
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs) + lacking
        loss = add_aux_loss(self.config.text_config, loss, outputs)
        loss = add_head_losses(self.model, loss, outputs.aux or {}, labels, kwargs)
        fields = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        if learned is not None:
            return HiResLmmTrainingOutput(loss=loss, cache=fields.pop(CACHE, None), **fields)
        return HiResLmmCausalLMOutputWithPast(loss=loss, logits=logits, **fields)


class HiResLmmForSequenceClassification(HiResLmmPreTrainedModel):
    """The model with a linear head on the last token of each row: rewards (`num_labels=1`) or classes."""

    def __init__(self, config: HiResLmmConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = HiResLmmModel(config)
        self.score = nn.Linear(config.text_config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """A checkpoint of the generating model has another head; this one starts anew, with a warning."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        loading_info.unexpected_keys = {key for key in loading_info.unexpected_keys if not key.startswith("lm_head.")}
        if "score.weight" in loading_info.missing_keys:
            logger.warning(f"The head `score` of {type(self).__name__} is not in the checkpoint and starts anew.")
            loading_info.missing_keys = loading_info.missing_keys - {"score.weight"}

    def get_image_features(self, *args: Any, **kwargs: Any) -> tuple | BaseModelOutputWithPooling:
        """See `HiResLmmModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> tuple | SequenceClassifierOutputWithPast:
        """Run the model and score the last token of each row that is no padding.

        Args:
            labels (`torch.Tensor` of shape `(B,)` or `(B, num_labels)`, *optional*): Classes, or numbers to regress.
            kwargs: See `HiResLmmModel.forward`.

        Returns:
            `SequenceClassifierOutputWithPast` with `logits` `(B, num_labels)`.

        Raises:
            ValueError: If inputs contradict each other.
        """
        kwargs |= {"use_cache": use_cache, "return_dict": True}
        outputs = self.model(input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        last = last_positions(outputs.last_hidden_state, attention_mask)
        logits = self.score(outputs.last_hidden_state[torch.arange(len(last), device=last.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        fields = {name: outputs.get(name) for name in ("hidden_states", "attentions", CACHE) if name in outputs}
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits, **fields)


__all__ = [
    "HiResLmmForConditionalGeneration",
    "HiResLmmForSequenceClassification",
    "HiResLmmModel",
    "HiResLmmPreTrainedModel",
]

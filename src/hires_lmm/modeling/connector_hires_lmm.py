"""The connector: owns all parts between vision tower and language model and runs them in order."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .blocks_hires_lmm import ImageMemory
from .configuration_hires_lmm import HiResLmmConnectorConfig
from .layout_hires_lmm import HiResLmmLayout
from .parts_hires_lmm import BUDGET_ROUTER, budget_consumers, resolve_part
from .views_hires_lmm import KIND_CROP, KIND_GLOBAL, PartContext, Question, ViewFeatures, VisualTokens


class HiResLmmConnector(PreTrainedModel):
    """Turns features of views into visual tokens.

    Args:
        config (`HiResLmmConnectorConfig`): The parts.
        width (`int`): Width of the vision tower.
        text_width (`int`): Width of the language model.
        patch_grid (`tuple[int, int]`): Patch rows and columns of a view.
        vocab_size (`int`): Token ids of the language model, for parts with word embeddings of their own.
    """

    config: HiResLmmConnectorConfig
    config_class = HiResLmmConnectorConfig
    base_model_prefix = "connector"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["HiResLmmQueryFormer", "HiResLmmMlp", "HiResLmmSaPerceiver", "LlamaDecoderLayer"]

    def __init__(
        self,
        config: HiResLmmConnectorConfig,
        width: int,
        text_width: int,
        patch_grid: tuple[int, int],
        vocab_size: int = 0,
    ):
        super().__init__(config)
        chain = config.resolve()
        grids = chain.grids_before(patch_grid)

        def context(position: int, entering: int = width) -> PartContext:
            glob, crop = grids[position]
            return PartContext(config, entering, text_width, glob, crop, patch_grid, vocab_size)

        self.view_ops = nn.ModuleList(op.part(context(i), op.options) for i, op in enumerate(chain.view_ops))
        self.adapter = chain.adapter.part(context(-2), chain.adapter.options)
        self.adapted_grids = grids[-1]
        widths = chain.widths(width, text_width)
        self.layout = HiResLmmLayout(chain.layout, patch_grid, widths[0])
        self.token_ops = nn.ModuleList(
            op.part(context(-1, entering), op.options) for op, entering in zip(chain.token_ops, widths, strict=False)
        )
        self.budget_router = None
        if not budget_consumers(chain):
            router = resolve_part("token_ops", BUDGET_ROUTER, "the budget router")
            self.budget_router = router.part(context(-1), router.options)
        self.reads_question = any(op.part.reads_question(op.options) for op in chain.token_ops)
        self.is_count_static = all(op.part.is_count_static(op.options) for op in chain.token_ops)
        self.makes_tokens = chain.fixed_counts() is not None
        held_back = [
            op.part.reads_question(op.options)
            or not op.part.is_count_static(op.options)
            or op.part.fixed_counts(op.options) is not None
            for op in chain.token_ops
        ]
        self.num_early_ops = held_back.index(True) if True in held_back else len(held_back)
        self.is_done_early = True not in held_back
        self.training_views = "all"  # views that a training stage uses: "all", "global" or "crops"
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialise = None if isinstance(module, PreTrainedModel) else getattr(module, "init_weights", None)
        if initialise is not None:
            initialise()

    def resize_vocabulary(self, rows: int, mean_resizing: bool = True) -> None:
        """Let parts with word embeddings of the language model's vocabulary follow its size.

        Args:
            rows (`int`): Tokens from now on.
            mean_resizing (`bool`): See `PreTrainedModel.resize_token_embeddings`.
        """
        followers: list[Any] = [op for op in self.token_ops if hasattr(op, "resize_vocabulary")]
        for op in followers:
            op.resize_vocabulary(rows, mean_resizing)

    def encode(self, views: ViewFeatures, embed: Callable[[torch.Tensor], torch.Tensor]) -> VisualTokens:
        """Run everything that needs neither the question nor a count that depends on content.

        Args:
            views (`ViewFeatures`): Features of the vision tower.
            embed (`Callable`): Looks up token embeddings of the language model, for marks.

        Returns:
            The tokens of the batch; where all operations could run, exactly `num_tokens` an image.
        """
        views = self.adapt(views)
        tokens = self.layout(views, embed)
        if self.makes_tokens:
            tokens.memory = [ImageMemory() for _ in tokens.lengths]
        else:
            check_counts(tokens)
        for op in self.token_ops[: self.num_early_ops]:
            tokens, _ = op(tokens, None)
        return self._apply_budget(tokens) if self.is_done_early else tokens

    def adapt(self, views: ViewFeatures) -> ViewFeatures:
        """Run view operations and adapter.

        In training, the kinds of views that `training_views` names run in every batch, crops on a zero-weighted view
        if need be, and the other kind runs in none: all processes do the same work.
        """
        num_images = len(views.images)
        idle = self.training and self.training_views != "global" and not views.crop_features.shape[0]
        if idle:
            views = replace(views, crop_features=torch.zeros_like(views.global_features[:1]))
        for op in self.view_ops:
            views = op(views)
        crops = self.adapter(views.crop_features, KIND_CROP)
        global_grid, crop_grid = self.adapted_grids
        if views.global_features.shape[0] or not num_images:
            glob = self.adapter(views.global_features, KIND_GLOBAL)
        else:
            glob = crops.new_zeros(num_images, global_grid[0] * global_grid[1], crops.shape[-1])
        if idle:
            glob, crops = glob + (0.0 * crops).sum(), crops[:0]  # a sum of half precision may overflow
        return replace(views, global_features=glob, crop_features=crops, global_grid=global_grid, crop_grid=crop_grid)

    def run_idle(self, views: ViewFeatures, embed: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Zero, computed from all parts, for training batches without images.

        Args:
            views (`ViewFeatures`): Features of any one image with a global view and a crop.
            embed (`Callable`): Ids to embeddings of the language model.

        Returns:
            A scalar zero that depends on every parameter of the connector.
        """
        tokens = self.layout(self.adapt(views), embed)
        tokens.num_tokens = list(tokens.lengths)
        one = torch.ones(1, 1, dtype=torch.long, device=tokens.features.device)
        question = Question(tokens.features.detach()[None, :1], None, one, one[0] * 0, one[0])
        for op in self.token_ops:
            tokens, question = op(tokens, question)
        scores = (score.float().nan_to_num() for score in tokens.scores.values())
        return sum(((0.0 * score).sum() for score in scores), (0.0 * tokens.features).sum())

    def finish(self, tokens: VisualTokens, question: Question | None) -> VisualTokens:
        """Run the operations that `encode` held back.

        Args:
            tokens (`VisualTokens`): What `encode` returned; not changed.
            question (`Question`, *optional*): The readable text.

        Returns:
            The tokens with `kept` filled.
        """
        if self.is_done_early:
            return tokens
        tokens = replace(tokens)
        for op in self.token_ops[self.num_early_ops :]:
            tokens, question = op(tokens, question)
        return self._apply_budget(tokens)

    def read_blocks(self, question: Question) -> list[list[tuple]]:
        """What a call asks of the operation that makes its own tokens.

        Args:
            question (`Question`): The readable text and the placeholders.

        Returns:
            For each image its blocks of tokens, each with the position behind its placeholders.
        """
        maker: Any = next(op for op in self.token_ops if hasattr(op, "read_blocks"))
        return maker.read_blocks(question)

    def _apply_budget(self, tokens: VisualTokens) -> VisualTokens:
        """Reduce images over their budget where no configured part does so."""
        if self.budget_router is None or tokens.lengths == tokens.num_tokens:
            return tokens
        return self.budget_router(tokens, None)[0]


def check_counts(tokens: VisualTokens) -> None:
    """Compare the tokens of each image with its placeholders.

    Args:
        tokens (`VisualTokens`): Tokens of the batch.

    Raises:
        ValueError: If an image has fewer tokens than placeholders.
    """
    for image, (length, num_tokens) in enumerate(zip(tokens.lengths, tokens.num_tokens, strict=True)):
        if length < num_tokens:
            raise ValueError(
                f"Image {image} gives {length} tokens but view_positions promises {num_tokens}. Model and image "
                "processor disagree: build the processor with HiResLmmProcessor.from_config(model.config, tokenizer)."
            )


def drop(tokens: VisualTokens) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Remove the tokens that are not kept, where placeholders are fewer than tokens.

    Args:
        tokens (`VisualTokens`): Tokens with `kept` filled (or None = all kept).

    Returns:
        Features `(M, D)`, exactly `num_tokens` an image, and `kept` `(M,)` of them (None = all). Tokens of images
        without a budget stay in, kept or not.
    """
    if tokens.kept is None or tokens.lengths == tokens.num_tokens:
        return tokens.features, tokens.kept
    pieces, start = [], 0
    for length, num_tokens in zip(tokens.lengths, tokens.num_tokens, strict=True):
        index = torch.arange(start, start + length, device=tokens.kept.device)
        if num_tokens < length:
            order = torch.argsort((~tokens.kept[start : start + length]).to(torch.int8), stable=True)
            index = index[order[:num_tokens]]
        pieces.append(index)
        start += length
    index = torch.cat(pieces)
    return tokens.features[index], tokens.kept[index]

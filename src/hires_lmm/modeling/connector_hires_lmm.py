"""The connector: owns all parts between vision tower and language model and runs them in order."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .bases_hires_lmm import Needs, PartContext
from .carriers_hires_lmm import Question, ViewFeatures, ViewGroup, VisualTokens
from .configuration_hires_lmm import HiResLmmConnectorConfig
from .geometry_hires_lmm import MAIN_TOWER, Kind
from .layout_hires_lmm import HiResLmmLayout, idle_image, view_limits
from .parts_hires_lmm import BUDGET_ROUTER, resolve_part


Embed = Callable[[torch.Tensor], torch.Tensor]

GLOBAL_TOKENS = "global_tokens"
"""Name of the adapted tokens of the global views `(I, L, D)` in `aux`, in training."""


class HiResLmmConnector(PreTrainedModel):
    """Turns features of views into visual tokens."""

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

    def __init__(self, config: HiResLmmConnectorConfig, context: PartContext):
        super().__init__(config)
        chain = config.resolve().fit(replace(context, config=config))
        self.view_ops = nn.ModuleList(step.build() for step in chain.of("view_ops"))
        self.adapter = chain.of("adapter")[0].build()
        others = [step for step in chain.steps if step.slot.startswith("tower_adapters.")]
        self.tower_adapters = nn.ModuleDict({step.slot.partition(".")[2]: step.build() for step in others})
        self.map_ops = nn.ModuleList(step.build() for step in chain.of("map_ops"))
        self.layout = HiResLmmLayout(chain.layout, chain.grids, chain.elastic, chain.adapted.width)
        steps = chain.of("token_ops")
        self.token_ops = nn.ModuleList(step.build() for step in steps)
        self.layer_ops = nn.ModuleList(step.build() for step in chain.of("layer_ops"))
        self.position_plan = next((step.build() for step in chain.of("position_plan")), None)
        heads = [step for step in chain.steps if step.slot.startswith("heads.")]
        self.heads = nn.ModuleDict({step.slot.partition(".")[2]: step.build() for step in heads})
        self.budget_router = None
        if chain.consumer is None and chain.own is None:
            router = resolve_part("token_ops", BUDGET_ROUTER, "the budget router")
            self.budget_router = router.part(chain.adapted, router.options)
            self.budget_router.traits = router.part.describe(router.options, chain.adapted)
        self.reads_question = any(step.traits.reads_question for step in steps)
        self.is_count_static = all(step.traits.count != "content" for step in steps)
        self.makes_tokens = chain.own is not None
        self.has_turns = chain.own is not None and chain.own.later_tokens is not None
        self.needs = Needs()
        for step in chain.steps:
            self.needs |= step.traits.needs
        waiting = [step.waits for step in steps]
        self.num_early_ops = waiting.index(True) if True in waiting else len(waiting)
        self.is_done_early = True not in waiting
        self.entering = tuple(chain.first.grids)
        self.reads_objects = Kind.OBJECT in chain.grids
        self.patch_grid = chain.first.patch_grid
        self.training_views = "all"  # views that a training stage uses: "all", "global" or "crops"
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialise = None if isinstance(module, PreTrainedModel) else getattr(module, "init_weights", None)
        if initialise is not None:
            initialise()

    def resize_vocabulary(self, rows: int, mean_resizing: bool = True) -> None:
        """Let parts with word embeddings of the language model's vocabulary follow its size."""
        followers: list[Any] = [op for op in self.token_ops if hasattr(op, "resize_vocabulary")]
        for op in followers:
            op.resize_vocabulary(rows, mean_resizing)

    def uses(self, kind: int) -> bool:
        """Whether the views of a kind are used: in training, a stage may leave some out on every process.

        Extra towers see whole images, so they go with the global views.
        """
        if not self.training or self.training_views == "all":
            return True
        return (kind in (Kind.GLOBAL, Kind.DETAIL)) == (self.training_views == "global")

    @property
    def vocabularies(self) -> list[Any]:
        """The parts that have tokens of their own in texts."""
        return [op for op in self.map_ops if op.has_vocabulary]

    @property
    def used(self) -> list[tuple[int, str]]:
        """Kind and tower of the groups that are used."""
        return [key for key in self.entering if self.uses(key[0])]

    def encode(self, views: ViewFeatures, embed: Embed) -> VisualTokens:
        """Run what needs neither the question nor a count by content; `embed` looks up ids of separators."""
        if self.layout.is_elastic:
            images = tuple((image.arranged, image.num_tokens) for image in views.images)
            views = replace(views, limits=view_limits(images, self.layout.spec))
        tokens = self.layout(self.adapt(views), embed)
        if not self.has_turns and not self.makes_tokens:
            check_counts(tokens)
        for op in self.token_ops[: self.num_early_ops]:
            tokens, _ = op(tokens, None)
        return self._apply_budget(tokens) if self.is_done_early else tokens

    def adapt(self, views: ViewFeatures) -> ViewFeatures:
        """Run view operations, adapters and map operations.

        In training every group that the stage uses runs in every batch, on a zero-weighted view if need be: all
        processes do the same work.
        """
        if self.training:
            missing = [key for key in self.used if key not in [group.key for group in views.groups]]
            idle = [_idle_group(views.groups, key) for key in missing]
            views = replace(views, groups=[*views.groups, *idle])
        for op in self.view_ops:
            views = op(views)
        adapters: dict[str, Any] = {MAIN_TOWER: self.adapter, **dict(self.tower_adapters.items())}
        adapted = [adapters[group.tower].adapt(group) for group in views.groups]
        views = replace(views, groups=adapted)
        for op in self.map_ops:
            views = op(views)
        views = _without_idle(views)
        return _with_aux(views, adapted) if self.training else views

    def run_idle(self, groups: list[ViewGroup], embed: Embed) -> tuple[torch.Tensor, dict]:
        """A zero that depends on every parameter, and `aux`, from the blank `groups` of a batch without images."""
        kinds = [group.kind for group in groups if group.tower == MAIN_TOWER]
        tokens = self.layout(self.adapt(ViewFeatures(groups, [idle_image(kinds, self.patch_grid)])), embed)
        tokens.num_tokens = list(tokens.lengths)
        one = torch.ones(1, 1, dtype=torch.long, device=tokens.features.device)
        question: Question | None = Question(tokens.features.detach()[None, :1], None, one, one[0] * 0, one[0])
        for op in self.token_ops:
            tokens, question = op(tokens, question)
        scores = (score.float().nan_to_num() for score in tokens.scores.values())
        return sum(((0.0 * score).sum() for score in scores), (0.0 * tokens.features).sum()), tokens.aux

    def finish(self, tokens: VisualTokens, question: Question | None) -> tuple[VisualTokens, Question | None]:
        """Run the operations that `encode` held back: tokens with `kept` filled, and the question afterwards."""
        if self.is_done_early:
            return tokens, question
        tokens = replace(tokens)
        for op in self.token_ops[self.num_early_ops :]:
            tokens, question = op(tokens, question)
        return self._apply_budget(tokens), question

    def _apply_budget(self, tokens: VisualTokens) -> VisualTokens:
        """Reduce images over their budget where no configured part does so; in training, say what is kept."""
        if self.budget_router is not None and tokens.lengths != tokens.num_tokens:
            tokens = self.budget_router(tokens, None)[0]
        if self.training and tokens.kept is not None:
            tokens = replace(tokens, aux={**tokens.aux, "kept": tokens.kept})
        return tokens


def _idle_group(groups: list[ViewGroup], key: tuple[int, str]) -> ViewGroup:
    """A blank view of a kind that the batch lacks, shaped like those of the same tower."""
    like = next(group for group in groups if group.tower == key[1])
    return replace(
        like,
        kind=key[0],
        features=torch.zeros_like(like.features[:1]),
        rows=(),
        scores={name: torch.zeros_like(score[:1]) for name, score in like.scores.items()},
        hidden={layer: torch.zeros_like(states[:1]) for layer, states in like.hidden.items()},
    )


def _without_idle(views: ViewFeatures) -> ViewFeatures:
    """Take idle views away; what was computed on them joins a group of the batch as zero."""
    idle = [0.0 * group.features[len(group.rows) :] for group in views.groups]  # a sum of half precision may overflow
    groups = [
        replace(
            group,
            features=group.features[: len(group.rows)],
            scores={name: score[: len(group.rows)] for name, score in group.scores.items()},
            hidden={},
        )
        for group in views.groups
    ]
    zeros = [part.sum() for part in idle if part.numel()]
    if zeros:
        at = next(number for number, group in enumerate(groups) if group.rows)
        groups[at] = replace(groups[at], features=groups[at].features + torch.stack(zeros).sum())
    return replace(views, groups=groups)


def _with_aux(views: ViewFeatures, adapted: list[ViewGroup]) -> ViewFeatures:
    """What losses and logs read: tokens of the global views, and what the adapters said, over all groups."""
    names = dict.fromkeys(name for group in adapted for name in group.aux)
    said = {name: [group.aux[name].flatten(0, -2) for group in adapted if name in group.aux] for name in names}
    glob = views.group("global")
    shown = {} if glob is None else {GLOBAL_TOKENS: glob.features}
    return replace(views, aux={**views.aux, **shown, **{name: torch.cat(parts) for name, parts in said.items()}})


def check_counts(tokens: VisualTokens) -> None:
    """Refuse images that have fewer tokens than placeholders."""
    for image, (length, num_tokens) in enumerate(zip(tokens.lengths, tokens.num_tokens, strict=True)):
        if length < num_tokens:
            raise ValueError(
                f"Image {image} gives {length} tokens but view_positions promises {num_tokens}. Model and image "
                "processor disagree: build the processor with HiResLmmProcessor.from_config(model.config, tokenizer)."
            )

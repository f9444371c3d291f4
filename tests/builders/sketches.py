"""Mechanisms that come next, sketched: each is one class, thrown away when it is built in earnest."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from hires_lmm.modeling.bases_hires_lmm import HiResLmmTokenOp, HiResLmmViewOp, Needs, Traits
from hires_lmm.modeling.geometry_hires_lmm import MAIN_TOWER, Grid, Kind


FINE = (int(Kind.DETAIL), "fine")


class Gate(HiResLmmViewOp):
    """A second tower's mean over an image, gated into each token of the global view."""

    def __init__(self, context, options):
        super().__init__(context, options)
        self.gate = nn.Linear(context.text_width, context.text_width)

    @classmethod
    def describe(cls, options, context):
        if not context.grids.keys() >= {FINE, (int(Kind.GLOBAL), MAIN_TOWER)}:
            raise ValueError("gate joins the views of the tower 'fine' with global ones; name both in layout.order.")
        return Traits({key: grid for key, grid in context.grids.items() if key != FINE}, context.width)

    def forward(self, views):
        fine, main = views.group("detail", "fine"), views.group("global")
        mean = fine.features.mean(dim=1, keepdim=True)
        mixed = replace(main, features=main.features + torch.tanh(self.gate(mean)) * mean)
        return replace(views, groups=[mixed if g is main else g for g in views.groups if g is not fine])


class Rewrite(HiResLmmTokenOp):
    """Writes into the question: each of its tokens learns the mean of the visual tokens."""

    @classmethod
    def describe(cls, options, context):
        return Traits(context.grids, context.width, reads_question=True, writes_question=True)

    def forward(self, tokens, question):
        means = torch.stack([part.mean(dim=0) for part in tokens.per_image(tokens.features)])
        embeds = question.embeds.clone()
        for mean, mask, row in zip(means, question.image_mask(), question.image_row.tolist(), strict=True):
            embeds[row] += mask[:, None] * mean
        return tokens, replace(question, embeds=embeds)


class FirstTokens(HiResLmmViewOp):
    """Nested queries: a budget keeps the first ones of every view."""

    @dataclass(frozen=True)
    class Options:
        on: str = "all"

    @classmethod
    def output_grid(cls, options, grid):
        return Grid(1, grid.rows * grid.cols, None, whole=True)

    @classmethod
    def describe(cls, options, context):
        return replace(super().describe(options, context), budget_on=options.on)

    def forward_group(self, features, grid):
        return features


class ByAttention(HiResLmmTokenOp):
    """Keeps what the tower's class token attends to most."""

    @classmethod
    def describe(cls, options, context):
        return Traits(context.grids, context.width, budget_on="all", needs=Needs(scores=("cls_logits",)))

    def forward(self, tokens, question):
        kept = torch.ones(len(tokens.features), dtype=torch.bool)
        scores = tokens.scores["cls_logits"]
        for image, index in enumerate(tokens.rows("all")):
            surplus = tokens.lengths[image] - tokens.num_tokens[image]
            kept[index[scores[index].argsort()[:surplus]]] = False
        return replace(tokens, kept=kept, score="cls_logits"), question


class Ends(HiResLmmTokenOp):
    """Two tokens of its own an image, whatever its size: the least and the greatest of each channel."""

    count: ClassVar[int] = 2

    @classmethod
    def describe(cls, options, context):
        return Traits(context.grids, context.width, count="own", own_tokens=cls.count)

    def forward(self, tokens, question):
        parts = tokens.per_image(tokens.features)
        features = torch.cat([torch.stack([part.amin(dim=0), part.amax(dim=0)]) for part in parts])
        none = torch.full((len(features),), -1)
        lengths = [self.count] * len(parts)
        return (
            replace(
                tokens, features=features, lengths=lengths, view=none, cell=none[:, None].expand(-1, 2), kind=none
            ),
            question,
        )


SKETCHES = {
    "gate": ("map_ops", Gate),
    "rewrite": ("token_ops", Rewrite),
    "first": ("view_ops", FirstTokens),
    "by_attention": ("token_ops", ByAttention),
    "ends": ("token_ops", Ends),
}
"""Slot and class by name."""

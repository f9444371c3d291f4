"""Mechanisms that come next, sketched: each is one class or function, thrown away when it is built in earnest."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, normalize

from hires_lmm.modeling.bases_hires_lmm import (
    HiResLmmHead,
    HiResLmmLayerOp,
    HiResLmmPositionPlan,
    HiResLmmTokenOp,
    HiResLmmViewOp,
    Needs,
    Traits,
)
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


class Commander(HiResLmmTokenOp):
    """The global view says how many tokens each crop keeps, and helps to choose them (GlobalCom2)."""

    temperature: ClassVar[float] = 10.0

    @classmethod
    def describe(cls, options, context):
        return Traits(context.grids, context.width, budget_on=["global", "crops"], needs=Needs(scores=("cls_logits",)))

    def forward(self, tokens, question):
        kept = torch.ones(len(tokens.features), dtype=torch.bool)
        for number, (whole, crops) in enumerate(zip(tokens.rows("global"), tokens.rows("crops"), strict=True)):
            surplus = tokens.lengths[number] - tokens.num_tokens[number]
            if surplus:
                kept[torch.cat([whole, crops])] = False
                kept[self.choose(tokens, tokens.images[number], whole, crops, surplus)] = True
        return replace(tokens, kept=kept, score="cls_logits"), question

    def choose(self, tokens, image, whole, crops, surplus):
        """Indices of the tokens of one image that stay."""
        scores, total = tokens.scores["cls_logits"], len(whole) + len(crops)
        ratio = (total - surplus) / total
        stay = [whole[scores[whole].argsort(descending=True)[: max(int(ratio * len(whole)), 1)]]]
        if not len(crops):
            return stay[0] if surplus + len(stay[0]) >= total else whole[scores[whole].argsort()[surplus:]]
        rows, cols = image.grid(Kind.CROP)
        size = tokens.grids[int(Kind.GLOBAL)].size
        thumbnail = scores[whole].view(1, 1, *size)
        sums = adaptive_avg_pool2d(thumbnail, (rows, cols)).flatten() * (size[0] // rows * size[1] // cols)
        wide = interpolate(thumbnail, (rows * size[0], cols * size[1]), mode="bilinear")[0, 0]
        own = [crops[tokens.view[crops] == row] for row in image.rows(Kind.CROP)]
        wanted = (sums / self.temperature).softmax(dim=0) + 1 - 1 / len(own)
        quotas = share(total - surplus - len(stay[0]), wanted.detach().tolist(), [len(index) for index in own])
        for place, (index, quota) in enumerate(zip(own, quotas, strict=True)):
            cell = tokens.cell[index] + torch.tensor([place // cols * size[0], place % cols * size[1]])
            both = normalize(scores[index], dim=0) + normalize(wide[cell[:, 0], cell[:, 1]], dim=0)
            stay.append(index[both.argsort(descending=True)[:quota]])
        return torch.cat(stay)


def share(total: int, weights: list[float], sizes: list[int]) -> list[int]:
    """Divide a number by weights times sizes, none above its size; one after another to who lacks most."""
    given = [0] * len(sizes)
    for _ in range(total):
        open_ones = [n for n in range(len(sizes)) if given[n] < sizes[n]]
        given[max(open_ones, key=lambda n: (weights[n] * sizes[n] / sum(sizes) * total - given[n], -n))] += 1
    return given


class Blend(HiResLmmLayerOp):
    """Adds to the hidden states behind a layer what a linear map makes of them."""

    def __init__(self, context, options):
        super().__init__(context, options)
        self.linear = nn.Linear(context.width, context.width)

    def forward(self, layer, hidden, call):
        return hidden + 0.1 * self.linear(hidden), None


class HalfSteps(HiResLmmPositionPlan):
    """Visual tokens stand half as far apart as text."""

    def forward(self, tokens):
        steps = tokens.real * torch.where(tokens.image >= 0, 0.5, 1.0)
        return steps.cumsum(dim=1) - steps, None


class Score(HiResLmmHead):
    """One number at a token."""

    def __init__(self, context, options):
        super().__init__(context, options)
        self.linear = nn.Linear(context.width, 1)

    def forward(self, hidden):
        return self.linear(hidden)[:, 0]

    def loss(self, output, labels):
        return (output - labels).pow(2).mean()


SKETCHES = {
    "commander": ("token_ops", Commander),
    "blend": ("layer_ops", Blend),
    "half_steps": ("position_plan", HalfSteps),
    "score": ("heads", Score),
    "gate": ("map_ops", Gate),
    "rewrite": ("token_ops", Rewrite),
    "first": ("view_ops", FirstTokens),
    "by_attention": ("token_ops", ByAttention),
    "ends": ("token_ops", Ends),
}
"""Slot and class by name."""

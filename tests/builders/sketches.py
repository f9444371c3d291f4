"""Mechanisms that come next, sketched: each is one class or function, thrown away when it is built in earnest."""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn

from hires_lmm.modeling.bases_hires_lmm import (
    HiResLmmHead,
    HiResLmmLayerOp,
    HiResLmmPositionPlan,
    HiResLmmTokenOp,
    HiResLmmViewOp,
    Traits,
)
from hires_lmm.modeling.geometry_hires_lmm import MAIN_TOWER, Kind


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
    "ends": ("token_ops", Ends),
    "blend": ("layer_ops", Blend),
    "half_steps": ("position_plan", HalfSteps),
    "score": ("heads", Score),
    "gate": ("map_ops", Gate),
}
"""Slot and class by name."""

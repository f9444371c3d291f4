"""Mechanisms that come next, sketched: each is one class or function, thrown away when it is built in earnest."""

import math
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, scaled_dot_product_attention

from hires_lmm.modeling.bases_hires_lmm import (
    HiResLmmHead,
    HiResLmmLayerOp,
    HiResLmmPositionPlan,
    HiResLmmViewOp,
    Traits,
)
from hires_lmm.modeling.geometry_hires_lmm import KINDS, MAIN_TOWER, Grid, Kind
from hires_lmm.processing.planners_hires_lmm import BLACK, Canvas, Planner, PlannerLimits, View, ViewPlan, assemble


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


class TwoPerspectives(HiResLmmViewOp):
    """Contiguous and strided views of an image read one another and join its global view (INF-LLaVA)."""

    @dataclass(frozen=True)
    class Options:
        num_heads: int = 2

    def __init__(self, context, options):
        super().__init__(context, options)
        width = context.width
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm, self.norm_fused = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ffn_crop, self.ffn_stride = (
            nn.Sequential(nn.Linear(width, max(1, width // 16)), nn.GELU(), nn.Linear(max(1, width // 16), width // 2))
            for _ in range(2)
        )

    @classmethod
    def describe(cls, options, context):
        if {(KINDS[name], MAIN_TOWER) for name in ("global", "crops", "strided")} > context.grids.keys():
            raise ValueError("two_perspectives needs global views, crops and strided views; name all in layout.order.")
        joined = (int(Kind.CROP), int(Kind.STRIDED))
        return Traits({key: grid for key, grid in context.grids.items() if key[0] not in joined}, context.width)

    def attend(self, query, keys):
        """Views `(n, L, C)` read views, in place of a residual the query itself."""
        heads = [
            layer(states).unflatten(-1, (self.options.num_heads, -1)).transpose(1, 2)
            for layer, states in ((self.query, query), (self.key, keys), (self.value, keys))
        ]
        return self.norm(self.out(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)) + query)

    def fuse(self, plain, crops, strided, shape, grid):
        """`(L, C)` of the global view and `(n, L, C)` of the others -> `(L, C)`."""
        (rows, cols), (high, wide) = shape, grid

        def from_tiles(views):
            return views.view(rows, cols, high, wide, -1).transpose(1, 2).reshape(rows * high, cols * wide, -1)

        def from_phases(views):
            return views.view(rows, cols, high, wide, -1).permute(2, 0, 3, 1, 4).reshape(rows * high, cols * wide, -1)

        tiles = from_phases(strided).view(rows, high, cols, wide, -1).transpose(1, 2).reshape(strided.shape)
        phases = from_tiles(crops).view(high, rows, wide, cols, -1).permute(1, 3, 0, 2, 4).reshape(crops.shape)
        by_global, by_local = from_tiles(self.attend(tiles, crops)), from_phases(self.attend(phases, strided))
        mixed = torch.cat([self.ffn_crop(by_local), self.ffn_stride(by_global)], dim=-1)
        fused = self.norm_fused(mixed + by_global + by_local).permute(2, 0, 1)[None]
        return (plain + interpolate(fused, grid, mode="bilinear")[0].flatten(1).T) / 2

    def forward(self, views):
        whole, crops, strided = (views.group(name) for name in ("global", "crops", "strided"))
        rest = [group for group in views.groups if group not in (whole, crops, strided)]
        found, start = [], 0
        for number, image in enumerate(views.images):
            rows, cols = image.grid(Kind.CROP)
            end, plain = start + rows * cols, whole.features[number]
            if rows:
                own = crops.features[start:end], strided.features[start:end]
                plain = self.fuse(plain, *own, (rows, cols), whole.grid)
            found, start = [*found, plain], end
        if not start and crops is not None:  # views of training that stand for missing ones
            found[0] = found[0] + 0 * self.fuse(found[0], crops.features, strided.features, (1, 1), whole.grid)
        return replace(views, groups=[replace(whole, features=torch.stack(found)), *rest])


class Cells(HiResLmmViewOp):
    """As many tokens of every view, whatever its size: means over equal cells of the patches that it has."""

    @dataclass(frozen=True)
    class Options:
        on: str | list = "all"
        side: int = 2

    @classmethod
    def output_grid(cls, options, grid):
        return Grid(options.side, options.side, None, whole=True)

    def forward(self, views):
        def pool(group):
            planes = group.features.unflatten(1, group.grid).permute(0, 3, 1, 2)
            sizes, side = views.patches(group), self.options.side
            means = [
                adaptive_avg_pool2d(plane[:, :high, :wide], side).flatten(1).T
                for plane, (high, wide) in zip(planes, sizes, strict=True)
            ]
            return replace(group, features=torch.stack(means), grid=(side, side))

        return views.map(self.options.on, pool)


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


@dataclass(frozen=True)
class DualLimits(PlannerLimits):
    """Options of `dual`: rows and columns of the views of each perspective."""

    n: int = 2


def plan_dual(height: int, width: int, limits: DualLimits) -> ViewPlan:
    """The picture squeezed to n x n views, cut into tiles and into every n-th pixel, and whole (INF-LLaVA)."""
    side = limits.n * limits.view_size
    plan = assemble((height, width), limits, Canvas((limits.n, limits.n), (side, side), (0, 0)), "squeeze")
    strided = [replace(view, kind=int(Kind.STRIDED), box=plan.views[0].box) for view in plan.views[1:]]
    return replace(plan, views=(*plan.views, *strided))


def plan_uhd(height: int, width: int, limits: PlannerLimits) -> ViewPlan:
    """Slices of one size of their own, about as large as a view, then the whole picture (LLaVA-UHD)."""
    side, patch, most = limits.view_size, limits.patch_size, limits.max_crops or 7

    def fit(high: int, wide: int) -> tuple[int, int]:
        rows = int(side / math.sqrt(wide / high))
        return max(rows // patch, 1), max(int(rows * (wide / high)) // patch, 1)

    number = min(math.ceil(height * width / side**2), most)
    grids = [(n // c, c) for n in (number - 1, number, number + 1) for c in range(1, n + 1) if n % c == 0]
    fitting = [grid for grid in grids if 1 < grid[0] * grid[1] <= most]
    rows, cols = min(fitting, key=lambda g: abs(math.log(width / height) - math.log(g[1] / g[0])))
    rows, cols = (rows, cols) if number > 1 else (0, 0)
    small = fit(max(height // rows, 1), max(width // cols, 1)) if rows else (0, 0)
    canvas, whole = (rows * small[0] * patch, cols * small[1] * patch), fit(height, width)
    views = []
    for row, col in product(range(rows), range(cols)):
        box = (256 * row * height // rows, 256 * col * width // cols)
        end = (256 * (row + 1) * height // rows, 256 * (col + 1) * width // cols)
        views.append(View(int(Kind.CROP), rows, cols, row, col, (*box, *end), (0, small[0], 0, small[1]), small))
    full = (0, 0, 256 * height, 256 * width)
    views.append(View(int(Kind.GLOBAL), rows, cols, 0, 0, full, (0, whole[0], 0, whole[1]), whole))
    size = (whole[0] * patch, whole[1] * patch)
    return ViewPlan(
        (height, width), side, patch, tuple(views), canvas, canvas, (0, 0), BLACK, size, (0, 0), BLACK, (None, None)
    )


SKETCHED_PLANNERS = {"dual": Planner(plan_dual, DualLimits), "uhd": Planner(plan_uhd)}

SKETCHES = {
    "two_perspectives": ("view_ops", TwoPerspectives),
    "cells": ("view_ops", Cells),
    "blend": ("layer_ops", Blend),
    "half_steps": ("position_plan", HalfSteps),
    "score": ("heads", Score),
    "gate": ("map_ops", Gate),
}
"""Slot and class by name."""

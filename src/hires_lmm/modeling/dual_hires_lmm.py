"""Contiguous and strided views of an image read one another and join its global view (INF-LLaVA)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from .attention_hires_lmm import HiResLmmCrossAttention
from .bases_hires_lmm import HiResLmmViewOp, PartContext, Traits
from .carriers_hires_lmm import ViewFeatures
from .geometry_hires_lmm import KINDS, MAIN_TOWER, Kind


class HiResLmmDualEnhancement(HiResLmmViewOp):
    """The maps of both perspectives read one another; their mix, at the size of the global view, is averaged with it.

    Crops laid side by side make one map of the image, strided views interleaved another of the same size. Cut
    contiguously, the second reads the first; cut by strides, the first reads the second, with the same weights.

    Source: INF-LLaVA, huggingface.co/papers/2407.16198, and its released code (WeihuangLin/INF-LLaVA at ea3e986), of
    3 x 3 views. Ours: any grid, another one for each image; an image without crops keeps its global view.
    """

    needs_equal_views = True

    @strict
    @dataclass
    class Options:
        """Options of `dual_enhancement`.

        Args:
            num_heads (`int`): Heads of the attention.
        """

        num_heads: int = 8

        def __post_init__(self) -> None:
            if self.num_heads < 1:
                raise ValueError(f"num_heads={self.num_heads} must be at least 1.")

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        width, hidden = context.width, max(context.width // 16, 1)
        self.attention = HiResLmmCrossAttention(context.config, width, options.num_heads)
        self.attention_norm, self.output_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.local_mlp, self.global_mlp = (
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, half))
            for half in (width // 2, width - width // 2)
        )

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """Crops and strided views leave."""
        names = ("global", "crops", "strided")
        keys = [(KINDS[name], MAIN_TOWER) for name in names]
        missing = [name for name, key in zip(names, keys, strict=True) if key not in context.grids]
        if missing:
            raise ValueError(
                f"dual_enhancement reads global views, crops and strided views, but no {missing[0]} reach it; name "
                "all three in layout.order, and use the planner dual."
            )
        sizes = [context.grids[key].size for key in keys]
        if len(set(sizes[1:])) > 1:
            raise ValueError(f"dual_enhancement needs crops and strided views of one token grid, not {sizes[1:]}.")
        return Traits({key: grid for key, grid in context.grids.items() if key not in keys[1:]}, context.width)

    def forward(self, views: ViewFeatures) -> ViewFeatures:
        """Mix crops and strided views into the global views, whose shape stays."""
        whole, crops, strided = (views.group(name) for name in ("global", "crops", "strided"))
        shapes = [image.grid(Kind.CROP) for image in views.images]
        if whole is None or len(whole.rows) != len(shapes):
            raise ValueError(
                "dual_enhancement needs the global view of every image; make the batch with views='all' or 'global'."
            )
        for number, image in enumerate(views.images):
            here = [len(image.rows(kind)) for kind in (Kind.CROP, Kind.STRIDED)]
            if here[0] != here[1]:
                raise ValueError(
                    f"Image {number} has {here[0]} crops and {here[1]} strided views; dual_enhancement needs as many "
                    "of both: cut it by the planner dual."
                )
        if crops is None or strided is None:
            return views
        shown = [shape for shape in shapes if shape[0]]
        idle = [(1, 1)] * (len(crops.features) - len(crops.rows))
        maps = self.mix(crops.features, strided.features, [*shown, *idle], crops.grid)
        resized = [
            nn.functional.interpolate(own.permute(2, 0, 1)[None], whole.grid, mode="bilinear", align_corners=False)
            for own in maps
        ]
        details, plain = iter(resized), whole.features
        mixed = [
            (own + next(details)[0].flatten(1).T) / 2 if shape[0] else own
            for own, shape in zip(plain, shapes, strict=False)
        ]
        features = torch.stack([*mixed, *plain[len(shapes) :]])
        for idle_map in details:  # of views that stand for missing ones in training
            features = features + 0.0 * idle_map.sum()
        rest = [group for group in views.groups if all(group is not own for own in (whole, crops, strided))]
        groups = [replace(whole, features=features), *rest]
        return replace(views, groups=groups)

    def mix(
        self, crops: torch.Tensor, strided: torch.Tensor, shapes: list[tuple[int, int]], grid: tuple[int, int]
    ) -> list[torch.Tensor]:
        """Views `(K, L, C)`, all of one token grid, of images with grids `shapes` -> one map `(h, w, C)` an image."""
        counts = [rows * cols for rows, cols in shapes]
        pairs = list(zip(crops.split(counts), strided.split(counts), shapes, strict=True))
        tiles = torch.cat([to_tiles(from_phases(own, shape, grid), grid) for _, own, shape in pairs])
        phases = torch.cat([to_phases(from_tiles(own, shape, grid), shape) for own, _, shape in pairs])
        by_global, by_local = self.read(tiles, crops).split(counts), self.read(phases, strided).split(counts)
        wide = torch.cat([from_tiles(o, s, grid).flatten(0, 1) for o, s in zip(by_global, shapes, strict=True)])
        local = torch.cat([from_phases(o, s, grid).flatten(0, 1) for o, s in zip(by_local, shapes, strict=True)])
        mixed = torch.cat([self.local_mlp(local), self.global_mlp(wide)], dim=-1) + wide + local
        areas = [count * grid[0] * grid[1] for count in counts]
        maps = self.output_norm(mixed).split(areas)
        return [own.view(rows * grid[0], cols * grid[1], -1) for own, (rows, cols) in zip(maps, shapes, strict=True)]

    def read(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Each view `(K, L, C)` reads the one of the other perspective at its place."""
        return self.attention_norm(self.attention(queries, keys, keys) + queries)


def from_tiles(views: torch.Tensor, shape: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """Views `(n, L, C)` side by side: `(h, w, C)`."""
    tokens = views.unflatten(1, grid).unflatten(0, shape).transpose(1, 2)
    return tokens.flatten(0, 1).flatten(1, 2)


def from_phases(views: torch.Tensor, shape: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """Views `(n, L, C)` interleaved: `(h, w, C)`."""
    tokens = views.unflatten(1, grid).unflatten(0, shape).permute(2, 0, 3, 1, 4)
    return tokens.flatten(0, 1).flatten(1, 2)


def to_tiles(plane: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A map `(h, w, C)` cut contiguously into views of a token grid: `(n, L, C)`."""
    return plane.unflatten(1, (-1, grid[1])).unflatten(0, (-1, grid[0])).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def to_phases(plane: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """A map `(h, w, C)` cut by strides into rows and columns of views: `(n, L, C)`."""
    phases = plane.unflatten(1, (-1, shape[1])).unflatten(0, (-1, shape[0])).permute(1, 3, 0, 2, 4)
    return phases.flatten(2, 3).flatten(0, 1)

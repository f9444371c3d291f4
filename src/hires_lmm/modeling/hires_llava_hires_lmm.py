"""Pooled tokens that read their own view, and layers of the tower that see across crops (HiRes-LLaVA, our reading)."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, pad
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_hires_lmm import HiResLmmCrossAttention, eager_attention_forward
from .bases_hires_lmm import HiResLmmLayerOp, HiResLmmViewOp, PartContext, TowerCall, follow_grid
from .carriers_hires_lmm import ImageGeometry, ViewFeatures, ViewGroup, constant_index
from .dual_hires_lmm import from_tiles, to_tiles
from .geometry_hires_lmm import Grid, Kind, kinds_on


class HiResLmmSelfMiningSampler(HiResLmmViewOp):
    """Each view is pooled to a small grid, and each pooled token reads all patches of its view.

    Args:
        context (`PartContext`): Widths and grids around the part.
        options (`Options`): Where, how many tokens, heads.

    Source: HiRes-LLaVA, huggingface.co/papers/2407.08706, which has no public code. Ours: layer norms, biases, the
    residual of the pooled token, no positions in the attention.
    """

    @strict
    @dataclass
    class Options:
        """Options of `self_mining_sampler`.

        Args:
            on (`str` or `list[str]`): Kinds of views that are compressed.
            pool (`list[int]`): Rows and columns of tokens of a view.
            num_heads (`int`): Heads of the attention.
            residual (`bool`): Whether the pooled token is added to what it read.
        """

        on: str | list = "all"
        pool: list | tuple = (12, 12)
        num_heads: int = 8
        residual: bool = True

        def __post_init__(self) -> None:
            kinds_on(self.on)
            if len(self.pool) != 2 or any(type(side) is not int or side < 1 for side in self.pool):
                raise ValueError(f"pool={self.pool!r} must be rows and columns of tokens, two integers of at least 1.")
            if self.num_heads < 1:
                raise ValueError(f"num_heads={self.num_heads} must be at least 1.")

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        self.query_norm, self.key_norm = nn.LayerNorm(context.width), nn.LayerNorm(context.width)
        self.attention = HiResLmmCrossAttention(context.config, context.width, options.num_heads)

    @classmethod
    def output_grid(cls, options: Any, grid: Grid) -> Grid:
        """Token grid of a view afterwards."""
        return replace(grid, rows=options.pool[0], cols=options.pool[1], stride=None)

    def forward(self, views: ViewFeatures) -> ViewFeatures:
        """Compress the views that `on` names, each by itself: `(V, L, C)` -> `(V, rows * cols, C)`."""
        return views.map(self.options.on, lambda group: self.sample(group, self.sizes(views, group)))

    def sample(self, group: ViewGroup, sizes: list[tuple[int, int]]) -> ViewGroup:
        """Compress a group whose views have so many rows and columns of patches, each padded to the grid."""
        grid = self.output_grid(self.options, Grid(*group.grid))
        planes = group.features.unflatten(1, group.grid)
        shown = [plane[:high, :wide] for plane, (high, wide) in zip(planes, sizes, strict=True)]
        if set(sizes) == {tuple(group.grid)}:
            pooled = adaptive_avg_pool2d(planes.permute(0, 3, 1, 2), grid.size).flatten(2).transpose(1, 2)
            keys = self.key_norm(group.features)
            read = self.attention(self.query_norm(pooled), keys, keys)
        else:
            pooled = torch.stack([adaptive_avg_pool2d(own.permute(2, 0, 1), grid.size).flatten(1).T for own in shown])
            keys = self.key_norm(torch.cat([own.flatten(0, 1) for own in shown]))
            counts = [high * wide for high, wide in sizes]
            read = self.attention.read_ragged(self.query_norm(pooled), keys, keys, counts)
        features = read + pooled if self.options.residual else read
        return replace(group, features=features, grid=grid.size, scores=follow_grid(group, grid, sizes))


class HiResLmmSliceRestore(HiResLmmLayerOp):
    """Behind layers of the tower, the crops of an image are laid side by side, and each patch learns from its
    neighbours, also across the cuts, and from the whole image at a lower resolution. Other views, and tokens before
    the patches, stay as they are. Both sums start at zero, so a new part changes nothing.

    All layers that it runs behind share its weights; for weights of their own, name the part once a layer.

    Args:
        context (`PartContext`): Width of the tower.
        options (`Options`): Which layers, how coarse, heads.

    Source: HiRes-LLaVA, huggingface.co/papers/2407.08706, which has no public code. Ours: the layers, norm, biases,
    gates; its branch of low resolution is left out.
    """

    @strict
    @dataclass
    class Options(HiResLmmLayerOp.Options):
        """Options of `slice_restore`, beside `layers`.

        Args:
            of (`str`): `"vision_tower"`.
            down_sampling (`int`): Patches a side that make one token of the whole image.
            num_heads (`int`): Heads of the attention among those.
        """

        of: Literal["vision_tower"] = "vision_tower"
        down_sampling: int = 2
        num_heads: int = 8

        def __post_init__(self) -> None:
            for name in ("down_sampling", "num_heads"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        width = context.width
        self.local_conv = nn.Conv2d(width, width, kernel_size=3, groups=width)
        self.global_norm = nn.LayerNorm(width)
        self.attention = HiResLmmCrossAttention(context.config, width, options.num_heads)
        self.local_gate, self.global_gate = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))

    def init_weights(self) -> None:
        """Close the gates."""
        init.zeros_(self.local_gate)
        init.zeros_(self.global_gate)

    def forward(self, layer: int, hidden: torch.Tensor, call: TowerCall) -> tuple[torch.Tensor, None]:
        """Restore what the cuts between crops took.

        Args:
            layer (`int`): Not read.
            hidden (`torch.Tensor` of shape `(V, prefix + L, C)`): States of whole images.
            call (`TowerCall`): Their geometry.

        Raises:
            ValueError: If the crops of an image do not fill its grid.
        """
        cut = [image for image in call.images if image.rows(Kind.CROP)]
        rows, shapes = [row for image in cut for row in image.rows(Kind.CROP)], [_full_grid(image) for image in cut]
        if not rows and not call.training:
            return hidden, None
        index = constant_index(tuple(rows or [0]), str(hidden.device))
        before, patches = hidden[:, : call.prefix], hidden[:, call.prefix :]
        change = self.restore(patches[index], shapes or [(1, 1)], call.grid)
        if not rows:  # in training, where other processes may have crops
            return hidden + 0.0 * change.sum(), None
        return torch.cat([before, patches.index_add(0, index, change.to(patches.dtype))], dim=1), None

    def restore(self, crops: torch.Tensor, shapes: list[tuple[int, int]], grid: tuple[int, int]) -> torch.Tensor:
        """What is added to the crops `(K, L, C)` of images with grids `shapes`; layers run once for all of them."""
        counts = [rows * cols for rows, cols in shapes]
        maps = [from_tiles(own, shape, grid) for own, shape in zip(crops.split(counts), shapes, strict=True)]
        return self.local_gate * self.look_around(maps, grid) + self.global_gate * self.look_far(maps, grid)

    def look_around(self, maps: list[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
        """A convolution over maps `(h, w, C)`, as crops `(K, L, C)`: each is cut with a border of its neighbours."""
        high, wide = grid
        crops = []
        for plane in maps:
            around = pad(plane.permute(2, 0, 1), (1, 1, 1, 1))
            cut = around.unfold(1, high + 2, high).unfold(2, wide + 2, wide)
            crops.append(cut.permute(1, 2, 0, 3, 4).flatten(0, 1))
        return self.local_conv(torch.cat(crops)).flatten(2).transpose(1, 2)

    def look_far(self, maps: list[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
        """Attention among the patches of maps `(h, w, C)` at a lower resolution, as crops `(K, L, C)`."""
        step = self.options.down_sampling
        sizes = [(-(-plane.shape[0] // step), -(-plane.shape[1] // step)) for plane in maps]
        pairs = zip(maps, sizes, strict=True)
        pooled = [adaptive_avg_pool2d(plane.permute(2, 0, 1), size).flatten(1).T for plane, size in pairs]
        read = self.exchange(self.global_norm(torch.cat(pooled)), [len(own) for own in pooled])
        crops = []
        for plane, size, own in zip(maps, sizes, read, strict=True):
            small = own.T.unflatten(1, size)[None]
            large = interpolate(small, plane.shape[:2], mode="bilinear", align_corners=False)
            crops.append(to_tiles(large[0].permute(1, 2, 0), grid))
        return torch.cat(crops)

    def exchange(self, tokens: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, ...]:
        """Let the `counts` tokens of each image `(T, C)` read one another."""
        layer = self.attention
        name = layer.config._attn_implementation
        function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        options = {"dropout": 0.0, "scaling": layer.scaling, "is_causal": False}
        states = [
            projection(tokens).unflatten(-1, (layer.num_heads, -1)).split(counts)
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        ]
        read = [
            function(layer, *(each[None].transpose(1, 2) for each in own), None, **options)[0][0]
            for own in zip(*states, strict=True)
        ]
        return layer.o_proj(torch.cat(read).flatten(1)).split(counts)


def _full_grid(image: ImageGeometry) -> tuple[int, int]:
    """Rows and columns of an image's crops, which fill them."""
    (rows, cols), number = image.grid(Kind.CROP), len(image.rows(Kind.CROP))
    if number != rows * cols:
        raise ValueError(
            f"slice_restore lays crops side by side, but an image has {number} of {rows} x {cols}; use a planner that "
            "gives them all."
        )
    return rows, cols

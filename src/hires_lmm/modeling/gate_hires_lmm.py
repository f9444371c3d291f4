"""A second tower gated into the global view (the Conv-Gate of MG-LLaVA)."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init

from .bases_hires_lmm import HiResLmmViewOp, PartContext, Traits
from .carriers_hires_lmm import ViewFeatures
from .geometry_hires_lmm import KINDS, MAIN_TOWER


GLOBAL = (KINDS["global"], MAIN_TOWER)


class HiResLmmZeroConv(nn.Conv2d):
    """A convolution that starts at zero."""

    def init_weights(self) -> None:
        """Called by the connector behind its own rule."""
        init.zeros_(self.weight)


class HiResLmmConvGate(HiResLmmViewOp):
    """Adds to each token of the global view its neighbourhood, and, times one number an image, the token of a second
    tower at its place. Both sums start at zero, so a new part changes nothing.

    Source: MG-LLaVA, huggingface.co/papers/2406.17770, and its released code (PhoenixZ810/MG-LLaVA). Ours: towers of
    any kind and grid, whose map is interpolated. Its tokens of objects are the part `object_tokens`.
    """

    needs_equal_views = True

    @strict
    @dataclass
    class Options:
        """Options of `conv_gate`.

        Args:
            tower (`str`, *optional*): Name of the second tower in `extra_towers`; the only one by default.
            gate_width (`int`, *optional*): Hidden width of the gate; half the width of the main tower by default.
        """

        tower: str | None = None
        gate_width: int | None = None

        def __post_init__(self) -> None:
            if self.gate_width is not None and self.gate_width < 1:
                raise ValueError(f"gate_width={self.gate_width} must be at least 1.")

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        self.tower = _find_tower(options, context)
        width, other = context.width, context.tower_widths[self.tower]
        hidden = options.gate_width or max(width // 2, 1)
        self.main_conv = nn.Conv2d(width, width, kernel_size=7, padding=3, groups=width)
        self.main_proj = HiResLmmZeroConv(width, width, kernel_size=1)
        self.other_conv = nn.Conv2d(other, other, kernel_size=1)
        self.other_proj = HiResLmmZeroConv(other, width, kernel_size=1)
        self.gate_1 = nn.Conv2d(2 * width, hidden, kernel_size=1)
        self.gate_2 = nn.Conv2d(hidden, 1, kernel_size=1)

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """The views of the second tower leave."""
        tower = _find_tower(options, context)
        if GLOBAL not in context.grids:
            raise ValueError("conv_gate writes into the global view, but none reaches it.")
        grids = {key: grid for key, grid in context.grids.items() if key != (KINDS["detail"], tower)}
        return Traits(grids, context.width)

    def forward(self, views: ViewFeatures) -> ViewFeatures:
        """Mix the second tower into the global views, whose shape stays."""
        main, other = views.group("global"), views.group("detail", self.tower)
        if main is None or other is None or main.rows != other.rows:
            raise ValueError(
                f"conv_gate needs the global view of every image beside that of {self.tower!r}; make the batch with "
                "views='all' or 'global'."
            )
        mixed = replace(main, features=self.mix(main.features, main.grid, other.features, other.grid))
        groups = [mixed if group is main else group for group in views.groups if group is not other]
        return replace(views, groups=groups)

    def mix(
        self, main: torch.Tensor, grid: tuple[int, int], other: torch.Tensor, other_grid: tuple[int, int]
    ) -> torch.Tensor:
        """Gate the tokens `(I, M, E)` of the second tower into those of the main one `(I, L, C)`."""
        plane, other = main.transpose(1, 2).unflatten(2, grid), other.transpose(1, 2).unflatten(2, other_grid)
        low = plane + self.main_proj(nn.functional.gelu(self.main_conv(plane)))
        high = self.other_proj(nn.functional.gelu(self.other_conv(other.to(main.dtype))))
        if grid != other_grid:
            high = nn.functional.interpolate(high, size=grid, mode="bilinear", align_corners=False)
        return (low + self.gate(low, high) * high).flatten(2).transpose(1, 2)

    def gate(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """One number an image in (-1, 1), from the means of both maps `(I, C, h, w)`: `(I, 1, 1, 1)`."""
        means = torch.cat([low.mean(dim=(2, 3), keepdim=True), high.mean(dim=(2, 3), keepdim=True)], dim=1)
        return self.gate_2(nn.functional.gelu(self.gate_1(means))).tanh()


def _find_tower(options: Any, context: PartContext) -> str:
    """The second tower that an option names, or the only one there is."""
    names = [tower for kind, tower in context.grids if tower != MAIN_TOWER and kind == KINDS["detail"]]
    if options.tower is None and len(names) != 1:
        raise ValueError(
            f"conv_gate reads a second tower, but there are {names or 'none'}; name one by tower, and put it into "
            "extra_towers."
        )
    name = names[0] if options.tower is None else options.tower
    if name not in names:
        raise ValueError(f"conv_gate reads the tower {name!r}, but extra_towers has {names or 'none'} here.")
    return name

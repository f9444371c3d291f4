"""A state space block that scans the patches of a view in several orders."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from .bases_hires_lmm import HiResLmmViewOp, PartContext
from .carriers_hires_lmm import constant_indices
from .geometry_hires_lmm import kinds_on


EXPAND, CHUNK = 2, 64
"""Inner width of the block over its width; steps that it computes at once, which changes speed and memory alone."""


def scan_orders(rows: int, cols: int, scan: str) -> list[tuple[int, ...]]:
    """The four orders in which the cells of a grid are read, as raster indices; some may be the same.

    Args:
        rows, cols (`int`): The grid.
        scan (`str`): `"cross"`: by rows, by columns, and both from the end. `"bidirectional"`: by rows and from the
            end, each twice. `"rotated"`: by the rows of the grid turned by 0, 90, 180 and 270 degrees.
    """
    grid = np.arange(rows * cols).reshape(rows, cols)
    forth = [grid, grid.T if scan == "cross" else grid]
    turned = [np.rot90(grid, turns) for turns in range(4)]
    read = turned if scan == "rotated" else [*forth, *(own.flatten()[::-1] for own in forth)]
    return [tuple(own.flatten().tolist()) for own in read]


@torch.compiler.assume_constant_result
def scan_indices(rows: int, cols: int, scan: str, device: str) -> tuple[torch.Tensor, ...]:
    """The four orders on a device, then for each the places of the cells in it."""
    orders = scan_orders(rows, cols, scan)
    back = [tuple(np.argsort(order).tolist()) for order in orders]
    return constant_indices((*orders, *back), device)


def merge_scans(outputs: list[torch.Tensor], back: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The sum `(V, L, C)` of what four scans gave, each put back into raster order."""
    return torch.stack([output[:, places] for output, places in zip(outputs, back, strict=True)]).sum(dim=0)


class HiResLmmScanBlock(Mamba2Mixer):
    """The block of `transformers`, which starts its own parameters where a checkpoint lacks them."""

    def init_weights(self) -> None:
        """Start steps, decays and the direct way; the library knows the rest."""
        self.init_mamba2_weights()


class HiResLmmScanMixer(HiResLmmViewOp):
    """Each view is read by one Mamba-2 block in four orders; what these give at a patch is added to it.

    Args:
        context (`PartContext`): Width of the features.
        options (`Options`): Which views, orders, sizes of the block.

    Source: ML-Mamba, huggingface.co/papers/2407.19832, whose connector is not in its repository; orders and their sum
    are those of VMamba (MzeroMiko/VMamba at 2ed52ea), which it names. Ours: one block for all orders, norm, residual.
    """

    @strict
    @dataclass
    class Options:
        """Options of `scan_mixer`.

        Args:
            on (`str` or `list[str]`): Kinds of views that are mixed.
            scan (`str`): See `scan_orders`.
            state_size (`int`): Numbers that a channel remembers along a scan.
            head_dim (`int`): Channels of a head; a divisor of twice the width.
        """

        on: str | list = "all"
        scan: Literal["cross", "bidirectional", "rotated"] = "cross"
        state_size: int = 128
        head_dim: int = 64

        def __post_init__(self) -> None:
            kinds_on(self.on)
            if self.state_size < 1 or self.head_dim < 1:
                raise ValueError(f"state_size={self.state_size} and head_dim={self.head_dim} must be at least 1.")

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        width, head = context.width, options.head_dim
        if EXPAND * width % head:
            raise ValueError(f"scan_mixer has head_dim={head}, which does not divide {EXPAND * width}; change it.")
        sizes = {"hidden_size": width, "expand": EXPAND, "head_dim": head, "num_heads": EXPAND * width // head}
        config = Mamba2Config(
            **sizes, state_size=options.state_size, n_groups=1, chunk_size=CHUNK, num_hidden_layers=1
        )
        self.norm, self.mixer = nn.LayerNorm(width), HiResLmmScanBlock(config, layer_idx=0)

    def forward_group(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Mix `(V, L, C)`; orders that are the same are read once."""
        indices = scan_indices(*grid, self.options.scan, str(features.device))
        entering, times = self.norm(features), 2 if self.options.scan == "bidirectional" else 1
        read = [self.mixer(entering[:, order]) for order in indices[:4:times]]
        return features + merge_scans([own for own in read for _ in range(times)], indices[4:])

"""MG-LLaVA: the released module that gates a second tower into the first."""

from math import ceil
from pathlib import Path

import pytest
import torch
from torch import nn

from builders import randomise
from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.gate_hires_lmm import HiResLmmConvGate
from hires_lmm.modeling.geometry_hires_lmm import MAIN_TOWER, Grid, Kind

from .base import GoldenSet, write_set


NAME = "mg_convgate"
GOLDEN = GoldenSet(NAME)
NAMES = {
    "slow_conv": "other_conv",
    "slow_proj": "other_proj",
    "fast_conv": "main_conv",
    "fast_proj": "main_proj",
    "gate.0": "gate_1",
    "gate.2": "gate_2",
}


def build(settings: dict) -> HiResLmmConvGate:
    grid = Grid(settings["grid"], settings["grid"])
    grids = {(int(Kind.GLOBAL), MAIN_TOWER): grid, (int(Kind.DETAIL), "hires"): grid}
    width = settings["low_dim"]
    context = PartContext(None, width, 1, grids, grid.size, tower_widths={"hires": settings["high_dim"]})
    return HiResLmmConvGate(context, HiResLmmConvGate.Options(gate_width=settings["gate_hidden"])).eval()


def load(part: HiResLmmConvGate, released: dict[str, torch.Tensor]) -> None:
    """Give it the released weights."""
    pairs = ((theirs, ours, kind) for theirs, ours in NAMES.items() for kind in ("weight", "bias"))
    shapes = {name: value.shape for name, value in part.state_dict().items()}
    named = {f"{ours}.{kind}": released[f"{theirs}.{kind}"] for theirs, ours, kind in pairs}
    part.load_state_dict({name: value.reshape(shapes[name]) for name, value in named.items()})


@torch.no_grad()
def run(part: HiResLmmConvGate, low: torch.Tensor, high: torch.Tensor, grid: int) -> dict[str, torch.Tensor]:
    """All numbers of a set, each token of them."""
    seen: dict = {}
    hooks = [
        part.main_proj.register_forward_hook(lambda _, args, output: seen.update(low_residual=output)),
        part.other_proj.register_forward_hook(lambda _, args, output: seen.update(high_projected=output)),
        part.gate_1.register_forward_hook(lambda _, args, output: seen.update(gate_input=args[0].flatten(1))),
        part.gate_2.register_forward_hook(lambda _, args, output: seen.update(gate=output.tanh().flatten(1))),
    ]
    size = (grid, grid)
    found = {"fused": part.mix(low, size, high.flatten(2).transpose(1, 2), size)}
    for hook in hooks:
        hook.remove()
    found |= {name: value.flatten(2).transpose(1, 2) if value.ndim == 4 else value for name, value in seen.items()}
    return found | {"with_sampler": low + found["low_residual"]}


def test_every_number():
    settings, part = GOLDEN.cases["settings"], build(GOLDEN.cases["settings"])
    load(part, GOLDEN.under("weight.fuse_module."))
    found = run(part, GOLDEN["input.low"], GOLDEN["input.high"], settings["grid"])
    wanted = GOLDEN.under("output.")
    assert "fused" in wanted
    for name, value in wanted.items():
        step = ceil(found[name].shape[1] / value.shape[1]) if value.ndim == 3 else 1
        GOLDEN.close(found[name][:, ::step], f"output.{name}")


def test_a_part_whose_projections_are_zero_is_the_identity():
    part = build(GOLDEN.cases["settings"])
    for layer in (part.main_proj, part.other_proj):
        layer.init_weights()
        nn.init.zeros_(layer.bias)
    found = run(part, GOLDEN["input.low"], GOLDEN["input.high"], GOLDEN.cases["settings"]["grid"])
    wanted = GOLDEN.cases["init_identity_max_difference"]
    assert float((found["fused"] - GOLDEN["input.low"]).abs().max()) == pytest.approx(wanted)


# ---- a set at other sizes


def remake(folder: Path, seed: int) -> None:
    settings = {"low_dim": 12, "high_dim": 20, "grid": 9, "batch": 3, "gate_hidden": 7, "depthwise_kernel": 7}
    part = randomise(build(settings), seed)
    side = settings["grid"]
    low, high = torch.randn(3, side**2, settings["low_dim"]), torch.randn(3, settings["high_dim"], side, side)
    found, weights = run(part, low, high, side), part.state_dict()
    names = ((theirs, ours, kind) for theirs, ours in NAMES.items() for kind in ("weight", "bias"))
    tensors = {f"weight.fuse_module.{theirs}.{kind}": weights[f"{ours}.{kind}"] for theirs, ours, kind in names}
    tensors |= {key: value.flatten(1) for key, value in tensors.items() if "gate" in key and value.ndim == 4}
    tensors |= {"input.low": low, "input.high": high, "output.fused": found["fused"][:, ::3]}
    tensors |= {f"output.{name}": found[name] for name in ("gate", "gate_input", "low_residual", "high_projected")}
    write_set(folder, {"seed": seed, "settings": settings, "init_identity_max_difference": 0.0}, tensors)

"""HiRes-LLaVA, by a reference of the same reading: the sampler at several grids, and what joins crops in the tower."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from builders import randomise
from hires_lmm import HiResLmmConnectorConfig
from hires_lmm.modeling.bases_hires_lmm import PartContext, TowerCall
from hires_lmm.modeling.carriers_hires_lmm import ImageGeometry, ViewGroup
from hires_lmm.modeling.geometry_hires_lmm import MAIN_TOWER, Grid, Kind, ViewShape
from hires_lmm.modeling.hires_llava_hires_lmm import HiResLmmSelfMiningSampler, HiResLmmSliceRestore

from .base import GoldenSet, write_set


NAME = "hires_llava"
GOLDEN = GoldenSet(NAME)
ATTENTION = {f"{name}_proj": f"attention.{name}_proj" for name in "qkv"} | {"out_proj": "attention.o_proj"}
SAMPLER = {"norm_q": "query_norm", "norm_kv": "key_norm", **ATTENTION}
RESTORE = {"local": "local_conv", "norm": "global_norm", **{f"global.{a}": b for a, b in ATTENTION.items()}}
KEYS = ("weight", "bias")


def build(settings: dict, part: type, **options) -> nn.Module:
    config = HiResLmmConnectorConfig()
    config._attn_implementation = "sdpa"
    grid = Grid(settings["h"], settings["w"])
    context = PartContext(config, settings["C"], settings["C"], {(int(Kind.CROP), MAIN_TOWER): grid}, grid.size)
    return part(context, part.Options(num_heads=settings["heads"], **options)).eval()


def load(part: nn.Module, names: dict[str, str], released: dict[str, torch.Tensor], **more) -> nn.Module:
    """Give it the weights of a set."""
    named = {f"{ours}.{key}": released[f"{theirs}.{key}"] for theirs, ours in names.items() for key in KEYS}
    part.load_state_dict(named | more)
    return part


@torch.no_grad()
def sample(part: HiResLmmSelfMiningSampler, features: torch.Tensor, settings: dict) -> dict[str, torch.Tensor]:
    """What the sampler makes of views, with and without what was pooled."""
    group = ViewGroup(int(Kind.CROP), features, (settings["h"], settings["w"]), tuple(range(len(features))))
    found, sizes = {}, [group.grid] * len(features)
    for name, residual in (("residual", True), ("plain", False)):
        part.options.residual = residual
        found[name] = part.sample(group, sizes).features
    return found | {"pooled": found["residual"] - found["plain"]}


@torch.no_grad()
def restore(part: HiResLmmSliceRestore, crops: torch.Tensor, shape: tuple[int, int], settings: dict) -> torch.Tensor:
    """What the layer op makes of the crops of one image, behind a class token and a global view."""
    size = (settings["h"], settings["w"])
    kinds = [(Kind.GLOBAL, 0, 0), *((Kind.CROP, row, col) for row in range(shape[0]) for col in range(shape[1]))]
    views = tuple(tuple(ViewShape(int(k), *shape, r, c, *size, 0, size[0], 0, size[1])) for k, r, c in kinds)
    whole = torch.randn(len(views), 1 + size[0] * size[1], settings["C"])
    whole[1:, 1:] = crops
    call = TowerCall([ImageGeometry(0, views, 0)], size, 1, training=False)
    found, keep = part(0, whole, call)
    assert keep is None and torch.equal(found[0], whole[0]) and torch.equal(found[1:, 0], whole[1:, 0])
    return found[1:, 1:]


def gates(local: float, wide: float) -> dict[str, torch.Tensor]:
    return {"local_gate": torch.tensor([local]), "global_gate": torch.tensor([wide])}


def numbers(settings: dict, released: dict, crops: torch.Tensor, shape: tuple[int, int], down: int, local, wide):
    part = load(build(settings, HiResLmmSliceRestore, down_sampling=down), RESTORE, released, **gates(local, wide))
    return restore(part, crops, shape, settings)


@pytest.mark.parametrize("pool", GOLDEN.cases["settings"]["pools"], ids=str)
def test_the_sampler(pool):
    settings = GOLDEN.cases["settings"]
    part = load(build(settings, HiResLmmSelfMiningSampler, pool=pool), SAMPLER, GOLDEN.under("weight.sampler."))
    found = sample(part, GOLDEN["input.sampler.features"], settings)
    for name, value in found.items():
        GOLDEN.close(value, f"output.sampler.{pool[0]}x{pool[1]}.{name}")


PLACES = [
    name for name in GOLDEN.tensors if re.fullmatch(r"output\.restore\.\d+x\d+(\.s\d+)?\.(local|global|out_.*)", name)
]


@pytest.mark.parametrize("name", PLACES)
def test_what_joins_the_crops(name):
    """Sums of both with several gates, and each alone."""
    settings = GOLDEN.cases["settings"]
    rows, cols, down, kind = re.fullmatch(r"output\.restore\.(\d+)x(\d+)(?:\.s(\d+))?\.(.*)", name).groups()
    crops = GOLDEN[f"input.restore.{rows}x{cols}.slices"]
    alone = {"local": (1.0, 0.0), "global": (0.0, 1.0)}
    weights = alone.get(kind) or tuple(map(float, kind.split("_")[1:]))
    arguments = (crops, (int(rows), int(cols)), int(down or settings["ds"][0]))
    found = numbers(settings, GOLDEN.under("weight.restore."), *arguments, *weights)
    GOLDEN.close(found - crops if kind in alone else found, name)


def test_a_new_part_is_the_identity():
    settings = GOLDEN.cases["settings"]
    for shape in settings["grids"]:
        part = build(settings, HiResLmmSliceRestore)
        part.init_weights()
        crops = GOLDEN[f"input.restore.{shape[0]}x{shape[1]}.slices"]
        assert torch.equal(restore(part, crops, tuple(shape), settings), crops)


@torch.no_grad()
def test_views_of_unequal_size_are_sampled_as_each_alone():
    settings = GOLDEN.cases["settings"]
    part = load(build(settings, HiResLmmSelfMiningSampler, pool=[2, 3]), SAMPLER, GOLDEN.under("weight.sampler."))
    sizes, planes = [(5, 3), (4, 7), (5, 7)], torch.randn(3, 5, 7, settings["C"])
    group = ViewGroup(int(Kind.CROP), planes.flatten(1, 2), (5, 7), (0, 1, 2))
    for number, (high, wide) in enumerate(sizes):
        own = planes[number, :high, :wide].reshape(1, high * wide, -1)
        alone = part.sample(ViewGroup(int(Kind.CROP), own, (high, wide), (0,)), [(high, wide)])
        torch.testing.assert_close(part.sample(group, sizes).features[number], alone.features[0], atol=1e-5, rtol=1e-4)


# ---- a set at other sizes


def remake(folder: Path, seed: int) -> None:
    settings = {"C": 12, "heads": 3, "h": 5, "w": 7, "V": 2, "pools": [[2, 3], [5, 1]], "grids": [[3, 2], [1, 1]]}
    settings["ds"] = [4, 1]
    sampler = randomise(build(settings, HiResLmmSelfMiningSampler), seed)
    part = randomise(build(settings, HiResLmmSliceRestore), seed)
    weights = {f"sampler.{a}.{key}": sampler.get_parameter(f"{b}.{key}") for a, b in SAMPLER.items() for key in KEYS}
    weights |= {f"restore.{a}.{key}": part.get_parameter(f"{b}.{key}") for a, b in RESTORE.items() for key in KEYS}
    features = torch.randn(settings["V"], 35, settings["C"])
    tensors = {f"weight.{name}": value for name, value in weights.items()} | {"input.sampler.features": features}
    for pool in settings["pools"]:
        made = build(settings, HiResLmmSelfMiningSampler, pool=pool)
        made.load_state_dict(sampler.state_dict())
        found = sample(made, features, settings)
        tensors |= {f"output.sampler.{pool[0]}x{pool[1]}.{name}": value for name, value in found.items()}
    released = {name.removeprefix("restore."): value for name, value in weights.items()}
    for rows, cols in settings["grids"]:
        place, crops = f"restore.{rows}x{cols}", torch.randn(rows * cols, 35, settings["C"])
        tensors[f"input.{place}.slices"] = crops
        for down in settings["ds"]:
            arguments = (settings, released, crops, (rows, cols), down)
            tensors[f"output.{place}.local"] = numbers(*arguments, 1.0, 0.0) - crops
            tensors[f"output.{place}.s{down}.global"] = numbers(*arguments, 0.0, 1.0) - crops
            tensors[f"output.{place}.s{down}.out_0.3_-2.0"] = numbers(*arguments, 0.3, -2.0)
    write_set(folder, {"seed": seed, "settings": settings}, tensors)

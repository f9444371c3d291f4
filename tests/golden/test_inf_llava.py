"""INF-LLaVA: the released module of two perspectives, and the views and tokens of a small picture."""

import re
from math import ceil
from pathlib import Path

import pytest
import torch
from torch import nn

from builders import randomise
from hires_lmm import HiResLmmConnectorConfig
from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.carriers_hires_lmm import ImageGeometry, ViewFeatures, ViewGroup
from hires_lmm.modeling.dual_hires_lmm import HiResLmmDualEnhancement
from hires_lmm.modeling.geometry_hires_lmm import MAIN_TOWER, Grid, Kind
from hires_lmm.processing.planners_hires_lmm import PLANNERS
from hires_lmm.processing.rendering_hires_lmm import _cut

from .base import GoldenSet, write_set


NAME = "inf_llava"
GOLDEN = GoldenSet(NAME)
KINDS = (Kind.GLOBAL, Kind.CROP, Kind.STRIDED)
PATCH = 14  # of the stand-in encoder, which averages over patches
NAMES = {
    "attention.linears.0": "attention.q_proj",
    "attention.linears.1": "attention.k_proj",
    "attention.linears.2": "attention.v_proj",
    "attention.linears.3": "attention.o_proj",
    "attention.ln": "attention_norm",
    "ffn_crop.0": "local_mlp.0",
    "ffn_crop.2": "local_mlp.2",
    "ffn_stride.0": "global_mlp.0",
    "ffn_stride.2": "global_mlp.2",
    "ln_fuse": "output_norm",
}


def build(settings: dict) -> HiResLmmDualEnhancement:
    config = HiResLmmConnectorConfig()
    config._attn_implementation = "sdpa"
    grid = Grid(settings["tile_grid"], settings["tile_grid"])
    grids = {(int(kind), MAIN_TOWER): grid for kind in KINDS}
    context = PartContext(config, settings["channels"], 1, grids, grid.size)
    return HiResLmmDualEnhancement(context, HiResLmmDualEnhancement.Options(num_heads=settings["heads"])).eval()


@pytest.fixture(scope="module")
def part() -> HiResLmmDualEnhancement:
    """With the released weights."""
    made, released = build(GOLDEN.cases["settings"]), GOLDEN.under("weight.spatial_embed.")
    pairs = ((theirs, ours, kind) for theirs, ours in NAMES.items() for kind in ("weight", "bias"))
    made.load_state_dict({f"{ours}.{kind}": released[f"{theirs}.{kind}"] for theirs, ours, kind in pairs})
    return made


def plan_of(settings: dict, size: tuple[int, int] = (24, 24)):
    """The views of an image, by our planner."""
    options = {"view_size": PATCH * settings["tile_grid"], "patch_size": PATCH, "n": settings["n"]}
    return PLANNERS["dual"](*size, PLANNERS["dual"].build_options("dual", options))


@torch.no_grad()
def run(part: HiResLmmDualEnhancement, settings: dict, features: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """What becomes of the global view `(1, L, C)`, given the contiguous views and then the strided ones."""
    number, grid = settings["n"] ** 2, (settings["tile_grid"],) * 2
    views = tuple(tuple(view.shape) for view in plan_of(settings).views)
    rows = ((0,), tuple(range(1, number + 1)), tuple(range(number + 1, 2 * number + 1)))
    split = (plain, features[:number], features[number:])
    groups = [ViewGroup(int(kind), *each) for kind, *each in zip(KINDS, split, [grid] * 3, rows, strict=True)]
    (found,) = part(ViewFeatures(groups, [ImageGeometry(0, views, 0)])).groups
    return found.features


def numbers(part: HiResLmmDualEnhancement, settings: dict, features: torch.Tensor) -> dict[str, torch.Tensor]:
    """All numbers of a set that come from features."""
    read, maps = [], []
    hooks = [
        part.attention_norm.register_forward_hook(lambda _, args, output: read.append(output)),
        part.output_norm.register_forward_hook(lambda _, args, output: maps.append(output)),
    ]
    nothing = torch.zeros_like(features[:1])
    fused = 2 * run(part, settings, features, nothing)  # the mean with a global view of zeros
    for hook in hooks:
        hook.remove()
    side = settings["n"] * settings["tile_grid"]
    return {
        "fused": fused,
        "attention_global_queries": read[0],
        "attention_local_queries": read[1],
        "fused_map_sub": maps[0].view(side, side, -1),
    }


def pictures(settings: dict, small: torch.Tensor) -> torch.Tensor:
    """The views of a picture `(1, 3, h, w)` enlarged as released, cut as our planner says, the whole one last."""
    plan = plan_of(settings, tuple(small.shape[2:]))

    def enlarge(size: tuple[int, int]) -> torch.Tensor:
        return nn.functional.interpolate(small, size=size, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)

    canvas = enlarge(plan.canvas)
    cut = [_cut(canvas, view, plan.view_pixels(view)) for view in plan.views[1:]]
    return torch.stack([*cut, enlarge(plan.view_pixels(plan.views[0]))]).permute(0, 3, 1, 2)


@torch.no_grad()
def encode(part: HiResLmmDualEnhancement, settings: dict, views: torch.Tensor, weights: dict) -> torch.Tensor:
    """Tokens of the pictures, with a stand-in encoder and projector."""
    patches = nn.functional.avg_pool2d(views, PATCH).flatten(2).transpose(1, 2)
    features = nn.functional.linear(patches, weights["standin_encoder.weight"], weights["standin_encoder.bias"])
    mixed = run(part, settings, features[:-1], features[-1:])
    return nn.functional.linear(mixed, weights["mm_projector.weight"], weights["mm_projector.bias"])


def places(name: str) -> slice:
    """Which rows and columns a set keeps, as it says itself."""
    offset, stride = re.search(r"offset (\d+) stride (\d+)", GOLDEN.cases["tensors"][name]["what"]).groups()
    return slice(int(offset), None, int(stride))


def test_the_module(part):
    found = numbers(part, GOLDEN.cases["settings"], GOLDEN["input.features"])
    GOLDEN.close(found["fused"], "output.fused")
    for name in ("attention_global_queries", "attention_local_queries"):
        kept = GOLDEN[f"output.{name}"].shape[1]
        GOLDEN.close(found[name][:, :: ceil(found[name].shape[1] / kept)], f"output.{name}")
    at = places("output.fused_map_sub")
    GOLDEN.close(found["fused_map_sub"][at, at], "output.fused_map_sub")


def test_the_views_and_tokens_of_a_picture(part):
    settings = GOLDEN.cases["settings"]
    views = pictures(settings, GOLDEN["input.small_image"])
    at = places("output.views_sub")
    GOLDEN.close(views[:, :, at, at], "output.views_sub")
    found = encode(part, settings, views, GOLDEN.under("weight."))
    kept = GOLDEN["output.encode_images"].shape[1]
    GOLDEN.close(found[:, :: ceil(found.shape[1] / kept)], "output.encode_images")


@pytest.mark.skipif(GOLDEN.cases["settings"]["n"] % 2 == 0, reason="an odd n has a sample at the centre")
def test_of_the_strided_views_the_centre_one_alone_matters(part):
    """At odd n; the released numbers say so too."""
    settings, features = GOLDEN.cases["settings"], GOLDEN["input.features"]
    number, before = settings["n"] ** 2, GOLDEN["output.fused"]
    others = features.clone()
    others[number:] = torch.randn_like(others[number:])
    others[number + number // 2] = features[number + number // 2]
    torch.testing.assert_close(numbers(part, settings, others)["fused"], before, atol=1e-4, rtol=1e-4)
    others[number + number // 2] += 1
    assert (numbers(part, settings, others)["fused"] - before).abs().max() > 0.1


# ---- a set at other sizes


def remake(folder: Path, seed: int) -> None:
    settings = {"channels": 24, "heads": 4, "n": 2, "tile_grid": 6, "ffn_hidden": 1, "ln_eps": 1e-5}
    part = randomise(build(settings), seed)
    weights = {f"weight.spatial_embed.{a}.{k}": part.get_parameter(f"{b}.{k}") for a, b in NAMES.items() for k in KEYS}
    rest = {"standin_encoder": nn.Linear(3, 24), "mm_projector": nn.Linear(24, 5)}
    weights |= {f"weight.{a}.{k}": layer.get_parameter(k) for a, layer in rest.items() for k in KEYS}
    features, small = torch.randn(2 * settings["n"] ** 2, 36, 24), torch.randn(1, 3, 20, 30)
    found, views = numbers(part, settings, features), pictures(settings, small)
    tokens = encode(part, settings, views, {name.removeprefix("weight."): value for name, value in weights.items()})
    tensors = weights | {"input.features": features, "input.small_image": small, "output.fused": found["fused"]}
    tensors |= {f"output.attention_{name}_queries": found[f"attention_{name}_queries"][:, ::5] for name in KEPT}
    tensors["output.fused_map_sub"] = found["fused_map_sub"][1::2, 1::2]
    tensors |= {"output.views_sub": views[:, :, 3::9, 3::9], "output.encode_images": tokens[:, ::4]}
    what = {"output.fused_map_sub": "offset 1 stride 2", "output.views_sub": "offset 3 stride 9"}
    cases = {"seed": seed, "settings": settings, "tensors": {name: {"what": text} for name, text in what.items()}}
    write_set(folder, cases, tensors)


KEYS, KEPT = ("weight", "bias"), ("global", "local")

"""LLaVA-UHD v1: slices, separators and counts of many sizes, pixels of a picture, positions, and the resampler."""

import re
from itertools import pairwise
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from builders import randomise
from hires_lmm import PRESETS, HiResLmmConnectorConfig
from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.carriers_hires_lmm import ViewGroup
from hires_lmm.modeling.geometry_hires_lmm import MAIN_TOWER, Grid, Kind
from hires_lmm.modeling.uhd_hires_lmm import HiResLmmUhdResampler, cell_points
from hires_lmm.processing.image_processing_hires_lmm import HiResLmmImageProcessor
from hires_lmm.processing.planners_hires_lmm import PLANNERS
from hires_lmm.processing.sequence_hires_lmm import Mark
from hires_lmm.processing.token_layout_hires_lmm import TokenLayout, count_tokens

from .base import GoldenSet, fuse_attention, split_attention, write_set


NAME = "llava_uhd"
GOLDEN = GoldenSet(NAME)
NORMS = {"ln_q": "query_norm", "ln_kv": "key_norm", "ln_post": "output_norm"}
LINEARS = {"kv_proj.weight": "input_proj.weight"}
FILTER = Image.Resampling.BICUBIC


# ---- slices


def layout_of(settings: dict) -> TokenLayout:
    """The layout of the preset with the ids of a set."""
    ids = settings["separator_ids"]
    side, grid = int(settings["tokens_per_view"] ** 0.5), settings["scale_resolution"] // settings["patch_size"]
    layout = dict(PRESETS["llava_uhd"]["connector_config"]["layout"])
    own = {"comma": [ids["between columns"]], "newline": [ids["row end"]]}
    layout["separators"] = {name: {**each, "value": own[name]} for name, each in layout["separators"].items()}
    grids = {kind: {"rows": side, "cols": side, "stride": None} for kind in ("global", "crops")}
    return TokenLayout((grid, grid), grids, layout)


def describe(size: tuple[int, int], settings: dict, most: int) -> dict:
    """What our planner and layout make of an image (width, height), in the words of the set."""
    layout, planner = layout_of(settings), PLANNERS["llava_uhd"]
    options = {"view_size": settings["scale_resolution"], "patch_size": settings["patch_size"], "max_crops": most}
    plan = planner(size[1], size[0], planner.build_options("llava_uhd", options))
    overview, *slices = plan.views
    ids = [separator.value[0] for separator in layout.arrangement.separators]
    marks = [piece for piece in layout.arrangement.walk([view.shape for view in plan.views]) if type(piece) is Mark]
    return {
        "overview": list(plan.view_pixels(overview)[::-1]),
        "grid_cols_rows": list(plan.grid[::-1]) if slices else None,
        "slice": list(plan.view_pixels(slices[0])[::-1]) if slices else None,
        "refined": list(plan.canvas[::-1]) if slices else None,
        "num_slices": len(slices),
        "separators": [ids[mark.separator] for mark in marks],
        "tokens": count_tokens(plan, layout).total,
    }


TABLES = [name for name in GOLDEN.cases["slicing"] if name.endswith("rows")]


@pytest.mark.parametrize("table", TABLES)
def test_slices_separators_and_counts(table):
    slicing = GOLDEN.cases["slicing"]
    cap = re.search(r"\d+", table)
    most = int(cap.group()) if cap else slicing["settings"]["max_slice_nums"]
    for row in slicing[table]:
        assert {"size": row["size"], **describe(row["size"], slicing["settings"], most)} == row


def coded_image(width: int, height: int) -> Image.Image:
    """A picture whose every value says where it is."""
    x, y = np.arange(width)[None], np.arange(height)[:, None]
    values = (x // 4 % 64) * 2 + (y // 8 % 2)
    return Image.fromarray(np.repeat(values[:, :, None], 3, axis=2).astype(np.uint8))


def pixels_of(size: tuple[int, int], settings: dict) -> list[np.ndarray]:
    """Grey values of the views of the coded picture, the whole one first."""
    options = {"view_size": settings["scale_resolution"], "patch_size": settings["patch_size"]}
    processor = HiResLmmImageProcessor(planner="llava_uhd", max_crops=settings["max_slice_nums"], **options)
    batch = processor(coded_image(*size), do_rescale=False, do_normalize=False, resample=FILTER)
    plan = processor.plan(*size[::-1])
    sizes = [plan.view_pixels(view) for view in plan.views]
    return [view[0, :high, :wide] for view, (high, wide) in zip(batch["pixel_values"], sizes, strict=True)]


def strips(view: np.ndarray, number: int) -> list[float]:
    """Mean grey values of vertical strips."""
    edges = [n * view.shape[1] // number for n in range(number + 1)]
    return [float(view[:, left:right].mean()) for left, right in pairwise(edges)]


def test_the_pixels_of_the_views():
    coded, settings = GOLDEN.cases["coded_image"], GOLDEN.cases["slicing"]["settings"]
    found = describe(coded["size"], settings, settings["max_slice_nums"])
    assert {name: found[name] for name in coded if name != "size"} == {n: coded[n] for n in coded if n != "size"}
    overview, *slices = pixels_of(coded["size"], settings)
    wanted = GOLDEN["output.slices_mean"]
    means = torch.tensor([strips(view, wanted.shape[1]) for view in slices])
    GOLDEN.close(means, "output.slices_mean", atol=0.01)
    for name, views in (("overview", overview[None]), ("slice", np.stack(slices))):
        offset, step = map(int, re.search(r"offset (\d+) stride (\d+)", what(f"output.{name}_sub")).groups())
        kept = torch.tensor(views[:, offset::step, offset::step])
        GOLDEN.close(kept.view(GOLDEN[f"output.{name}_sub"].shape), f"output.{name}_sub", atol=0, rtol=0)


def what(name: str) -> str:
    return GOLDEN.cases["tensors"][name]["what"]


# ---- positions


def embeddings(settings: dict, weights: dict[str, torch.Tensor]) -> nn.Module:
    """The embedding layer of a tower with the weights of a set."""
    width, patch, side = (settings[name] for name in ("width", "patch", "square"))
    config = CLIPVisionConfig(hidden_size=width, num_attention_heads=1, num_hidden_layers=1, intermediate_size=4)
    config.patch_size, config.image_size = patch, patch * side
    tower = CLIPVisionModel(config).eval()
    layer = next(module for name, module in tower.named_modules() if name.endswith("embeddings"))
    layer.load_state_dict(weights, strict=False)
    return layer


@torch.no_grad()
def positions(layer: nn.Module, settings: dict, grid: tuple[int, int]) -> torch.Tensor:
    """What the tower adds to the class token and the patches of a view of a size."""
    pixels = torch.zeros(1, 3, grid[0] * settings["patch"], grid[1] * settings["patch"])
    found = layer(pixels, interpolate_pos_encoding=True)[0]
    found[0] -= layer.class_embedding
    return found


def test_positions_are_resized_for_each_view():
    settings = GOLDEN.cases["vision_embeddings"]
    layer = embeddings(settings, GOLDEN.under("weight.vision_embeddings."))
    for name in GOLDEN.under("output.pos_"):
        grid = tuple(map(int, name.split("x")))
        found = positions(layer, settings, grid)
        kept = len(GOLDEN[f"output.pos_{name}"])
        GOLDEN.close(found[:: ceil(len(found) / kept)], f"output.pos_{name}")
    with torch.no_grad():
        GOLDEN.close(layer(GOLDEN["input.pixels"], interpolate_pos_encoding=True), "output.embeddings")


# ---- resampler


def build(settings: dict) -> HiResLmmUhdResampler:
    config = HiResLmmConnectorConfig()
    config._attn_implementation = "sdpa"
    grids = {(int(Kind.GLOBAL), MAIN_TOWER): Grid(24, 24)}
    context = PartContext(config, settings["kv_dim"], settings["embed_dim"], grids, (24, 24))
    options = HiResLmmUhdResampler.Options(num_queries=settings["grid_size"] ** 2, num_heads=settings["num_heads"])
    made = HiResLmmUhdResampler(context, options)
    made.init_weights()
    return made.eval()


@pytest.fixture(scope="module")
def part() -> HiResLmmUhdResampler:
    """With the released weights."""
    made, released = build(GOLDEN.cases["resampler"]["settings"]), GOLDEN.under("weight.resampler.")
    named = {"queries": released["query"], "positions": made.positions, "output_proj.weight": released["proj"].T}
    named |= {ours: released[theirs] for theirs, ours in LINEARS.items()}
    for theirs, ours in NORMS.items():
        named |= {f"{ours}.{kind}": released[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    attention = {key.removeprefix("attn."): value for key, value in released.items() if key.startswith("attn.")}
    made.load_state_dict(named | {f"attention.{key}": value for key, value in split_attention(attention).items()})
    return made


@torch.no_grad()
def run(part: HiResLmmUhdResampler, features: torch.Tensor, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """All numbers of a set, each row of them."""
    group = ViewGroup(int(Kind.GLOBAL), features, grid, tuple(range(len(features))))
    inputs = part.key_norm(part.input_proj(features)).unflatten(1, grid)
    return {
        "y": part.compress(group, [grid] * len(features)).features,
        "values": cell_points(inputs, part.side),
    }


def test_the_resampler(part):
    kept = len(GOLDEN["output.resampler.pos_embed_sub"])
    GOLDEN.close(part.positions[:: ceil(len(part.positions) / kept)], "output.resampler.pos_embed_sub")
    for number, shape in enumerate(GOLDEN.cases["resampler"]["shapes"]):
        found = run(part, GOLDEN[f"input.resampler.x{number}"], tuple(shape["feature_hw"]))
        assert found["values"].shape[1] == shape["pool_hw"][0] * shape["pool_hw"][1]
        wanted = GOLDEN[f"output.resampler.y{number}"]
        GOLDEN.close(found["y"][:, :: ceil(found["y"].shape[1] / wanted.shape[1])], f"output.resampler.y{number}")
        step = int(re.search(r"every (\d+)", what(f"output.resampler.values{number}")).group(1))
        GOLDEN.close(found["values"][::step], f"output.resampler.values{number}")


@torch.no_grad()
def test_views_of_unequal_size_are_read_as_each_alone(part):
    """What pads a view to the largest counts nowhere."""
    sizes = [tuple(shape["feature_hw"]) for shape in GOLDEN.cases["resampler"]["shapes"]]
    largest = tuple(map(max, zip(*sizes, strict=True)))
    planes, wanted = torch.randn(len(sizes), *largest, GOLDEN.cases["resampler"]["settings"]["kv_dim"]), []
    for plane, (high, wide) in zip(planes, sizes, strict=True):
        wanted.append(run(part, plane[:high, :wide].reshape(1, high * wide, -1), (high, wide))["y"])
    group = ViewGroup(int(Kind.CROP), planes.flatten(1, 2), largest, tuple(range(len(sizes))))
    torch.testing.assert_close(part.compress(group, sizes).features, torch.cat(wanted), atol=1e-5, rtol=1e-4)


# ---- a set at other sizes


def remake(folder: Path, seed: int) -> None:
    cutting = {"max_slice_nums": 5, "scale_resolution": 112, "patch_size": 8, "tokens_per_view": 25}
    cutting["separator_ids"] = {"between columns": 7, "row end": 5}
    sizes = [(300, 200), (90, 100), (40, 900), (113, 112), (500, 510), (33, 77)]
    slicing = {"settings": cutting, "rows": [{"size": s, **describe(s, cutting, 5)} for s in sizes]}
    slicing["cap3_rows"] = [{"size": size, **describe(size, cutting, 3)} for size in sizes]
    coded = {"size": (320, 250), **describe((320, 250), cutting, 5)}
    coded = {name: coded[name] for name in ("size", "grid_cols_rows", "separators", "overview", "slice")}
    overview, *slices = pixels_of(coded["size"], cutting)
    tensors = {"output.slices_mean": torch.tensor([strips(view, 3) for view in slices])}
    kept = {"overview": overview[2::20, 2::20], "slice": np.stack(slices)[:, 4::17, 4::17]}
    tensors |= {f"output.{name}_sub": torch.tensor(each).to(torch.uint8) for name, each in kept.items()}
    texts = {"output.overview_sub": "offset 2 stride 20", "output.slice_sub": "offset 4 stride 17"}
    seen = {"width": 12, "patch": 8, "square": 6}
    layer = randomise(embeddings(seen, {}), seed)
    tensors |= {f"weight.vision_embeddings.{name}": own for name, own in layer.named_parameters()}
    for grid in ((6, 6), (4, 9), (7, 3)):
        tensors[f"output.pos_{grid[0]}x{grid[1]}"] = positions(layer, seen, grid)[::3]
    tensors["input.pixels"] = torch.randn(2, 3, 24, 40)
    tensors["output.embeddings"] = layer(tensors["input.pixels"], interpolate_pos_encoding=True)
    settings = {"grid_size": 5, "embed_dim": 24, "num_heads": 3, "kv_dim": 10}
    part, shapes = randomise(build(settings), seed), []
    weights = part.state_dict()
    attention = {key.removeprefix("attention."): weights[key] for key in weights if key.startswith("attention.")}
    released = {"query": weights["queries"], "proj": part.output_proj.weight.T}
    released |= {theirs: weights[ours] for theirs, ours in LINEARS.items()}
    released |= {f"attn.{key}": value for key, value in fuse_attention(attention).items()}
    for theirs, ours in NORMS.items():
        released |= {f"{theirs}.{kind}": weights[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    tensors |= {f"weight.resampler.{key}": value for key, value in released.items()}
    tensors["output.resampler.pos_embed_sub"] = part.positions[::4]
    for number, (grid, bins) in enumerate((((14, 14), (3, 3)), ((6, 20), (2, 4)), ((20, 11), (4, 2)))):
        features = torch.randn(2, grid[0] * grid[1], settings["kv_dim"])
        found = run(part, features, grid)
        tensors[f"input.resampler.x{number}"] = features
        tensors[f"output.resampler.y{number}"] = found["y"][:, ::2]
        tensors[f"output.resampler.values{number}"] = found["values"][::7]
        texts[f"output.resampler.values{number}"] = "every 7th"
        shapes.append({"feature_hw": grid, "pool_hw": bins})
    cases = {"seed": seed, "slicing": slicing, "coded_image": coded, "vision_embeddings": seen}
    cases |= {"resampler": {"settings": settings, "shapes": shapes}}
    write_set(folder, cases | {"tensors": {name: {"what": text} for name, text in texts.items()}}, tensors)

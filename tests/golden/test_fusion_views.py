"""The views of the fusion paper: canvases and grids by image size, token counts, and rendered pixels."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from builders.images import assert_same_views
from hires_lmm.processing.geometry_hires_lmm import Grid
from hires_lmm.processing.image_processing_hires_lmm import HiResLmmImageProcessor
from hires_lmm.processing.planners_hires_lmm import PLANNERS, PlannerLimits, ViewPlan
from hires_lmm.processing.token_layout_hires_lmm import TokenLayout, count_tokens

from .fusion import GOLDEN


TABLE, RENDERED = GOLDEN.cases["a_plan_table"], GOLDEN.cases["rendered_views"]
TILE, MOST = TABLE["settings"]["tile"], TABLE["settings"]["hd_num"]
OFFSET, STRIDE = 8, 48  # pixels of rendered views that a set keeps


def plan_of(size: list[int], tile: int, most: int, patches: int = 1) -> ViewPlan:
    """The plan of an image, given as width and height, whose views have so many patches a side."""
    limits = PlannerLimits(view_size=tile, patch_size=tile // patches, max_crops=most)
    return PLANNERS["hd"](size[1], size[0], limits)


def row_of(plan) -> dict:
    """What the set says of one image, width before height."""
    return {"canvas": list(plan.canvas[::-1]), "grid_cols_rows": list(plan.grid[::-1])}


def num_tokens(size: list[int], tile: int, most: int, side: int) -> int:
    """Tokens of an image whose views are merged to `side` x `side` tokens, with a mark each."""
    merged = Grid(side, side, (2, 2))
    options = {"crop_order": "views", "separators": {"end": {"place": "view_end"}}}
    layout = TokenLayout((2 * side, 2 * side), {"global": merged, "crops": merged}, options)
    return count_tokens(plan_of(size, tile, most, 2 * side), layout).total


def clamped(canvas: list[int]) -> dict:
    """The published row with a side of 0 replaced by one view."""
    return {"canvas": [side or TILE for side in canvas], "grid_cols_rows": [side // TILE or 1 for side in canvas]}


@pytest.mark.parametrize("column", [None, *(key for key in TABLE["rows"][0] if key.startswith("hd"))])
def test_canvases_and_grids(column):
    most = MOST if column is None else int(column.removeprefix("hd"))
    for row in TABLE["rows"]:
        published = row if column is None else row[column]
        assert row_of(plan_of(row["size"], TILE, most)) == clamped(published["canvas"]), row["size"]


def test_views_and_tokens():
    for row in TABLE["rows"]:
        assert len(plan_of(row["size"], TILE, MOST).views) == row["num_views"]
        side = math.isqrt(row["tokens_with_newline"] // row["num_views"] - 1)
        assert num_tokens(row["size"], TILE, MOST, side) == row["tokens_with_newline"]


def test_sides_of_zero_become_one_view():
    for row in TABLE.get("extreme_rows", []):
        plan = plan_of(row["size"], TILE, MOST)
        assert row_of(plan) == clamped(row["canvas"]), row["size"]
        assert min(plan.resized) >= 1


def test_truncation_drops_a_row():
    for width, height in TABLE.get("truncation_rows", []):
        rows, columns = plan_of([width, height], TILE, MOST).grid
        assert rows == math.ceil(columns * height / width) - 1


def picture(size: list[int], seed: int) -> Image.Image:
    """The picture of a formula, as `image_formula` of the set says."""
    x, y, c = np.arange(size[0])[None, :, None], np.arange(size[1])[:, None, None], np.arange(3)[None, None]
    return Image.fromarray(((x * (3 + 2 * c) + y * (5 + c) + 7 * ((x * y) % 11) + seed) % 256).astype(np.uint8))


def render(size: list[int], seed: int, tile: int, most: int, backend: str = "pillow") -> torch.Tensor:
    processor = HiResLmmImageProcessor(planner="hd", view_size=tile, patch_size=tile, max_crops=most)
    return processor(picture(size, seed), return_tensors="pt", resize_backend=backend)["pixel_values"]


@pytest.mark.parametrize("case", RENDERED["cases"], ids=lambda case: case["name"])
def test_rendered_pixels(case):
    """All crops and global views: of images that shrink, of a square one, of a small one."""
    pixels = render(case["size"], case["formula_seed"], TILE, MOST)
    assert len(pixels) == case["num_views"]
    GOLDEN.close(pixels[:, :, OFFSET::STRIDE, OFFSET::STRIDE], f"output.{case['name']}.views_sub", rtol=0)
    GOLDEN.close(pixels.mean((2, 3)), f"output.{case['name']}.views_mean", atol=1e-5, rtol=0)
    assert_same_views(render(case["size"], case["formula_seed"], TILE, MOST, "torch"), pixels, "torch")


# ---- for a set at other sizes


def remade(seed: int) -> tuple[dict, dict, dict[str, torch.Tensor]]:
    """Table, description of rendered views, and their tensors."""
    generator, tile, most, side = random.Random(seed), 112, 6, 4
    rows = []
    for size in [[generator.randint(20, 900), generator.randint(20, 900)] for _ in range(20)]:
        plan = plan_of(size, tile, most)
        counts = {"num_views": len(plan.views), "tokens_with_newline": num_tokens(size, tile, most, side)}
        rows.append({"size": size, **row_of(plan), **counts, "hd3": row_of(plan_of(size, tile, 3))})
    cases, tensors = [], {}
    for name, size in {"wide": [300, 200], "square": [150, 150], "small": [50, 40]}.items():
        pixels = render(size, seed, tile, most)
        cases.append({"name": name, "size": size, "formula_seed": seed, "num_views": len(pixels)})
        tensors[f"output.{name}.views_sub"] = pixels[:, :, OFFSET::STRIDE, OFFSET::STRIDE]
        tensors[f"output.{name}.views_mean"] = pixels.mean((2, 3))
    return {"settings": {"tile": tile, "hd_num": most}, "rows": rows}, {"cases": cases}, tensors

"""MIA-DPO: where pictures and labels of composites lie, shares of attention, and the numbers of the filters."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hires_lmm.training.data.composites import GRIDS, LABEL_INDENT, grid_composite, inner_composite
from hires_lmm.training.data.mia import Answer, Filters, attention_share

from .base import GoldenSet, write_set


NAME = "mia_dpo"
GOLDEN = GoldenSet(NAME)
SETTINGS = GOLDEN.cases["settings"]


def grid(case: dict, settings: dict):
    pictures = [Image.new("RGB", tuple(size), (9, 90, 200)) for size in case["sizes_wh"]]
    return grid_composite(pictures, tuple(settings["tile"]), settings["margin"])


@pytest.mark.parametrize("case", GOLDEN.cases["collages"], ids=lambda case: str(case["case"]))
def test_collages(case):
    found = grid(case, SETTINGS)
    assert list(found.images[0].size) == case["canvas_wh"]
    assert [list(box) for box in found.boxes] == case["picture_boxes_top_left_bottom_right"]
    assert [{"at_xy": [x, y], "text": text} for text, x, y in found.labels] == case["labels"]
    pixels = np.asarray(found.images[0])
    for top, left, bottom, right in found.boxes:
        assert (pixels[top:bottom, left:right] == (9, 90, 200)).all()
        assert pixels[top - SETTINGS["margin"] : top, left : left + SETTINGS["tile"][0]].min() < 128  # its label
        pixels = pixels.copy()
        pixels[top:bottom, left:right] = 255
    assert (pixels == pixels[..., :1]).all()  # nothing else is coloured


def inner(case: dict, settings: dict):
    pictures = [
        Image.new("RGB", tuple(case[f"{name}_wh"]), colour) for name, colour in (("inner", "red"), ("outer", "blue"))
    ]
    return inner_composite(*pictures, settings["inner_share"])


@pytest.mark.parametrize("case", GOLDEN.cases["picture_in_picture"], ids=lambda case: str(case["inner_wh"]))
def test_pictures_in_pictures(case):
    found = inner(case, SETTINGS)
    assert list(found.boxes[0]) == case["inner_box"] and list(found.images[0].size) == case["outer_wh"]
    top, left, bottom, right = found.boxes[0]
    red = (np.asarray(found.images[0]) == (255, 0, 0)).all(axis=-1)
    assert red[top:bottom, left:right].all() and red.sum() == (bottom - top) * (right - left)


def share(attention: torch.Tensor, case: dict) -> float:
    """Blocks of the map as the release cuts it: the first ones take what is left over."""
    sizes = [
        np.array_split(np.arange(side), number)
        for side, number in zip(attention.shape, case["rows_columns"], strict=True)
    ]
    row, column = (torch.tensor(np.concatenate([[i] * len(part) for i, part in enumerate(parts)])) for parts in sizes)
    pictures = row[:, None] * case["rows_columns"][1] + column
    return attention_share(attention.flatten(), pictures.flatten(), case["picture"] - 1)


@pytest.mark.parametrize("case", GOLDEN.cases["ratios"], ids=lambda case: case["case"])
def test_shares_of_attention(case):
    assert share(GOLDEN[case["case"]], case) == pytest.approx(case["ratio"], abs=1e-5)


def test_the_numbers_of_the_filters():
    limits, filters = SETTINGS["thresholds"], Filters()
    for kind, name in (("grid", "collage"), ("sequence", "sequence")):
        assert {str(number): value for number, value in filters.shares[kind].items()} == limits[name]
        for number, limit in limits[name].items():
            at, below = (
                filters.reason(Answer("no", value, 2.0), "yes", kind, int(number)) for value in (limit, limit - 1e-6)
            )
            assert at == (None if kind == "sequence" else "share") and below is None
    sizes = [len(case["sizes_wh"]) for case in GOLDEN.cases["collages"]]
    assert set(sizes) <= set(GRIDS)
    assert filters.characters == limits["answer_characters"]
    assert f"> {filters.perplexity}" in limits["perplexity"]
    assert GOLDEN.cases["collages"][0]["labels"][0]["at_xy"][0] == LABEL_INDENT


def remake(folder: Path, seed: int) -> None:
    """Another set, from our own functions; the numbers of the filters and the indent stay."""
    settings = {**SETTINGS, "tile": [200, 150], "margin": 44, "inner_share": 0.5}
    rng = np.random.default_rng(seed)
    cases: dict = {"settings": settings, "collages": [], "picture_in_picture": [], "ratios": []}
    for index, number in enumerate((2, 4, 6)):
        case: dict = {"case": index, "sizes_wh": rng.integers(30, 900, (number, 2)).tolist()}
        found = grid(case, settings)
        case["canvas_wh"] = list(found.images[0].size)
        case["picture_boxes_top_left_bottom_right"] = [list(box) for box in found.boxes]
        case["labels"] = [{"at_xy": [x, y], "text": text} for text, x, y in found.labels]
        cases["collages"].append(case)
    for _ in range(3):
        case = {f"{name}_wh": rng.integers(30, 500, 2).tolist() for name in ("inner", "outer")}
        cases["picture_in_picture"].append({**case, "inner_box": list(inner(case, settings).boxes[0])})
    tensors = {}
    for index, rows_columns in enumerate(((1, 2), (2, 2))):
        tensors[f"attention{index}"] = torch.rand(13, 10)
        case = {"case": f"attention{index}", "rows_columns": rows_columns, "picture": 2}
        cases["ratios"].append({**case, "ratio": share(tensors[f"attention{index}"], case)})
    write_set(folder, cases, tensors)

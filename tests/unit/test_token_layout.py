"""What a budget may take away, and which token layouts are refused."""

import json
import re

import pytest

from hires_lmm.processing.geometry_hires_lmm import Grid
from hires_lmm.processing.planners_hires_lmm import PLANNERS, PinpointLimits
from hires_lmm.processing.token_layout_hires_lmm import (
    TokenCount,
    TokenLayout,
    apply_budget,
    count_tokens,
    min_budget,
)


SMALL = {"view_size": 56, "patch_size": 14}
GRIDS = {"global": Grid(4, 4), "crops": Grid(4, 4)}
NEWLINE = {"separators": {"newline": {"place": "token_row_end", "on": "crops"}}}


def layout_with(on, **changes) -> TokenLayout:
    return TokenLayout((4, 4), GRIDS, NEWLINE, budget=None if on is None else {"on": on}, **changes)


def count(on, **limits) -> TokenCount:
    return count_tokens(PLANNERS["llava_next"](112, 112, PinpointLimits(**SMALL, **limits)), layout_with(on))


@pytest.mark.parametrize(
    "on, least", [("all", 9), ("crops", 25), ("global", 73), (["crops", "global"], 9), (None, 88)]
)
def test_min_budget(on, least):
    """A 2 x 2 grid: 16 global tokens, 64 crop tokens, 8 separators."""
    found, layout = count(on), layout_with(on)
    assert found.total == 88 and min_budget(found) == least
    for budget in range(least, 100):
        assert apply_budget(found, layout, budget, 0) == min(budget, 88)
    for budget in (least - 1, 1, 0, -5):
        with pytest.raises(ValueError, match=f"Image 7: max_image_tokens={budget} .*smallest value .* is {least}"):
            apply_budget(found, layout, budget, 7)
    assert apply_budget(found, layout, None, 0) == 88


def test_nothing_to_drop_needs_the_full_count():
    found = count("crops", views="global")
    assert apply_budget(found, layout_with("crops"), 16, 0) == 16
    with pytest.raises(ValueError, match="is 16"):
        apply_budget(found, layout_with("crops"), 15, 0)


def test_counts_of_their_own():
    plan = PLANNERS["llava_next"](1, 5000, PinpointLimits(**SMALL))
    elastic = layout_with("own", own_tokens=10)
    rigid = layout_with(None, own_tokens=10)
    assert count_tokens(plan, elastic).total == count_tokens(plan, rigid).total == 10
    assert [apply_budget(count_tokens(plan, elastic), elastic, n, 0) for n in (1, 7, 10, 99)] == [1, 7, 10, 10]
    with pytest.raises(ValueError, match="=9 is too small; this model uses 10 tokens for it"):
        apply_budget(count_tokens(plan, rigid), rigid, 9, 0)


def test_too_small_a_budget_says_why():
    with pytest.raises(ValueError, match=r"is too small \(separators and protected views stay\)"):
        apply_budget(count("crops"), layout_with("crops"), 3, 0)
    with pytest.raises(ValueError, match=r"is too small \(this model has no part that drops tokens\)"):
        apply_budget(count(None), layout_with(None), 3, 0)
    for value in (True, 2.0, "20"):
        with pytest.raises(ValueError, match="must be an integer"):
            apply_budget(TokenCount(30, 30), layout_with("all"), value, 0)


@pytest.mark.parametrize("layout", [layout_with("crops"), layout_with("own", own_tokens=9, later_tokens=3)])
def test_dict_round_trip(layout):
    values = json.loads(json.dumps(layout.to_dict()))
    assert TokenLayout.from_dict(values).to_dict() == values
    assert set(values) == {"patch_grid", "grids", "layout", "own_tokens", "later_tokens", "budget"}


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"patch_grid": [0, 4]}, "patch_grid=[0, 4]"),
        ({"patch_grid": [4.0, 4]}, "patch_grid=[4.0, 4]"),
        ({"grids": {"crop": {"rows": 1, "cols": 1}}}, "grids={'crop'"),
        ({"grids": {"crops": {"rows": 1}}}, "cols"),
        (
            {"grids": {"crops": {"rows": 2, "cols": 2}}},
            "2x2 tokens, but views of 4x4 patches with stride=(1, 1) have 4x4",
        ),
        ({"layout": {"crop_order": "rows"}}, "crop_order"),
        ({"layout": {"row_end": "learned"}}, "row_end"),
        ({"own_tokens": 0}, "own_tokens=0"),
        ({"later_tokens": True}, "later_tokens=True"),
        ({"budget": {"on": "marks"}}, "on='marks' names no views"),
        ({"budget": {"off": "all"}}, "'on'"),
        ({"extra": 1}, "unknown keys ['extra']"),
    ],
)
def test_wrong_layouts_are_refused_by_name(changes, text):
    grids = {"global": {"rows": 4, "cols": 4}, "crops": {"rows": 4, "cols": 4}}
    with pytest.raises(ValueError, match=f"token_layout.*{re.escape(text)}"):
        TokenLayout.from_dict({"patch_grid": [4, 4], "grids": grids, **changes})

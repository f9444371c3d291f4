"""Token counts against a counter that lays the tokens out one by one, and the budget's limits."""

import itertools
from fractions import Fraction

import pytest

from builders_images import random_sizes
from hires_lmm.processing.planners_hires_lmm import PLANNERS, PlannerLimits
from hires_lmm.processing.token_layout_hires_lmm import TokenCount, TokenLayout, apply_budget, count_tokens


SMALL = {"view_size": 56, "patch_size": 14}
GRIDS = [(4, 4), (2, 2), (3, 3), (1, 1), (0, 0)]
LAYOUTS = [
    TokenLayout((4, 4), (4, 4), (4, 4), row_end=True),
    TokenLayout((4, 4), (4, 4), (2, 2), crop_order="views", view_end=True, row_end=True),
    TokenLayout((4, 4), (2, 2), (3, 3), global_position="last", between_views=True),
    TokenLayout((4, 4), (4, 4), (3, 3), crop_order="views", between_views=True, view_end=True),
    TokenLayout((4, 4), (4, 4), (0, 0), between_views=True, view_end=True, row_end=True),
    TokenLayout((4, 4), (0, 0), (2, 2), between_views=True, row_end=True),
]
LIMITS = [{}, {"unpad": True}, {"unpad": False}, {"views": "global"}, {"views": "crops"}, {"global_view": "pad"}]


def touched(start: int, end: int, patches: int, tokens: int) -> set[int]:
    """Token indices whose share of the view meets any patch of a span, by comparing exact fractions."""
    found = set()
    for patch in range(start, end):
        for token in range(tokens):
            first, last = Fraction(token, tokens), Fraction(token + 1, tokens)
            if first < Fraction(patch + 1, patches) and last > Fraction(patch, patches):
                found.add(token)
    return found


def cells(view, grid, patches) -> tuple[list[tuple[int, int]], set[int]]:
    rows = touched(view.span[0], view.span[1], patches, grid[0])
    cols = touched(view.span[2], view.span[3], patches, grid[1])
    return list(itertools.product(rows, cols)), rows


def lay_out(plan, layout) -> list[str]:
    """The sequence of an image as a list of words."""
    blocks = []
    image = ["global"] * len(cells(plan.views[0], layout.global_grid, 4)[0])
    crops, stitched, stitched_rows = [], set(), set()
    for view in plan.views[1:]:
        own, rows = cells(view, layout.crop_grid, 4)
        if layout.crop_order == "raster":
            stitched |= {(view.row, row, view.col, col) for row, col in own}
            stitched_rows |= {(view.row, row) for row in rows}
        elif own:
            block = []
            for row in sorted(rows):
                block += ["crop"] * sum(cell[0] == row for cell in own) + ["mark"] * layout.row_end
            crops.append(block)
    if layout.crop_order == "raster":
        block = []
        for place in sorted(stitched_rows):
            block += ["crop"] * sum(cell[:2] == place for cell in stitched) + ["mark"] * layout.row_end
        crops = [block] if block else []
    blocks = [*crops, image] if layout.global_position == "last" else [image, *crops]
    blocks = [block for block in blocks if block]
    words = []
    for index, block in enumerate(blocks):
        words += ["mark"] * (layout.between_views and index > 0) + block + ["mark"] * layout.view_end
    return words


@pytest.mark.parametrize("planner", PLANNERS)
def test_counts_equal_the_laid_out_sequence(planner):
    empty = 0
    for index, (height, width) in enumerate(random_sizes(500, seed=5)):
        limits = PlannerLimits(**SMALL, **LIMITS[index % len(LIMITS)])
        if planner in ("slime", "multiple"):
            limits = PlannerLimits(**SMALL, **LIMITS[index % len(LIMITS)], max_crops=6)
        plan = PLANNERS[planner](height, width, limits)
        for layout in LAYOUTS:
            words = lay_out(plan, layout)
            found = count_tokens(plan, layout)
            expected = TokenCount(len(words), words.count("global"), words.count("crop"), words.count("mark"))
            assert found == expected, (height, width, limits, layout)
            empty += not words
    assert empty < 1500


@pytest.mark.parametrize("layout", [*LAYOUTS, TokenLayout((4, 4), (4, 4), (4, 4), fixed_tokens=9, later_tokens=3)])
def test_dict_round_trip(layout):
    import json

    values = json.loads(json.dumps(layout.to_dict()))
    assert TokenLayout.from_dict(values) == layout
    assert set(values) == {
        *("patch_grid", "global_grid", "crop_grid", "global_position", "crop_order", "between_views", "row_end"),
        *("view_end", "fixed_tokens", "later_tokens", "budget"),
    }


def layout_with(on, **changes):
    return TokenLayout((4, 4), (4, 4), (4, 4), row_end=True, budget=None if on is None else {"on": on}, **changes)


@pytest.mark.parametrize(
    "on, least",
    [("all", 8 + 1), ("crops", 16 + 8 + 1), ("global", 8 + 64 + 1), (None, 88)],
)
def test_smallest_budget(on, least):
    """A 2 x 2 grid: 16 global tokens, 64 crop tokens, 8 marks."""
    plan = PLANNERS["llava_next"](112, 112, PlannerLimits(**SMALL))
    layout = layout_with(on)
    count = count_tokens(plan, layout)
    assert count == TokenCount(88, 16, 64, 8)
    for budget in range(least, 100):
        assert apply_budget(count, layout, budget, 0) == min(budget, 88)
    for budget in (least - 1, 1, 0, -5):
        with pytest.raises(ValueError, match=f"Image 7: max_image_tokens={budget} .*smallest value .* is {least}"):
            apply_budget(count, layout, budget, 7)
    assert apply_budget(count, layout, None, 0) == 88


def test_nothing_to_drop_needs_the_full_count():
    plan = PLANNERS["llava_next"](112, 112, PlannerLimits(**SMALL, views="global"))
    layout = layout_with("crops")
    count = count_tokens(plan, layout)
    assert apply_budget(count, layout, 16, 0) == 16
    with pytest.raises(ValueError, match="is 16"):
        apply_budget(count, layout, 15, 0)


def test_fixed_tokens():
    plan = PLANNERS["llava_next"](1, 5000, PlannerLimits(**SMALL))
    elastic = TokenLayout((4, 4), (4, 4), (4, 4), fixed_tokens=10, budget={"on": "fixed"})
    rigid = TokenLayout((4, 4), (4, 4), (4, 4), fixed_tokens=10)
    assert count_tokens(plan, elastic).total == count_tokens(plan, rigid).total == 10
    assert [apply_budget(count_tokens(plan, elastic), elastic, n, 0) for n in (1, 7, 10, 99)] == [1, 7, 10, 10]
    assert apply_budget(count_tokens(plan, rigid), rigid, 10, 0) == 10
    with pytest.raises(ValueError, match="=9 is too small; this model uses 10 tokens for every image"):
        apply_budget(count_tokens(plan, rigid), rigid, 9, 0)


@pytest.mark.parametrize("value", [True, 2.0, "20"])
def test_budget_types(value):
    with pytest.raises(ValueError, match="must be an integer"):
        apply_budget(TokenCount(30, 30), LAYOUTS[0], value, 0)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"patch_grid": [0, 4]}, "patch_grid"),
        ({"crop_grid": [2]}, "crop_grid"),
        ({"global_grid": [2.0, 2]}, "global_grid"),
        ({"global_position": "middle"}, "'first' or 'last'"),
        ({"crop_order": "rows"}, "'raster' or 'views'"),
        ({"row_end": 1}, "row_end=1"),
        ({"fixed_tokens": 0}, "fixed_tokens=0"),
        ({"budget": {"on": "fixed"}}, "'all'.*'crops'.*'global'"),
        ({"budget": {"on": "all", "rate": 2}}, "budget="),
        ({"fixed_tokens": 5, "budget": {"on": "all"}}, "'fixed'"),
        ({"extra": 1}, "unknown keys \\['extra'\\]"),
    ],
)
def test_wrong_layouts(changes, text):
    with pytest.raises(ValueError, match=text):
        TokenLayout.from_dict({"patch_grid": [4, 4], "global_grid": [4, 4], "crop_grid": [4, 4], **changes})


def test_missing_keys_and_other_types():
    with pytest.raises(ValueError, match="no global_grid, crop_grid"):
        TokenLayout.from_dict({"patch_grid": [4, 4]})
    with pytest.raises(ValueError, match="must be a dict"):
        TokenLayout.from_dict([4, 4])


def test_plan_and_layout_must_agree():
    plan = PLANNERS["slime"](10, 10, PlannerLimits())
    with pytest.raises(ValueError, match="24x24 patches, token_layout has 4x4"):
        count_tokens(plan, LAYOUTS[0])

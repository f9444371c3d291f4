"""Token counts against a counter that lays the tokens out one by one, and the budget's limits."""

import itertools
import re
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

import pytest

from builders.images import random_sizes
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
    TokenLayout((4, 4), (1, 1), (1, 1), between_views=True, view_end=True),
    TokenLayout((4, 4), (2, 3), (3, 1), row_end=True, view_end=True),
]
LIMITS = [{}, {"unpad": True}, {"unpad": False}, {"views": "global"}, {"views": "crops"}, {"global_view": "pad"}]


@lru_cache
def touched(start: int, end: int, patches: int, tokens: int) -> frozenset[int]:
    """Token indices whose share of the view meets any patch of a span, by comparing exact fractions."""
    found = set()
    for patch in range(start, end):
        for token in range(tokens):
            first, last = Fraction(token, tokens), Fraction(token + 1, tokens)
            if first < Fraction(patch + 1, patches) and last > Fraction(patch, patches):
                found.add(token)
    return frozenset(found)


def cells(view, grid, patches) -> tuple[list[tuple[int, int]], frozenset[int]]:
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


@pytest.mark.parametrize(
    "changes",
    [
        *[{"fixed_tokens": value} for value in (True, 1.0, "1", -1)],
        *[{"later_tokens": value} for value in (True, 0, 2.5)],
        *[{"budget": value} for value in ("all", {}, {"off": "all"}, {"on": "marks"}, {"on": None}, ["on"])],
        *[{"patch_grid": value} for value in ([True, 4], [4, 0], 4, "44", [4, 4, 4])],
        *[{"global_grid": value} for value in ([-1, 2], [2, -1], [False, 2], {4, 5})],
        *[{name: value} for name in ("between_views", "row_end", "view_end") for value in (0, None, "yes")],
        *[{"global_position": "middle"}, {"crop_order": 1}],
    ],
)
def test_more_wrong_layouts(changes):
    with pytest.raises(ValueError, match=f"token_layout: {next(iter(changes))}="):
        TokenLayout.from_dict({"patch_grid": [4, 4], "global_grid": [4, 4], "crop_grid": [4, 4], **changes})


def test_errors_name_what_is_allowed():
    grids = {"patch_grid": [4, 4], "global_grid": [4, 4], "crop_grid": [4, 4]}
    keys = (
        "patch_grid, global_grid, crop_grid, global_position, crop_order, between_views, row_end, view_end, "
        "fixed_tokens, later_tokens, budget"
    )
    choices = "{'on': 'all'} or {'on': 'crops'} or {'on': 'global'} where fixed_tokens=None"
    for values, text in (
        ({**grids, "b": 1, "a": 2}, f"token_layout has unknown keys ['a', 'b']; its keys are {keys}."),
        ({"crop_grid": [1, 1]}, f"token_layout has no patch_grid, global_grid; its keys are {keys}."),
        ({**grids, "budget": 1}, f"token_layout: budget=1 must be null or {choices}."),
        ({**grids, "crop_order": "x"}, "token_layout: crop_order='x' is unknown; choose 'raster' or 'views'."),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            TokenLayout.from_dict(values)


def test_the_smallest_values_are_accepted():
    tiny = TokenLayout([1, 1], (0, 0), [0, 0], fixed_tokens=1, later_tokens=1, budget={"on": "fixed"})
    assert (tiny.patch_grid, tiny.global_grid, tiny.fixed_tokens, tiny.later_tokens) == ((1, 1), (0, 0), 1, 1)
    plain = TokenLayout((4, 5), (2, 3), (1, 2))
    assert plain == TokenLayout((4, 5), (2, 3), (1, 2), "first", "raster", False, False, False, None, None, None)
    assert plain.to_dict()["patch_grid"] == [4, 5]
    assert TokenCount(7) == TokenCount(7, 0, 0, 0)


def test_a_grid_that_is_not_square_belongs_to_no_plan():
    plan = PLANNERS["slime"](10, 10, PlannerLimits(**SMALL))
    for grid in ((4, 5), (5, 4)):
        with pytest.raises(ValueError, match=f"4x4 patches, token_layout has {grid[0]}x{grid[1]}"):
            count_tokens(plan, TokenLayout(grid, (4, 4), (4, 4)))


def test_one_token_that_may_be_dropped_is_kept():
    """At least one of the tokens that a part chooses from stays, so one alone cannot be dropped."""
    layout = TokenLayout((4, 4), (1, 1), (1, 1), budget={"on": "global"})
    assert apply_budget(TokenCount(5, 1, 4, 0), layout, 5, 0) == 5
    with pytest.raises(ValueError, match="smallest value for this image is 5, its full count is 5"):
        apply_budget(TokenCount(5, 1, 4, 0), layout, 4, 0)
    assert apply_budget(TokenCount(5, 2, 3, 0), layout, 4, 0) == 4


def test_too_small_a_budget_says_why():
    count, marked = TokenCount(88, 16, 64, 8), layout_with("crops")
    with pytest.raises(ValueError, match=r"is too small \(marks and protected views stay\)"):
        apply_budget(count, marked, 3, 0)
    with pytest.raises(ValueError, match=r"is too small \(this model has no part that drops tokens\)"):
        apply_budget(count, layout_with(None), 3, 0)
    elastic = TokenLayout((4, 4), (4, 4), (4, 4), fixed_tokens=10, budget={"on": "fixed"})
    with pytest.raises(ValueError, match="marks and protected views stay"):
        apply_budget(TokenCount(10), elastic, 0, 0)


def test_an_empty_span_counts_nothing_wherever_it_lies():
    plan = PLANNERS["llava_next"](56, 112, PlannerLimits(**SMALL))
    views = tuple(replace(view, span=(1, 1, 0, 4)) for view in plan.views)
    layout = TokenLayout((4, 4), (3, 3), (3, 3), row_end=True)
    assert count_tokens(replace(plan, views=views), layout) == TokenCount(0, 0, 0, 0)

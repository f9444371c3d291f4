"""Whole plans written out by hand for views of 56 pixels with 4 x 4 patches, and what the limits let pass."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest
from PIL import Image

from builders.images import random_sizes
from hires_lmm.processing.planners_hires_lmm import PLANNERS
from hires_lmm.processing.view_plans_hires_lmm import View, ViewPlan


WHOLE = (0, 4, 0, 4)
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
PILLOW = Image.Resampling


def plan(planner: str, height: int, width: int, **changes) -> ViewPlan:
    options = PLANNERS[planner].options(**{"view_size": 56, "patch_size": 14, **changes})
    return PLANNERS[planner](height, width, options)


def assembled(grid, image_box, row_edges, col_edges, image_span=WHOLE, row_spans=None, col_spans=None) -> tuple:
    """The views of a plan from the edges of its rows and columns."""
    row_spans, col_spans = row_spans or [(0, 4)] * grid[0], col_spans or [(0, 4)] * grid[1]
    views = [View(0, *grid, 0, 0, image_box, image_span, (4, 4))]
    for row in range(grid[0]):
        for col in range(grid[1]):
            box = (row_edges[row], col_edges[col], row_edges[row + 1], col_edges[col + 1])
            views.append(View(1, *grid, row, col, box, (*row_spans[row], *col_spans[col]), (4, 4)))
    return tuple(views)


def expected(size, views, canvas, resized, paste, **others) -> ViewPlan:
    defaults = {
        "fill": BLACK,
        "global_size": (56, 56),
        "global_paste": (0, 0),
        "global_fill": BLACK,
        "resample": (None, None),
    }
    return ViewPlan(size, 56, 14, views, canvas, resized, paste, **{**defaults, **others})


# ---- one image a rule


def test_slime():
    """2 x 3 views lose no pixel of 90 x 150; the width decides the scale 1.12: 90 becomes 101 (rounded up)."""
    views = assembled(
        (2, 3), (-7454, 0, 30494, 38400), [-1141, 11634, 24409], [0, 12800, 25600, 38400], image_span=WHOLE
    )
    wanted = expected((90, 150), views, (112, 168), (101, 168), (5, 0), global_size=(34, 56), global_paste=(11, 0))
    assert plan("slime", 90, 150) == wanted


def test_multiple():
    """60 x 90 at its own scale on 2 x 2 views: 4 rows and 34 columns of pixels in the last ones."""
    edges = [0, 56 * 256, 112 * 256]
    views = assembled(
        (2, 2), (0, 0, 60 * 256, 90 * 256), edges, edges, row_spans=[(0, 4), (0, 1)], col_spans=[(0, 4), (0, 3)]
    )
    assert plan("multiple", 60, 90, unpad=True) == expected((60, 90), views, (112, 112), (60, 90), (0, 0))


def test_multiple_shrunk():
    """Two views for 200 x 150: one above the other lets it keep 56/150 of its size, side by side only 56/200."""
    found = plan("multiple", 200, 150, max_crops=2)
    assert (found.grid, found.resized, found.canvas) == ((2, 1), (74, 56), (112, 56))
    assert plan("multiple", 56, 112, max_crops=2).resized == (56, 112)
    assert plan("multiple", 57, 112, max_crops=2).resized == (56, 110)
    assert plan("multiple", 1, 1000, max_crops=1).resized == (1, 56)
    assert plan("multiple", 56, 36 * 56).grid == plan("multiple", 56, 37 * 56).grid == (1, 36)


def test_hd_small_and_square_images_keep_their_scale_on_a_square():
    small = plan("hd", 20, 40)
    assert (small.grid, small.canvas, small.resized) == ((2, 4), (112, 224), (112, 224))
    assert (small.global_square, small.resample) == (40, (PILLOW.BICUBIC, PILLOW.BILINEAR))
    assert (small.global_size, small.global_paste) == ((28, 56), (14, 0))
    assert small.views[0].box == (-2560, 0, 7680, 10240)
    square = plan("hd", 70, 70)
    assert (square.global_square, square.global_size, square.transposed) == (70, (56, 56), False)
    assert (square.grid, square.resized, square.views[0].box) == ((3, 3), (168, 168), (0, 0, 17920, 17920))
    assert plan("hd", 40, 20).views[0].box == (0, -2560, 10240, 7680)
    assert plan("hd", 20, 56).global_square == 56
    assert plan("hd", 20, 57).global_square is None and plan("hd", 57, 20).global_square is None
    assert plan("hd", 20, 40, global_view="squeeze").global_square is None


def test_hd_keeps_a_pixel_of_the_thinnest_image():
    assert (plan("hd", 4000, 1).resized, plan("hd", 4000, 1).paste) == ((504, 1), (0, 27))
    assert plan("hd", 4000, 1).global_size == (56, 1)
    assert (plan("hd", 1, 4000).resized, plan("hd", 1, 4000).global_size) == ((1, 504), (1, 56))


def test_llava_next_cuts_columns():
    """240 becomes 135 of 168 pixels; of 12 patch columns int(9.6) = 9 hold the image, one is cut on each side."""
    views = assembled(
        (1, 3),
        (0, 0, 25600, 61440),
        [0, 25600],
        [half_up(Fraction((cut - 16) * 240 * 256, 135)) for cut in (0, 56, 112, 168)],
        col_spans=[(1, 4), (0, 4), (0, 3)],
    )
    assert plan("llava_next", 100, 240) == expected((100, 240), views, (56, 168), (56, 135), (0, 16))


def half_up(value: Fraction) -> int:
    return floor(value + Fraction(1, 2))


@pytest.mark.parametrize("planner", PLANNERS)
def test_boxes_are_rounded_half_up(planner):
    for height, width in random_sizes(60, seed=8):
        found = plan(planner, height, width, **({"max_crops": 6} if planner in ("slime", "multiple") else {}))
        for view in (view for view in found.views if view.kind == 1):
            side = found.view_pixels(view)
            for axis, place in ((0, view.row), (1, view.col)):
                for edge, cut in ((view.box[axis], place), (view.box[axis + 2], place + 1)):
                    at = cut * side[axis] - found.paste[axis]
                    source = Fraction(at * found.size[axis] * 256, found.resized[axis])
                    assert edge == half_up(source), (height, width)


def test_dual():
    """100 x 50 squeezed to 2 x 2 views, and every second pixel of it: each strided view shows the whole image."""
    found, whole = plan("dual", 100, 50, n=2), (0, 0, 25600, 12800)
    crops = assembled((2, 2), whole, [0, 12800, 25600], [0, 6400, 12800])
    strided = [View(2, 2, 2, row, col, whole, WHOLE, (4, 4)) for row in (0, 1) for col in (0, 1)]
    assert found == expected((100, 50), (*crops, *strided), (112, 112), (112, 112), (0, 0))
    alone = plan("dual", 100, 50, views="global")
    assert (len(alone.views), alone.grid, alone.canvas) == (1, (0, 0), (0, 0))


def test_llava_uhd():
    """90 x 150 is 4.3 areas: two rows of three; a slice of 45 x 50 as 53 x 58 pixels, so 3 x 4 patches."""
    found = plan("llava_uhd", 90, 150)
    whole = View(0, 2, 3, 0, 0, (0, 0, 23040, 38400), (0, 3, 0, 5), (3, 5))
    crops = [
        View(1, 2, 3, r, c, (11520 * r, 12800 * c, 11520 * r + 11520, 12800 * c + 12800), (0, 3, 0, 4), (3, 4))
        for r in (0, 1)
        for c in (0, 1, 2)
    ]
    wanted = expected((90, 150), (whole, *crops), (84, 168), (84, 168), (0, 0), global_size=(42, 70))
    assert found == wanted
    assert plan("llava_uhd", 90, 150, views="crops").views[0].span == (0, 0, 0, 0)
    assert plan("llava_uhd", 90, 150, views="global").views == (
        View(0, 0, 0, 0, 0, (0, 0, 23040, 38400), (0, 3, 0, 5), (3, 5)),
    )


def test_the_global_view_is_unpadded_by_pixels():
    """40 x 200 padded to 12 x 56 pixels, 22 from the top: patch rows 1 and 2 of 4."""
    found = plan("slime", 40, 200, unpad=True)
    assert (found.global_size, found.global_paste) == ((12, 56), (22, 0))
    assert found.views[0].span == (1, 3, 0, 4)
    turned = plan("slime", 200, 40, unpad=True)
    assert turned.views[0].span == (0, 4, 1, 3)


def test_pixels_beyond_the_last_whole_patch_are_not_seen():
    found = plan("multiple", 60, 60, view_size=60, unpad=True)
    assert found.patch_grid == 4 and [view.span for view in found.views] == [WHOLE, WHOLE]
    late = plan("multiple", 118, 60, view_size=59, unpad=True)
    assert [view.span for view in late.views[1:]] == [(0, 4, 0, 4), (0, 4, 0, 1)] * 2


# ---- what is chosen


def test_the_first_of_equal_canvases_is_taken():
    assert plan("slime_release", 10, 10).grid == (2, 1)
    assert plan("llava_next", 10, 10).grid == (1, 2)
    assert plan("llava_next", 10, 10, pinpoints=[[112, 56], [56, 112]]).grid == (2, 1)


@pytest.mark.parametrize(
    "most, grid", [(36, (6, 6)), (35, (5, 6)), (12, (3, 4)), (9, (3, 3)), (3, (1, 2)), (1, (1, 1))]
)
def test_slime_takes_the_best_grid_that_is_allowed(most, grid):
    """Three views side by side show no more of 3600 x 3700 than two: the height decides."""
    assert plan("slime", 3600, 3700, max_crops=most).grid == grid


def test_slime_release_counts_view_areas():
    """From one area to more than six; the count may be one more or less where that fits better."""
    for side, count in ((56, 1), (57, 2), (79, 2), (80, 3), (97, 4), (112, 4), (113, 5), (125, 5), (400, 6)):
        rows, cols = plan("slime_release", side, side).grid
        assert max(2, count - 1) <= rows * cols <= max(2, count) + 1
    assert plan("slime_release", 56, 10000).grid == (1, 7)
    assert plan("slime_release", 56, 2000, max_crops=2).grid == (1, 3)


def test_max_crops_counts_views_of_pinpoints():
    points = [[112, 112], [56, 168], [56, 56]]
    assert plan("slime", 500, 500, pinpoints=points).grid == (2, 2)
    assert plan("slime", 500, 500, pinpoints=points, max_crops=4).grid == (2, 2)
    assert plan("slime", 500, 500, pinpoints=points, max_crops=3).grid in ((1, 3), (1, 1))
    assert plan("slime", 100, 500, pinpoints=points, max_crops=3).grid == (1, 3)
    assert plan("slime", 100, 500, pinpoints=points, max_crops=2).grid == (1, 1)
    with pytest.raises(ValueError, match="max_crops=1 leaves no canvas: the smallest of the list has 3 crops"):
        plan("llava_next", 5, 5, pinpoints=points[:2], max_crops=1)


# ---- what is accepted


@pytest.mark.parametrize("planner", ["slime_release", "multiple", "hd"])
def test_planners_without_pinpoints(planner):
    options = {"view_size": 56, "patch_size": 14, "pinpoints": None}
    assert PLANNERS[planner].build_options(planner, options).view_size == 56
    with pytest.raises(ValueError, match=f"planner='{planner}' takes no pinpoints; its options are view_size"):
        PLANNERS[planner].build_options(planner, {**options, "pinpoints": [[56, 56]]})


def test_sizes_may_be_any_integers():
    found = plan("slime", np.int64(90), np.uint8(150))
    assert found == plan("slime", 90, 150) and [type(side) for side in found.size] == [int, int]

"""The planners against transformers' own LLaVA-NeXT, and as exact tilings; published tables are in `tests/golden`."""

import itertools

import pytest
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from builders.images import picture, random_sizes
from hires_lmm.conversion import preset_processor
from hires_lmm.processing.geometry_hires_lmm import Grid
from hires_lmm.processing.planners_hires_lmm import PLANNERS
from hires_lmm.processing.token_layout_hires_lmm import TokenLayout, count_tokens
from hires_lmm.processing.view_plans_hires_lmm import BOX_UNIT, PinpointLimits


LLAVA_NEXT_LAYOUT = TokenLayout(
    (24, 24),
    {"global": Grid(24, 24), "crops": Grid(24, 24)},
    {"separators": {"newline": {"place": "token_row_end", "on": "crops"}}},
)
LLAVA_NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
NAMED_SIZES = [(1, 1), (14, 1296), (1296, 14), (333, 1999), (4000, 400), (1, 4000), (4000, 1), (336, 336), (672, 672)]


def kinds_of(plan) -> dict[int, int]:
    """Tokens of a plan by kind, in LLaVA-NeXT's arrangement; separators are -1."""
    return LLAVA_NEXT_LAYOUT.arrangement.count([view.shape for view in plan.views])


def llava_next_processor() -> LlavaNextProcessor:
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.patch_size, processor.num_additional_image_tokens = 14, 0
    processor.image_processor = type("ImageProcessor", (), {"image_grid_pinpoints": LLAVA_NEXT_PINPOINTS})()
    return processor


def test_llava_next_equals_transformers():
    processor = llava_next_processor()
    cut_away = 0
    for height, width in NAMED_SIZES + random_sizes(1500, seed=1):
        plan = PLANNERS["llava_next"](height, width, PinpointLimits())
        best = select_best_resolution((height, width), LLAVA_NEXT_PINPOINTS)
        assert plan.canvas == best
        image = type("Image", (), {"shape": (3, height, width)})()
        assert plan.resized == get_patch_output_size_of(image, best)
        assert plan.paste == tuple((best[axis] - plan.resized[axis]) // 2 for axis in (0, 1))
        count = count_tokens(plan, LLAVA_NEXT_LAYOUT)
        assert count.total == processor._get_number_of_features(height, width, 336, 336), (height, width)
        cut_away += kinds_of(plan)[1] == 0
    assert cut_away > 10


def get_patch_output_size_of(image, resolution) -> tuple[int, int]:
    import numpy as np

    array = np.broadcast_to(np.zeros((), np.uint8), image.shape)
    return tuple(get_patch_output_size(array, resolution, "channels_first"))


@pytest.mark.parametrize("size, crops, marks", [((14, 1296), 0, 0), ((1296, 14), 0, 72), ((4000, 1), 0, 24)])
def test_llava_next_can_lose_all_patches(size, crops, marks):
    """A cut to zero rows leaves no marks, a cut to zero columns leaves the mark of every row."""
    plan = PLANNERS["llava_next"](*size, PinpointLimits())
    assert kinds_of(plan) == {0: 576, 1: crops, -1: marks}


def test_llava_next_without_unpadding_enters_whole():
    plan = PLANNERS["llava_next"](333, 1999, PinpointLimits(unpad=False))
    assert plan.grid == (1, 3)
    assert all(view.span == (0, 24, 0, 24) for view in plan.views)


def test_multiple_shrinks_least_beyond_the_limit():
    """Compared with a search over all scales in steps of 1/20000."""
    for height, width, most in [(5000, 4000, 9), (10000, 300, 6), (900, 1100, 4), (3000, 3000, 1), (1, 5000, 3)]:
        plan = PLANNERS["multiple"](height, width, PinpointLimits(max_crops=most))
        scales = [step / 20000 for step in range(20000, 0, -1)]
        fits = lambda scale: -(-height * scale // 336) * -(-width * scale // 336) <= most  # noqa: E731
        best = next(scale for scale in scales if fits(scale))
        assert plan.grid[0] * plan.grid[1] <= most
        assert max(plan.resized) == pytest.approx(best * max(height, width), abs=1 + max(height, width) / 20000)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        *[("slime", 6), ("slime", 1), ("multiple", 5), ("hd", 4), ("llava_next", 3), ("llava_next", 2)],
        *[("dual", 8), ("dual", 1), ("llava_uhd", 6), ("llava_uhd", 2)],
    ],
)
def test_max_crops_is_respected(name, limit):
    grids = set()
    for height, width in random_sizes(200, seed=2):
        plan = PLANNERS[name](height, width, PLANNERS[name].options(max_crops=limit))
        grids.add(plan.grid[0] * plan.grid[1])
    assert min(grids) >= (name != "llava_uhd") and max(grids) == (4 if (name, limit) == ("dual", 8) else limit)


def test_slime_release_may_have_one_crop_more():
    grids = {PLANNERS["slime_release"](*size, PinpointLimits(max_crops=6)).grid for size in random_sizes(500)}
    assert max(rows * cols for rows, cols in grids) == 7


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("unpad", [None, True, False])
def test_boxes_and_spans_tile(planner, unpad):
    limits = PLANNERS[planner].options(unpad=unpad)
    for height, width in random_sizes(2000, seed=3):
        plan = PLANNERS[planner](height, width, limits)
        rows, cols = plan.grid
        kinds = [1, 2] if planner == "dual" else [1]
        assert [view.kind for view in plan.views] == [0, *(kind for kind in kinds for _ in range(rows * cols))]
        places = [(row, col) for row in range(rows) for col in range(cols)]
        assert [(view.row, view.col) for view in plan.views[1:]] == places * len(kinds)
        crops = {(view.row, view.col): view for view in plan.views if view.kind == 1}
        if crops:
            check_boxes_tile(plan, crops, height, width)
            check_spans_tile(plan, crops)


def check_boxes_tile(plan, crops, height, width):
    """Neighbours share their edges, the outer edges enclose the image, every edge is where the canvas maps to."""
    rows, cols = plan.grid
    for (row, col), view in crops.items():
        top, left, bottom, right = view.box
        assert top < bottom and left < right
        if (row + 1, col) in crops:
            assert crops[row + 1, col].box[0] == bottom
        if (row, col + 1) in crops:
            assert crops[row, col + 1].box[1] == left + (right - left)
        exact = (row * plan.view_pixels(view)[0] - plan.paste[0]) * height / plan.resized[0] * BOX_UNIT
        assert abs(top - exact) <= 0.5 + 1e-6 * abs(exact)
    first, last = crops[0, 0].box, crops[rows - 1, cols - 1].box
    global_box = plan.views[0].box
    for top, left, bottom, right in [(*first[:2], *last[2:]), global_box]:
        assert top <= 0 and left <= 0 and bottom >= height * BOX_UNIT and right >= width * BOX_UNIT
    assert all(0 <= plan.paste[axis] <= plan.canvas[axis] - plan.resized[axis] for axis in (0, 1))
    shown = plan.view_pixels(plan.views[0])
    assert all(0 <= plan.global_paste[axis] <= shown[axis] - plan.global_size[axis] for axis in (0, 1))


def check_spans_tile(plan, crops):
    """On the stitched patch map the spans are one rectangle without holes."""
    for axis in (0, 1):
        size = crops[0, 0].patches[axis]
        marked = [False] * (plan.grid[axis] * size)
        for place, view in crops.items():
            start, end = view.span[2 * axis : 2 * axis + 2]
            assert 0 <= start <= end <= size
            if place[1 - axis] == 0:
                for patch in range(start, end):
                    marked[place[axis] * size + patch] = True
            else:
                same = crops[(place[0], 0) if axis == 0 else (0, place[1])]
                assert same.span[2 * axis : 2 * axis + 2] == (start, end)
        assert sum(a != b for a, b in itertools.pairwise(marked)) <= 2


@pytest.mark.parametrize("planner", ["slime", "slime_release", "multiple", "hd"])
def test_unpadding_keeps_exactly_the_patches_with_pixels(planner):
    for height, width in random_sizes(150, seed=4):
        plan = PLANNERS[planner](height, width, PinpointLimits(unpad=True))
        for view in plan.views[1:]:
            for axis, place in ((0, view.row), (1, view.col)):
                start, end = plan.paste[axis], plan.paste[axis] + plan.resized[axis]
                origin = place * 336
                shown = [
                    patch for patch in range(24) if origin + patch * 14 < end and origin + (patch + 1) * 14 > start
                ]
                expected = (shown[0], shown[-1] + 1) if shown else (0, 0)
                assert view.span[2 * axis : 2 * axis + 2] == expected


def test_views_switch():
    alone = PLANNERS["slime"](500, 500, PinpointLimits(views="global"))
    assert len(alone.views) == 1 and alone.grid == (0, 0) and alone.canvas == (0, 0)
    crops = PLANNERS["slime"](500, 500, PinpointLimits(views="crops"))
    assert crops.views[0].span == (0, 0, 0, 0) and crops.views[0].kind == 0 and len(crops.views) == 5


@pytest.mark.parametrize("square", [None, "pad", "crop"])
@pytest.mark.parametrize("name", PLANNERS)
def test_without_enlarging_there_are_no_crops_of_what_the_global_view_shows_whole(name, square):
    """At its own size or larger: otherwise the plan is that of the rule, whatever is asked."""
    planner, small = PLANNERS[name], 0
    for size in [*NAMED_SIZES, *random_sizes(200, seed=3), (336, 337), (300, 200), (335, 336), (337, 336), (40, 700)]:
        plain = planner(*size, planner.options(square=square))
        found = planner(*size, planner.options(square=square, enlarge=False))
        drawn = {None: size, "pad": (max(size),) * 2, "crop": (min(size),) * 2}[square]
        shown = plain.global_size[0] >= drawn[0] and plain.global_size[1] >= drawn[1]
        small += shown
        if shown:
            assert found.grid == (0, 0) and found == planner(*size, planner.options(square=square, views="global"))
        else:
            assert found == plain
        for views in ("crops", "global"):
            options = {"views": views, "square": square}
            assert planner(*size, planner.options(**options, enlarge=False)) == planner(
                *size, planner.options(**options)
            )
        assert planner(*size, planner.options(square=square, enlarge=True)) == plain
    assert small > 20


def test_presets_without_released_weights_do_not_enlarge_and_count_so():
    kept = {"llava_hd", "vlsa", "hires_llava"}
    for name in ("llava_next", "slime", "slime_release", "monkey", "fusion", "llava_uhd", "inf_llava", *kept):
        processor = preset_processor(name).image_processor
        assert (processor.enlarge is False) == (name in kept)
        views = processor(picture(336, 300), return_tensors="pt")["view_positions"]
        assert views[0, 5] == processor.image_tokens(336, 300) and (len(views) == 1) == (name in {*kept, "llava_uhd"})


def test_global_view_squeeze_and_pad():
    squeezed = PLANNERS["slime"](200, 400, PinpointLimits(global_view="squeeze"))
    assert squeezed.global_size == (336, 336) and squeezed.views[0].box == (0, 0, 200 * 256, 400 * 256)
    padded = PLANNERS["slime"](200, 400, PinpointLimits(unpad=True))
    assert (padded.global_size, padded.global_paste) == ((168, 336), (84, 0))
    assert padded.views[0].box == (-100 * 256, 0, 300 * 256, 400 * 256)
    assert padded.views[0].span == (6, 18, 0, 24)
    assert PLANNERS["slime_release"](200, 400, PinpointLimits()).global_size == (336, 336)
    assert PLANNERS["hd"](200, 400, PinpointLimits()).global_size == (168, 336)


def test_view_size_with_a_remainder():
    plan = PLANNERS["llava_next"](700, 500, PinpointLimits(view_size=384, patch_size=14))
    assert plan.patch_grid == 27 and plan.canvas == (768, 768)
    unpadded = PLANNERS["slime"](700, 500, PinpointLimits(view_size=384, patch_size=14, unpad=True))
    assert all(end <= 27 for view in unpadded.views for end in view.span)


@pytest.mark.parametrize(
    "planner, arguments, text",
    [
        ("slime", {"max_crops": 37}, "from 1 to 36"),
        ("slime_release", {"max_crops": 1}, "at least 2"),
        ("llava_next", {"max_crops": 1}, "smallest of the list has 2"),
        ("dual", {"n": 0}, "n=0 must be an integer of at least 1"),
        ("dual", {"n": 65}, "n=65 asks for more than 4096 crops"),
        ("dual", {"follow_aspect": 1}, "follow_aspect=1 must be True or False"),
        ("dual", {"unpad": True, "global_view": "pad"}, "cannot leave out padding"),
        ("llava_uhd", {"global_view": "pad"}, "at its own aspect, not by global_view='pad'"),
    ],
)
def test_limits_a_planner_cannot_use(planner, arguments, text):
    with pytest.raises(ValueError, match=text):
        PLANNERS[planner](500, 500, PLANNERS[planner].options(**arguments))


@pytest.mark.parametrize(
    ("size", "grid"), [((500, 500), (3, 3)), ((500, 750), (2, 3)), ((900, 300), (3, 1)), ((100, 1000), (1, 9))]
)
def test_dual_follows_the_aspect_where_it_is_told(size, grid):
    found = PLANNERS["dual"](*size, PLANNERS["dual"].options(n=3, follow_aspect=True))
    assert found.grid == grid and len(found.views) == 1 + 2 * grid[0] * grid[1]
    assert PLANNERS["dual"](*size, PLANNERS["dual"].options(n=3)).grid == (3, 3)


@pytest.mark.parametrize("size", [(900_000, 2), (1, 1_000_000), (10, 10_000), (3000, 4)])
def test_slices_of_the_thinnest_image_have_no_more_patches_than_a_view(size):
    found = PLANNERS["llava_uhd"](*size, PinpointLimits())
    assert all(rows * cols <= 576 and min(rows, cols) >= 1 for rows, cols in (view.patches for view in found.views))


def test_slices_of_a_view_with_a_remainder_fill_their_canvas():
    """A slice of as many patches as a view has its size too, 384 pixels."""
    found = PLANNERS["llava_uhd"](800, 1200, PinpointLimits(view_size=384, patch_size=14))
    for view in found.views:
        assert found.view_pixels(view)[0] * max(found.grid[0], 1) == (
            found.canvas[0] if view.kind else found.global_size[0] * found.grid[0]
        )


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (2.5, 3), (True, 3)])
def test_wrong_sizes(size):
    for plan in PLANNERS.values():
        with pytest.raises(ValueError, match="must be an integer of at least 1"):
            plan(*size, PinpointLimits())

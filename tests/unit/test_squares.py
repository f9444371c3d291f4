"""`square` of every planner: what LLaVA-1.5 makes of an image, compared with the image processor of CLIP."""

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.image_utils import OPENAI_CLIP_MEAN

from builders.images import BACKENDS, assert_same_views
from hires_lmm.processing.image_processing_hires_lmm import HiResLmmImageProcessor
from hires_lmm.processing.planners_hires_lmm import PLANNERS


SIZES = [(30, 50), (77, 31), (40, 40), (11, 90), (200, 100)]
CLIP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "resample": 3}
VIEWS = {"view_size": 28, "patch_size": 14}


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (height, width, 3), dtype=np.uint8))


def on_square(picture: Image.Image) -> Image.Image:
    """`expand2square` of LLaVA."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in OPENAI_CLIP_MEAN))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("square", ["pad", "crop"])
def test_one_view_is_that_of_llava(size, square, backend):
    picture = noise(*size)
    whole = on_square(picture) if square == "pad" else picture
    wanted = CLIPImageProcessorPil(**CLIP).preprocess(whole, return_tensors="np")["pixel_values"]
    processor = HiResLmmImageProcessor(planner={"name": "slime", "square": square}, views="global", **VIEWS)
    found = processor(picture, resize_backend=backend)["pixel_values"]
    assert_same_views(found, wanted, backend)


@pytest.mark.parametrize("size", [(30, 50), (77, 31)])
def test_crops_of_a_square_are_cut_from_it(size):
    """Three times as many pixels a side, as INF-LLaVA does."""
    picture = noise(*size)
    clip = {"size": {"shortest_edge": 84}, "crop_size": {"height": 84, "width": 84}, "resample": 3}
    wanted = CLIPImageProcessorPil(**clip).preprocess(on_square(picture), return_tensors="np")["pixel_values"][0]
    processor = HiResLmmImageProcessor(planner={"name": "dual", "square": "pad"}, **VIEWS)
    found = processor(picture, resize_backend="pillow")["pixel_values"]
    assert len(found) == 19
    for number in range(9):
        top, left = number // 3 * 28, number % 3 * 28
        np.testing.assert_allclose(found[1 + number], wanted[:, top : top + 28, left : left + 28], atol=1e-5)
        np.testing.assert_allclose(found[10 + number], wanted[:, number // 3 :: 3, number % 3 :: 3], atol=1e-5)


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize("square", ["pad", "crop"])
def test_every_planner_cuts_the_square_and_tells_its_place_in_the_image(name, square):
    planner = {"name": name, "square": square}
    processor = HiResLmmImageProcessor(planner=planner, **VIEWS)
    side, plan = (90 if square == "pad" else 50), processor.plan(50, 90)
    alone = HiResLmmImageProcessor(planner=name, **VIEWS).plan(side, side)
    top, left = (-20, 0) if square == "pad" else (0, 20)
    shift = np.array([top, left, top, left]) * 256
    assert plan.size == (50, 90) and [view.span for view in plan.views] == [view.span for view in alone.views]
    assert [view.box for view in plan.views] == [tuple(shift + np.array(view.box)) for view in alone.views]
    batch = processor(noise(50, 90))
    assert len(batch["pixel_values"]) == len(alone.views)
    assert processor.image_tokens(50, 90) == HiResLmmImageProcessor(planner=name, **VIEWS).image_tokens(side, side)


def test_extra_towers_see_the_square():
    tower = {"size": 40, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    for square, color in (("pad", [int(255 * channel) for channel in OPENAI_CLIP_MEAN]), ("crop", None)):
        planner = {"name": "multiple", "square": square}
        processor = HiResLmmImageProcessor(planner=planner, extra_towers={"second": tower}, **VIEWS)
        found = processor(Image.new("RGB", (80, 40), (255, 0, 0)))["pixel_values_second"][0]
        edge = [255, 0, 0] if color is None else color
        np.testing.assert_allclose(found[:, 0, 20] * 255, edge, atol=0.01)
        np.testing.assert_allclose(found[:, 20, 20] * 255, [255, 0, 0], atol=0.01)


def test_a_processor_with_squares_is_saved_and_loaded(tmp_path):
    processor = HiResLmmImageProcessor(planner={"name": "dual", "n": 2, "square": "crop"}, **VIEWS)
    processor.save_pretrained(tmp_path)
    again = HiResLmmImageProcessor.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again(noise(30, 50))["pixel_values"], processor(noise(30, 50))["pixel_values"])


def test_a_square_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="square='stretch' is unknown; choose one of None, 'pad', 'crop'"):
        HiResLmmImageProcessor(planner={"name": "slime", "square": "stretch"})
    with pytest.raises(ValueError, match="unpad=True cannot leave out the padding of square='pad'"):
        HiResLmmImageProcessor(planner={"name": "slime", "square": "pad"}, unpad=True)
    thin = Image.new("RGB", (1, 40_000))
    with pytest.raises(ValueError, match=r"Image 1 of 40000x1 pixels would stand on a square of 1600000000 pixels"):
        HiResLmmImageProcessor(planner={"name": "slime", "square": "pad"}, views="global")([noise(9, 9), thin])
    cut = HiResLmmImageProcessor(planner={"name": "slime", "square": "crop"}, views="global")(thin)
    assert cut["pixel_values"].shape == (1, 3, 336, 336)

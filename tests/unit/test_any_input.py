"""Whatever comes in as image, option or text: the right result, or an error that says what is wrong.

The same 150 examples each on every run; `pytest tests/unit/test_any_input.py --hypothesis-profile long` tries
thousands of new ones and prints how to repeat a failure.
"""

import functools
import io
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import (
    array_shapes,
    arrays,
    boolean_dtypes,
    floating_dtypes,
    integer_dtypes,
    unsigned_integer_dtypes,
)
from PIL import Image, ImageOps

from builders.images import picture
from builders.text import tiny_tokenizer
from hires_lmm.processing.image_processing_hires_lmm import HiResLmmImageProcessor
from hires_lmm.processing.planners_hires_lmm import PLANNERS
from hires_lmm.processing.processing_hires_lmm import HiResLmmProcessor


SMALL = {"planner": "llava_next", "view_size": 28, "patch_size": 14}
CLEAR = (ValueError, TypeError, OSError)
Image.init()
PLAIN_MODES = ("RGB", "L", "1", "CMYK")

planners = st.sampled_from(sorted(PLANNERS))
side = st.integers(1, 60)


@functools.cache
def image_processor(planner: str) -> HiResLmmImageProcessor:
    return HiResLmmImageProcessor(planner=planner, view_size=28, patch_size=14, max_crops=4, pixel_limit=4_000_000)


@functools.cache
def processor() -> HiResLmmProcessor:
    return HiResLmmProcessor(HiResLmmImageProcessor(**SMALL), tiny_tokenizer())


def views(planner: str, image, **options) -> dict[str, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on damaged files
        return dict(image_processor(planner)(image, **options))


def assert_whole(batch) -> None:
    """Finite views, a global one first, then crops in raster order, then as many strided ones or none."""
    pixels, positions = np.asarray(batch["pixel_values"]), np.asarray(batch["view_positions"])
    assert len(pixels) == len(positions) and np.isfinite(pixels).all()
    for own in np.split(positions, np.flatnonzero(positions[:, 8] == 1)[1:]):
        rows, cols = own[0, 1:3]
        crops, strided = ([[kind, row, col] for row in range(rows) for col in range(cols)] for kind in (1, 2))
        places = own[:, [0, 3, 4]].tolist()
        assert places in ([[0, 0, 0], *crops], [[0, 0, 0], *crops, *strided]) and own[0, 5] >= 1


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name


def attempt(call, match: str = ""):
    """The result; None where a clear error says why there is none."""
    try:
        return call()
    except CLEAR as error:
        message = str(error)
    assert len(message) > 15 and match in message, message
    event("refused")
    return None


def whole_or_clear(call, match: str = "") -> None:
    batch = attempt(call, match)
    if batch is not None:
        assert_whole(batch)


# ---- images


@st.composite
def files(draw, formats=("PNG", "TIFF", "JPEG", "WEBP", "PNG", "BMP", "GIF", "ICO", "JPEG2000")) -> bytes:
    """A sound file, with an orientation where the format holds one."""
    name = draw(st.sampled_from([form for form in formats if form in Image.SAVE]))
    image = picture(draw(side), draw(side), draw(st.integers(0, 9)))
    if name in ("PNG", "TIFF"):
        image = image.convert(draw(st.sampled_from(["RGB", "L", "1", "P", "RGBA", "LA"])))
    elif name == "JPEG":
        image = image.convert(draw(st.sampled_from(["RGB", "L", "CMYK"])))
    exif = Image.Exif()
    exif[0x0112] = draw(st.sampled_from([6, 8, 3, 1, 2, 4, 5, 7, 0, 9]))
    buffer = io.BytesIO()
    image.save(buffer, format=name, **({"exif": exif} if name in ("PNG", "TIFF", "JPEG", "WEBP") else {}))
    return buffer.getvalue()


@given(planner=planners, data=files())
def test_a_file_gives_the_picture_that_pillow_shows(planner, data):
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    found = views(planner, data)
    assert_whole(found)
    if shown.mode in PLAIN_MODES:
        assert_same(found, views(planner, Image.fromarray(np.asarray(shown.convert("RGB")))))


@given(planner=planners, array=arrays(np.uint8, st.tuples(st.integers(5, 40), st.integers(5, 40), st.just(3))))
def test_every_form_of_a_picture_gives_the_same_views(planner, array):
    expected = views(planner, Image.fromarray(array))
    forms = [array, np.asfortranarray(array), array.transpose(2, 0, 1), array.astype(np.int64), array.astype(float)]
    forms += [torch.from_numpy(array), torch.from_numpy(array).permute(2, 0, 1)]
    if array.max() > 1:
        forms += [(array / 255).astype(np.float32), array.astype(np.uint16) * 257]
    else:
        del forms[4]  # as floats it would be another picture, of values from 0 to 1
    for form in forms:
        assert_same(views(planner, form), expected)


@given(
    planner=planners, data=files(), cuts=st.lists(st.tuples(st.integers(0, 4000), st.binary(max_size=9)), min_size=1)
)
def test_a_damaged_file_is_named_or_read(planner, data, cuts):
    for place, filling in cuts:
        data = data[: place % len(data)] + filling + data[place % len(data) + 2 * len(filling) :]
        assume(data)
    whole_or_clear(lambda: views(planner, data), "Image 0")


shapes = array_shapes(min_dims=1, max_dims=5, min_side=0, max_side=9)
numeric = st.one_of(integer_dtypes(), unsigned_integer_dtypes(), floating_dtypes(), boolean_dtypes())
other = st.sampled_from(["O", "S2", "U3", "V4", "M8[s]", "m8[s]", "c8"]).flatmap(
    lambda dtype: shapes.map(lambda shape: np.zeros(shape, dtype))
)


@given(planner=planners, array=st.one_of(numeric.flatmap(lambda dtype: arrays(dtype, shapes)), other))
def test_any_array_is_named_or_read(planner, array):
    whole_or_clear(lambda: views(planner, array), "mage")
    if array.dtype.kind not in "biuf" or array.size == 0 or not np.isfinite(array).all():
        with pytest.raises(CLEAR):
            views(planner, array)


junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.binary(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=9,
)


@given(planner=planners, image=junk)
def test_what_is_no_image_is_refused(planner, image):
    with pytest.raises(CLEAR):
        views(planner, image)


# ---- options

OPTIONS = [
    *("planner", "view_size", "patch_size", "max_crops", "pinpoints", "unpad", "global_view", "views"),
    *("token_layout", "max_image_tokens", "background", "pixel_limit", "resample", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "input_data_format", "size", "return_tensors", "unknown_option"),
]
numbers = st.one_of(st.integers(-3, 70), st.sampled_from([1000, 20_000, 1 << 40, 28 * 100_000]), st.floats())
likely = st.one_of(numbers, st.lists(numbers, max_size=4), st.lists(st.lists(numbers, max_size=3), max_size=3))


@given(options=st.dictionaries(st.sampled_from(OPTIONS), st.one_of(likely, junk), min_size=1, max_size=3))
def test_any_option_is_named_or_taken(options):
    image = picture(60, 40)
    whole_or_clear(lambda: HiResLmmImageProcessor(**{**SMALL, **options})(image))
    whole_or_clear(lambda: processor().image_processor(image, **options))
    count = attempt(lambda: processor().image_tokens(60, 40, **options))
    assert count is None or count >= 1


# ---- texts

pieces = [
    "<image>",
    "<image>",
    "<query>",
    "a",
    " ",
    "\n",
    "\0",
    "\ud800",
    "<s>",
    "</s>",
    "<pad>",
    "<|im_start|>",
    "é",
    "🙂",
]
texts = st.lists(st.sampled_from(pieces), max_size=7).map("".join)


@given(text=st.one_of(texts, st.lists(texts, max_size=3), junk), count=st.integers(0, 3), padding=st.booleans())
def test_any_text_has_as_many_placeholders_as_tokens_or_is_named(text, count, padding):
    images = [picture(30 + 10 * number, 40) for number in range(count)]
    batch = attempt(lambda: processor()(text=text, images=images or None, padding=padding))
    if batch is None or text is None:
        return
    found = sum(list(row).count(processor().image_token_id) for row in batch.get("input_ids", []))
    positions = np.asarray(batch["view_positions"]) if count else np.zeros((0, 9), int)
    assert found == positions[positions[:, 8] == 1, 5].sum()

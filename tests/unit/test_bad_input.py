"""Bad input: a `ValueError` that names the image's index, the bad value and the remedy; nothing is skipped."""

import io
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from builders.images import picture, psd
from builders.text import tiny_tokenizer
from hires_lmm.processing.image_processing_hires_lmm import HiResLmmImageProcessor
from hires_lmm.processing.planners_hires_lmm import PLANNERS
from hires_lmm.processing.processing_hires_lmm import HiResLmmProcessor


GOOD = picture(12, 10)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"


def small(**changes) -> HiResLmmImageProcessor:
    return HiResLmmImageProcessor(**{"planner": "llava_next", "view_size": 28, "patch_size": 14, **changes})


def encoded(form: str = "png", **kwargs) -> bytes:
    buffer = io.BytesIO()
    picture(60, 60).save(buffer, format=form, **kwargs)
    return buffer.getvalue()


def filled(value: float, dtype=np.float32) -> np.ndarray:
    array = np.zeros((8, 9, 3), dtype)
    array[2, 3, 1] = value
    return array


IMAGES = {
    "number": (5, "is a int"),
    "dict": ({"image": 1}, "is a dict"),
    "missing path": ("/nowhere/a.png", "'/nowhere/a.png' is no URL"),
    "empty text": ("", "is empty"),
    "no image file": (__file__, "is not an image"),
    "no image bytes": (b"hello world", "is not an image"),
    "no bytes": (b"", "is empty"),
    "truncated png": (encoded()[:2000], "truncated or damaged"),
    "truncated jpeg": (encoded("jpeg")[:1500], "truncated or damaged"),
    "truncated header": (encoded()[:20], "is not an image|truncated"),
    "damaged png": (encoded()[:200] + bytes(400) + encoded()[600:], "truncated or damaged"),
    "zero height": (np.zeros((0, 5, 3), np.uint8), "is empty: 0x5"),
    "zero width": (Image.new("RGB", (0, 5)), "is empty: 5x0"),
    "zero tensor": (torch.zeros(3, 5, 0), "is empty: 5x0"),
    "nan": (filled(np.nan), "NaN or infinite"),
    "inf": (filled(np.inf), "NaN or infinite"),
    "minus inf": (torch.from_numpy(filled(-np.inf)), "NaN or infinite"),
    "nan in mode F": (Image.fromarray(filled(np.nan)[:, :, 1]), "NaN or infinite"),
    "half precision nan": (torch.from_numpy(filled(np.nan)).bfloat16(), "NaN or infinite"),
    "negative floats": (filled(-0.5), "floats from -0.5 to 0.0"),
    "large floats": (filled(256.5), "floats from 0.0 to 256.5"),
    "huge double": (filled(1e300, np.float64), "NaN or infinite|floats from"),
    "8 bits in uint16": (filled(255, np.uint16), "array of uint16 with values up to 255: 8 bits"),
    "negative integers": (filled(-1, np.int32), "integers from -1"),
    "large integers": (filled(65536, np.int64), "integers from 0 to 65536"),
    "large mode I": (Image.fromarray(filled(70000, np.int32)[:, :, 1]), "0 to 70000"),
    "strings": (np.array([["a", "b"]]), "array of <U1"),
    "objects": (np.array([[None, 1]]), "array of object"),
    "complex": (np.zeros((4, 4, 3), np.complex64), "array of complex64"),
    "complex tensor": (torch.zeros(4, 4, 3, dtype=torch.complex64), "complex64"),
    "two channels": (np.zeros((8, 9, 2), np.uint8), "must have 2 dimensions, or 3 with 1, 3 or 4 channels"),
    "one dimension": (np.zeros(9, np.uint8), "must have 2 dimensions, or 3"),
    "five dimensions": (np.zeros((1, 2, 3, 4, 5), np.uint8), "must have 2 dimensions, or 3"),
    "ambiguous": (np.zeros((3, 9, 3), np.uint8), "input_data_format='channels_first' or 'channels_last'"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_bad_images(name):
    image, text = IMAGES[name]
    with pytest.raises(ValueError, match=f"(?s)Image 2.*({text})"):
        small()([GOOD, GOOD, image])
    with pytest.raises(ValueError, match=f"(?s)Image 2.*({text})"):
        small()([[GOOD], [GOOD, image]])


@pytest.mark.parametrize("images", [[], [[]], ()])
def test_no_image(images):
    with pytest.raises(ValueError, match="list is empty"):
        small()(images)


def test_pixel_limit():
    with pytest.raises(ValueError, match=r"Image 1 has 12x10 = 120 pixels, more than pixel_limit=119"):
        small(pixel_limit=119)([picture(5, 5), GOOD])
    assert len(small(pixel_limit=120)(GOOD)["pixel_values"])
    assert len(small(pixel_limit=119)(GOOD, pixel_limit=120)["pixel_values"])
    huge = np.broadcast_to(np.zeros((), np.uint8), (60000, 50000, 3))
    with pytest.raises(ValueError, match=r"Image 0 has 60000x50000 .* pixel_limit=178956970"):
        small()(huge)
    with pytest.raises(ValueError, match="pixel_limit=178956970"):
        small()(Image.new("1", (20000, 9000)))


def test_pillows_own_limit_is_wrapped(monkeypatch):
    data = encoded()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"Image 1: .* refused by Pillow .*MAX_IMAGE_PIXELS"):
        small()([GOOD, data])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.warns(Image.DecompressionBombWarning):
        assert len(small()(data)["pixel_values"])


def test_url_errors(monkeypatch):
    class Session:
        def get(self, url, **kwargs):
            raise OSError("no route")

    monkeypatch.setattr("hires_lmm.processing.image_input_hires_lmm.get_session", Session)
    with pytest.raises(ValueError, match=r"Image 1: 'https://example.org/a.png' cannot be fetched \(no route\)"):
        small()([GOOD, "https://example.org/a.png"])


OPTIONS = [
    ({"max_crop": 3}, r"Unknown image options \['max_crop'\]; the known ones are .*max_crops"),
    ({"planner": "grid"}, "planner='grid'.*slime_release"),
    ({"planner": 3}, "planner"),
    ({"view_size": 0}, "view_size=0"),
    ({"view_size": "28"}, "view_size"),
    ({"patch_size": 29}, "patch_size=29"),
    ({"max_crops": 0}, "views='global'"),
    ({"max_crops": -1}, "max_crops=-1"),
    ({"max_crops": True}, "max_crops"),
    ({"max_crops": 2.5}, "max_crops"),
    ({"pinpoints": [[28, 30]]}, "multiples of view_size=28"),
    ({"pinpoints": "28x28"}, "pinpoints"),
    ({"unpad": "yes"}, "unpad"),
    ({"global_view": "crop"}, "global_view='crop'"),
    ({"views": "all "}, "views='all '"),
    ({"token_layout": {"patch_grid": [2, 2]}}, "token_layout"),
    ({"token_layout": [2, 2]}, "token_layout"),
    ({"max_image_tokens": 0}, "max_image_tokens=0"),
    ({"max_image_tokens": True}, "max_image_tokens"),
    ({"max_image_tokens": 5.5}, "max_image_tokens"),
    ({"background": [1, 2]}, "background"),
    ({"background": [1, 2, 256]}, "background"),
    ({"background": "white"}, "background"),
    ({"pixel_limit": 0}, "pixel_limit=0"),
    ({"image_mean": [0.5, 0.5]}, "image_mean"),
    ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean"),
    ({"image_std": 0.0}, r"image_std=0.0 must be .*not 0"),
    ({"rescale_factor": float("inf")}, "rescale_factor=inf"),
    ({"resample": 9}, "resample"),
    ({"input_data_format": "hwc"}, "input_data_format='hwc'"),
    ({"size": {"height": 28, "width": 14}}, "size="),
    ({"size": {"shortest_edge": 28}}, "size="),
    ({"do_convert_rgb": False}, "do_convert_rgb=False"),
    ({"do_resize": False}, "do_resize=False has no meaning"),
    ({"do_center_crop": True}, "do_center_crop=True has no meaning"),
    ({"crop_size": {"height": 28, "width": 28}}, "crop_size"),
    ({"do_pad": True}, "do_pad=True has no meaning"),
    ({"data_format": "channels_last"}, "data_format='channels_last' has no meaning"),
]


@pytest.mark.parametrize("options, text", OPTIONS)
def test_bad_options(options, text):
    """At construction, per call, in the counters, and through the processor both ways."""
    with pytest.raises(ValueError, match=text):
        small(**options)
    with pytest.raises(ValueError, match=text):
        small()(GOOD, **options)
    with pytest.raises(ValueError, match=text):
        small().image_tokens(12, 10, **options)
    processor = HiResLmmProcessor(small(), tiny_tokenizer())
    name = next(iter(options))
    for kwargs in (options, {"images_kwargs": options}):
        with pytest.raises(ValueError, match=f"{text}|{name}"):
            processor(text="<image>", images=GOOD, **kwargs)
        with pytest.raises(ValueError, match=f"{text}|{name}"):
            processor._get_num_multimodal_tokens(image_sizes=[(12, 10)], **kwargs)


def test_unscaled_unit_floats_are_refused():
    with pytest.raises(ValueError, match=r"Image 0 .*do_rescale=False"):
        small()(filled(0.5), do_rescale=False)
    assert small()(filled(200.0), do_rescale=False, do_normalize=False)["pixel_values"].max() > 1


def test_budgets_out_of_range():
    """Image 1 is the one that cannot shrink: its smallest value is in the message and works."""
    layout = {
        "patch_grid": [2, 2],
        "grids": {"global": {"rows": 2, "cols": 2}, "crops": {"rows": 2, "cols": 2}},
        "budget": {"on": "crops"},
    }
    end = {"separators": {"end": {"place": "view_end"}}}
    processor = HiResLmmProcessor(small(token_layout={**layout, "layout": end}), tiny_tokenizer())
    images = [picture(56, 56), picture(28, 84)]
    with pytest.raises(
        ValueError, match=r"Image 0: max_image_tokens=6 .*smallest value for this image is 7.*full count is 22"
    ):
        processor(text="<image><image>", images=images, max_image_tokens=6)
    counts = processor(text="<image><image>", images=images, max_image_tokens=7)["view_positions"][:, 5]
    assert set(counts.tolist()) == {7}
    refusing = small(token_layout={**layout, "budget": None})
    with pytest.raises(ValueError, match=r"no part that drops tokens.*is 20"):
        refusing.image_tokens(56, 56, max_image_tokens=19)
    assert refusing.image_tokens(56, 56, max_image_tokens=20) == 20


def test_an_image_without_tokens_is_an_error():
    with pytest.raises(
        ValueError, match=r"Image 1 of 1x500 pixels has no tokens with views='crops'; take other views, or unpad=False"
    ):
        small()([GOOD, picture(1, 500)], views="crops")


PLACEHOLDERS = [
    ("none", [GOOD], "0 <image> placeholders, but 1 images"),
    ("<image>", None, "1 <image> placeholders, but 0 images"),
    ("<image>", [], "1 <image> placeholders, but 0 images"),
    ("<image><image>", [GOOD], "2 <image> placeholders, but 1 images"),
    (["<image>", "x"], [GOOD, GOOD], "1 <image> placeholders, but 2 images"),
    (["<image><image>", "x"], [[GOOD], [GOOD]], "Sample 0 has 2 <image> placeholders, but 1 images"),
    (["x", "<image>"], [[GOOD], []], "Sample 0 has 0 <image> placeholders, but 1 images"),
]


@pytest.mark.parametrize("text, images, message", PLACEHOLDERS)
def test_placeholders_and_images_must_agree(text, images, message):
    processor = HiResLmmProcessor(small(), tiny_tokenizer())
    with pytest.raises(ValueError, match=f"{message}.*write one <image>"):
        processor(text=text, images=images)


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_that_cuts_an_image(side):
    processor = HiResLmmProcessor(small(), tiny_tokenizer())
    processor.tokenizer.truncation_side = side
    texts, images = ["short", "some <image> text"], picture(50, 50)
    needed = len(processor(text=texts, images=images)["input_ids"][1])
    with pytest.raises(ValueError, match=f"of sample 1, which needs max_length={needed}; raise max_length"):
        processor(text=texts, images=images, truncation=True, max_length=8)
    assert processor(text=texts, images=images, truncation=True, max_length=needed)


@pytest.mark.parametrize("kwargs", [{"text": None}, {"text": []}, {"text": [1, 2]}, {"text": [["a", "b"]]}])
def test_bad_text(kwargs):
    with pytest.raises(ValueError, match=r"text|nothing to process"):
        HiResLmmProcessor(small(), tiny_tokenizer())(**kwargs)


@pytest.mark.parametrize(
    "kwargs, text",
    [
        ({"pading": True}, r"Unknown options \['pading'\]; the known ones are .*padding"),
        ({"text_kwargs": {"pading": True}}, r"Unknown text_kwargs \['pading'\]"),
        ({"images_kwargs": {"padding": True}}, r"Unknown images_kwargs \['padding'\]"),
        ({"videos_kwargs": {"fps": 1}}, r"Unknown videos_kwargs \['fps'\]"),
        ({"images_kwargs": 3}, "images_kwargs=3 must be a dict"),
        ({"max_length": "8"}, "max_length"),
        ({"max_length": -1, "truncation": True}, "max_length=-1 must be at least 0"),
        ({"stride": -3, "truncation": True}, "stride=-3 must be at least 0"),
        ({"pad_to_multiple_of": 0, "padding": True}, "pad_to_multiple_of=0 must be at least 1"),
        ({"videos": [GOOD]}, "has 0 <video> placeholders, but 1 videos were passed"),
        ({"audio": [1.0]}, "reads images, videos and text"),
    ],
)
def test_unknown_call_options(kwargs, text):
    with pytest.raises(ValueError, match=text):
        HiResLmmProcessor(small(), tiny_tokenizer())(text="a", **kwargs)


# ---- sizes and files that would take too much


@pytest.mark.parametrize("opened", [False, True])
def test_postscript_starts_no_program(tmp_path, monkeypatch, opened):
    """Pillow decodes EPS by running `gs` on it; here that would leave a mark."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'RAN'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None, raising=False)
    image = Image.open(io.BytesIO(EPS)) if opened else EPS
    with pytest.raises(ValueError, match="Image 1 is an EPS file, which Pillow decodes by starting another program"):
        small()([picture(9, 9), image])
    assert not (tmp_path / "RAN").exists()


def test_an_opened_layered_file_at_a_layer():
    array = np.asarray(picture(20, 30))
    image = Image.open(io.BytesIO(psd(array, layers=2)))
    expected = small()(Image.fromarray(array))["pixel_values"]
    assert np.array_equal(small()(image)["pixel_values"], expected)
    image = Image.open(io.BytesIO(psd(array, layers=2)))
    image.seek(1)
    assert np.isfinite(small()(image)["pixel_values"]).all() and image.tell() == 1


@pytest.mark.parametrize("size", [(1_000_001, 1), (1, 1_000_001)])
def test_a_side_that_no_filter_can_hold(size):
    image = Image.new("1", size)
    with pytest.raises(ValueError, match=r"Image 0 has .*, a side of more than 1000000; cut it"):
        small()(image)


@pytest.mark.parametrize("planner", PLANNERS)
def test_a_long_thin_image_needs_little_memory(planner):
    """Widened first, the 900 000 rows would be 1.2 GB; the address space that may be added is half of that."""
    image = Image.new("L", (2, 900_000), 200)
    processor = HiResLmmImageProcessor(planner=planner)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 600_000_000, hard))
    try:
        pixels = processor(image)["pixel_values"]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert np.isfinite(pixels).all()


def test_resizing_in_two_steps_gives_the_same_picture():
    image = Image.fromarray(np.linspace(0, 255, 600_000).astype(np.uint8)[:, None].repeat(3, 1))
    tall = small(planner="multiple", view_size=336)(image, max_crops=1)["pixel_values"][0, 0]
    rows = (np.arange(336) + 0.5) / 336 * 255
    mean, std = small().image_mean[0], small().image_std[0]
    assert np.abs(tall.mean(axis=1) * std * 255 + mean * 255 - rows).max() < 1


def test_views_of_opposite_aspects_are_not_padded_beyond_all_measure():
    processor = HiResLmmImageProcessor(planner="llava_uhd")
    tall, wide = Image.new("L", (200, 300_000)), Image.new("L", (300_000, 200))
    assert len(processor([tall])["pixel_values"]) == len(processor([wide])["pixel_values"]) == 8
    with pytest.raises(ValueError, match=r"Image 0 would become 8 views of 8064x8064 = .* very different aspect"):
        processor([tall, wide])

"""Images made to harm, one test each."""

import io
import os
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from builders.images import picture, psd
from hires_lmm.processing import image_input_hires_lmm as image_input
from hires_lmm.processing.image_processing_hires_lmm import HiResLmmImageProcessor
from hires_lmm.processing.planners_hires_lmm import PLANNERS


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"


def small(**changes) -> HiResLmmImageProcessor:
    return HiResLmmImageProcessor(**{"planner": "llava_next", "view_size": 28, "patch_size": 14, **changes})


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


def test_noise_in_exif_leaves_the_pixels():
    """A tag that Pillow reads but cannot write again: the picture is turned all the same."""
    image, exif = picture(20, 30), Image.Exif()
    exif[0x0112] = 6
    exif[0x0132] = "x"
    buffer = io.BytesIO()
    image.save(buffer, format="png", exif=exif)
    opened = Image.open(io.BytesIO(buffer.getvalue()))
    opened.getexif()[0x8298] = object()  # no type that EXIF can hold
    expected = small()(Image.fromarray(np.asarray(image).transpose(1, 0, 2)[:, ::-1]))
    assert np.array_equal(small()(opened)["pixel_values"], expected["pixel_values"])


def test_an_icon_that_is_larger_inside():
    inner = io.BytesIO()
    Image.new("1", (300, 300)).save(inner, format="png")
    data = inner.getvalue()
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(data), 22) + data
    with pytest.warns(UserWarning, match="not the expected size"), pytest.raises(ValueError, match="300x300"):
        small(pixel_limit=1000)(icon)


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


def test_output_is_bounded_too():
    processor = small(view_size=14_000, patch_size=1400, pinpoints=[[14_000, 14_000]])
    with pytest.raises(ValueError, match=r"Image 0 would become 2 views of 14000x14000 = 392000000 pixels"):
        processor(picture(9, 9))


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"planner": "hd", "max_crops": 4097}, "max_crops=4097 is more than 4096"),
        ({"planner": "slime_release", "max_crops": 10**18}, "is more than 4096"),
        ({"pinpoints": [[28 * 65, 28 * 64]]}, "which is more than 4096 crops of 28"),
        ({"rescale_factor": 10**400}, "rescale_factor"),
        ({"image_std": 1e-320}, "float32 cannot hold"),
        ({"image_mean": [1e39, 0, 0]}, "float32 cannot hold"),
    ],
)
def test_settings_that_exhaust(changes, text):
    with pytest.raises(ValueError, match=text):
        small(**changes)
    with pytest.raises(ValueError, match=text):
        small()(picture(9, 9), **changes)


def test_deeply_nested_settings():
    deep: list = [1]
    for _ in range(2000):
        deep = [deep]
    for name in ("image_mean", "pinpoints", "token_layout", "background"):
        with pytest.raises(ValueError, match=f"Image option '{name}' is nested too deeply"):
            small(**{name: deep})


def test_more_tokens_than_a_text_can_hold():
    layout = {
        "patch_grid": [2, 2],
        "grids": {"global": {"rows": 1000, "cols": 1001, "stride": None}, "crops": {"rows": 2, "cols": 2}},
    }
    with pytest.raises(ValueError, match=r"Image 0 of 9x9 pixels would have .* tokens, more than 1000000"):
        small(token_layout=layout).image_tokens(9, 9)


@pytest.mark.parametrize(
    "image, text",
    [
        (np.ma.masked_array(np.zeros((9, 9, 3), np.uint8)), "masked array"),
        (torch.empty(9, 9, 3, dtype=torch.uint4), "no values to read"),
        (torch.empty(9, 9, 3, device="meta"), "values in memory"),
        (torch.eye(9).to_sparse(), "sparse_coo"),
        (memoryview(np.array(5)), "is not an image"),
    ],
    ids=["masked", "uint4", "meta", "coo", "memoryview"],
)
def test_arrays_without_plain_values(image, text):
    with pytest.raises(ValueError, match=f"Image 1.*{text}"):
        small()([picture(9, 9), image])


def test_negated_view_of_a_tensor():
    values = torch.rand(9, 11, 3)
    negated = torch._neg_view(-values)
    assert np.array_equal(small()(negated)["pixel_values"], small()(values)["pixel_values"])


def test_lists_that_never_end():
    images: list = []
    images.append(images)
    with pytest.raises(ValueError, match="nested more than 16 lists deep"):
        small()(images)
    with pytest.raises(ValueError, match="nested more than 16 lists deep"):
        small().fetch_images(images)


@pytest.mark.parametrize("bound", ["DOWNLOAD_LIMIT", "DOWNLOAD_SECONDS"])
def test_a_download_without_end(monkeypatch, bound):
    class Response:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def raise_for_status(self):
            pass

        def iter_bytes(self):
            while True:
                yield b"x" * 1000

    class Session:
        def stream(self, *_, **__):
            return Response()

    monkeypatch.setattr(image_input, "get_session", Session)
    monkeypatch.setattr(image_input, bound, -1 if bound == "DOWNLOAD_SECONDS" else 5000)
    with pytest.raises(ValueError, match=r"Image 0: 'https://example.org/a' cannot be fetched \(\d+ bytes so far"):
        small()("https://example.org/a")


def test_a_png_that_names_a_million_rows_reads_none():
    header = struct.pack(">IIBBBBB", 2_000_000_000, 1, 8, 2, 0, 0, 0)
    kinds = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in kinds
    )
    with pytest.raises(ValueError, match=r"Image 0: .* is refused by Pillow"):
        small()(b"\x89PNG\r\n\x1a\n" + chunks)

"""Pixels against transformers' LLaVA-NeXT, SliME and the fusion paper's code; every kind of image; save and reload."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from builders.images import BACKENDS, assert_same_views, picture
from hires_lmm.processing.image_processing_hires_lmm import HiResLmmImageProcessor
from hires_lmm.processing.planners_hires_lmm import PLANNERS


GRIDS = {"global": {"rows": 2, "cols": 2}, "crops": {"rows": 1, "cols": 1, "stride": None}}
SIZES = [(1, 1), (1, 2), (7, 5), (28, 28), (14, 1296), (1296, 14), (333, 1999), (4000, 400), (57, 56), (56, 112)]
SIZES += [
    (84, 28),
    (29, 83),
    (300, 301),
    (640, 480),
    (480, 640),
    (100, 1000),
    (2000, 3),
    (31, 90),
    (123, 456),
    (500, 7),
]


def small(**changes) -> HiResLmmImageProcessor:
    return HiResLmmImageProcessor(**{"view_size": 28, "patch_size": 14, **changes})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("resample", [None, 0, 1, 2])
def test_llava_next_pixels_equal_transformers(resample, backend):
    processor = small(planner="llava_next", resample=resample, resize_backend=backend)
    pinpoints = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    size = {"height": 28, "width": 28}
    reference = LlavaNextImageProcessorPil(size=size, crop_size=size, image_grid_pinpoints=pinpoints)
    if resample is not None:
        reference.resample = resample
    for index, (height, width) in enumerate(SIZES):
        image = picture(height, width, index)
        found = processor(image)["pixel_values"]
        expected = reference(image, return_tensors="np")["pixel_values"][0]
        assert_same_views(found, expected, "torch" if backend == "torch" and resample in (None, 2) else "pillow")


def test_rescale_and_normalise_switches_equal_transformers():
    size = {"height": 28, "width": 28}
    pinpoints = [[28, 56], [56, 28]]
    for changes in ({"do_normalize": False}, {"do_rescale": False}, {"do_rescale": False, "do_normalize": False}):
        changes = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], **changes}
        processor = small(planner="llava_next", pinpoints=pinpoints, resize_backend="pillow")
        found = processor(picture(30, 40), **changes)["pixel_values"]
        reference = LlavaNextImageProcessorPil(size=size, crop_size=size, image_grid_pinpoints=pinpoints, **changes)
        expected = reference(picture(30, 40), return_tensors="np")["pixel_values"][0]
        assert np.allclose(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("size", [(700, 700), (97, 97), (60, 41), (20, 56), (56, 56), (1, 1)])
def test_square_and_small_global_views_of_hd_are_those_of_torch(size):
    """The whole view, by torch's own interpolation of the padded picture."""
    image = picture(*size)
    square = np.zeros((max(size), max(size), 3), np.float32)
    top, left = ((max(size) - side) // 2 for side in size)
    square[top : top + size[0], left : left + size[1]] = np.asarray(image)
    planes = torch.from_numpy(square).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.interpolate(planes, size=(56, 56), mode="bicubic", align_corners=False)[0].numpy()
    plain = {"do_normalize": False, "do_rescale": False, "planner": "hd", "view_size": 56}
    shrinks = size[0] != size[1] and max(size) > 56
    batch = small(**plain)(image)
    found = batch["pixel_values"][0]
    assert (np.abs(found - wanted).max() <= 2e-3) != shrinks  # of 255
    if shrinks:
        return
    box = batch["view_boxes"][0].tolist()  # the padded square, in source pixels
    assert box == [256 * edge for edge in (-top, -left, max(size) - top, max(size) - left)]
    asked = small(**plain, resample=Image.Resampling.BILINEAR)(image)["pixel_values"][0]
    is_copied = max(size) in (1, 56)  # one pixel, or already of the size of a view
    assert (np.abs(asked - wanted).max() > 1) != is_copied


@pytest.mark.parametrize("planner", PLANNERS)
def test_at_most_two_resizes_by_pillow(planner, monkeypatch):
    calls = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: calls.append(self.size) or resize(self, *a, **k))
    for height, width in SIZES:
        calls.clear()
        small(planner=planner, resize_backend="pillow")(picture(height, width))
        assert len(calls) <= 2 and all(set(size) == {height, width} for size in calls)
        calls.clear()
        small(planner=planner, resize_backend="pillow")(picture(height, width), views="global")
        assert len(calls) <= 1


@pytest.mark.parametrize("planner", PLANNERS)
def test_geometry_tensors_equal_the_plan(planner):
    images = [picture(height, width) for height, width in SIZES[:8]]
    processor = small(planner=planner, **({} if planner == "llava_next" else {"max_crops": 4}))
    batch = processor(images, return_tensors="pt")
    plans = [processor.plan(image.height, image.width) for image in images]
    views = [view for plan in plans for view in plan.views]
    assert {name: value.dtype for name, value in batch.items() if name != "pixel_values"} == {
        "view_positions": torch.int64,
        "view_boxes": torch.int64,
        "view_spans": torch.int64,
    }
    expected = [
        [*place, processor.image_tokens(*plan.size), *view.patches, int(number == 0)]
        for plan in plans
        for number, view in enumerate(plan.views)
        for place in [(view.kind, view.grid_rows, view.grid_cols, view.row, view.col)]
    ]
    assert batch["view_positions"].tolist() == expected
    assert batch["view_boxes"].tolist() == [list(view.box) for view in views]
    assert batch["view_spans"].tolist() == [list(view.span) for view in views]
    sizes = [plan.view_pixels(view) for plan in plans for view in plan.views]
    assert batch["pixel_values"].shape == (len(views), 3, *map(max, zip(*sizes, strict=True)))


def test_padding_colour_and_place():
    """White source: crops are white on the image and black (hd: white) elsewhere; a padded global view is black."""
    white = Image.new("RGB", (100, 40), (255, 255, 255))
    plain = {"do_normalize": False}
    crops = small(planner="slime_release")(white, **plain)["pixel_values"]
    plan = small(planner="slime_release").plan(40, 100)
    stitched = stitch(crops[1:], plan.grid)
    assert (stitched.shape, plan.canvas) == ((3, *plan.canvas), plan.canvas)
    (top, left), (height, width) = plan.paste, plan.resized
    expected = np.zeros(plan.canvas, np.float32)
    expected[top : top + height, left : left + width] = 1
    assert np.array_equal(stitched[0], expected) and 0 < expected.mean() < 1
    hd = small(planner="hd")(white, **plain)["pixel_values"]
    assert hd[1:].min() == 1.0 and hd[0, :, 0].max() == 0.0 and hd[0, :, 14].min() == 1.0


def stitch(crops: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    rows = [np.concatenate(list(crops[row * grid[1] : (row + 1) * grid[1]]), axis=2) for row in range(grid[0])]
    return np.concatenate(rows, axis=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_squeezed_global_view_is_pillows_resize(backend):
    image = picture(90, 50)
    processor = small(planner="slime_release", resize_backend=backend)
    found = processor(image, do_normalize=False)["pixel_values"][0]
    expected = np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / np.float32(255)
    assert_same_views(found, expected, backend, (1, 1, 1))


def one_view(image, **kwargs) -> np.ndarray:
    """The pixels as the tower sees them, 0 to 255, of an image of view size."""
    pixels = small(view_size=14)(image, views="global", do_normalize=False, **kwargs)["pixel_values"]
    return np.rint(pixels[0].transpose(1, 2, 0) * 255).astype(int)


RGB = np.random.default_rng(1).integers(0, 256, (14, 14, 3), dtype=np.uint8)
GREY = RGB[:, :, 0]


def expected_grey(values=GREY) -> np.ndarray:
    return np.repeat(np.asarray(values).astype(int)[:, :, None], 3, axis=2)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_opaque_modes(mode):
    image = Image.fromarray(RGB).convert(mode)
    assert np.array_equal(one_view(image), np.asarray(image.convert("RGB")).astype(int))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
@pytest.mark.parametrize("background", [None, [10, 200, 30]])
def test_alpha_lies_over_the_background(mode, background):
    alpha = np.linspace(0, 255, 196).astype(np.uint8).reshape(14, 14)
    alpha[0], alpha[1] = 0, 255
    grey = mode in ("LA", "La")
    opaque = Image.fromarray(GREY if grey else RGB)
    if mode == "PA":
        opaque = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE)
    colour = np.asarray(opaque.convert("RGB")).astype(float)
    image = opaque.copy()
    image.putalpha(Image.fromarray(alpha))
    if mode.endswith("a"):
        image = image.convert(mode)
    assert image.mode == mode
    share = alpha[:, :, None] / 255
    expected = colour * share + np.array(background or [255, 255, 255]) * (1 - share)
    found = one_view(image, background=background)
    assert np.abs(found - expected)[:2].max() <= 0.5
    assert np.abs(found - expected).max() <= (6 if mode.endswith("a") else 1)


def test_transparent_palette_and_colour_keys():
    palette = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE)
    index = palette.getpixel((3, 3))
    palette.info["transparency"] = index
    mask = np.asarray(palette) == index
    found = one_view(palette)
    assert (found[mask] == 255).all()
    assert np.array_equal(found[~mask], np.asarray(Image.fromarray(RGB).convert("P", palette=1).convert("RGB"))[~mask])
    keyed = Image.fromarray(RGB)
    keyed.info["transparency"] = tuple(int(value) for value in RGB[2, 5])
    assert (one_view(keyed)[2, 5] == 255).all() and np.array_equal(one_view(keyed)[0, 0], RGB[0, 0])


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bit(mode):
    values = np.random.default_rng(2).integers(0, 65536, (14, 14)).astype(np.uint16)
    if mode == "I":
        image = Image.fromarray(values.astype(np.int32))
    else:
        image = Image.frombytes(mode, (14, 14), values.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    assert image.mode == mode
    assert np.array_equal(one_view(image), expected_grey(np.rint(values / 257)))


def test_dark_sixteen_bit_stays_dark():
    image = Image.frombytes("I;16", (14, 14), np.full((14, 14), 255, "<u2").tobytes())
    assert one_view(image).max() == 1
    assert one_view(Image.fromarray(np.full((14, 14), 255, np.int32))).min() == 255


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_float_images(scale):
    values = (GREY.astype(np.float32) / 255 * scale).astype(np.float32)
    assert np.array_equal(one_view(Image.fromarray(values)), expected_grey())
    assert np.array_equal(one_view(values), expected_grey())


def test_tensors_with_gradient_half_precision_and_batches():
    tensor = (torch.from_numpy(RGB.copy()).float() / 255).requires_grad_()
    assert np.array_equal(one_view(tensor), RGB)
    assert np.abs(one_view(tensor.to(torch.bfloat16)) - RGB).max() <= 1
    assert np.abs(one_view(tensor.half()) - RGB).max() <= 1
    stack = torch.stack([tensor, tensor])
    assert len(small()(stack, views="global")["pixel_values"]) == 2
    assert len(small()([stack, tensor], views="global")["pixel_values"]) == 3


@pytest.mark.parametrize("shape", [(14, 14), (14, 14, 1), (1, 14, 14)])
def test_grey_arrays(shape):
    assert np.array_equal(one_view(GREY.reshape(shape)), expected_grey())
    assert np.array_equal(one_view((GREY > 127).reshape(shape)), expected_grey((GREY > 127) * 255))


def test_array_with_alpha():
    rgba = np.concatenate([RGB, np.full((14, 14, 1), 255, np.uint8)], axis=2)
    rgba[0, :, 3] = 0
    found = one_view(rgba)
    assert (found[0] == 255).all() and np.array_equal(found[1:], RGB[1:])


@pytest.mark.parametrize("shape", [(3, 9, 3), (1, 9, 3), (4, 9, 1), (3, 3, 3)])
def test_ambiguous_channel_order_is_settled_by_the_caller(shape):
    array = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    with pytest.raises(ValueError, match=r"Image 1 .*input_data_format"):
        small()([picture(5, 5), array])
    last = small()(array, input_data_format="channels_last")
    first = small()(array, input_data_format="channels_first")
    assert last["view_boxes"][0].tolist() == list(small().plan(shape[0], shape[1]).views[0].box)
    assert first["view_boxes"][0].tolist() == list(small().plan(shape[1], shape[2]).views[0].box)


def test_an_animation_shows_the_frame_at_which_it_stands(tmp_path):
    frames = [Image.new("RGB", (14, 14), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    image = Image.open(tmp_path / "a.gif")
    image.seek(2)
    assert (one_view(image) == [0, 0, 255]).all()
    assert image.tell() == 2
    assert (one_view(Image.open(tmp_path / "a.gif")) == [255, 0, 0]).all()


def test_sources(tmp_path):
    """Path, path object, bytes, base64 and data URL give what the image gives, alpha included."""
    import base64

    rgba = Image.fromarray(RGB)
    rgba.putalpha(100)
    rgba.save(tmp_path / "image.png")
    data = (tmp_path / "image.png").read_bytes()
    text = base64.b64encode(data).decode()
    expected = one_view(rgba)
    sources = [str(tmp_path / "image.png"), tmp_path / "image.png", data, bytearray(data), memoryview(data)]
    for source in [*sources, text, base64.encodebytes(data).decode(), f"data:image/png;base64,{text}"]:
        assert np.array_equal(one_view(source), expected)
    batch = small().fetch_images([[sources[0]], [data, rgba]])
    assert [[image.size for image in row] for row in batch] == [[(14, 14)], [(14, 14), (14, 14)]]


def test_url(monkeypatch):
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, format="png")
    fetched = []

    class Session:
        def get(self, url, **kwargs):
            fetched.append(url)
            return SimpleNamespace(content=buffer.getvalue(), raise_for_status=lambda: None)

    monkeypatch.setattr("hires_lmm.processing.image_input_hires_lmm.get_session", Session)
    assert np.array_equal(one_view("https://example.org/a.png"), RGB)
    assert fetched == ["https://example.org/a.png"]


def test_user_images_are_left_alone():
    image, array, tensor = picture(9, 9), RGB.copy(), torch.from_numpy(RGB.copy())
    before = image.tobytes(), array.tobytes(), tensor.clone()
    small()([image, array, tensor])
    assert image.tobytes() == before[0] and array.tobytes() == before[1] and torch.equal(tensor, before[2])


def test_call_options_go_before_the_processors_own():
    processor = small(planner="slime", max_crops=6)
    image = picture(200, 200)
    assert len(processor(image)["pixel_values"]) == 5
    assert len(processor(image, max_crops=1)["pixel_values"]) == 2
    assert len(processor(image, max_crops=None)["pixel_values"]) == 5
    assert len(processor(image, planner="hd", max_crops=9)["pixel_values"]) == 10
    assert processor(image, view_size=14)["pixel_values"].shape[-1] == 14
    assert processor(image, size={"height": 14, "width": 14})["pixel_values"].shape[-1] == 14
    assert processor.image_tokens(200, 200, max_image_tokens=7) == 7
    assert len(processor(image)["pixel_values"]) == 5


def test_save_and_reload(tmp_path):
    layout = {"patch_grid": [2, 2], "grids": GRIDS}
    options = {
        **{"planner": "llava_next", "pinpoints": [[28, 56], [56, 28]], "unpad": False, "global_view": "pad"},
        **{"views": "all", "max_crops": 2, "max_image_tokens": 6, "background": [1, 2, 3], "pixel_limit": 10**6},
        **{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1], "resample": 2},
        **{"resize_backend": "pillow", "decode": "scaled", "num_threads": 3, "enlarge": False},
    }
    processor = small(**options, token_layout={**layout, "budget": {"on": "all"}})
    processor.save_pretrained(tmp_path)
    reloaded = HiResLmmImageProcessor.from_pretrained(tmp_path)
    assert reloaded.to_dict() == processor.to_dict()
    image = picture(60, 40)
    first, second = processor(image), reloaded(image)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    changed = HiResLmmImageProcessor.from_pretrained(tmp_path, max_image_tokens=5, pinpoints=None)
    assert changed.image_tokens(60, 40) == 5
    grids = {**GRIDS, "global": {"rows": 4, "cols": 4}}
    larger = {"size": 56, "token_layout": {"patch_grid": [4, 4], "grids": grids}, "pinpoints": [[56, 56]]}
    assert HiResLmmImageProcessor.from_pretrained(tmp_path, **larger).view_size == 56

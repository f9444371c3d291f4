"""Pictures resized by torch and by Pillow, decoded whole and scaled, read one by one and in threads."""

import io
import multiprocessing
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin

from builders.images import PILLOW, assert_same_views, picture
from builders.tiny import random_image
from hires_lmm.processing import reading_hires_lmm as reading
from hires_lmm.processing import resizing_hires_lmm as resizing
from hires_lmm.processing.image_processing_hires_lmm import HiResLmmImageProcessor
from hires_lmm.processing.planners_hires_lmm import PLANNERS


def small(**changes) -> HiResLmmImageProcessor:
    return HiResLmmImageProcessor(**{"view_size": 28, "patch_size": 14, **changes})


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "jpeg", **{"quality": 95, **options})
    return file.getvalue()


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


# ---- backends -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("resample", [None, 0, 1, 2, 3, 4, 5])
def test_torch_draws_what_pillow_draws(planner, resample):
    """At most 2 of 255 levels apart, and equal where torch has no such filter; geometry is the same."""
    for number, size in enumerate([(1, 1), (7, 5), (20, 400), (400, 20), (56, 112), (300, 301), (240, 80), (30, 300)]):
        image = picture(*size, seed=number)
        plain = {"do_normalize": False, "resample": resample}
        pillow = small(planner=planner, resize_backend="pillow")(image, **plain)
        default = small(planner=planner)(image, **plain)
        views = default.pop("pixel_values"), pillow.pop("pixel_values")
        assert_same_views(*views, "torch" if resample in (None, 2, 3) else "pillow", (1, 1, 1))
        assert equal(default, pillow)


@pytest.mark.parametrize("step", [1, 3000, 10**9])
def test_bands_change_no_bit(step, monkeypatch):
    image = picture(97, 130)
    wanted = [((31, 40), 3), ((200, 61), 2), ((97, 50), 3), ((97, 130), 3)]
    monkeypatch.setattr(resizing, "BAND_BYTES", step)
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    for found, (size, resample) in zip(resizing.resize_all(image, wanted, "torch"), wanted, strict=True):
        mode = {2: "bilinear", 3: "bicubic"}[resample]
        whole = torch.nn.functional.interpolate(planes, size=size, mode=mode, antialias=True)
        assert np.array_equal(found, whole[0].permute(1, 2, 0))


@pytest.mark.skipif(PILLOW < 13, reason="its axes come in another order")
@pytest.mark.parametrize("step", [1, 3000, 10**9])
def test_the_axes_come_in_the_order_of_pillow(step, monkeypatch):
    """On black and white noise the other order is more than 10 levels off."""
    monkeypatch.setattr(resizing, "BAND_BYTES", step)
    noise = np.random.default_rng(0).integers(0, 2, (90, 60, 3), dtype=np.uint8) * 255
    for size in ((30, 80), (20, 59), (20, 26), (20, 24), (120, 20), (120, 90)):
        wanted = np.asarray(Image.fromarray(noise).resize(size[::-1], 3)).astype(int)
        (found,) = resizing.resize_all(noise, [(size, 3)], "torch")
        assert np.abs(found - wanted).max() <= 2, size


def test_arrays_of_any_strides_are_read_where_they_lie():
    """Read-only, turned and channels-first ones give what their copy gives; nothing of the caller's is written."""
    array = np.asarray(picture(90, 70))
    assert not array.flags.writeable
    processor, wanted = small(), small()(picture(90, 70))
    sources = [array, array.transpose(2, 0, 1), np.asfortranarray(array), torch.from_numpy(array.copy())]
    for source in [*sources, torch.from_numpy(array.transpose(2, 0, 1).copy())]:
        assert equal(processor(source), wanted)
    mirrored = processor(array[:, ::-1])
    assert equal(mirrored, processor(np.ascontiguousarray(array[:, ::-1])))
    assert np.array_equal(array, np.asarray(picture(90, 70)))


def test_an_array_becomes_no_image_of_pillow(monkeypatch):
    array, made = np.asarray(picture(90, 70)), []
    monkeypatch.setattr(Image, "fromarray", lambda *a, **k: made.append(a))
    small()(array)
    assert not made


@pytest.mark.parametrize("backend", ["torch", "pillow"])
def test_a_strip_is_made_shorter_before_its_rows_are_widened(backend):
    """Else a strip of half a million rows would take a gigabyte."""
    tracemalloc.start()
    (found,) = resizing.resize_all(picture(500_000, 1), [((336, 672), 3)], backend)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (336, 672, 3) and most < 2**26


def test_the_default_device_of_torch_changes_nothing():
    wanted = [small(planner=name)(picture(60, 90)) for name in ("slime", "hd")]
    with torch.device("meta"):
        found = [small(planner=name)(picture(60, 90)) for name in ("slime", "hd")]
    assert all(map(equal, found, wanted))


# ---- decoding -----------------------------------------------------------------------------------------------------
@pytest.fixture
def decoded(monkeypatch) -> list:
    """Sizes (height, width) at which JPEG files decode themselves."""
    sizes = []
    load = JpegImagePlugin.JpegImageFile.load

    def noted(self):
        if self.tile:
            sizes.append(self.size[::-1])
        return load(self)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", noted)
    return sizes


CANVASES = (
    ({"max_crops": 4}, (80, 60)),
    ({"max_crops": 12}, (160, 120)),
    ({}, (320, 240)),
    ({"views": "global"}, (80, 60)),
    ({"view_size": 140}, (640, 480)),
)


@pytest.mark.parametrize("as_source", ["bytes", "path", "opened"])
def test_a_scaled_jpeg_is_decoded_as_small_as_its_views_allow(as_source, tmp_path, decoded):
    image = random_image(640, 480)
    (tmp_path / "a.jpg").write_bytes(jpeg(image))
    whole = small(decode="full", do_normalize=False)(tmp_path / "a.jpg")
    assert decoded == [(640, 480)]
    source = {"bytes": jpeg(image), "path": tmp_path / "a.jpg", "opened": Image.open(tmp_path / "a.jpg")}[as_source]
    for options, size in CANVASES:
        decoded.clear()
        plan = small(**options).plan(640, 480)
        needed = [max(pair) for pair in zip(plan.resized, plan.global_size, strict=True)]
        found = small(decode="scaled", do_normalize=False, **options)(source)
        assert decoded == [size] and all(map(lambda got, least, own: got >= min(least, own), size, needed, (640, 480)))
        assert found["view_boxes"].tolist() == [list(view.box) for view in plan.views]
    found = small(decode="scaled", do_normalize=False)(source)
    assert 0 < np.abs(found["pixel_values"] - whole["pixel_values"]).mean() < 0.03
    if as_source == "opened":
        assert source.size == (480, 640) and source.tile  # the user's own image is as it was


def test_by_default_files_are_decoded_whole(decoded):
    small()(jpeg(random_image(640, 480)))
    assert decoded == [(640, 480)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_jpeg_is_turned_upright_and_planned_by_its_true_size(orientation, decoded):
    image = random_image(601, 303)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(image, exif=exif)
    size = (303, 601) if orientation >= 5 else (601, 303)
    whole, found = (small(planner="slime", decode=decode, do_normalize=False)(data) for decode in ("full", "scaled"))
    assert decoded == [(601, 303), (301, 152)]
    assert np.abs(found.pop("pixel_values") - whole.pop("pixel_values")).mean() < 0.03
    assert equal(found, whole)
    assert found["view_boxes"].tolist() == [list(view.box) for view in small(planner="slime").plan(*size).views]


@pytest.mark.parametrize("options", [{"planner": "hd"}, {"planner": "multiple"}])
def test_what_is_drawn_at_its_own_size_is_decoded_whole(options, decoded):
    image = random_image(200, 200)
    whole, found = (small(**options, decode=decode)(jpeg(image)) for decode in ("full", "scaled"))
    assert decoded == [(200, 200)] * 2 and equal(whole, found)


@pytest.mark.parametrize("square", ["pad", "crop"])
def test_squares_and_other_formats_are_decoded_whole(square):
    data = jpeg(random_image(300, 200))
    planner = {"name": "slime", "square": square}
    assert equal(small(planner=planner, decode="scaled")(data), small(planner=planner)(data))
    file = io.BytesIO()
    random_image(300, 200).save(file, "webp")
    assert equal(small(decode="scaled")(file.getvalue()), small()(file.getvalue()))


def test_grey_cmyk_and_damaged_jpeg_files_are_scaled_as_well():
    for mode in ("L", "CMYK"):
        data = jpeg(random_image(640, 480).convert(mode))
        whole, found = (
            small(decode=decode, do_normalize=False)(data)["pixel_values"] for decode in ("full", "scaled")
        )
        assert np.abs(found - whole).mean() < 0.03
    with pytest.raises(ValueError, match="Image 1 cannot be decoded"):
        small(decode="scaled")([picture(9, 9), jpeg(random_image(640, 480))[:3000]])
    with pytest.raises(ValueError, match=r"Image 0 has 640x480 .* more than pixel_limit=1000"):
        small(decode="scaled", pixel_limit=1000)(jpeg(random_image(640, 480)))


# ---- threads ------------------------------------------------------------------------------------------------------
def sources() -> list:
    images = [random_image(40 + 13 * number, 200 - 17 * number, seed=number) for number in range(9)]
    return [jpeg(image) if number % 3 == 0 else image for number, image in enumerate(images)]


@pytest.mark.parametrize("planner", ["slime", "hd", "llava_uhd"])
def test_threads_give_what_one_gives(planner):
    assert equal(small(planner=planner, num_threads=5)(sources()), small(planner=planner, num_threads=1)(sources()))


def test_one_opened_file_given_several_times_is_decoded_once_at_a_time(tmp_path):
    random_image(500, 400).save(tmp_path / "a.png")
    wanted = small(num_threads=1)(tmp_path / "a.png")["pixel_values"]
    for _ in range(5):
        image = Image.open(tmp_path / "a.png")
        found = small(num_threads=4)([image] * 8)["pixel_values"].reshape(8, *wanted.shape)
        assert (found == wanted).all()


def test_no_more_pictures_are_decoded_at_once_than_there_are_threads(monkeypatch):
    running, most, lock = [0], [0], threading.Lock()
    both = threading.Barrier(3)
    read = reading.to_picture

    def noted(*args, **options):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        both.wait(timeout=30)  # as many as there are threads come here at once
        result = read(*args, **options)
        with lock:
            running[0] -= 1
        return result

    monkeypatch.setattr(reading, "to_picture", noted)
    small(num_threads=3)(sources())
    assert most == [3]


def test_the_first_image_that_fails_is_named_whichever_fails_first(monkeypatch):
    slow = threading.Event()
    read = reading.open_image

    def waits(source, index):
        if index == 2:
            slow.wait(timeout=30)
        if index == 5:
            slow.set()
        return read(source, index)

    monkeypatch.setattr(reading, "open_image", waits)
    bad = sources()
    bad[2], bad[5] = b"no image", b"neither"
    with pytest.raises(ValueError, match="Image 2: '8 bytes' is not an image"):
        small(num_threads=9)(bad)


def test_threads_are_as_many_as_torch_has_and_none_remain(monkeypatch):
    seen = set()
    read = reading.open_image
    monkeypatch.setattr(reading, "open_image", lambda *args: seen.add(threading.current_thread()) or read(*args))
    before = threading.active_count()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    small()(sources())
    assert seen == {threading.current_thread()}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    small()(sources())
    small()(sources()[0])
    assert 1 < len(seen) <= 1 + reading.MOST_THREADS and threading.active_count() == before


def _views_in_child(connection) -> None:
    connection.send(float(small(num_threads=3)(sources())["pixel_values"].sum()))


def test_a_fork_after_threads_were_used_does_not_hang():
    wanted = float(small(num_threads=3)(sources())["pixel_values"].sum())
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe()
    child = context.Process(target=_views_in_child, args=(sender,))
    child.start()
    assert receiver.poll(60) and receiver.recv() == wanted
    child.join(10)
    assert child.exitcode == 0


@pytest.mark.parametrize(
    "options, match",
    [
        ({"resize_backend": "opencv"}, "resize_backend='opencv' must be 'torch' or 'pillow'"),
        ({"decode": "draft"}, "decode='draft' must be 'full' or 'scaled'"),
        ({"num_threads": 0}, "num_threads=0 must be at least 1"),
        ({"num_threads": True}, "num_threads"),
        ({"enlarge": "no"}, "enlarge"),
    ],
)
def test_wrong_values_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        small(**options)
    with pytest.raises(ValueError, match=match):
        small()(picture(9, 9), **options)

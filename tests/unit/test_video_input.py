"""Videos as users pass them: which frames are taken, what they look like, files, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

import hires_lmm.processing.video_input_hires_lmm as video_input
from builders.clips import counting_frames, write_clip
from hires_lmm.processing.frame_sampling_hires_lmm import FRAME_SAMPLERS, Sampling
from hires_lmm.processing.image_processing_hires_lmm import HiResLmmImageProcessor
from hires_lmm.processing.video_input_hires_lmm import Video, flatten_videos, merge_videos


SMALL = {"view_size": 28, "patch_size": 14}


def processor(**options) -> HiResLmmImageProcessor:
    return HiResLmmImageProcessor(**SMALL, **options)


def numbers(frames) -> list[int]:
    """Which frames of `counting_frames` these are."""
    return [round(float(np.asarray(frame).mean()) / 6) for frame in frames]


def opened(video, **options) -> list[int]:
    return numbers(processor().open_videos(video, **options)[0])


FRAMES = counting_frames(20)
FORMS = {
    "array": FRAMES,
    "channels first": FRAMES.transpose(0, 3, 1, 2),
    "tensor": torch.from_numpy(FRAMES),
    "pictures": [Image.fromarray(frame) for frame in FRAMES],
    "arrays": list(FRAMES),
    "tensors": list(torch.from_numpy(FRAMES).permute(0, 3, 1, 2)),
    "floats": FRAMES / np.float32(255),
    "floats to 255": FRAMES.astype(np.float32),
    "wide integers": FRAMES.astype(np.int64),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_views(form):
    wanted = processor()(images=Video(FRAMES), return_tensors="np")
    found = processor()(images=Video(FORMS[form]), return_tensors="np")
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])


def test_a_frame_is_drawn_as_the_global_view_of_its_image():
    pictures = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (30, 50, 3), np.uint8)) for n in range(3)]
    for global_view in ("squeeze", "pad"):
        frames = processor(video_planner={"name": "frames", "global_view": global_view})(images=Video(pictures))
        images = processor(planner="slime", views="global", global_view=global_view)(images=pictures)
        np.testing.assert_array_equal(frames["pixel_values"], images["pixel_values"])
        np.testing.assert_array_equal(frames["view_boxes"], images["view_boxes"])
        assert frames["view_positions"][:, :5].tolist() == [[3, 3, 1, row, 0] for row in range(3)]
        assert frames["view_positions"][:, 8].tolist() == [1, 0, 0]


def test_dark_floats_stay_dark_where_other_frames_are_bright():
    dark = np.array([1.0, 200.0]).reshape(2, 1, 1, 1) * np.ones((2, 5, 4, 3))
    for form in (dark, torch.from_numpy(dark), torch.from_numpy(dark).bfloat16()):
        frames = processor().open_videos(form)[0]
        assert [int(np.asarray(frame).max()) for frame in frames] == [1, 200]


@pytest.mark.parametrize("sampler", FRAME_SAMPLERS)
@pytest.mark.parametrize("total", [17, 40, 101])
def test_samplers_take_rising_numbers_within_the_video(sampler, total):
    for number in range(1, total):
        chosen = Sampling(number, sampler=sampler).choose(total)
        assert len(chosen) == number and chosen == sorted(set(chosen)) and chosen[0] >= 0 and chosen[-1] < total


def test_options_say_which_frames_are_taken():
    assert opened(FRAMES) == list(range(20))
    assert opened(FRAMES, num_frames=50) == list(range(20))
    assert opened(FRAMES, num_frames=4) == [2, 7, 12, 16]  # int(2.375) + round(4.75 n)
    assert opened(FRAMES, num_frames=4, frame_sampling="linspace") == [0, 6, 13, 19]
    saved = processor(num_frames=3, frame_sampling="linspace")
    assert numbers(saved.open_videos(FRAMES)[0]) == [0, 10, 19]  # 9.5 goes to the even number
    assert numbers(saved.open_videos(FRAMES, num_frames=2)[0]) == [0, 19]


def test_nested_videos_are_found_in_their_order():
    one, other = FRAMES[:2], [Image.fromarray(FRAMES[0])]
    assert [video.source for video in flatten_videos("a.mp4")] == ["a.mp4"]
    assert [video.source for video in flatten_videos(["a.mp4", "b.mp4"])] == ["a.mp4", "b.mp4"]
    assert len(flatten_videos([[one, other], [], None, ["c.mp4"]])) == 3
    assert len(flatten_videos(np.stack([one, one, one]))) == 3
    assert len(flatten_videos(other)) == len(flatten_videos(FRAMES[0])) == 1
    with pytest.raises(ValueError, match="A video is a int; pass a list of frames"):
        flatten_videos([3])


def test_images_and_videos_come_in_the_order_of_their_marks():
    texts = ["<video> then <image>", "none", "<image><image> <video>"]
    merged, images, videos = merge_videos(["a", "b", "c"], texts, ["1.mp4", "2.mp4"], ("<image>", "<video>"))
    shown = [[one.source if isinstance(one, Video) else one for one in own] for own in merged]
    assert shown == [["1.mp4", "a"], [], ["b", "c", "2.mp4"]] and (images, videos) == (3, 2)


# ---- planners


def test_frames_lie_in_a_grid_in_time_order():
    plan = processor(video_planner={"name": "frames", "grid": [2, 3], "overview": True}).plan_video(5, 40, 60)
    assert [(view.kind, view.row, view.col, view.frame) for view in plan.views] == [
        (0, 0, 0, 0), (3, 0, 0, 0), (3, 0, 1, 1), (3, 0, 2, 2), (3, 1, 0, 3), (3, 1, 1, 4),
    ]  # fmt: skip
    assert {(view.grid_rows, view.grid_cols) for view in plan.views} == {(2, 3)}


def test_too_few_frames_are_repeated_and_an_image_may_be_a_video():
    few = {"name": "frames", "min_frames": 5}
    shown = processor(video_planner=few)(images=Video(FRAMES[:2]))["pixel_values"]
    once = processor()(images=Video(FRAMES[:2]))["pixel_values"]
    np.testing.assert_array_equal(shown, once[[0, 0, 0, 1, 1]])
    image = processor(planner=few)(images=Image.fromarray(FRAMES[1]))
    np.testing.assert_array_equal(image["pixel_values"], once[[1] * 5])


def test_a_thumbnail_is_the_collage_of_normalised_frames():
    thumbnail = processor(video_planner={"name": "thumbnail", "collage": 4})
    views = thumbnail(images=Video(FRAMES[:9]))
    pixels = views["pixel_values"]
    assert views["view_positions"][:, 0].tolist() == [0, *[3] * 9]
    for place, frame in enumerate((0, 3, 5, 8)):  # round(8 / 3 n)
        top, left = place // 2 * 14, place % 2 * 14
        mean = pixels[1 + frame].mean(axis=(1, 2))
        np.testing.assert_allclose(pixels[0, :, top : top + 14, left : left + 14].mean(axis=(1, 2)), mean, atol=1e-4)


def test_squares_are_made_of_every_frame():
    pictures = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (30, 50, 3), np.uint8)) for n in range(2)]
    for square in ("pad", "crop"):
        frames = processor(video_planner={"name": "frames", "square": square})(images=Video(pictures))
        images = processor(planner={"name": "slime", "square": square}, views="global", global_view="squeeze")(
            pictures
        )
        np.testing.assert_array_equal(frames["pixel_values"], images["pixel_values"])
        np.testing.assert_array_equal(frames["view_boxes"], images["view_boxes"])


def test_an_extra_tower_sees_every_frame():
    towers = {"hires": {"size": 20, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}}
    sources = [Video(FRAMES[:3]), Image.fromarray(FRAMES[9])]
    seen = processor(extra_towers=towers, global_view="squeeze")(images=sources)
    means = seen["pixel_values_hires"].mean(axis=(1, 2, 3)) * 255 / 6
    np.testing.assert_allclose(means, [0, 1, 2, 9], atol=1e-2)


# ---- files


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    pytest.importorskip("av")
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", counting_frames(40), rate=10)


def test_a_file_gives_the_frames_that_were_asked_for(clip):
    assert opened(str(clip), num_frames=5, frame_sampling="linspace") == [0, 10, 20, 29, 39]
    assert opened(clip, fps=2.5) == Sampling(10).choose(40)
    assert len(opened(clip)) == 16  # where nobody says how many


@pytest.mark.parametrize(("ending", "codec"), [("webm", "libvpx-vp9"), ("mkv", "libx264")])
def test_a_file_that_does_not_say_its_frames_is_counted(tmp_path, ending, codec):
    pytest.importorskip("av")
    path = write_clip(tmp_path / f"clip.{ending}", counting_frames(12), codec=codec)
    assert opened(str(path), num_frames=4, frame_sampling="linspace") == [0, 4, 7, 11]


def test_frames_are_counted_where_the_file_is_cut_short(clip, monkeypatch):
    load = video_input.load_video

    def boast(source, sample_indices_fn, **kwargs):
        def choose(metadata, **options):
            metadata.total_num_frames = 60
            return sample_indices_fn(metadata, **options)

        return load(source, sample_indices_fn=choose, **kwargs)

    monkeypatch.setattr(video_input, "load_video", boast)
    assert opened(str(clip), num_frames=4, frame_sampling="linspace") == [0, 13, 26, 39]


def test_long_decoding_shows_how_far_it_is(clip, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **options):
            self.options, self.done, self.total = options, 0, None
            bars.append(self)

        def update(self, number):
            self.done += number

        __enter__, __exit__ = lambda self: self, lambda self, *_: None

    monkeypatch.setattr(video_input.logging, "tqdm", Bar)
    opened(str(clip), num_frames=5, frame_sampling="linspace")
    assert [(bar.done, bar.total) for bar in bars] == [(40, 40)]
    assert bars[0].options["desc"] == "decoding clip.mp4" and bars[0].options["delay"] > 0


# ---- what is refused


@pytest.mark.parametrize(
    ("video", "options", "message"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), {}, "Video 0 has no frames; pass at least one"),
        ([FRAMES[0], FRAMES[0][:9]], {}, "Video 0: frame 1 has 9x48 pixels, frame 0 32x48; .* equally large"),
        ([FRAMES[0], FRAMES[0].astype(complex)], {}, "Video 0, .*complex128; pass integers or floats"),
        (np.full((2, 4, 4, 3), 300, np.int32), {}, "Video 0 is of int32 with values above 255; scale it to 8 bits"),
        ("nowhere.mp4", {}, "Video 0: 'nowhere.mp4' is no existing file and no URL .*; correct it"),
        (FRAMES, {"fps": 2}, "fps=2 needs the rate of the video itself.*; pass num_frames"),
        (FRAMES, {"fps": 2, "num_frames": 3}, "num_frames=3 and fps=2 exclude each other"),
        (FRAMES, {"num_frames": 0}, "num_frames=0 must be a number above 0"),
        (FRAMES, {"frame_sampling": "random"}, "frame_sampling='random' is unknown; choose one of uniform, segments"),
        (FRAMES, {"video_planner": "slime"}, "video_planner='slime' plans images; choose one of frames, thumbnail"),
        (FRAMES, {"video_planner": {"name": "frames", "grid": [2, 3]}}, "no room for 20 frames; pass num_frames=6"),
        (FRAMES, {"video_planner": {"name": "frames", "max_crops": 3}}, "max_crops=3 is of no meaning for frames"),
        (FRAMES[:3], {"video_planner": {"name": "thumbnail"}}, "collage=6 needs as many frames, but a video has 3"),
        (FRAMES, {"image_boxes": [[[0, 0, 4, 4]]]}, "image_boxes of image 0, which is a video"),
        (FRAMES, {"token_layout": {"patch_grid": [2, 2], "grids": {}}}, "places no frames. Build the model"),
    ],
    ids=str,
)
def test_wrong_videos_and_options_are_named_with_their_remedy(video, options, message):
    with pytest.raises(ValueError, match=message):
        processor()(images=Video(video), **options)


def test_a_damaged_file_is_named(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    with pytest.raises(ValueError, match=r"Video 0: '.*bad.mp4' cannot be decoded by pyav .*; replace it"):
        opened(tmp_path / "bad.mp4")


def test_without_a_decoder_the_extra_is_named(clip, monkeypatch):
    for name in ("av", "torchcodec", "cv2", "decord"):
        monkeypatch.setattr(video_input, f"is_{name}_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'hires-lmm\[video\]'"):
        opened(clip)

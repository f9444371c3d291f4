"""Needle clips: answers read off the pixels, one frame that does not tell, splits, and the encoded clips."""

import json

import numpy as np
import pytest
from transformers.video_utils import load_video


pytest.importorskip("av")
from needle.clips import CLIP_KINDS, CLIP_WORDS, needle_clip, render_clip
from needle.demo_clips import FOLDER, LIST, clip_frames, main, pick_clips
from needle.scenes import COLOURS


CLIPS = [needle_clip(index, "validation") for index in range(80)]
DIRECTIONS = {(0, -1): "left", (0, 1): "right", (-1, 0): "up", (1, 0): "down"}


def seen(frames: np.ndarray, colour: str) -> list[np.ndarray]:
    """Places of the pixels of a colour in each frame; backgrounds lie in the middle of the colour cube."""
    near = np.abs(frames.astype(int) - np.array(COLOURS[colour])).max(-1) < 45
    return [np.argwhere(frame) for frame in near]


def shows(frames: np.ndarray, colour: str) -> list[bool]:
    return [len(places) > 8 for places in seen(frames, colour)]


def of_kind(kind: str):
    return [clip for clip in CLIPS if clip.kind == kind]


def test_the_way_of_an_object_is_that_of_its_pixels():
    answers = set()
    for clip in of_kind("way"):
        frames = render_clip(clip)
        for question in clip.questions:
            places = seen(frames, question.text.split()[4])
            moved = places[-1].mean(0) - places[0].mean(0)
            axis = int(np.abs(moved).argmax())
            assert abs(moved[axis]) > 12 and abs(moved[1 - axis]) < 2
            assert DIRECTIONS[tuple(np.sign(moved * np.eye(2)[axis]).astype(int))] == question.answer
            answers.add(question.answer)
    assert answers == {"left", "right", "up", "down"}


def test_objects_stay_whole_and_the_middle_of_their_way_does_not_tell_it():
    """In 400 clips: within the picture, apart, and with the same places in the middle whatever the way."""
    middles: dict[str, list] = {}
    for index in range(0, 1600, 4):
        clip = needle_clip(index, "train")
        for question, track in zip(clip.questions, clip.tracks, strict=True):
            ends = [track.at(0), track.at(clip.num_frames - 1)]
            for item in ends:
                assert 0 <= item.top <= 64 - item.height and 0 <= item.left <= 64 - item.width
            middles.setdefault(question.answer, []).append([ends[0].top + ends[1].top, ends[0].left + ends[1].left])
        first, second = (
            {(t.at(f).top // 32, t.at(f).left // 32) for f in range(clip.num_frames)} for t in clip.tracks
        )
        assert len(first) == len(second) == 1 and first != second
    means = np.array([np.mean(places, 0) / 2 for places in middles.values()])
    assert len(means) == 4 and np.ptp(means, axis=0).max() < 4  # of 64


def test_what_is_first_is_seen_first_and_nothing_is_seen_together():
    for clip in of_kind("first"):
        frames = render_clip(clip)
        start = {track.item.colour: shows(frames, track.item.colour).index(True) for track in clip.tracks}
        assert len(clip.questions) == 3
        for question in clip.questions:
            named = question.text.replace(" or", "").replace(",", "").split()
            pair = [word for word in named if word in COLOURS]
            assert question.answer == min(pair, key=start.__getitem__)
    named_first = [
        question.text.index(question.answer) < 30 for clip in of_kind("first") for question in clip.questions
    ]
    assert 0 < sum(named_first) < len(named_first)


def test_before_and_after_are_the_neighbours_of_the_digit_that_is_named():
    for clip in of_kind("before"):
        shown = []
        for frame in range(clip.num_frames):
            (track,) = (track for track in clip.tracks if frame in track.frames)
            shown += [track.item.value] if track.item.value not in shown else []
        before, after = clip.questions
        assert before.text == f"which digit is before the {shown[1]} ?" and before.answer == shown[0]
        assert after.text == f"which digit is after the {shown[1]} ?" and after.answer == shown[2]


def test_the_total_is_the_number_of_colours_of_the_whole_clip():
    totals = set()
    for clip in of_kind("total"):
        frames = render_clip(clip)
        counts = np.array([shows(frames, colour) for colour in COLOURS])
        assert clip.questions[0].answer == str(counts.any(1).sum())
        assert set(counts.sum(0).tolist()) == {1}  # no frame shows two
        totals.add(clip.questions[0].answer)
    assert totals == {"2", "3", "4", "5"}


@pytest.mark.parametrize("kind", ["first", "before", "total"])
def test_every_frame_shows_one_object_alone(kind):
    for clip in of_kind(kind):
        for frame in range(clip.num_frames):
            assert sum(frame in track.frames for track in clip.tracks) == 1


def test_longer_clips_change_between_eight_parts_alone():
    for index in range(8):
        short, long = needle_clip(index, "test"), needle_clip(index, "test", num_frames=24)
        assert short.questions == long.questions
        if short.kind != "way":
            assert [track.frames for track in long.tracks] == [
                range(3 * track.frames.start, 3 * track.frames.stop) for track in short.tracks
            ]


def test_splits_and_seeds_differ_and_the_same_key_gives_the_same_clip():
    given = [(0, "train"), (0, "validation"), (0, "test"), (0, "train", 1)]
    pixels = [render_clip(needle_clip(*key)).tobytes() for key in given]
    assert len(set(pixels)) == 4
    assert render_clip(needle_clip(0, "train")).tobytes() == pixels[0]
    with pytest.raises(ValueError, match="split='rain'"):
        needle_clip(0, "rain")
    with pytest.raises(ValueError, match="num_frames=12 must be a multiple of 8"):
        needle_clip(0, "train", num_frames=12)


def test_the_committed_clips_are_those_of_the_script(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["demo_clips", str(tmp_path)])
    main()
    entries = json.loads((FOLDER / LIST).read_text())
    assert entries == pick_clips() == json.loads((tmp_path / LIST).read_text())
    assert [entry["kind"] for entry in entries] == list(CLIP_KINDS)
    assert sum((FOLDER / entry["video"]).stat().st_size for entry in entries) < 300_000
    for entry in entries:
        committed, again = (
            load_video(str(folder / entry["video"]), backend="pyav")[0] for folder in (FOLDER, tmp_path)
        )
        drawn = clip_frames(entry["clip"]).astype(int)
        assert committed.shape == drawn.shape == (24, 384, 384, 3)
        for frames in (committed, again):
            assert np.abs(frames - drawn).mean() < 6
            apart = [np.abs(frames[number] - drawn).mean((1, 2, 3)).argmin() for number in (0, 12, 23)]
            assert entry["kind"] != "way" or apart == [0, 12, 23]


def test_the_words_that_the_halves_lack_are_those_listed():
    vocabulary = json.loads((FOLDER.parents[1] / "checkpoints/halves/language/tokenizer.json").read_text())
    used = {
        word for clip in CLIPS for question in clip.questions for word in (*question.text.split(), question.answer)
    }
    assert used - set(vocabulary["model"]["vocab"]) == set(CLIP_WORDS)

"""The needle task: scenes, exact answers, labels, splits, streaming."""

import hashlib
import json
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from needle import (
    QUESTION_KINDS,
    NeedleDataset,
    NeedleOptions,
    ask_questions,
    chance_accuracy,
    constant_accuracy,
    demo_scenes,
    needle_rows,
    needle_scene,
    render_scene,
    sprites,
)
from needle.patch_labels import (
    crop_boxes,
    visible_share,
)


ROOT = Path(__file__).parents[2]
SCENES = [needle_scene(index, "validation") for index in range(60)]


def digest(split: str = "train", seed: int = 0) -> str:
    pixels = b"".join(render_scene(needle_scene(index, split, seed)).tobytes() for index in range(3))
    return hashlib.sha256(pixels).hexdigest()


# ---- scenes


def test_the_same_key_gives_the_same_scene_in_another_process():
    code = (
        "import hashlib; from needle import *\n"
        "pixels = b''.join(render_scene(needle_scene(i, 'train')).tobytes() for i in range(3))\n"
        "print(hashlib.sha256(pixels).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == digest()
    assert len({digest(), digest("validation"), digest("test"), digest(seed=1)}) == 4


def test_digit_images_of_the_splits_are_disjoint_and_complete():
    rows = [{row for group in sprites.digit_rows(split).values() for row in group} for split in sprites.SPLITS]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 1797
    assert all(len(group) >= 10 for split in sprites.SPLITS for group in sprites.digit_rows(split).values())


@pytest.mark.parametrize("scene_size", [256, 384, 1536])
def test_objects_are_too_small_for_the_global_view(scene_size: int):
    options = NeedleOptions(scene_size=scene_size, grid=4 if scene_size == 256 else 6)
    for index in range(10):
        for item in needle_scene(index, "train", options=options).objects:
            assert item.height / options.unit <= 2.25
            assert item.height >= 8  # and readable in the scene


def test_colours_and_values_are_distinct_and_boxes_inside_and_apart():
    for scene in SCENES:
        items = scene.objects
        assert 1 <= len(items) <= 6
        assert len({item.colour for item in items}) == len(items)
        values = [item.value for item in items if item.kind != "chart"]
        assert len(set(values)) == len(values)
        taken = np.zeros((384, 384), dtype=int)
        for item in items:
            assert min(item.top, item.left) >= 0
            assert item.top + item.height <= 384 and item.left + item.width <= 384
            taken[item.top : item.top + item.height, item.left : item.left + item.width] += 1
        assert taken.max() == 1


def test_cut_objects_are_marked():
    cut = 0
    for scene in SCENES:
        for item in scene.objects:
            shares = [visible_share(item, box) for box in crop_boxes(scene)]
            assert sum(shares) == pytest.approx(1)
            assert item.cut == (max(shares) < 1)
            cut += item.cut
    assert cut > 20  # free placement really cuts


# ---- questions


def test_answers_are_right():
    for scene in SCENES:
        by_colour = {item.colour: item for item in scene.objects}
        by_value = {item.value: item for item in scene.objects if item.kind != "chart"}
        for question in ask_questions(scene):
            words = question.text.split()
            if question.kind in ("read_digit", "read_number", "read_word", "shape", "chart"):
                item = next(by_colour[word] for word in words if word in by_colour)
                assert question.answer == item.value and question.cut == item.cut
            elif question.kind == "colour_of_value":
                assert by_value[words[-2]].colour == question.answer
            elif question.kind == "place_of_value":
                assert by_value[words[-2]].place == question.answer
            elif question.kind == "larger_digit":
                named = [by_colour[word] for word in words if word in by_colour]
                assert question.answer == max(named, key=lambda item: int(item.value)).colour
            elif question.kind == "count":
                assert int(question.answer) == len(scene.objects)
            elif question.kind == "background":
                assert question.answer == scene.background
            elif question.kind == "place_of_colour":
                assert by_colour[words[3]].place == question.answer
            else:
                place = " ".join(words[-3:-1])
                there = [item for item in scene.objects if item.place == place]
                there = [item for item in there if question.kind == "colour_at_place" or item.kind == "digit"]
                assert [item.value if question.kind == "digit_at_place" else item.colour for item in there] == [
                    question.answer
                ]


def test_chance_is_what_the_best_constant_answer_gets():
    asked = [question for index in range(1500) for question in ask_questions(needle_scene(index, "train"))]
    chance, constant = chance_accuracy(NeedleOptions()), constant_accuracy(asked)
    assert set(chance) == set(constant) == set(QUESTION_KINDS)
    for kind in QUESTION_KINDS:
        assert chance[kind] <= constant[kind] + 1e-9
        assert constant[kind] < chance[kind] + 0.05


# ---- the stream


def test_the_stream_is_endless_repeats_and_can_be_continued():
    def keys(rows) -> list:
        return [(row["scene"], row["messages"][0]["content"][1]["text"]) for row in rows]

    stream = iter(NeedleDataset("train"))
    first = [next(stream) for _ in range(12)]
    again = list(NeedleDataset("train", num_scenes=3))
    assert keys(again) == keys(first)[: len(again)]
    assert keys(NeedleDataset("train", num_scenes=3, first_scene=2)) == [key for key in keys(again) if key[0] == 2]


def test_workers_share_the_scenes():
    data = NeedleDataset("validation", num_scenes=6, questions_per_scene=2)
    alone = sorted((row["scene"], row["answer"]) for row in data)
    loader = DataLoader(data, batch_size=None, num_workers=2)
    assert sorted((row["scene"], row["answer"]) for row in loader) == alone


def test_rows_of_a_sweep_are_those_of_the_dataset_with_pictures_drawn_later():
    options = NeedleOptions(scene_size=192)
    expected = list(NeedleDataset("validation", 3, seed=5, options=options, questions_per_scene=4))
    rows = needle_rows("validation", scenes=3, questions=4, seed=5, **vars(options))
    chance = chance_accuracy(options)
    assert len(rows) == len(expected) == 12
    for row, other in zip(rows, expected, strict=True):
        assert np.array_equal(np.asarray(row["images"][0]()), np.asarray(other["images"][0]))
        same = ("messages", "answer", "kind", "fine", "cut", "scene")
        assert [row[name] for name in same] == [other[name] for name in same]
        assert row["chance"] == chance[row["kind"]]
        assert chance[row["kind"]] * 0.9 < row["constant"] < chance[row["kind"]] * 3
    assert rows[0]["images"][0] is rows[1]["images"][0]
    with pytest.raises(ValueError, match=r"NeedleOptions has no field 'size'; its fields are .*scene_size"):
        needle_rows(size=192)


def test_the_task_is_registered_for_sweeps():
    (entry,) = (entry for entry in entry_points(group="hires_lmm.rows") if entry.name == "needle")
    assert entry.load() is needle_rows


def test_neither_the_package_nor_its_examples_import_the_task():
    imported = re.compile(r"^\s*(from|import) needle\b", re.MULTILINE)
    files = [file for folder in ("src", "examples") for file in (ROOT / folder).rglob("*.py")]
    assert files and imported.search("def f():\n    from needle.runs import train")
    assert [file for file in files if imported.search(file.read_text(encoding="utf-8"))] == []


def test_the_demonstration_shows_what_its_script_draws():
    entries = demo_scenes.pick_scenes()
    assert entries == json.loads((demo_scenes.FOLDER / demo_scenes.LIST).read_text())
    assert len({entry["kind"] for entry in entries}) == len(entries) == 5
    for entry in entries:
        stored = Image.open(demo_scenes.FOLDER / entry["image"])
        assert min(stored.size) >= 1500 and (demo_scenes.FOLDER / entry["image"]).stat().st_size < 600_000
    drawn = np.asarray(demo_scenes.picture_of(entries[0]), dtype=int)
    assert np.abs(np.asarray(Image.open(demo_scenes.FOLDER / entries[0]["image"]), dtype=int) - drawn).mean() < 6

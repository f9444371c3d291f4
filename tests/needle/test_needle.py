"""The needle task: scenes, exact answers, labels, splits, streaming."""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from needle import (
    FINE_KINDS,
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
from needle.backgrounds import BACKGROUNDS, paint_background
from needle.patch_labels import (
    IGNORED,
    KIND_INDEX,
    VALUE_INDEX,
    crop_boxes,
    cut_view,
    global_box,
    label_patches,
    patch_shares,
    visible_share,
)
from needle.scenes import COLOURS, PLACES
from needle.text_scenes import TextStyle, answerable_kinds, pick_questions, write_slots


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


def test_scenes_of_the_splits_differ():
    seen = {
        split: {tuple((o.value, o.colour, o.top, o.left) for o in needle_scene(i, split).objects) for i in range(200)}
        for split in sprites.SPLITS
    }
    assert not seen["train"] & seen["validation"] and not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


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


@pytest.mark.parametrize(("placement", "offsets"), [("aligned", {0}), ("jitter", {0, 1, 2, 3})])
def test_curriculum_modes_stay_near_the_lattice(placement: str, offsets: set[int]):
    options = NeedleOptions(placement=placement)
    seen = set()
    for index in range(60):
        scene = needle_scene(index, "train", options=options)
        crops = [(item.top // 64, item.left // 64) for item in scene.objects]
        assert len(set(crops)) == len(crops)
        assert not any(item.cut for item in scene.objects)
        seen |= {edge % 8 for item in scene.objects for edge in (item.top, item.left)}
    assert seen == offsets


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placement": "grid"}, "free, jitter, aligned"),
        ({"num_objects": (0, 3)}, "num_objects"),
        ({"num_objects": (2, 9)}, "distinct colours"),
        ({"scene_size": 64, "grid": 1}, "enlarge scene_size"),
        ({"grid": 12}, "lower grid"),
    ],
)
def test_impossible_options_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        NeedleOptions(**changes)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="train, validation, test"):
        needle_scene(0, "dev")
    with pytest.raises(ValueError, match="train, validation, test"):
        sprites.digit_rows("dev")
    with pytest.raises(ValueError, match="circle"):
        sprites.drawn_shape("heart", 12)
    with pytest.raises(ValueError, match="pillow"):
        sprites.rendered_text("cat", 12, "comic")
    with pytest.raises(ValueError, match="brick"):
        paint_background("sea", 0, 64, 64, 6)


# ---- sprites and backgrounds


@pytest.mark.parametrize("font", sprites.FONTS)
def test_text_fills_its_height(font: str):
    for text in (*sprites.NUMBERS[::7], "CAT", "OWL"):
        cover = sprites.rendered_text(text, 12, font)
        assert cover.shape[0] == 12 and 6 <= cover.shape[1] <= 24
        assert cover[0].max() > 0 and cover[-1].max() > 0 and cover[:, 0].max() > 0 and cover[:, -1].max() > 0


def test_fonts_and_shapes_differ():
    assert len({sprites.rendered_text("47", 13, font).tobytes() for font in sprites.FONTS}) == len(sprites.FONTS)
    assert len({sprites.drawn_shape(shape, 13).tobytes() for shape in sprites.SHAPES}) == len(sprites.SHAPES)


@pytest.mark.parametrize("tallest", sprites.BARS)
def test_tallest_bar_is_where_the_chart_says(tallest: str):
    for look in range(49):
        columns = sprites.bar_chart(tallest, 12, look)[:-1].sum(0)
        assert columns.argmax() // 4 == sprites.BARS.index(tallest)


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_backgrounds_leave_room_for_every_colour(name: str):
    for seed in range(5):
        image = paint_background(name, seed, 128, 128, 6.0)
        assert image.shape == (128, 128, 3) and image.dtype == np.float32
        distances = [np.abs(image - np.array(colour)).max(-1) for colour in COLOURS.values()]
        assert min(np.percentile(distance, 1) for distance in distances) > 40


def test_a_digit_keeps_its_look_in_any_size():
    row = sprites.digit_rows("test")["8"][0]
    small, large = sprites.handwritten_digit(row, 12), sprites.handwritten_digit(row, 48)
    shrunk = np.asarray(Image.fromarray(large).resize((12, 12), Image.Resampling.BOX))
    assert np.abs(small - shrunk).mean() < 0.05


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


def test_every_kind_is_asked_and_fine_means_detail():
    asked = [question for scene in SCENES for question in ask_questions(scene)]
    assert {question.kind for question in asked} == set(QUESTION_KINDS)
    assert all(question.fine == (question.kind in FINE_KINDS) for question in asked)


def test_places_near_the_middle_lines_are_not_asked():
    for scene in SCENES:
        unclear = {item.colour for item in scene.objects if not item.clear_place}
        for question in ask_questions(scene):
            if question.kind == "place_of_colour":
                assert question.text.split()[3] not in unclear


def test_chance_is_what_the_best_constant_answer_gets():
    asked = [question for index in range(1500) for question in ask_questions(needle_scene(index, "train"))]
    chance, constant = chance_accuracy(NeedleOptions()), constant_accuracy(asked)
    assert set(chance) == set(constant) == set(QUESTION_KINDS)
    for kind in QUESTION_KINDS:
        assert chance[kind] <= constant[kind] + 1e-9
        assert constant[kind] < chance[kind] + 0.05


def test_questions_need_distinct_objects():
    with pytest.raises(ValueError, match="distinct=True"):
        ask_questions(needle_scene(0, "train", options=NeedleOptions(distinct=False)))


# ---- patch labels


def test_labels_of_an_aligned_object():
    options = NeedleOptions(placement="aligned", num_objects=(1, 1), kinds=(("digit", 1.0),))
    scene = needle_scene(3, "train", options=options)
    (item,) = scene.objects
    box = next(box for box in crop_boxes(scene) if visible_share(item, box) == 1)
    labels = label_patches(scene, box, 8)
    row, column = int(item.top - box[0]) // 8, int(item.left - box[1]) // 8
    assert labels.kind.reshape(8, 8)[row, column] == KIND_INDEX["digit"]
    assert labels.value.reshape(8, 8)[row, column] == VALUE_INDEX["digit", item.value]
    assert patch_shares(item, box, 8).sum() * 64 == pytest.approx(item.height * item.width)
    assert (labels.kind == 0).sum() >= 64 - 9
    empty = label_patches(scene, next(box for box in crop_boxes(scene) if visible_share(item, box) == 0), 8)
    assert (empty.kind == 0).all() and (empty.value == IGNORED).all()


def test_slivers_are_ignored_and_the_global_view_labels_one_patch_an_object():
    for scene in SCENES:
        for box in crop_boxes(scene):
            labels = label_patches(scene, box, 8)
            seen = [visible_share(item, box) for item in scene.objects]
            named = {
                VALUE_INDEX[o.kind, o.value] for o, share in zip(scene.objects, seen, strict=True) if share >= 0.5
            }
            assert set(labels.value.tolist()) - {IGNORED} <= named
        if len(scene.objects) == 1:
            assert (label_patches(scene, global_box(scene), 8).kind > 0).sum() == 1


def test_views_are_cut_as_they_are_or_resized():
    scene = SCENES[0]
    image = render_scene(scene)
    box = crop_boxes(scene)[7]
    assert np.array_equal(cut_view(image, box, 64), image[64:128, 64:128])
    whole = cut_view(image, global_box(scene), 64)
    assert whole.shape == (64, 64, 3)
    assert np.abs(whole.mean((0, 1)) - image.mean((0, 1))).max() < 1


# ---- scenes as text


def style(**changes) -> TextStyle:
    return replace(TextStyle(views="both", joined=False, listed=False, fillers=3, repeats=False), **changes)


def test_the_blocks_hold_what_the_views_can_show():
    import random

    scene = next(scene for scene in SCENES if len(scene.objects) == 5)
    slots = write_slots(scene, style(), random.Random(0))
    assert len(slots) == 2 * (5 + 3)
    first, second = slots[:8], slots[8:]
    assert all(slot == (scene.background,) or slot[0] == "object" for slot in first)
    assert {slot[2] for slot in second if len(slot) == 3} == {item.value for item in scene.objects}
    joined = write_slots(scene, style(views="local", joined=True), random.Random(0))
    assert {" ".join(slot[3:]) for slot in joined if len(slot) == 5} == {item.place for item in scene.objects}
    assert all(len(slot) == 1 for slot in write_slots(scene, style(listed=True), random.Random(0)))


def test_only_answerable_kinds_are_picked():
    import random

    questions = ask_questions(SCENES[1])
    assert set(answerable_kinds(style(views="global"))).isdisjoint(FINE_KINDS)
    assert "place_of_value" not in answerable_kinds(style(views="local"))
    assert "place_of_value" in answerable_kinds(style(views="local", joined=True))
    picked = pick_questions(questions, ("count", "read_digit"), 3, random.Random(0))
    assert {question.kind for question in picked} <= {"count", "read_digit"}
    assert len(pick_questions(questions, QUESTION_KINDS, 4, random.Random(0))) == 4


# ---- the stream


def test_rows_are_conversations():
    row = next(iter(NeedleDataset("test", num_scenes=1)))
    assert row["images"][0].size == (384, 384)
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert [part["type"] for part in row["messages"][0]["content"]] == ["image", "text"]
    assert row["messages"][1]["content"][0]["text"] == row["answer"]
    assert row["kind"] in QUESTION_KINDS and isinstance(row["cut"], bool)


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


def test_kinds_can_be_chosen():
    rows = list(NeedleDataset("validation", num_scenes=12, kinds=("read_digit", "larger_digit")))
    assert {row["kind"] for row in rows} == {"read_digit", "larger_digit"}
    with pytest.raises(ValueError, match="colour_of_value"):
        NeedleDataset("validation", kinds=("colour",))
    with pytest.raises(ValueError, match="validation"):
        NeedleDataset("dev")


def test_places_are_four():
    assert {item.place for scene in SCENES for item in scene.objects} == set(PLACES)


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

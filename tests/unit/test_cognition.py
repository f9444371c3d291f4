"""Cognition alignment: what is asked, where it goes, how often, and how answers are read and scored."""

import math
import pickle
import re
from collections import Counter
from random import Random

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from builders.tiny import random_image, tiny_processor
from builders.training import conversation, slime_config
from hires_lmm.training import HiResLmmCollator
from hires_lmm.training.data.cognition import (
    CodebookTask,
    CognitionTransform,
    PixelTask,
    Place,
    find_places,
    with_cognition,
)
from hires_lmm.training.data.cognition_tasks import (
    CODE_TEMPLATES,
    PIXEL_TEMPLATES,
    read_codes,
    read_pixels,
    region_colours,
    write_codes,
    write_pixels,
)


PALETTE = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 0, 0]])


class Palette:
    """A labelled codebook of five colours on a grid of 2 x 3 cells; the code is the nearest colour of the centre."""

    num_codes, grid = 5, (2, 3)

    def __call__(self, images):
        cells = np.stack([np.asarray(image.resize((3, 2), Image.Resampling.BOX), dtype=int) for image in images])
        return np.abs(cells[..., None, :] - PALETTE).sum(-1).argmin(-1)


def flag(codes, scale: int = 20) -> Image.Image:
    """An image whose cells have colours of the palette."""
    return Image.fromarray(PALETTE[np.array(codes)].astype(np.uint8).repeat(scale, 0).repeat(scale, 1))


def row(number: int = 0, turns: int = 3, parts: bool = False, system: bool = False, mark: str = "<image>\n{}") -> dict:
    """A conversation whose first turn holds the image."""
    messages = [{"role": "system", "content": "Be brief."}] if system else []
    for turn in range(turns):
        question = f"question {number}.{turn}"
        messages.append({"role": "user", "content": mark.format(question) if turn == 0 else question})
        messages.append({"role": "assistant", "content": f"answer {number}.{turn}"})
    if parts:
        for message in messages:
            texts = message["content"].split("<image>")
            content = [{"type": "text", "text": text} for text in texts if text]
            message["content"] = [{"type": "image"}, *content] if len(texts) > 1 else content
    return {"id": str(number), "messages": messages, "images": [random_image(24, 40, number)]}


def texts(row: dict) -> list[str]:
    """All contents as text, images as marks."""
    joined = []
    for message in row["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join("<image>" if part["type"] == "image" else part["text"] for part in content)
        joined.append(content)
    return joined


def inserted(before: dict, after: dict) -> list[int]:
    """Numbers of the new user turns, checked to be whole pairs between old ones."""
    old = [text.replace("<image>", "").strip() for text in texts(before)]
    new = [text.replace("<image>", "").strip() for text in texts(after)]
    found, index = [], 0
    while index < len(new):
        if new[index] in old:
            index += 1
        else:
            assert [m["role"] for m in after["messages"][index : index + 2]] == ["user", "assistant"]
            found.append(index)
            index += 2
    assert [text for text in new if text in old] == old
    return found


# ---- answers


@pytest.mark.parametrize("seed", range(3))
def test_codes_and_pixels_survive_the_round_trip(seed):
    rng = np.random.default_rng(seed)
    grid = tuple(rng.integers(1, 7, 2).tolist())
    codes, pixels = rng.integers(0, 1000, grid), rng.integers(0, 256, (*grid, 3)).astype(np.uint8)
    assert (read_codes(write_codes(codes), grid, 1000) == codes).all()
    assert (read_pixels(write_pixels(pixels), grid) == pixels).all()
    spaced = re.sub(r"\s", "\t \n", write_pixels(pixels)).replace(",", " ,\n")
    assert (read_pixels(f"\n {spaced} ", grid) == pixels).all()


def test_the_form_of_the_answers():
    assert write_codes(np.array([[1, 20], [3, 4]])) == "1 20\n3 4"
    assert write_pixels(np.array([[[1, 2, 3], [0, 255, 6]]], dtype=np.uint8)) == "1,2,3 0,255,6"
    assert read_codes("007 0 00 9", (2, 2), 10).tolist() == [[7, 0], [0, 9]]
    assert read_pixels("0,000,255 007,8,9", (2, 1)).tolist() == [[[0, 0, 255]], [[7, 8, 9]]]


@pytest.mark.parametrize(
    "text",
    ["", "1 2 3", "1 2 3 4 5", "1 2 3 10", "1 2 3 x", "1 2 3 -1", "1 2 3 4.0", "1, 2, 3, 4", "1 2 3 ٤", "9" * 9999],
)
def test_what_is_not_exactly_so_many_codes_is_no_answer(text):
    assert read_codes(text, (2, 2), 10) is None


# ---- tasks


def test_every_template_names_the_region_it_is_about():
    image = random_image(40, 60)
    for template in PIXEL_TEMPLATES:
        query = PixelTask((2, 3), [template]).ask(image, Random(3), "image 2")
        numbers = set(map(int, re.findall(r"\d+", query.prompt)))
        rng = Random(3)
        left, top = rng.randint(0, 50), rng.randint(0, 50)
        assert {left, top, left + 50, top + 50, 2, 3} <= numbers and "image 2" in query.prompt
        assert (query.target == region_colours(image, left, top, (2, 3))).all()
    for template in CODE_TEMPLATES:
        query = CodebookTask(Palette(), (1, 2), [template]).ask(flag([[0, 1, 2], [3, 4, 0]]), Random(1))
        assert "the image" in query.prompt and "{" not in query.prompt
    assert len(set(PIXEL_TEMPLATES)) >= 5 and len(set(CODE_TEMPLATES)) >= 5


def test_cells_are_means_of_the_pixels_under_them():
    image = random_image(200, 100, 5)
    pixels = np.asarray(image, dtype=np.float64)
    found = region_colours(image, left=20, top=10, grid=(4, 5)).astype(float)
    region = pixels[20:120, 20:70]
    cells = region.reshape(4, 25, 5, 10, 3).mean((1, 3))
    assert np.abs(found - cells).max() <= 1.01  # Pillow rounds after the rows and after the columns
    assert np.abs(found - pixels[20:120, 21:71].reshape(4, 25, 5, 10, 3).mean((1, 3))).max() > 2


def test_a_labelled_codebook_gives_the_known_indices():
    codes = np.array([[0, 1, 2], [3, 4, 1]])
    whole = CodebookTask(Palette(), block=None).ask(flag(codes), Random(0))
    assert whole.answer == "0 1 2\n3 4 1"
    template = (
        "{first_row} {last_row} {first_col} {last_col} {rows} {cols} {num_codes} {last_code} {grid_rows} {grid_cols}"
    )
    task, seen = CodebookTask(Palette(), (1, 2), [template]), set()
    for seed in range(30):
        query = task.ask(flag(codes), Random(seed))
        top, bottom, left, right, *rest = map(int, query.prompt.split())
        assert rest == [1, 2, 5, 4, 2, 3]
        assert (query.target == codes[top - 1 : bottom, left - 1 : right]).all()
        assert (task.read(query.answer) == query.target).all()
        seen.add((top, left))
    assert seen == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_tasks_score_answers():
    codes = CodebookTask(Palette(), None)
    query = codes.ask(flag([[0, 1, 2], [3, 4, 1]]), Random(0))
    assert codes.score([query.answer, "0 1 2 3 4 0", "no"], [query] * 3) == pytest.approx(
        {"parsed": 2 / 3, "accuracy": (1 + 5 / 6) / 3}
    )
    pixels = PixelTask((1, 1))
    query = pixels.ask(Image.new("RGB", (8, 8), (10, 20, 30)), Random(0))
    assert pixels.score(["10,20,36", "ten", query.answer], [query] * 3) == {
        "parsed": pytest.approx(2 / 3),
        "error": 1.0,
    }
    nothing = pixels.score(["?"], [query])
    assert nothing["parsed"] == 0 and math.isnan(nothing["error"])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PixelTask((0, 2)), "rows, columns"),
        (lambda: PixelTask((2.0, 2)), "rows, columns"),
        (lambda: CodebookTask(Palette(), (3, 1)), "does not fit into the 2 x 3 grid"),
        (lambda: CodebookTask(object()), "object is no quantiser"),
        (lambda: PixelTask(templates="one text"), "list of texts"),
        (lambda: PixelTask(templates=["{first_row}"]), "first_row.*its fields are image, left"),
        (lambda: PixelTask(templates=["<image> {left}"]), "write {image} there"),
        (lambda: CognitionTransform({PixelTask(): 1.5}), "1.5 of the task 'pixels'"),
        (lambda: CognitionTransform({PixelTask(): float("nan")}), "nan"),
        (lambda: CognitionTransform({PixelTask: 0.5}), "no task"),
        (lambda: CognitionTransform({PixelTask(): 1}, places="end"), "places='end'.*any, after"),
        (lambda: with_cognition({"train": []}, CognitionTransform({PixelTask(): 1})), "dict is no dataset"),
    ],
)
def test_senseless_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- places


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("mark", ["<image>\n{}", "{}\n<image>", "before <image> {}"])
def test_pairs_stay_whole_and_the_image_comes_first(parts, system, mark):
    transform = CognitionTransform({PixelTask((1, 1)): 1.0, CodebookTask(Palette(), (1, 1)): 1.0})
    for number in range(15):
        before = row(number, parts=parts, system=system, mark="<image>\n{}" if parts else mark)
        kept = pickle.dumps(before)
        after = transform(before)
        assert pickle.dumps(before) == kept
        assert len(inserted(before, after)) == 2
        marks = [text.count("<image>") for text in texts(after)]
        assert sum(marks) == 1 and marks.index(1) == int(system)
        kinds = {type(message["content"]) for message in after["messages"]}
        assert kinds == ({list} if parts else {str})
        assert not any(text.startswith("\n") or text.endswith("\n") for text in texts(after))


def test_places_are_uniform():
    transform, counts = CognitionTransform({PixelTask((1, 1)): 1.0}), Counter()
    for number in range(1200):
        before = row(number)
        counts[inserted(before, transform(before))[0]] += 1
    assert set(counts) == {0, 2, 4, 6}
    chi = sum((count - 300) ** 2 / 300 for count in counts.values())
    assert chi < 16.3  # 3 degrees of freedom, p = 0.001


def test_where_a_question_may_stand():
    assistant = {"role": "assistant", "content": "a"}

    def user(text):
        return {"role": "user", "content": text}

    two = [user("<image>\n<image> q"), assistant, user("q"), assistant]
    assert find_places(two, 1) == [Place(2), Place(4)]
    later = [user("q"), assistant, user("<image> q"), assistant, user("last")]
    assert find_places(later, 0) == [Place(2, moves=True), Place(4)]
    assert find_places(later, 0, before=False) == [Place(4)]
    assert find_places([user("<image>"), assistant], 0) == [Place(2)]
    assert find_places([user("<image> q")], 0) == [Place(0, moves=True)]
    assert find_places([user("<image> q"), user("q"), assistant], 0) == [Place(0, moves=True), Place(3)]
    assert find_places([user("q"), assistant, {"role": "assistant", "content": "<image>"}], 0) == [Place(3)]
    tool = {"role": "tool", "content": "t"}
    assert find_places([user("a <image> q"), assistant, tool, assistant], 0) == [Place(4)]
    separate = [user("<image>\nq"), assistant, user("<image>\nr"), assistant]
    assert find_places(separate, 1) == [Place(2, moves=True), Place(4)]


def test_images_are_named_and_asked_about_evenly_where_there_are_several():
    transform, counts = CognitionTransform({PixelTask((1, 1)): 1.0}, seed=4), Counter()
    colours = [(255, 0, 0), (0, 0, 255)]
    for number in range(400):
        messages = [{"role": "user", "content": f"<image><image> {number}"}, {"role": "assistant", "content": "a"}]
        images = [Image.new("RGB", (8, 8), colour) for colour in colours]
        question, answer = transform({"messages": messages, "images": images})["messages"][2:]
        name = re.search(r"image (\d)", question["content"])[1]
        assert read_pixels(answer["content"], (1, 1))[0, 0].tolist() == list(colours[int(name) - 1])
        counts[name] += 1
    assert set(counts) == {"1", "2"} and abs(counts["1"] - 200) < 60


# ---- rates and seeds


def test_rates_are_those_of_many_rows():
    transform = CognitionTransform({PixelTask((1, 1)): 0.3, CodebookTask(Palette(), (1, 1)): 0.8})
    pixels = codes = 0
    for number in range(1000):
        new = transform(row(number))["messages"]
        answers = [message["content"] for message in new if message["role"] == "assistant"]
        pixels += sum(read_pixels(answer, (1, 1)) is not None for answer in answers)
        codes += sum(read_codes(answer, (1, 1), 5) is not None for answer in answers)
    assert abs(pixels / 1000 - 0.3) < 0.05 and abs(codes / 1000 - 0.8) < 0.05


def test_a_rate_of_zero_and_rows_without_images_change_nothing():
    text = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "images": []}
    assert CognitionTransform({PixelTask(): 1.0})(text) is text
    example = row()
    assert CognitionTransform({PixelTask(): 0.0})(example) == example


def test_the_same_row_gets_the_same_questions_and_another_seed_or_epoch_others():
    rows = [row(number) for number in range(20)]

    def run(seed=0, epoch=0, order=range(20)):
        transform = CognitionTransform({PixelTask(): 0.7, CodebookTask(Palette(), (1, 2)): 0.7}, seed=seed)
        transform.set_epoch(epoch)
        return {number: texts(transform(rows[number])) for number in order}

    assert run() == run(order=reversed(range(20))) == run()
    assert run() != run(seed=1) and run() != run(epoch=1)


# ---- datasets


class Stream(IterableDataset):
    """A stream that notes the epoch it is told."""

    epoch = None

    def __iter__(self):
        return (row(number) for number in range(6))

    def set_epoch(self, epoch):
        self.epoch = epoch


def test_datasets_of_both_styles_give_the_same_rows_and_other_ones_in_the_next_epoch():
    rows, transform = [row(number) for number in range(6)], CognitionTransform({PixelTask(): 1.0})
    mapped, streamed = with_cognition(rows, transform), with_cognition(Stream(), transform)
    assert len(mapped) == 6 and isinstance(streamed, IterableDataset)
    expected = [texts(transform(one)) for one in rows]
    assert [texts(mapped[number]) for number in range(6)] == [texts(one) for one in streamed] == expected
    streamed.set_epoch(1)
    assert streamed.dataset.epoch == 1
    assert [texts(one) for one in streamed] != expected
    loader = DataLoader(pickle.loads(pickle.dumps(mapped)), batch_size=None, num_workers=2)
    assert [texts(one) for one in loader] == [texts(mapped[number]) for number in range(6)]


def test_the_collator_learns_the_inserted_answers():
    processor = tiny_processor(slime_config(), "chatml")
    transform = CognitionTransform({PixelTask((2, 2)): 1.0}, processor=processor)
    new = transform(conversation(3))
    batch = HiResLmmCollator(processor)([new])
    learned = processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    for message in new["messages"]:
        assert (message["content"] in learned) == (message["role"] == "assistant")
    assert (batch["input_ids"] == processor.image_token_id).sum() == batch["view_positions"][0, 5]

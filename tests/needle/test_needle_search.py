"""The run that compares ZoomEye with the plain answer, on scenes small enough for a test."""

import itertools

import pytest

from builders.docs import ROOT
from hires_lmm.inference import load_model, load_processor
from needle import NeedleOptions
from needle.runs import search


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(search, "OPTIONS", NeedleOptions())


def test_a_run_goes_on_behind_the_last_question(small):
    first = [(number, question) for number, _, _, question in itertools.islice(search.ask_all("validation", 3, 0), 7)]
    later = [(number, question) for number, _, _, question in itertools.islice(search.ask_all("validation", 3, 4), 3)]
    assert later == first[4:] and [number for number, _ in first] == list(range(7))
    assert all(search.colour_of(question.text) for _, question in first)


def test_a_row_has_both_answers_and_what_was_asked(small):
    folder = str(ROOT / "checkpoints" / "needle-slime")
    model, processor = load_model(folder, device="cpu"), load_processor(folder)
    (_, scene, picture, question) = next(search.ask_all("validation", 3, 0))
    row = search.answer(model, processor, scene, picture, question)
    assert row["answer"] == question.answer and row["plain"] and row["zoom_eye"]
    assert row["visits"] <= row["questions"] and row["image_sets"] >= 1
    for left, top, width, height in row["boxes"]:
        assert left + width <= picture.width and top + height <= picture.height


def test_the_summary_counts():
    counts = {"image_sets": 1, "visits": 1, "answer": "a", "zoom_eye": "a"}
    rows = [
        {**counts, "plain": "a", "questions": 3, "boxes": [[0, 0, 9, 9]], "box_shows_object": True},
        {**counts, "plain": "b", "questions": 1, "boxes": [], "box_shows_object": False},
    ]
    found = search.summarise(rows)
    assert (found["plain"]["accuracy"], found["zoom_eye"]["accuracy"]) == (0.5, 1.0)
    assert (found["mean_questions"], found["ended_with_a_box"], found["right_with_a_box"]) == (2.0, 1, 1)

"""Answers with scores: their order, pairs of them, attributes as text."""

import importlib
import sys

import pytest

from hires_lmm.training.preference import attribute_prompt, best_answers, preference_pairs, rank_answers


ANSWERS = ["long and right", "short", "wrong", "short"]
SCORES = [
    {"correctness": 4, "verbosity": 4},
    {"correctness": 3, "verbosity": 0},
    {"correctness": 0, "verbosity": 2},
    {"correctness": 9, "verbosity": 9},
]


def test_answers_are_ordered_by_the_weighted_mean_and_equal_ones_stand_once():
    assert [(answer.text, answer.value) for answer in rank_answers(ANSWERS, SCORES)] == [
        ("long and right", 4.0),
        ("short", 1.5),
        ("wrong", 1.0),
    ]
    ranked = rank_answers(ANSWERS, SCORES, {"correctness": 3, "verbosity": -1})
    assert [(answer.text, answer.value) for answer in ranked] == [
        ("short", 9 / 4),
        ("long and right", 2.0),
        ("wrong", -0.5),
    ]
    assert ranked[0].scores == SCORES[1]
    ties = rank_answers(["b", "a"], [{"x": 1}, {"x": 1}])
    assert [answer.text for answer in ties] == ["b", "a"]


def test_rejection_sampling_takes_the_best_that_is_good_enough():
    ranked = rank_answers(ANSWERS, SCORES)
    assert best_answers(ranked) == best_answers(ranked, least=4) == ["long and right"]
    assert best_answers(ranked, least=4.5) == []


def test_pairs_keep_their_gap():
    ranked = rank_answers(ANSWERS, SCORES)
    assert preference_pairs(ranked) == [("long and right", "wrong")]
    assert preference_pairs(ranked, min_gap=3) == []
    assert preference_pairs(ranked, min_gap=1, all_pairs=True) == [
        ("long and right", "short"),
        ("long and right", "wrong"),
    ]
    assert preference_pairs(rank_answers(["a", "b"], [{"x": 1}, {"x": 1}])) == []
    assert preference_pairs(rank_answers(["a"], [{"x": 1}])) == []


def test_attributes_stand_behind_the_question():
    assert attribute_prompt({"quality": 4.0, "verbosity": 0.5}, "What?") == "What?\n[quality 4, verbosity 0.5]"


@pytest.mark.parametrize(
    ("answers", "scores", "weights", "says"),
    [
        ([], [], None, "0 answers"),
        (["a"], [], None, "1 answers with 0 scores"),
        (["a", "b"], [{"x": 1}, {"y": 1}], None, "'b' lack x"),
        (["a"], [{"x": 1}], {"z": 1}, "lack z"),
    ],
)
def test_scores_that_do_not_match_are_refused(answers, scores, weights, says):
    with pytest.raises(ValueError, match=says):
        rank_answers(answers, scores, weights)


def test_without_trl_the_trainer_names_the_extra(monkeypatch):
    module = "hires_lmm.training.preference.image_masked"
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ImportError, match=r"needs trl .*'hires-lmm\[train\]'"):
        importlib.import_module(module)

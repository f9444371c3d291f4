"""The needle run of preference training: its questions, pairs and reward, and a tower that sees each view once."""

import pytest
import torch

from builders.needle import joined


pytest.importorskip("trl")
pytest.importorskip("datasets")

from needle import preference


def test_a_frozen_tower_gives_the_same_and_runs_each_view_once():
    model, _ = joined()
    tower = model.model.vision_tower
    views = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        wanted = tower(views, output_hidden_states=True)
    seen, runs = {}, []
    once = preference.ViewsOnce(tower, seen)
    plain = once.forward
    once.forward = lambda pixels, **options: runs.append(len(pixels)) or plain(pixels, **options)
    for rows in ([0, 1, 1], [1, 2, 0, 2]):
        found = tower(views[rows], output_hidden_states=True)
        torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state[rows], atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(found.hidden_states, wanted.hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs[rows], atol=1e-5, rtol=1e-5)
    assert runs == [2, 1]
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_questions_are_of_the_trained_kinds_and_scenes_of_each_seed_are_others():
    first, again, other = (preference.training_rows(3, seed) for seed in (0, 0, 1))
    assert [row["question"] for row in first] == [row["question"] for row in again]
    assert [row["question"].split(" is ")[0] for row in first] == ["which digit", "which number", "which digit"]
    assert " at the " in first[0]["question"] and " at the " not in first[2]["question"]
    assert first[0]["image"].tobytes() != other[0]["image"].tobytes()


def test_the_wrong_answer_that_comes_most_often_is_rejected():
    rows = [
        {"image": preference.training_rows(1, 0)[0]["image"], "question": "which ?", "answer": text} for text in "37"
    ]
    data = preference.pairs_of(rows, [["3", "5", "8", "8", "3 "], ["7", "7"]])
    assert len(data) == 1
    assert [data[0][name][0]["content"] for name in ("prompt", "chosen", "rejected")] == ["which ?", "3", "8"]


def test_only_the_right_answer_is_rewarded():
    said = [[{"role": "assistant", "content": text}] for text in ("3", " 3", "8", "")]
    assert preference.reward_right(said, ["3", "3", "3", "3"], prompts=None) == [1.0, 1.0, 0.0, 0.0]

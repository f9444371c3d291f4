"""The scripts of TRL's trainers run on small needle scenes with the shipped checkpoint."""

import json
import re
import runpy
import sys

import pytest
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification

from builders.docs import ROOT
from needle import NeedleOptions, ask_questions, needle_scene
from needle.dataset import draw


pytest.importorskip("trl")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Four scenes of two sizes, with a hard question each."""
    folder, rows = tmp_path_factory.mktemp("scenes"), []
    for index in range(4):
        scene = needle_scene(index, "train", 7, NeedleOptions(scene_size=128 + 64 * (index % 2), grid=2 + index % 2))
        question = next(own for own in ask_questions(scene) if own.kind.startswith("read"))
        draw(scene).save(folder / f"{index}.png")
        row = {"image": f"{index}.png", "question": question.text, "answer": question.answer}
        rows.append({**row, "facts": [own.answer for own in ask_questions(scene)]})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def run(name, folder, questions, monkeypatch, capsys, *options) -> list[dict[str, float]]:
    """What the trainer logged, step by step."""
    arguments = [f"{name}.py", "--data", str(questions), "--output", str(folder), "--steps", "1", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line]
    return [{key: float(value) for key, value in re.findall(r"'([\w/]+)': '?(-?[\d.e-]+)", line)} for line in lines]


def test_a_reward_model_is_trained_and_rewards_grpo(questions, tmp_path, monkeypatch, capsys):
    logs = run("reward", tmp_path / "judge", questions, monkeypatch, capsys)
    assert logs[0]["loss"] == pytest.approx(0.693, abs=0.2) and logs[0]["grad_norm"] > 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge").config.num_labels == 1
    reward = ["--reward", str(tmp_path / "judge")]
    logs = run("grpo", tmp_path / "grpo", questions, monkeypatch, capsys, *reward)
    assert {"rewards/right_answer/mean", "rewards/length/mean", "rewards/reward_model/mean"} <= logs[0].keys()
    assert logs[0]["grad_norm"] > 0
    AutoModelForImageTextToText.from_pretrained(tmp_path / "grpo")


@pytest.mark.slow
@pytest.mark.parametrize("name, start", [("rloo", 0.0), ("kto", 0.5), ("distill", None)])
def test_the_other_scripts_start_where_they_must(name, start, questions, tmp_path, monkeypatch, capsys):
    logs = run(name, tmp_path, questions, monkeypatch, capsys)
    assert logs[0]["grad_norm"] > 0
    if start is None:
        assert logs[0]["loss"] > 0
    else:
        assert logs[0]["loss"] == pytest.approx(start, abs=1e-3)
    AutoModelForImageTextToText.from_pretrained(tmp_path)

"""The scripts of preference training run on small needle scenes, five steps on the shipped checkpoint."""

import json
import math
import re
import runpy
import sys
from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from builders.docs import ROOT
from hires_lmm.training import HiResLmmCollator
from needle import NeedleOptions, ask_questions, needle_scene
from needle.dataset import draw


pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

CHECKPOINT = ROOT / "checkpoints" / "needle-slime"


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Four scenes of 2 x 2 crops, with a question each."""
    folder, rows = tmp_path_factory.mktemp("scenes"), []
    small = NeedleOptions(scene_size=128, grid=2)
    for index in range(4):
        scene = needle_scene(index, "train", 7, small)
        asked = {question.kind: question for question in ask_questions(scene)}
        steps = [[asked[kind].text, asked[kind].answer] for kind in ("background", "count")]
        draw(scene).save(folder / f"{index}.png")
        question, answer = steps[index % 2]
        rows.append({"image": f"{index}.png", "question": question, "answer": answer, "steps": steps})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def run(name, questions, out, monkeypatch, capsys, *arguments):
    """What a script prints, and the losses among it."""
    torch.manual_seed(0)
    options = ["--data", str(questions), "--output", str(out), "--steps", "5", *arguments]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    text = capsys.readouterr().out
    return text, [float(found) for found in re.findall(r"'loss': '?([-\d.e]+)", text)]


def has_learnt(folder, name="model.safetensors"):
    before, after = load_file(CHECKPOINT / name), load_file(folder / name)
    assert before.keys() == after.keys()
    return any(not torch.equal(before[key], after[key]) for key in before)


def test_dpo(questions, tmp_path, monkeypatch, capsys):
    _, losses = run("dpo", questions, tmp_path, monkeypatch, capsys)
    assert len(losses) == 5 and losses[0] > math.log(2)
    assert has_learnt(tmp_path)


@torch.no_grad()
def log_ratio(model, processor, row, wrong):
    """Log-probability of the right answer of a row minus that of a wrong one, each text by itself."""
    found = []
    for answer in (row["answer"], wrong):
        turns = [{"role": "user", "content": f"<image>{row['question']}"}, {"role": "assistant", "content": answer}]
        batch = HiResLmmCollator(processor)([{"messages": turns, "images": [row["picture"]]}])
        labels = batch["labels"][0, 1:]
        logs = model(**batch).logits[0, :-1].log_softmax(-1)
        found.append(sum(logs[place, token] for place, token in enumerate(labels.tolist()) if token >= 0))
    return float(found[0] - found[1])


def test_preference_distillation_starts_at_the_distance_from_its_teacher(questions, tmp_path, monkeypatch, capsys):
    """The first loss is that of two of the pairs, by the log-probabilities of student and teacher."""
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    teacher, student = (AutoModelForImageTextToText.from_pretrained(CHECKPOINT) for _ in range(2))
    with torch.no_grad():
        student.model.language_model.layers[0].mlp.down_proj.weight.zero_()
    student.save_pretrained(tmp_path / "student")
    processor.save_pretrained(tmp_path / "student")
    own = ["--model", str(tmp_path / "student"), "--steps", "1"]
    _, losses = run("preference_distillation", questions, tmp_path / "out", monkeypatch, capsys, *own)
    rows, each = json.loads(questions.read_text()), []
    for index, row in enumerate(rows):
        row["picture"], wrong = str(questions.parent / row["image"]), rows[(index + 1) % len(rows)]["answer"]
        mine, theirs = (log_ratio(model, processor, row, wrong) for model in (student, teacher))
        each.append(math.log1p(math.exp(-0.1 * (mine - theirs))))
    pairs = [sum(pair) / 2 for pair in combinations(each, 2)]
    assert min(abs(losses[0] - pair) for pair in pairs) < 1e-3
    assert all(abs(pair - math.log(2)) > 1e-2 for pair in pairs)
    assert has_learnt(tmp_path / "out")


@pytest.mark.slow
def test_opa_dpo(questions, tmp_path, monkeypatch, capsys):
    _, losses = run("opa_dpo", questions, tmp_path, monkeypatch, capsys)
    assert len(losses) == 10 and losses[5] == pytest.approx((1 + 0.2 + 2.0) * math.log(2), abs=2e-3)
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_mia_dpo(questions, tmp_path, monkeypatch, capsys):
    text, losses = run("mia_dpo", questions, tmp_path, monkeypatch, capsys, "--loose")
    kept = int(re.search(r"'kept': (\d)", text)[1])
    data = datasets.load_dataset(str(tmp_path / "data"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(data) == kept == len(re.findall(r"share 0\.\d+|share 1\.00", text)) and kept > 0
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert has_learnt(tmp_path)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("method", ["best", pytest.param("pairs", marks=SLOW), pytest.param("attributes", marks=SLOW)])
def test_rank_answers(method, questions, tmp_path, monkeypatch, capsys):
    _, losses = run("rank_answers", questions, tmp_path, monkeypatch, capsys, method)
    assert len(losses) == 5 and has_learnt(tmp_path)
    if method == "pairs":
        assert losses[0] == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.slow
def test_iterative_dpo_starts_each_round_at_its_own_reference(questions, tmp_path, monkeypatch, capsys):
    text, losses = run("iterative_dpo", questions, tmp_path, monkeypatch, capsys, "--temperature", "3")
    assert re.findall(r"round (\d): [1-4] pairs", text) == ["1", "2"]
    assert [losses[0], losses[5]] == pytest.approx([math.log(2)] * 2, abs=1e-3)
    first, second = (load_file(tmp_path / number / "model.safetensors") for number in "12")
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_curriculum(questions, tmp_path, monkeypatch, capsys):
    text, _ = run("curriculum", questions, tmp_path, monkeypatch, capsys)
    assert re.search(r"what is the background \? \w+\nhow many objects are there \? \d", text)
    first, second = (tmp_path / name for name in ("look_and_plan", "answer"))
    assert has_learnt(first) and has_learnt(second)

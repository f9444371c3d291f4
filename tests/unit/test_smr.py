"""The SMR builder on tiny downloads in the layouts of its sources."""

import json
import pickle

import numpy as np
import pytest

from builders.tiny import random_image, tiny_processor
from builders.training import slime_config
from hires_lmm.training import HiResLmmCollator
from hires_lmm.training.data.conversations import LlavaConversations
from hires_lmm.training.data.smr import (
    DESCRIBE,
    OPTION_LETTER,
    SHORT_ANSWER,
    SMR_SOURCES,
    build_smr,
    letter_of,
    with_options,
)


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    random_image(30, 40).save(path)


def write(path, content, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in content) if lines else json.dumps(content))


def tqa_text(text):
    return {"processedText": text, "rawText": text}


@pytest.fixture
def root(tmp_path):
    """One or two records a source, where the authors put them."""
    arxiv = {"id": "a1", "image": "images/a.jpg", "question": "Which curve?", "options": ["A) red", "B) blue"]}
    write(tmp_path / "arxivqa/arxivqa.jsonl", [{**arxiv, "label": "B", "rationale": "Blue is higher."}], lines=True)
    picture(tmp_path / "arxivqa/images/a.jpg")
    science = {"question": "Which?", "choices": ["cat", "dog"], "answer": 1, "hint": "Look.", "split": "train"}
    problems = {"1": {**science, "image": "image.png"}, "2": {**science, "image": None}}
    write(tmp_path / "scienceqa/problems.json", {**problems, "3": {**problems["1"], "split": "test"}})
    picture(tmp_path / "scienceqa/train/1/image.png")
    math = {"image": "images/1.jpg", "level": 1, "subject": "algebra"}
    rows = [{**math, "id": "1", "question": "How many?\n<image1>", "options": [], "answer": "4"}]
    rows += [{**math, "id": "2", "question": "Which?\n<image1>", "options": ["1", "2"], "answer": "B"}]
    write(tmp_path / "math_vision/test.jsonl", rows, lines=True)
    picture(tmp_path / "math_vision/images/1.jpg")
    question = {"answerTexts": ["sun", "moon"], "correctAnswer": 0, "questionId": "0.png-0", "abcLabel": False}
    write(tmp_path / "ai2d/questions/0.png.json", {"imageName": "0.png", "questions": {"What shines?": question}})
    picture(tmp_path / "ai2d/images/0.png")
    diagram = {
        "answerChoices": {"a": tqa_text("x"), "b": tqa_text("y")},
        "beingAsked": tqa_text("Which?"),
        "correctAnswer": tqa_text("b"),
        "imagePath": "question_images/q.png",
    }
    figures = [{"caption": "A volcano.", "imagePath": "textbook_images/v.png"}, {"caption": "", "imagePath": "no.png"}]
    lesson = {"globalID": "L1", "topics": {"T1": {"content": {"figures": figures, "text": "x"}}}}
    write(tmp_path / "textbookqa/tqa_v1_train.json", [{**lesson, "questions": {"diagramQuestions": {"D1": diagram}}}])
    picture(tmp_path / "textbookqa/question_images/q.png")
    picture(tmp_path / "textbookqa/textbook_images/v.png")
    geo = {"image": np.full((20, 30), 200, np.uint8), "subject": "∠A = ?", "choices": ["30°", "60°"], "label": 1}
    for name, file in (("geoqa3", "train.pk"), ("geoqa_plus", "Backtrans-train.pk")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(pickle.dumps([{**geo, "id": 5, "answer": "Because."}]))
    geometry = {"problem_text": "Find x.", "choices": ["1", "2", "3", "4"], "answer": "C"}
    write(tmp_path / "geometry3k/train/0/data.json", geometry)
    picture(tmp_path / "geometry3k/train/0/img_diagram.png")
    table = {"question": "How much?", "choices": None, "answer": "5", "unit": "$", "solution": "Add 2 and 3.\n"}
    write(tmp_path / "tabmwp/tabmwp/problems_train.json", {"9": table})
    picture(tmp_path / "tabmwp/tabmwp/tables/9.png")
    bar = {"question": "How many bars?", "answer": "3", "image": "bar.png"}
    kinds = ("reasoning", "data", "structure", "reasoning")
    write(
        tmp_path / "dvqa/qa/train_qa.json", [{**bar, "question_id": n, "template_id": k} for n, k in enumerate(kinds)]
    )
    picture(tmp_path / "dvqa/images/bar.png")
    chart = [{"imgname": "c.png", "query": "Highest?", "label": "12"}]
    write(tmp_path / "chartqa/train/train_human.json", chart)
    write(tmp_path / "chartqa/train/train_augmented.json", chart)
    picture(tmp_path / "chartqa/train/png/c.png")
    return tmp_path


def read(file):
    return {row["id"]: row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}


def turns(row):
    return [turn["value"] for turn in row["conversations"]]


def test_every_source_becomes_conversations_with_the_prompts_of_the_paper(root):
    file = root / "smr.jsonl"
    counts = build_smr(root, file)
    expected = {"math_vision": 2, "textbookqa": 2, "dvqa": 2}
    assert counts == {name: expected.get(name, 1) for name in SMR_SOURCES}
    rows = read(file)
    assert turns(rows["arxivqa/a1"]) == ["<image>\nWhich curve?\nA) red\nB) blue", "Blue is higher."]
    assert turns(rows["scienceqa/1"]) == [f"<image>\nLook.\nWhich?\nA. cat\nB. dog\n{OPTION_LETTER}", "B"]
    assert turns(rows["math_vision/1"]) == [f"<image>\nHow many?\n{SHORT_ANSWER}", "4"]
    assert turns(rows["ai2d/0.png-0"])[1] == "A"
    prompt, caption = turns(rows["textbookqa/L1-T1-0"])
    assert prompt.removeprefix("<image>\n").removesuffix(".") in DESCRIBE and caption == "A volcano."
    assert turns(rows["textbookqa/L1-D1"])[1] == "B"
    assert turns(rows["geoqa3/5"]) == [f"<image>\n∠A = ?\nA. 30°\nB. 60°\n{OPTION_LETTER}", "Because.\nB"]
    assert turns(rows["geometry3k/0"])[1] == "C"
    assert turns(rows["tabmwp/9"]) == ["<image>\nHow much? (unit: $)", "Add 2 and 3.\nThe answer is 5."]
    assert turns(rows["dvqa/0"]) == [f"<image>\nHow many bars?\n{SHORT_ANSWER}", "3"]
    assert sum(name.startswith("chartqa/") for name in rows) == 1


def test_the_result_trains(root):
    build_smr(root, root / "smr.jsonl")
    data = LlavaConversations(root / "smr.jsonl", root)
    batch = HiResLmmCollator(tiny_processor(slime_config(), "chatml"))([data[index] for index in range(len(data))])
    assert batch["view_positions"][:, 8].sum() == len(data) == 14


def test_missing_sources_are_named_and_skipped_only_on_request(root, caplog):
    (root / "tabmwp/tabmwp/problems_train.json").unlink()
    with pytest.raises(ValueError, match=r"tabmwp: .*problems_train\.json' is missing"):
        build_smr(root, root / "smr.jsonl")
    counts = build_smr(root, root / "smr.jsonl", skip_broken=True)
    assert counts["tabmwp"] == 0 and counts["dvqa"] == 2 and "problems_train.json" in caplog.text


def test_malformed_records_are_named_and_skipped_only_on_request(root, caplog):
    write(root / "geometry3k/train/1/data.json", {"problem_text": "No choices."})
    with pytest.raises(ValueError, match=r"train/1/data\.json is malformed \(KeyError: 'choices'\)"):
        build_smr(root, root / "smr.jsonl")
    assert build_smr(root, root / "smr.jsonl", skip_broken=True)["geometry3k"] == 1
    (root / "dvqa/qa/train_qa.json").write_text("[{")
    with pytest.raises(ValueError, match=r"dvqa: .*qa/train_qa\.json cannot be read \(JSONDecodeError"):
        build_smr(root, root / "smr.jsonl", sources=["dvqa"])


def test_pickles_that_would_run_code_are_refused(root):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    (root / "geoqa3/train.pk").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(ValueError, match=r"geoqa3: .*asks for builtins\.print"):
        build_smr(root, root / "smr.jsonl", sources=["geoqa3"])


def test_numbers_are_arguments_and_samples_are_seeded(root):
    chosen = [build_and_read(root, seed) for seed in (0, 0, 1, 2, 3, 4)]
    assert chosen[0] == chosen[1] and all(len(names) == 1 for names in chosen) and len(set(map(tuple, chosen))) == 2
    with pytest.raises(ValueError, match="Unknown source 'coco'"):
        build_smr(root, root / "smr.jsonl", numbers={"coco": 1})


def build_and_read(root, seed):
    build_smr(root, root / "smr.jsonl", sources=["math_vision"], numbers={"math_vision": 1}, seed=seed)
    return list(read(root / "smr.jsonl"))


@pytest.mark.parametrize("answer, letter", [(1, "B"), ("b", "B"), ("dog", "B"), ("(A)", "A"), ("B. dog", "B")])
def test_answers_become_letters(answer, letter):
    assert letter_of(answer, ["cat", "dog"]) == letter


def test_letters_that_options_carry_are_kept():
    assert with_options("Q", ["A. x", "y"]) == f"Q\nA. x\nB. y\n{OPTION_LETTER}"

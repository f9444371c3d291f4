"""What lmms-eval's tasks ask, on one row of a local file: each benchmark of the papers, and our variants beside it."""

import pytest


pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make test-harnesses")

import datasets
import needle_tasks as needle
from lmms_eval.tasks import TaskManager, get_task_dict

from hires_lmm.evaluation.harness_tasks import VARIANTS, write_tasks


WORD, LETTER = needle.WORD, "\n" + needle.LETTER
CAPTION = "Provide a one-sentence caption for the provided image."
Q = {"question": "Which one?", "answer": "A", "question_id": 1}
MMBENCH = {**Q, "hint": "Look.", "A": "red", "B": "blue", "C": "nan", "D": "nan", "index": 1}
MMBENCH |= {"category": "c", "L2-category": "l", "source": "s", "split": "dev"}
SEVERAL = {**Q, "choice_a": "red", "choice_b": "blue", "choice_c": "pink", "choice_d": "cyan", "data_type": "Scene"}
SEVERAL |= {"data_id": ["1"], "question_type_id": 1}
CHOSEN = "Which one?\nA. red\nB. blue\nC. pink\nD. cyan"
SCIENCE = {**Q, "hint": "Look.", "choices": ["red", "blue"], "answer": 0}
MMMU = {**Q, "id": "validation_Art_1", "options": "['red', 'blue']", "question_type": "multiple-choice"}
MMMU |= {"question": "See <image 1>: which?", **{f"image_{n}": None for n in range(2, 8)}}
VISTA = {**Q, "question_type": "free_form", "answer_type": "integer", "unit": None, "choices": None, "precision": None}
VERSE = {
    **Q,
    "query_wo": "Directly: which one?",
    "query_cot": "",
    "question_type": "free-form",
    "problem_version": "Text",
}
OCR = {**Q, "answers": ["A"] * 10, "ocr_tokens": ["EXIT", "12"]}
STEPS = "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
MATH = 'Please solve the problem step by step and put your answer in one "\\boxed{}".Which one?'

STOCK = {
    "textvqa_val": ("validation", OCR, "Which one?" + WORD),
    "gqa": ("testdev", {**Q, "imageId": "1", "image": "of another table"}, "Which one?" + WORD),
    "vqav2_val": ("validation", Q, "Which one?" + WORD),
    "vqav2_test": ("test", Q, "Which one?" + WORD),
    "mmbench_en_dev": (
        "dev",
        MMBENCH,
        f"Look. Which one? There are several options:\nA. red\nB. blue\n{LETTER}",
    ),
    "mmbench_cn_dev": (
        "dev",
        MMBENCH,
        "Look. Which one? There are several options:\nA. red\nB. blue\n\n请直接使用所提供的选项字母作为答案回答。",
    ),
    "mmmu_val": ("validation", MMMU, f"See|: which?\nA. red\nB. blue\n{LETTER}"),
    "llava_in_the_wild": ("train", Q, "Which one?"),
    "mme": (
        "test",
        {**Q, "question": "Is it red? Please answer yes or no.", "category": "color"},
        "Is it red?" + WORD,
    ),
    "mmvet": ("test", Q, STEPS + "Which one?"),
    "scienceqa_img": ("test", SCIENCE, f"Context: Look.\nWhich one?\nA. red\nB. blue{LETTER}"),
    "scienceqa": ("test", {**SCIENCE, "image": None}, f"Context: Look.\nWhich one?\nA. red\nB. blue{LETTER}"),
    "mathvision_test": ("test", {**Q, "options": []}, MATH),
    "mathvista_testmini_format": (
        "testmini",
        VISTA,
        "Which one?\nAnswer the question using a single integer number.",
    ),
    "mathverse_testmini": ("testmini", VERSE, "Directly: which one?"),
    "pope": ("test", Q, "Which one?" + WORD),
    "pope_random": ("random", Q, "Which one?" + WORD),
    "pope_pop": ("popular", Q, "Which one?" + WORD),
    "pope_adv": ("adversarial", Q, "Which one?" + WORD),
    "vizwiz_vqa_val": (
        "val",
        Q,
        "Which one?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + WORD,
    ),
    "stvqa": ("test", Q, "Which one?" + WORD),
    "coco2014_cap_val": ("val", Q, CAPTION),
    "textcaps_val": ("val", Q, CAPTION),
    "seedbench": ("test", {**SEVERAL, "image": []}, CHOSEN + LETTER),
    "seedbench_2_plus": (
        "test",
        {**Q, **{f"choice_{name}": text for name, text in zip("ABCD", ("red", "blue", "pink", "cyan"), strict=True)}},
        CHOSEN + LETTER,
    ),
    "ai2d": ("test", {**Q, "answer": "0", "options": ["red", "blue"]}, f"Which one?\nA. red\nB. blue{LETTER}"),
    "chartqa": ("test", Q, "Which one?\nAnswer the question with a single word."),
    "docvqa_val": ("validation", Q, "Which one?" + WORD),
    "hallusion_bench_image": ("image", Q, "Which one?"),
    "ocrbench": ("test", Q, "Which one?"),
    "realworldqa": ("test", Q, "Which one?"),
    "mmstar": ("val", Q, "Which one?" + LETTER.removesuffix(".")),
}
"""Task -> split, row and what is asked; `|` stands for an image within the text."""

OURS = {
    "textvqa_val_slime": ("textvqa_val", "Which one?" + WORD),
    "textvqa_val_slime_ocr": ("textvqa_val", "Which one?\nReference OCR token: EXIT, 12" + WORD),
    "mmbench_en_dev_slime": ("mmbench_en_dev", f"Look.\nWhich one?\nA. red\nB. blue{LETTER}"),
    "mmbench_cn_dev_slime": ("mmbench_cn_dev", "Look.\nWhich one?\nA. red\nB. blue\n请直接回答选项字母。"),
    "mmvet_slime": ("mmvet", "Which one?"),
    "mathvision_test_slime": ("mathvision_test", "Which one?" + WORD),
    "mme_hallucination": ("mme", "Is it red?" + WORD),
}


@pytest.fixture(scope="session")
def manager(tmp_path_factory) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return TaskManager("ERROR", include_path=str(folder), model_name="hires_lmm")


@pytest.fixture
def load(manager, tmp_path, monkeypatch):
    """Loads a task whose data set is a local file of given rows."""
    stored = datasets.load_dataset
    image = {"bytes": needle.image_bytes(needle.SCENES[0]["image"], 32), "path": None}

    def run(name: str, split: str, *rows: dict):
        columns = {"image": image, "decoded_image": image, "image_1": image}
        held = [{**columns, **row} for row in rows]
        if held[0]["image"] == []:
            held = [{**row, "image": [image]} for row in held]
        held = [{name: value for name, value in row.items() if value != "of another table"} for row in held]
        table = datasets.Dataset.from_list(held)
        for column in columns:
            if held[0].get(column) is not None:
                kind = datasets.List(datasets.Image()) if isinstance(held[0][column], list) else datasets.Image()
                table = table.cast_column(column, kind)
        table.to_parquet(tmp_path / "rows.parquet")

        def local(*args, **kwargs):
            if kwargs.get("split") is not None:  # the images of GQA
                return datasets.Dataset.from_list([{"id": "1", "image": image}]).cast_column("image", datasets.Image())
            return stored("parquet", data_files={split: str(tmp_path / "rows.parquet")}, cache_dir=str(tmp_path / "c"))

        monkeypatch.setattr(datasets, "load_dataset", local)
        return get_task_dict([name], manager, "chat")[name]

    return run


def asked(task, split: str) -> str:
    """The text of the first question, `|` for an image that does not stand before it."""
    (message,) = task.doc_to_messages(task.dataset[split][0])
    shown = [part["text"] if part["type"] == "text" else "|" for part in message["content"]]
    return "".join(shown).removeprefix("|")


@pytest.mark.parametrize("name", STOCK)
def test_what_the_harness_asks(load, name):
    split, row, text = STOCK[name]
    assert asked(load(name, split, row), split) == text


@pytest.mark.parametrize("name", OURS)
def test_what_our_variants_ask(load, name):
    stock, text = OURS[name]
    split, row, _ = STOCK[stock]
    task = load(name, split, row)
    assert asked(task, split) == text
    assert not task.config.generation_kwargs.get("do_sample")


def test_all_variants_are_tested():
    apart = {"seedbench_2_hires", "videomme_slime"}  # the second in test_lmms_video.py
    assert {variant.name for variant in VARIANTS} == {*OURS, *apart}


def test_seedbench_2_fails_as_it_is_and_works_as_a_variant(load):
    row = {**SEVERAL, "image": []}
    with pytest.raises((KeyError, TypeError)):
        asked(load("seedbench_2", "test", row), "test")
    assert asked(load("seedbench_2_hires", "test", row), "test") == CHOSEN + LETTER


def test_hallucination_is_four_categories_of_mme(load):
    kinds = ["existence", "count", "position", "color", "OCR", "celebrity"]
    task = load("mme_hallucination", "test", *({**Q, "category": kind} for kind in kinds))
    assert [row["category"] for row in task.test_docs()] == kinds[:4]

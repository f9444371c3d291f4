"""lmms-eval with videos: needle clips as a stock task of MVBench, and what Video-MME asks."""

from pathlib import Path

import pytest


pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make test-harnesses")

import datasets
import needle_tasks as needle
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager, get_task_dict

import hires_lmm.evaluation.lmms_eval as adapter
from hires_lmm.evaluation.harness_tasks import find_tasks, write_tasks
from hires_lmm.inference import load_model, load_processor
from needle.demo_clips import FOLDER


ROWS = [
    {**row, "video": str(FOLDER / row["video"]), "candidates": [row["answer"], "key"]} for row in needle.video_rows()
]
SCORE = """process_results: !function needle_utils.score
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]
"""
OPENING = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
    "letter (A, B, C, or D) of the correct option.\n"
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The shipped weights with places for frames; its answers are not right, but all its own."""
    folder = tmp_path_factory.mktemp("frames")
    needle.write_frames_checkpoint(folder)
    return folder


QUESTION = {"question": "Which one?", "options": ["A. red", "B. blue"], "answer": "A", "videoID": "v"}


def write(folder: Path, name: str, source: Path, split: str, rows: list[dict], more: str = "") -> None:
    """A task of a file, on given rows."""
    file = folder / f"{name}.parquet"
    datasets.Dataset.from_list(rows).to_parquet(file)
    lines = [f"include: {source}", f"task: {name}", "dataset_path: parquet", "dataset_name: null"]
    lines.append(f"dataset_kwargs: {{data_files: {{{split}: {file}}}}}")
    (folder / f"{name}.yaml").write_text("\n".join([*lines, more]))


@pytest.fixture(scope="session")
def manager(tmp_path_factory) -> TaskManager:
    folder, ours = tmp_path_factory.mktemp("video_tasks"), tmp_path_factory.mktemp("ours")
    pans = [{**row, "candidates": [row["answer"]]} for row in needle.write_pans(tmp_path_factory.mktemp("pans"))]
    (folder / "needle_utils.py").write_text(needle.UTILS)
    kwargs = "lmms_eval_specific_kwargs: {default: {sub_task: moving_direction}}"
    asks = f"doc_to_text: !function needle_utils.text\n{kwargs}\n{SCORE}"
    write(folder, "needle_mvbench", find_tasks() / "mvbench/mvbench_moving_direction.yaml", "train", ROWS, asks)
    write(folder, "needle_pans", find_tasks() / "mvbench/mvbench_moving_direction.yaml", "train", pans, asks)
    write_tasks(ours)
    write(folder, "asked_stock", find_tasks() / "videomme/videomme.yaml", "test", [QUESTION])
    write(folder, "asked_slime", ours / "videomme_slime.yaml", "test", [QUESTION])
    return TaskManager("ERROR", include_path=str(folder), model_name="hires_lmm")


@pytest.fixture(scope="session")
def alone(checkpoint) -> list[str]:
    """One question at a time, through the processor and `generate`, without a harness."""
    model, processor = load_model(str(checkpoint), device="cpu"), load_processor(str(checkpoint))
    return [needle.answer_clip(model, processor, row["video"], row["question"]) for row in ROWS]


@pytest.mark.parametrize("batch_size, share_images, encoded", [(1, True, 4), (4, True, 4), (4, False, 8)])
def test_videos_of_a_stock_task_are_answered_as_alone(
    manager, checkpoint, alone, monkeypatch, batch_size, share_images, encoded
):
    counts = []
    kept = adapter.HarnessAsker.answer
    monkeypatch.setattr(
        adapter.HarnessAsker, "answer", lambda self, *given: (counts.append(self.counts), kept(self, *given))[1]
    )
    monkeypatch.setattr(adapter, "stop_at_errors", lambda: None)  # an error is an error of the test
    found = simple_evaluate(
        model="hires_lmm",
        model_args=f"pretrained={checkpoint},device=cpu,num_frames=8,max_new_tokens=6,share_images={share_images}",
        tasks=["needle_mvbench"],
        task_manager=manager,
        batch_size=batch_size,
        log_samples=True,
        bootstrap_iters=0,
    )
    rows = sorted(found["samples"]["needle_mvbench"], key=lambda row: row["doc_id"])
    assert [row["filtered_resps"][0] for row in rows] == alone
    assert len(set(alone)) > 2
    assert counts[0]["encoded_images"] == encoded


def test_five_of_five_videos_are_answered_rightly(manager, tmp_path, monkeypatch):
    needle.write_pan_checkpoint(tmp_path)
    monkeypatch.setattr(adapter, "stop_at_errors", lambda: None)
    found = simple_evaluate(
        model="hires_lmm",
        model_args=f"pretrained={tmp_path},device=cpu,max_new_tokens=6",
        tasks=["needle_pans"],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
    )
    rows = found["samples"]["needle_pans"]
    assert len(rows) == 5 and all(row["right"] == 1 for row in rows)


def test_what_the_harness_and_our_variant_ask_about_a_video(manager):
    texts = []
    for name in ("asked_stock", "asked_slime"):
        task = get_task_dict([name], manager, "chat")[name]
        texts.append(task.doc_to_text(task.dataset["test"][0]))
    assert texts[0].startswith("Select the best answer") and texts[0].endswith(needle.LETTER)
    choices = "The choices are listed below: \nA. red\nB. blue\n"
    assert texts[1] == f"{OPENING}Which one? {choices}The best answer is:"


def test_a_part_of_a_video_is_refused_by_name():
    from lmms_eval.protocol import ChatVideoContent

    with pytest.raises(ValueError, match=r"asks about 1\.0 s to 2\.0 s of 'film\.mp4'; hires_lmm reads videos whole"):
        adapter._part(ChatVideoContent(url="film.mp4", start_time=1.0, end_time=2.0))

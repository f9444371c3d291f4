"""lmms-eval with the trained needle checkpoint: right answers in four formats, batches, ranks, kills, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText


pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make test-harnesses")

import needle_tasks as needle
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

import hires_lmm.evaluation.lmms_eval as adapter
from hires_lmm.evaluation.harness_tasks import find_tasks
from hires_lmm.inference import AnswerStream, load_model, load_processor, prepare


EMPTY = '{default: {pre_prompt: "", post_prompt: "", ocr: false}}'
SCORE = """process_results: !function needle_utils.score
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]
"""


def stock(folder: Path, name: str, task: str, split: str, rows: list[dict], changes: str) -> None:
    """A task of the harness with its own functions, on needle rows."""
    from datasets import Dataset

    Dataset.from_list(rows).cast_column("image" if "image" in rows[0] else "image_1", _column()).to_parquet(
        folder / f"{name}.parquet"
    )
    (folder / f"{name}.yaml").write_text(
        f"include: {find_tasks() / task}\ntask: {name}\ndataset_path: parquet\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{{split}: {folder / f'{name}.parquet'}}}}}\ntag: []\n{changes}"
    )


def _column():
    from datasets import Image

    return Image()


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> Path:
    """A folder of tasks: the four formats by the harness' own functions, and some of our own."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = needle.needle_rows()
    held = [{"bytes": row["image"], "path": None} for row in rows]
    base = [{**row, "image": image, "question_id": n} for n, (row, image) in enumerate(zip(rows, held, strict=True))]
    needle.write_task(folder, "needle_plain", rows)
    needle.write_task(folder, "needle_word", needle.needle_rows(needle.WORD))
    needle.write_task(folder, "needle_many", needle.many_rows())
    needle.write_task(folder, "needle_fails", rows[:1], "process_results: !function needle_utils.fail\n")
    needle.write_task(folder, "needle_broken", [{**rows[0], "image": b"no image"}])
    stock(
        folder,
        "needle_textvqa",
        "textvqa/textvqa_val.yaml",
        "validation",
        [{**row, "answers": [row["answer"]] * 10, "ocr_tokens": ["exit"]} for row in base],
        f"lmms_eval_specific_kwargs: {EMPTY}\nmetric_list: [{{metric: exact_match, aggregation: mean, "
        "higher_is_better: true}]\n",
    )
    stock(folder, "needle_pope", "pope/pope.yaml", "test", base, f"lmms_eval_specific_kwargs: {EMPTY}\n{SCORE}")
    more = {"hint": "nan", "category": "c", "L2-category": "l", "source": "s", "split": "dev"}
    stock(
        folder,
        "needle_mmbench",
        "mmbench/mmbench_en_dev.yaml",
        "dev",
        [{**row, **more, "index": n} for n, row in enumerate(base)],
        f"doc_to_text: !function needle_utils.text\nlmms_eval_specific_kwargs: {EMPTY}\n{SCORE}",
    )
    kinds = {"question_type": "open", "options": "[]", "id": "validation_Needle_1"}
    images = {f"image_{n}": None for n in range(2, 8)}
    stock(
        folder,
        "needle_mmmu",
        "mmmu/mmmu_val.yaml",
        "validation",
        [
            {
                **kinds,
                **images,
                "image_1": row["image"],
                "question": f"<image 1>{row['question']}",
                "answer": row["answer"],
            }
            for row in base
        ],
        "lmms_eval_specific_kwargs:\n"
        f"  default: {{prompt_type: format, multiple_choice_prompt: '', open_ended_prompt: ''}}\n{SCORE}",
    )
    return folder


@pytest.fixture(scope="session")
def manager(tasks) -> TaskManager:
    return TaskManager("ERROR", include_path=str(tasks), model_name="hires_lmm")


@pytest.fixture
def ask(manager, monkeypatch):
    """Runs tasks in this process: the answers by task and document, results, and what was counted."""

    def run(*names: str, batch_size: int = 1, model: str = "hires_lmm", **options):
        counts = []
        kept = adapter.HarnessAsker.answer
        monkeypatch.setattr(
            adapter.HarnessAsker, "answer", lambda self, *given: (counts.append(self.counts), kept(self, *given))[1]
        )
        monkeypatch.setattr(adapter, "stop_at_errors", lambda: None)  # an error is an error of the test
        given = {"pretrained": needle.CHECKPOINT, "device": "cpu", **options}
        found = simple_evaluate(
            model=model,
            model_args=",".join(f"{name}={value}" for name, value in given.items()),
            tasks=list(names),
            task_manager=manager,
            batch_size=batch_size,
            log_samples=True,
            bootstrap_iters=0,
        )
        answers = {
            name: [each["filtered_resps"][0] for each in sorted(rows, key=lambda each: each["doc_id"])]
            for name, rows in found["samples"].items()
        }
        return answers, found["results"], dict(counts[0]) if counts else {}

    return run


RIGHT = [scene["answer"] for scene in needle.SCENES]
FORMATS = {
    "needle_textvqa": "exact_match,none",
    **dict.fromkeys(("needle_pope", "needle_mmbench", "needle_mmmu"), "right,none"),
}


def test_five_of_five_needle_questions_are_right_in_four_formats(ask):
    answers, results, _ = ask(*FORMATS, batch_size=4)
    assert answers == dict.fromkeys(FORMATS, RIGHT)
    assert [results[name][metric] for name, metric in FORMATS.items()] == [1, 1, 1, 1]


@pytest.fixture(scope="session")
def alone() -> dict[str, list[str]]:
    """Answers of one question at a time, through the processor and `generate`, without a harness."""
    folder = str(needle.CHECKPOINT)
    model, processor = load_model(folder, device="cpu"), load_processor(folder)
    found: dict[str, list[str]] = {}
    for name, rows in {"needle_word": needle.needle_rows(needle.WORD), "needle_many": needle.many_rows()}.items():
        prepared = [prepare(processor, [row["image"]], row["question"]) for row in rows]
        found[name] = ["".join(AnswerStream(model, processor, each, 16)) for each in prepared]
    return found


@pytest.mark.parametrize("options", [{}, {"batch_size": 8}, {"batch_size": 8, "share_images": False}])
def test_answers_are_those_of_one_question_at_a_time(ask, alone, options):
    answers, _, counts = ask("needle_word", "needle_many", max_new_tokens=16, **options)
    assert answers == alone
    assert len(set(alone["needle_many"])) > 5
    size = options.get("batch_size", 1)
    if options.get("share_images", True):
        assert counts["encoded_images"] == 5 + 15
        assert counts["model_calls"] <= 65 / size + 3


def test_sixty_questions_on_fifteen_images_encode_fifteen(ask):
    _, _, counts = ask("needle_many", batch_size=8, max_new_tokens=16)
    assert counts == {"known_answers": 0, "encoded_images": 15, "model_calls": 8}
    _, _, counts = ask("needle_many", batch_size=8, max_new_tokens=16, share_images=False)
    assert counts == {"known_answers": 0, "encoded_images": 60, "model_calls": 8}


def test_the_generic_model_of_the_harness_loads_no_head(ask, deprecations):
    """It looks for the name of a model among classes of configs, and so takes `AutoModel` for every model."""
    assert "llava" not in AutoModelForImageTextToText._model_mapping.keys()  # noqa: SIM118
    with pytest.raises(AttributeError, match="'HiResLmmModel' object has no attribute 'generate'"):
        ask("needle_plain", model="huggingface", device_map="cpu")
    deprecations.clear()


# --- processes of their own


def command(tasks: Path, name: str, out: Path, *launcher: str, **options) -> list[str]:
    given = {"pretrained": needle.CHECKPOINT, "max_new_tokens": 16, **options}
    model_args = ",".join(f"{key}={value}" for key, value in given.items())
    run = [*(launcher or (sys.executable, "-m")), "lmms_eval", "--model", "hires_lmm", "--model_args", model_args]
    return [*run, "--include_path", str(tasks), "--tasks", name, "--output_path", str(out), "--log_samples"]


def answered(out: Path) -> list[str]:
    (file,) = out.rglob("*_samples_*.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]


def test_a_killed_run_goes_on(tasks, tmp_path, ask, alone):
    folder = tmp_path / "answers"
    with subprocess.Popen(command(tasks, "needle_many", tmp_path / "out", answers=folder)) as run:
        limit = time.monotonic() + 300
        while sum(file.read_bytes().count(b"\n") for file in folder.glob("*.jsonl")) < 8:
            assert run.poll() is None and time.monotonic() < limit
            time.sleep(0.02)
        os.kill(run.pid, signal.SIGKILL)
    answers, _, counts = ask("needle_many", batch_size=4, max_new_tokens=16, answers=folder)
    assert answers["needle_many"] == alone["needle_many"]
    assert 7 <= counts["known_answers"] < 60


def test_two_ranks_give_the_same_answers(tasks, tmp_path, alone, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m")
    given = [*command(tasks, "needle_many", tmp_path, *launcher, answers=tmp_path / "answers"), "--batch_size", "4"]
    assert subprocess.run(given).returncode == 0
    assert answered(tmp_path) == alone["needle_many"]
    assert len(list((tmp_path / "answers").iterdir())) == 2


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("needle_plain", {"colour": "red"}, "hires_lmm has no option 'colour'"),
        ("needle_broken", {}, "cannot identify image file"),
        ("needle_fails", {}, "this metric always fails"),
        ("no_such_task", {}, "Tasks were not found: no_such_task"),
    ],
)
def test_the_exit_code_says_that_something_failed(tasks, tmp_path, name, options, words):
    done = subprocess.run(command(tasks, name, tmp_path, **options), capture_output=True, text=True)
    assert done.returncode == 1
    assert words in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*_results.json"))


def test_a_map_of_devices_is_refused_with_several_ranks(monkeypatch):
    class Two:
        process_index, num_processes, device = 0, 2, "cpu"

    monkeypatch.setattr(adapter, "Accelerator", Two)
    with pytest.raises(ValueError, match="device_map='auto' spreads one model over devices, but 2 ranks"):
        adapter.HiResLmm(str(needle.CHECKPOINT), device_map="auto")


def test_the_entry_point_imports_nothing_heavy():
    names = [entry.value for entry in entry_points(group="lmms_eval.models") if entry.name == "hires_lmm"]
    assert names == ["hires_lmm_command:lmms_eval_models"]
    code = (
        "import sys, lmms_eval.models\n"
        "print(lmms_eval.models.MODEL_REGISTRY_V2.resolve('hires_lmm').class_path, 'hires_lmm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["hires_lmm.evaluation.lmms_eval.HiResLmm", "False"]

"""Writes tasks for lmms-eval that ask as the papers did: `hires-lmm harness-tasks DIR`."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..files import write_text
from .prompts import LETTER_FORMAT, WORD_FORMAT


FUNCTIONS = "hires_lmm.evaluation.task_prompts"
GREEDY_64 = {"max_new_tokens": 64, "do_sample": False}
GREEDY_1024 = {"max_new_tokens": 1024, "do_sample": False}


@dataclass(frozen=True)
class Function:
    """A function of `task_prompts`, by name."""

    name: str


@dataclass(frozen=True)
class TaskVariant:
    """A task that differs from one of lmms-eval.

    Args:
        name (`str`): Its name.
        stock (`str`): File of the task that it changes, in the harness' folder of tasks.
        changes (`dict`): Entries that replace the stock task's.
        why (`str`): What differs, in a line.
    """

    name: str
    stock: str
    changes: dict[str, Any]
    why: str


def _asks(**options: Any) -> dict[str, Any]:
    return {"lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": "", **options}}}


WORD = f"\n{WORD_FORMAT}"
VARIANTS = (
    TaskVariant(
        "textvqa_val_slime",
        "textvqa/textvqa_val.yaml",
        {**_asks(post_prompt=WORD, ocr=False), "generation_kwargs": GREEDY_64},
        "the paper's prompt, at most 64 tokens",
    ),
    TaskVariant(
        "textvqa_val_slime_ocr",
        "textvqa/textvqa_val.yaml",
        {**_asks(post_prompt=WORD, ocr=True), "generation_kwargs": GREEDY_64},
        "with the OCR tokens of the released question file, which the paper does not mention",
    ),
    TaskVariant(
        "mmbench_en_dev_slime",
        "mmbench/mmbench_en_dev.yaml",
        {"doc_to_text": Function("mmbench"), "generation_kwargs": GREEDY_1024},
        "hint, question, options, one a line",
    ),
    TaskVariant(
        "mmbench_cn_dev_slime",
        "mmbench/mmbench_cn_dev.yaml",
        {"doc_to_text": Function("mmbench_cn"), "generation_kwargs": GREEDY_1024},
        "the same, answered as in the released code (Chinese; the paper has English)",
    ),
    TaskVariant(
        "mmvet_slime",
        "mmvet/mmvet.yaml",
        {**_asks(), "generation_kwargs": GREEDY_1024},
        "the question alone, without the request to reason",
    ),
    TaskVariant(
        "mathvision_test_slime",
        "mathvision/mathvision_test.yaml",
        {"doc_to_text": Function("math_vision"), "generation_kwargs": GREEDY_64},
        "a word or phrase instead of a solution",
    ),
    TaskVariant(
        "mme_hallucination",
        "mme/mme.yaml",
        {"process_docs": Function("keep_mme_hallucination")},
        "existence, count, position and color; their sum is mme_perception_score",
    ),
    TaskVariant(
        "videomme_slime",
        "videomme/videomme.yaml",
        {"doc_to_text": Function("video_mme"), "generation_kwargs": GREEDY_64},
        "as SliME's released script asks about videos, without subtitles",
    ),
    TaskVariant(
        "seedbench_2_hires",
        "seedbench_2/seedbench_2.yaml",
        {"lmms_eval_specific_kwargs": {"default": {"img_token": "<image>", "post_prompt": LETTER_FORMAT}}},
        "the stock task knows three models alone and fails with others",
    ),
)


def find_tasks() -> Path:
    """The folder of tasks of the installed lmms-eval.

    Raises:
        ImportError: If it is not installed.
    """
    found = find_spec("lmms_eval")
    if found is None or found.origin is None:
        raise ImportError("The tasks change those of lmms-eval, which is not installed: pip install lmms-eval==0.7.3.")
    return Path(found.origin).parent / "tasks"


def write_tasks(folder: str | Path, tasks: str | Path | None = None) -> list[TaskVariant]:
    """Write one file a task, which `lmms-eval --include_path FOLDER --tasks NAME` finds.

    Args:
        folder (`str` or `Path`): Made if missing.
        tasks (`str` or `Path`, *optional*): The harness' folder of tasks; that of the installed one by default.

    Returns:
        `list[TaskVariant]`: what was written.

    Raises:
        ValueError: If the harness lacks a task that one of them changes.
        ImportError: If lmms-eval is not installed.
    """
    folder, tasks = Path(folder), find_tasks() if tasks is None else Path(tasks)
    missing = [variant.stock for variant in VARIANTS if not (tasks / variant.stock).is_file()]
    if missing:
        raise ValueError(f"{str(tasks)!r} has no {missing[0]}; install lmms-eval==0.7.3.")
    folder.mkdir(parents=True, exist_ok=True)
    for variant in VARIANTS:
        entries = {"include": str((tasks / variant.stock).resolve()), "task": variant.name, **variant.changes}
        lines = [f"# {variant.why}", *(f"{name}: {_yaml(value)}" for name, value in entries.items())]
        write_text(folder / f"{variant.name}.yaml", "\n".join(lines) + "\n")
    return list(VARIANTS)


def _yaml(value: Any) -> str:
    """A value on one line; JSON is YAML."""
    if isinstance(value, Function):
        return f"!function {FUNCTIONS}.{value.name}"
    return json.dumps(value, ensure_ascii=False)

"""Prompts of SliME's benchmarks: functions that the tasks of `hires-lmm harness-tasks` name, and VLMEvalKit's prompts.

Source: SliME, huggingface.co/papers/2406.08487, Table 6; for MMBench-CN the released code, whose text is Chinese where
the paper's is English.
"""

import string
from typing import Any

from .prompts import LETTER_FORMAT, WORD_FORMAT


LETTER_FORMAT_CN = "请直接回答选项字母。"
VIDEO_MME_OPENING = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
    "letter (A, B, C, or D) of the correct option."
)
YES_OR_NO = " Please answer yes or no."
MME_HALLUCINATION = ("existence", "count", "position", "color")


def is_given(value: Any) -> bool:
    """Whether a cell of a table holds something: data sets write None, NaN or the text `nan` for nothing."""
    return value is not None and value == value and str(value) not in ("", "nan")  # NaN differs from itself


def ask_choices(row: Any, letter_format: str = LETTER_FORMAT) -> str:
    """Hint, question, options and how to answer; `row` holds `question`, `hint` and options by letter."""
    lines = [str(row["hint"])] if is_given(row.get("hint")) else []
    lines.append(str(row["question"]))
    options = [f"{name}. {row[name]}" for name in string.ascii_uppercase if is_given(row.get(name))]
    return "\n".join([*lines, *options, letter_format if options else WORD_FORMAT])


def ask_word(question: str) -> str:
    """A question with how to answer, in place of what it says of that itself."""
    return f"{question.replace(YES_OR_NO, '')}\n{WORD_FORMAT}"


def mmbench(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """A question of MMBench."""
    return ask_choices(doc)


def mmbench_cn(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """A question of MMBench-CN, as released."""
    return ask_choices(doc, LETTER_FORMAT_CN)


def math_vision(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """A question of MathVision, its options before how to answer."""
    options = [f"{name}. {option}" for name, option in zip(string.ascii_uppercase, doc["options"], strict=False)]
    return ask_word("\n".join([doc["question"], *options]))


def video_mme(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """A question of Video-MME, as SliME's released script asks it without subtitles."""
    choices = "".join(f"{option}\n" for option in doc["options"])
    return f"{VIDEO_MME_OPENING}\n{doc['question']} The choices are listed below: \n{choices}The best answer is:"


def keep_mme_hallucination(dataset: Any) -> Any:
    """The questions of MME that the paper adds up as hallucination."""
    return dataset.filter(lambda category: category in MME_HALLUCINATION, input_columns="category")

"""Accuracy of a checkpoint by question kind over budgets, thresholds, crops, views, sizes and response formats."""

from .evaluator import SweepResult, evaluate, group_answers
from .report import build_record, build_tables, write_report
from .rows import load_rows, prepare_rows, read_rows
from .settings import SweepSetting, expand_grid
from .store import Answer, AnswerStore


__all__ = [
    "Answer",
    "AnswerStore",
    "SweepResult",
    "SweepSetting",
    "build_record",
    "build_tables",
    "evaluate",
    "expand_grid",
    "group_answers",
    "load_rows",
    "prepare_rows",
    "read_rows",
    "write_report",
]

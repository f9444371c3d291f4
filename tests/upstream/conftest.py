"""Compares what does not run with the table in `skips.py`, both ways."""

import re
import sys
from pathlib import Path

import pytest


sys.path.append(str(Path(__file__).parent))

from skips import Row, rows_of


collect_ignore = ["upstream_suite"]  # named after the files of transformers they stand for
MARKERS = (
    "accelerate_tests flash_attn_test flash_attn_3_test flash_attn_4_test flash_attn_mps_test torch_compile_test "
    "is_fsdp_test is_pipeline_test is_tensor_parallel_test is_expert_parallel_test is_training_test generate"
)
COLLECTED: set[tuple[str, str]] = set()  # (test, preset) of this run, before any selection


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS.split():
        config.addinivalue_line("markers", f"{marker}: of transformers")


@pytest.fixture
def collected() -> set[tuple[str, str]]:
    """Every collected test with its preset."""
    return COLLECTED


@pytest.fixture(autouse=True)
def fail_on_deprecated_calls():
    """Off here: transformers tests its deprecated names as well."""


def preset_of(item: pytest.Item) -> str | None:
    """The preset of a test class that `suite.py` made."""
    return getattr(getattr(item, "cls", None), "preset", None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    COLLECTED.update((item.name, preset) for item in items if (preset := preset_of(item)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    preset = preset_of(item)
    if preset and (report.when == "call" or report.skipped):
        rows = rows_of(item.name, preset)
        judge(report, rows[0] if rows else None, str(call.excinfo.value) if call.excinfo else "")
    return report


def judge(report: pytest.TestReport, row: Row | None, message: str) -> None:
    """Turn a skip without a row, and a row that is not needed, into failures; and an expected failure into a skip."""
    wrong = ""
    if report.skipped and row is None:
        wrong = f"skipped without a row in skips.py: {message}"
    elif row is not None and report.passed:
        wrong = f"passes, so this row of skips.py is dead: {row}"
    elif row is not None and report.skipped and row.fails:
        wrong = f"skips itself ({message}), but its row expects a failure: {row}"
    elif row is not None and report.failed:
        if row.fails and re.search(row.fails, f"{report.longreprtext}\n{message}"):
            report.outcome, report.wasxfail = "skipped", row.reason
        else:
            wrong = f"fails otherwise than its row of skips.py says: {row}\n{report.longreprtext}"
    if wrong:
        report.outcome, report.longrepr = "failed", wrong

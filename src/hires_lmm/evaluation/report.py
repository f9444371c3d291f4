"""What a sweep found, as a table and as JSON."""

import json
import platform
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

from ..files import write_text
from .evaluator import SweepResult
from .settings import SweepSetting
from .statistics import Score


RESULT_FILE, ANSWERS_FILE, PLOT_FILE, LAWS_FILE = "sweep.json", "answers.jsonl", "sweep.png", "scaling.png"
SETTINGS_A_TABLE = 4
PACKAGES = ("hires-lmm", "torch", "transformers", "tokenizers", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that answers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def build_record(result: SweepResult, **facts: Any) -> dict[str, Any]:
    """The facts given, date, versions, seed and the summary of a sweep, as JSON values."""
    return {
        **facts,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": result.seed,
        "versions": versions(),
        "settings": result.summary(),
    }


def write_report(folder: str | Path, result: SweepResult, record: dict[str, Any], plot: bool = True) -> list[Path]:
    """Write `sweep.json`, and `sweep.png` where a plot is wanted, into a folder that is made if missing; the files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / RESULT_FILE]
    write_text(files[0], json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    if plot:
        from .plots import plot_sweep

        files.append(plot_sweep(result, folder / PLOT_FILE))
    return files


def build_tables(result: SweepResult) -> Iterator[Table]:
    """Tables of a few settings each: one row a group or kind, one column a setting, with 95 % intervals."""
    for start in range(0, len(result.settings), SETTINGS_A_TABLE):
        yield _table(result, result.settings[start : start + SETTINGS_A_TABLE])


def _table(result: SweepResult, settings: Sequence[SweepSetting]) -> Table:
    table = Table(title_justify="left")
    columns = [result.scores(setting) for setting in settings]
    table.add_column("questions about", no_wrap=True)
    for name in ("asked", "chance", "constant", *(setting.label.replace(", ", "\n") for setting in settings)):
        table.add_column(name, justify="right", no_wrap=True)
    for name, first in columns[0].items():
        floors = [_percent(first.chance), _percent(first.constant)]
        table.add_row(name, str(first.questions), *floors, *(_cell(scores[name]) for scores in columns))
    tokens = (f"{result.mean_tokens(setting):.1f}" for setting in settings)
    table.add_row("kept tokens, mean", "", "", "", *tokens)
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _cell(score: Score) -> str:
    low, high = score.interval
    return f"{100 * score.accuracy:.1f} % ({100 * low:.1f}–{100 * high:.1f})"

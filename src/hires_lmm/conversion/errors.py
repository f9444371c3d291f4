"""The error of all conversions, and the tables it shows."""

from collections.abc import Iterable


MAX_TABLE_ROWS = 40


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message says why and what to do."""


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust gave up, which Python reports as no ordinary exception.

    Args:
        error (`BaseException`): What was raised.
    """
    return type(error).__module__ == "pyo3_runtime"


def problem_table(title: str, rows: Iterable[tuple[str, str, str]]) -> str:
    """Lay out problems with tensors.

    Args:
        title (`str`): First line.
        rows (`Iterable[tuple[str, str, str]]`): Problem, name of the tensor, detail.

    Returns:
        The title and one aligned line a problem; beyond 40 lines only their number is given.
    """
    lines = list(rows)
    shown = lines[:MAX_TABLE_ROWS]
    widths = [max((len(row[column]) for row in shown), default=0) for column in range(2)]
    text = [title]
    text += [f"  {kind:<{widths[0]}}  {name:<{widths[1]}}  {detail}".rstrip() for kind, name, detail in shown]
    if len(lines) > len(shown):
        text.append(f"  and {len(lines) - len(shown)} more")
    return "\n".join(text)

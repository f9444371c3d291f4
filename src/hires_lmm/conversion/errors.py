"""The error of all conversions, and what it shows."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


MAX_TABLE_ROWS = 40


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message says why and what to do."""


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Turn what libraries and readers raise over a foreign file, errors of many types, into one that names it."""
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:1000]
        raise ConversionError(f"{what} cannot be used ({text}); correct or replace it.") from error


def problem_table(title: str, rows: Iterable[tuple[str, str, str]]) -> str:
    """A title and one aligned line a problem (kind, name of the tensor, detail); beyond 40 only their number."""
    lines = list(rows)
    shown = lines[:MAX_TABLE_ROWS]
    widths = [max((len(row[column]) for row in shown), default=0) for column in range(2)]
    text = [title]
    text += [f"  {kind:<{widths[0]}}  {name:<{widths[1]}}  {detail}".rstrip() for kind, name, detail in shown]
    if len(lines) > len(shown):
        text.append(f"  and {len(lines) - len(shown)} more")
    return "\n".join(text)

"""Files that are whole or not there: written beside their place, then moved to it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


PARTIAL = ".partial"


@contextmanager
def replacing(file: str | Path) -> Iterator[Path]:
    """A path beside a file to write to, moved to its place at the end and removed if something is raised.

    Whoever reads the file finds the old content or the new one, never a piece. One process writes at a time.
    """
    file = Path(file)
    partial = file.with_name(file.name + PARTIAL)
    try:
        yield partial
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(file: str | Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")

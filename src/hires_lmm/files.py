"""Files that are whole or not there: written beside their place, then moved to it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


PARTIAL = ".partial"


@contextmanager
def replacing(file: str | Path) -> Iterator[Path]:
    """Write a file anew, so that whoever reads it finds the old content or the new one, never a piece.

    Args:
        file (`str` or `Path`): Its place. The folder exists, and one process writes at a time.

    Returns:
        A context with the path to write to, in the same folder. It is moved to its place at the end, and removed if
        something is raised. A killed process leaves it there; the next writer takes it over.
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
    """Write a text in UTF-8, whole or not at all.

    Args:
        file (`str` or `Path`): Its place.
        text (`str`): The content.
    """
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")

"""Packages that only some installations have."""

from importlib import import_module
from typing import Any


def import_extra(name: str, extra: str) -> Any:
    """Import a module of an optional package; the error without it names the extra of this package to install."""
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"This needs {package} ({error}): pip install 'hires-lmm[{extra}]'.") from error


def import_pyplot() -> Any:
    """`matplotlib.pyplot`, drawing to files only."""
    import_extra("matplotlib", "evaluation").use("Agg")
    return import_module("matplotlib.pyplot")

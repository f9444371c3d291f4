"""Starts the command line without `hires_lmm/__init__.py`, which takes seconds: it imports torch and transformers."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType


LIGHT = "hires_lmm_light"
"""The package under another name and without its `__init__`; `cli` imports from it what needs no torch."""


def main() -> None:
    """Run the command line."""
    package = ModuleType(LIGHT)
    package.__path__ = [str(Path(__file__).parent / "hires_lmm")]
    sys.modules[LIGHT] = package
    import_module(f"{LIGHT}.cli").app(prog_name="hires-lmm")

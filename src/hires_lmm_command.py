"""Starts the command line without `hires_lmm/__init__.py`, which takes seconds: it imports torch and transformers."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def _load_cli() -> ModuleType:
    spec = spec_from_file_location("hires_lmm_cli", Path(__file__).parent / "hires_lmm" / "cli.py")
    if spec is None or spec.loader is None:
        raise ImportError("hires_lmm/cli.py is missing; install hires-lmm again.")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Run the command line."""
    _load_cli().app(prog_name="hires-lmm")

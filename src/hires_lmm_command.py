"""What starts without `hires_lmm/__init__.py`, which takes seconds, since it imports torch and transformers.

The command line, and the entry point that lmms-eval loads at every start, whatever model it is asked for.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any


LIGHT = "hires_lmm_light"
"""The package under another name and without its `__init__`; `cli` imports from it what needs no torch."""


def main() -> None:
    """Run the command line."""
    package = ModuleType(LIGHT)
    package.__path__ = [str(Path(__file__).parent / "hires_lmm")]
    sys.modules[LIGHT] = package
    import_module(f"{LIGHT}.cli").app(prog_name="hires-lmm")


def lmms_eval_models() -> Any:
    """The model that this package brings to lmms-eval, by the name of its class."""
    if {"hires_lmm", "--model=hires_lmm"} & set(sys.argv):
        stop_at_errors()  # here already: the harness looks for its tasks before it makes the model
    manifest = import_module("lmms_eval.models.registry_v2").ModelManifest
    return manifest(model_id="hires_lmm", chat_class_path="hires_lmm.evaluation.lmms_eval.HiResLmm")


def stop_at_errors() -> None:
    """lmms-eval logs what fails and ends with status 0; end with 1 instead."""
    import_module("loguru").logger.configure(patcher=_stop)


def _stop(record: dict[str, Any]) -> None:
    if record["name"] == "lmms_eval.__main__" and record["level"].name == "ERROR":
        raise SystemExit(record["message"])

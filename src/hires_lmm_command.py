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
    manifest = import_module("lmms_eval.models.registry_v2").ModelManifest
    return manifest(model_id="hires_lmm", chat_class_path="hires_lmm.evaluation.lmms_eval.HiResLmm")

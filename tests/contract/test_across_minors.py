"""What this version exports loads and answers alike at the oldest and the newest transformers, without the package.

The environments are those of `make test-versions`, and the one that runs the tests.
"""

import importlib.metadata
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from builders.reload import DIAGONAL, ROOT, Case, run_worker, write_case
from hires_lmm.modeling.compat_hires_lmm import TESTED


OLDEST, NEWEST = (f"{major}.{minor}" for major, minor in TESTED)
INSTALLED = importlib.metadata.version("transformers")
CASES = [replace(case, text="llama") if case.text == "gemma2" else case for case in DIAGONAL]
"""Without Gemma 2, which lacked its soft cap under SDPA at 5.20: its answers differ in transformers itself."""

CLOSE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-3}


def interpreter(minor: str) -> str:
    """The Python of an environment with this minor of transformers; the test is skipped where there is none."""
    if INSTALLED.startswith(f"{minor}."):
        return sys.executable
    path = ROOT / ".cache" / "versions" / minor / "bin" / "python"
    if not path.exists():
        pytest.skip(f"no environment with transformers {minor} in .cache/versions; make test-versions makes it")
    return str(path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[list[dict], dict]:
    """Jobs of one checkpoint a preset, and what each must give."""
    root = tmp_path_factory.mktemp("exported")
    written = {case.name: write_case(case, root) for case in CASES}
    return [job for job, _ in written.values()], {name: expected for name, (_, expected) in written.items()}


@pytest.fixture(scope="module", params=[OLDEST, NEWEST])
def found(request, exported, tmp_path_factory) -> dict:
    """What a process at one minor finds."""
    work: Path = tmp_path_factory.mktemp("work") / request.param
    return run_worker(exported[0], work, with_package=False, python=interpreter(request.param))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.preset)
def test_an_exported_checkpoint_answers_alike(exported, found, case: Case):
    result, expected = found[case.name], exported[1][case.name]
    assert "exception" not in result, result["exception"]
    model, processor = result["model"], result["processor"]
    assert model["module"].startswith("transformers_modules.") and model["info"] == {}
    assert model["difference"] <= CLOSE[case.dtype] and model["answer"] == expected["answer"]
    assert processor["different"] == [] and processor["image_tokens"] == expected["image_tokens"]
    assert processor["chat"] == expected["chat"]

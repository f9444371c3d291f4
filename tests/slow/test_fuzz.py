"""Thousands of hostile cases; each fault is shown with the command that replays it."""

import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.areas import AREAS, CONVERTED
from fuzz.check_folders import LIBRARY_SEEN
from fuzz.harness import run_cases


CASES = {"images": 4000, "calls": 2000, "load": 150, "commands": 200, **{f"convert {name}": 200 for name in CONVERTED}}
SEED = 1

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", AREAS)
def test_no_case_does_harm(name, tmp_path):
    found = run_cases(name, AREAS[name], tmp_path, seed=SEED, cases=CASES[name])
    assert sum(found.values()) == CASES[name]
    assert found["error"] and found["result"]
    if name == "load":
        print(f"through from_pretrained: {dict(LIBRARY_SEEN)}")


def test_the_command_replays_one_case():
    root = Path(__file__).parents[2]
    command = [sys.executable, "tests/fuzz", "images", "--seed", "0", "--case", "12"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("images, seed 0: {'")

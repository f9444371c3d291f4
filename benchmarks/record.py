"""Where a number was measured: written beside every result."""

import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from hires_lmm.files import write_text


FOLDER_VARIABLE = "HIRES_RESULTS"
RESULTS = Path(os.environ.get(FOLDER_VARIABLE) or Path(__file__).parent / "results")
"""The folder of results; another one where the variable names it."""


def surroundings() -> dict:
    """Device, versions, commit, date and command of this run."""
    given = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]  # no path of a machine
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    has_gpu = torch.cuda.is_available()
    return {
        "command": "python " + " ".join([Path(sys.argv[0]).parent.name + "/" + Path(sys.argv[0]).name, *given]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit.stdout.strip(),
        "device": torch.cuda.get_device_name() if has_gpu else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy", "pillow")},
    }


def write_result(name: str, rows: list[dict], seeds: list[int], folder: Path = RESULTS) -> Path:
    """Write rows and surroundings as `results/<name>.json`.

    Args:
        name (`str`): Name of the benchmark.
        rows (`list[dict]`): One dict a measured point.
        seeds (`list[int]`): Seeds used.
        folder (`Path`): Where, in place of `results`.

    Returns:
        The path.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    write_text(path, json.dumps({**surroundings(), "seeds": seeds, "rows": rows}, indent=1) + "\n")
    return path

"""Run the tests that need lmms-eval and VLMEvalKit in an environment that has them; called by the Makefile.

    python scripts/harnesses.py [-- ARGUMENT ...]     makes .cache/harnesses (1.2 GB, two minutes) and runs the tests

The environment sees all else in the one that runs this script, torch among it. Arguments after `--` go to pytest.
"""

import os
import subprocess
import sys
from pathlib import Path

from versions import ROOT, create


FOLDER = ROOT / ".cache" / "harnesses"
PACKAGES = ("lmms-eval==0.7.3", "ms-vlmeval==0.0.20", "torchvision==0.28.0")
"""The torchvision is that of the torch in constraints.txt."""

OLDER = "filelock==3.29.7"
"""lmms-eval imports a module that filelock 4 does not have."""

OWN_VERSIONS = ("av==",)
"""Of the lock; lmms-eval asks for an older PyAV."""

SCHEMAS = """import torch as _torch  # written by scripts/harnesses.py: the build for CUDA, beside a torch for CPUs
_SCHEMAS = _torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _SCHEMAS.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def prepare() -> Path:
    """Make or mend the environment; returns its interpreter."""
    site, python = create(FOLDER), FOLDER / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    print(f"{FOLDER.relative_to(ROOT)}: installing {', '.join(PACKAGES)}", flush=True)
    locked = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = FOLDER / "constraints.txt"
    constraints.write_text("\n".join(line for line in locked if not line.startswith(OWN_VERSIONS)), encoding="utf-8")
    subprocess.run([*pip, "install", "-qq", "--constraint", constraints, *PACKAGES], check=True)
    subprocess.run([*pip, "install", "-qq", OLDER], check=True)
    # The metadata beneath may be of an earlier state, without the entry point of lmms-eval.
    subprocess.run([*pip, "install", "-qq", "--no-deps", "--editable", ROOT], check=True)
    mend_torchvision(site, python)
    return python


def mend_torchvision(site: Path, python: Path) -> None:
    """A torchvision whose operators were built for CUDA cannot be imported beside a torch without: the harnesses need
    its Python part alone, and that needs the schemas of two operators."""
    tried = subprocess.run([python, "-c", "import torchvision"], capture_output=True, text=True)
    if "torchvision::nms does not exist" in tried.stderr:
        init = site / "torchvision" / "__init__.py"
        init.write_text(SCHEMAS + init.read_text(encoding="utf-8"), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Do what the command line asks for; returns the exit status of pytest."""
    given = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    python = prepare()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["HF_DATASETS_CACHE"] = str(FOLDER / "datasets")
    command = [python, "-m", "pytest", "tests/harnesses", "-m", "not gpu", "-q", *given]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

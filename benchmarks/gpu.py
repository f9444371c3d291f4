"""Everything that needs a GPU, in one run of at most eight minutes: `make test-gpu`.

    python benchmarks/gpu.py                    the steps below on CUDA, in their order, until the time is spent
    python benchmarks/gpu.py --dry-run          the same steps on tiny models on the CPU, to see that they run
    python benchmarks/gpu.py --steps tests silu

Every step is a command of its own, which writes results/<name>_cuda.json. What came of each stands in
results/gpu_cuda.json: passed, failed, stopped at its limit, or left out because the time was spent. Exit status 1
where a step is not passed.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import print_table, report_path, say
from record import FOLDER_VARIABLE, RESULTS, write_result


HERE = Path(__file__).parent
COLUMNS = {"step": "step", "what": "what it shows", "outcome": "outcome", "seconds": "s"}
GROUPS = ["slime, 4 crops", "slime, 4 crops, 144 local", "vlsa"]


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        what (`str`): What it shows.
        script (`str`): Of this folder, or `pytest`.
        cuda, cpu (`list[str]`): Its arguments on a GPU, and in a dry run.
        seconds (`int`): When it is stopped.
    """

    what: str
    script: str
    cuda: list[str]
    cpu: list[str]
    seconds: int

    def command(self, is_dry: bool) -> list[str]:
        """What is run, from the root of the repository."""
        start = ["-m", "pytest"] if self.script == "pytest" else [f"benchmarks/{self.script}"]
        device = [] if self.script == "pytest" else ["--device", "cpu" if is_dry else "cuda"]
        return [sys.executable, *start, *device, *(self.cpu if is_dry else self.cuda)]


TINY = ["--shapes", "tiny"]
STEPS = {
    "tests": Step(
        "tests that need CUDA",
        "pytest",
        ["-q", "-m", "gpu", "tests"],
        ["-q", "-m", "gpu", "tests/unit/test_silu_attention.py"],
        120,
    ),
    "attention": Step(
        "kernels of tower, connector and language model", "attention_kernels.py", [], ["--models", "llava_next"], 90
    ),
    "prefill": Step(
        "seconds and ratios to llava_next at true sizes",
        "prefill.py",
        ["--models", "llava_next", *GROUPS, "--images", "336x336", "1024x1024", "2048x2048", "--repeats", "3"],
        [*TINY, "--models", "llava_next", "--images", "336x336", "--repeats", "1"],
        120,
    ),
    "chunks": Step("memory of an image of 4096 x 4096", "chunks.py", [], [*TINY, "--sizes", "4"], 90),
    "silu": Step("the SiLU kernel against the plain function", "silu_memory.py", [], ["--crops", "1"], 60),
    "parts": Step("share of the roofline of every part", "parts.py", [], [*TINY, "--repeats", "1"], 60),
    "decode": Step(
        "time of a new token",
        "decode.py",
        ["--models", "llava_next", "slime, 4 crops"],
        [*TINY, "--models", "llava_next", "--side", "336", "--tokens", "3", "--repeats", "1"],
        60,
    ),
}


def run_step(step: Step, is_dry: bool, seconds: float, results: Path) -> tuple[str, float]:
    """Run one step.

    Args:
        step (`Step`): Which.
        is_dry (`bool`): On tiny models on the CPU.
        seconds (`float`): Time that is left.
        results (`Path`): Where it writes.

    Returns:
        Its outcome, and the seconds that it took.
    """
    if seconds < 1:
        return "left out: the time was spent", 0.0
    begin = time.perf_counter()
    environment = {**os.environ, FOLDER_VARIABLE: str(results)}
    limit = min(seconds, step.seconds)
    process = subprocess.Popen(step.command(is_dry), cwd=HERE.parent, env=environment, start_new_session=True)
    try:
        code = process.wait(limit)
        outcome = "passed" if code == 0 else f"failed with status {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started, which hold memory of the device
        process.wait()
        outcome = f"stopped after {limit:.0f} s"
    return outcome, time.perf_counter() - begin


def main() -> int:
    """Run all steps, print, write JSON; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--steps", nargs="*", choices=tuple(STEPS), help="all by default")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON files go")
    arguments = parser.parse_args()
    if not arguments.dry_run:
        import torch

        if not torch.cuda.is_available():
            parser.error("torch sees no CUDA device; see that the steps run with --dry-run, on a CPU")
    end = time.perf_counter() + 60 * arguments.minutes
    rows: list[dict[str, Any]] = []
    for name in arguments.steps or STEPS:
        step = STEPS[name]
        say(f"{name}: {step.what}")
        outcome, seconds = run_step(step, arguments.dry_run, end - time.perf_counter(), arguments.results)
        command = " ".join(["python", *step.command(arguments.dry_run)[1:]])
        rows.append({"step": name, "what": step.what, "outcome": outcome, "seconds": seconds, "command": command})
    print_table(rows, COLUMNS, f"{sum(row['seconds'] for row in rows):.0f} s in all")
    report_path(write_result("gpu_dry" if arguments.dry_run else "gpu_cuda", rows, [0], arguments.results))
    return 0 if all(row["outcome"] == "passed" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

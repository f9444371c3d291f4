"""Starts a script in two processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path


TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "examples" / "configs"


def run_launcher(config: str, script: list[str], timeout: int = 300) -> None:
    """Run a script under `accelerate launch` with one of the shipped configurations."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    command += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*command, *script], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]

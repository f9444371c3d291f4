"""The one script that needs a GPU runs on a CPU with tiny models, and says of every step what came of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/gpu.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)


def test_a_dry_run_passes_every_step_and_writes_where_it_is_told(tmp_path):
    done = run("--dry-run", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "gpu_dry.json").read_text())["rows"]
    assert {row["step"]: row["outcome"] for row in rows} == dict.fromkeys(
        ("tests", "attention", "prefill", "chunks", "silu", "parts", "decode"), "passed"
    )
    written = {path.stem for path in tmp_path.glob("*.json")}
    assert {"attention_kernels_cpu", "prefill_tiny_cpu", "chunks_cpu", "silu_memory", "decode_cpu"} <= written


def test_a_step_that_outlasts_the_time_is_stopped_and_the_next_is_left_out(tmp_path):
    done = run("--dry-run", "--results", str(tmp_path), "--steps", "prefill", "decode", "--minutes", "0.02")
    outcomes = [row["outcome"] for row in json.loads((tmp_path / "gpu_dry.json").read_text())["rows"]]
    assert done.returncode == 1 and outcomes == ["stopped after 1 s", "left out: the time was spent"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_names_the_dry_run():
    done = run()
    assert done.returncode == 2 and "--dry-run" in done.stderr

"""The bilinear example: its methods against the paper's closed forms, and where runs end."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest


FILE = Path(__file__).parents[2] / "examples" / "bilinear_alternation.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("bilinear_alternation", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("overlap", [0.5, 0.1, -0.5])
def test_runs_follow_the_closed_forms(example, overlap: float):
    assert example.closed_form_gap(overlap, 0.05, 60) < 1e-12


@pytest.mark.parametrize("method", ["simultaneous", "alternating", "exact"])
@pytest.mark.parametrize("overlap", [0.5, -0.5])
def test_random_starts_reach_the_optimum(example, method: str, overlap: float):
    counts = example.count_endings(overlap, starts=20, rate=0.05, steps=800, seed=1)
    assert counts[method] == {"optimum": 20}


@pytest.mark.parametrize("overlap", [0.5, -0.5])
def test_the_second_fixed_point_is_a_saddle(example, overlap: float):
    saddle = np.array([0.0, 1.0] if overlap > 0 else [1.0, 0.0])
    assert np.allclose(example.closed_form_step(saddle, overlap, 0.05), saddle)
    escaped = saddle[::-1] * 1e-6 + saddle
    for _ in range(1000):
        escaped = example.closed_form_step(escaped, overlap, 0.05)
    assert np.allclose(np.abs(escaped), saddle[::-1], atol=1e-6)


def test_a_picture_is_drawn(example, tmp_path: Path):
    pytest.importorskip("matplotlib")
    example.draw(tmp_path / "plot.png", 0.5, 0.05, steps=20, seed=0)
    assert (tmp_path / "plot.png").stat().st_size > 5000

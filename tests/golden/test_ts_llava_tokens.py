"""TS-LLaVA: which of all tokens of the frames are taken; its frames and collages are tested beside it."""

import math

import pytest

from hires_lmm.modeling.geometry_hires_lmm import Grid, Kind, ViewShape, spread_evenly
from hires_lmm.modeling.sequence_hires_lmm import Arrangement, LayoutOptions, Run

from .base import GoldenSet


GOLDEN = GoldenSet("ts_llava")
SAMPLES = GOLDEN.cases.get("token_sampling", [])


@pytest.mark.parametrize("case", SAMPLES, ids=lambda case: case["tensor"])
def test_indices(case):
    assert spread_evenly(case["total"], case["samples"]) == GOLDEN[case["tensor"]].tolist()


@pytest.mark.parametrize("case", SAMPLES, ids=lambda case: case["tensor"])
def test_a_video_of_so_many_tokens_gives_them_in_order(case):
    """Cut into frames of the largest square that divides the tokens."""
    total = case["total"]
    side = next(n for n in range(min(math.isqrt(total), 24), 0, -1) if total % (n * n) == 0)
    size = side * side
    whole = (side, side, 0, side, 0, side)
    frames = [ViewShape(int(Kind.FRAME), total // size, 1, n, 0, *whole) for n in range(total // size)]
    options, grid = LayoutOptions(order=["frames"]), Grid(side, side, sample=case["samples"])
    pieces = Arrangement(options, {int(Kind.FRAME): grid}).walk(frames)
    assert all(isinstance(piece, Run) and piece.stop == piece.start + 1 for piece in pieces)
    found = [piece.view * size + piece.row * side + piece.start for piece in pieces]
    assert found == GOLDEN[case["tensor"]].tolist()

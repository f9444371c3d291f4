"""Frames of videos: which are taken, how few are repeated, and collages, as in PLLaVA and TS-LLaVA."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hires_lmm.processing.frame_sampling_hires_lmm import FRAME_SAMPLERS, sample_segments
from hires_lmm.processing.rendering_hires_lmm import draw_collage
from hires_lmm.processing.video_planners_hires_lmm import collage_grid, repeated

from .base import GoldenSet, write_set


NAME = "video_frames"
GOLDEN = GoldenSet(NAME)


def bounded(case: dict) -> list[int]:
    """Segments of a part of a video, in seconds."""
    first, last = (round(second * case["fps"]) for second in case["bound_seconds"])
    return sample_segments(case["frames"], case["samples"], max(first, 0), min(last, case["frames"] - 1))


@pytest.mark.parametrize("case", GOLDEN.cases["uniform_and_segments"], ids=str)
def test_both_samplers_of_pllava_take_its_frames(case):
    if case["bound_seconds"]:
        assert bounded(case) == case["segments"]
        return
    for name in ("uniform", "segments"):
        assert FRAME_SAMPLERS[name](case["frames"], case["samples"]) == case[name]


@pytest.mark.parametrize("case", GOLDEN.cases["linspace"], ids=str)
def test_equidistant_frames_are_those_of_ts_llava(case):
    assert FRAME_SAMPLERS["linspace"](case["frames"], case["samples"]) == case["indices"]


@pytest.mark.parametrize("case", GOLDEN.cases["grids"], ids=str)
def test_collages_have_the_grid_of_ts_llava(case):
    assert list(collage_grid(case["frames"])) == case["rows_columns"]


@pytest.mark.parametrize("case", GOLDEN.cases["collages"], ids=lambda case: case["case"])
def test_collages_are_those_of_ts_llava(case):
    frames, wanted = GOLDEN[f"{case['case']}.frames"], GOLDEN[f"{case['case']}.output"]
    found = draw_collage(frames.numpy(), case["of"], tuple(case["final"]))
    rows, cols = wanted.shape[1:]  # where a side does not divide, the published collage is smaller than the view
    np.testing.assert_allclose(found[:, :rows, :cols], wanted.numpy(), atol=1e-6)
    assert not found[:, rows:].any() and not found[:, :, cols:].any()


@pytest.mark.parametrize("case", GOLDEN.cases["repeated"]["cases"], ids=str)
def test_too_few_frames_are_repeated_in_place_as_in_pllava(case):
    frames, number = case["frames"], case["num_frames"]
    times = int(number / frames) + 1 if frames < number else 1
    wanted = np.repeat(np.arange(frames), times)[: max(number, frames) if times > 1 else None]
    assert repeated(frames, number) == wanted.tolist()


# ---- another set


def remake(folder: Path, seed: int) -> None:
    """Other lengths, grids and sides, some of which do not divide, from our own functions."""
    draw = np.random.default_rng(seed)
    lengths = [(int(draw.integers(40, 900)), int(draw.integers(2, 33))) for _ in range(6)]
    both = [
        {"frames": total, "samples": number, "bound_seconds": None, "fps": 25.0}
        | {name: FRAME_SAMPLERS[name](total, number) for name in ("uniform", "segments")}
        for total, number in lengths
    ]
    part = {"frames": 500, "samples": 5 + seed % 7, "bound_seconds": [1.0 + seed % 3, 12.5], "fps": 24.0}
    collages, tensors = [], {}
    for index, (of, side) in enumerate(((4, 23), (6, 25), (3, 14))):
        frames = torch.from_numpy(draw.normal(size=(9, 3, 18 + seed % 5, 18 + seed % 5)).astype(np.float32))
        rows, cols = collage_grid(of)
        output = draw_collage(frames.numpy(), of, (side, side))[:, : side // rows * rows, : side // cols * cols]
        tensors |= {f"case{index}.frames": frames, f"case{index}.output": torch.from_numpy(output)}
        collages.append({"case": f"case{index}", "frames": 9, "of": of, "final": [side, side]})
    equal = [{"frames": t, "samples": n, "indices": FRAME_SAMPLERS["linspace"](t, n)} for t, n in lengths]
    grids = [{"frames": number, "rows_columns": list(collage_grid(number))} for number in (5, 10, 15, 16)]
    few = [{"frames": frames, "num_frames": 7 + seed % 9} for frames in (1, 2, 5, 30)]
    cases = {
        "uniform_and_segments": [*both, part | {"segments": bounded(part)}],
        "linspace": equal,
        "grids": grids,
        "collages": collages,
        "repeated": {"cases": few},
    }
    write_set(folder, cases, tensors)

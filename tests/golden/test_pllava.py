"""PLLaVA: the released projector and pooling over frames, rows and columns; how too few frames are repeated."""

from pathlib import Path

import pytest
import torch

from builders import randomise
from hires_lmm import HiResLmmConnectorConfig
from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.carriers_hires_lmm import ImageGeometry, ViewFeatures, ViewGroup
from hires_lmm.modeling.connector_hires_lmm import HiResLmmConnector
from hires_lmm.modeling.geometry_hires_lmm import MAIN_TOWER, Grid, Kind
from hires_lmm.processing.video_planners_hires_lmm import repeated

from .base import GoldenSet, write_set


NAME = "pllava"
GOLDEN = GoldenSet(NAME)


def build(settings: dict, case: dict) -> HiResLmmConnector:
    """The connector of a case."""
    config = HiResLmmConnectorConfig(
        map_ops=[{"part": "pool3d", "shape": case["pooling_shape"]}], layout={"order": ["frames"]}
    )
    grid = Grid(*case["grid"])
    grids = {(int(Kind.FRAME), MAIN_TOWER): grid}
    context = PartContext(config, settings["vision_width"], settings["text_width"], grids, grid.size)
    return HiResLmmConnector(config, context).eval()


def load(connector: HiResLmmConnector, released: dict[str, torch.Tensor]) -> HiResLmmConnector:
    connector.load_state_dict({f"adapter.mlp.{name}": value for name, value in released.items()})
    return connector


@torch.no_grad()
def run(connector: HiResLmmConnector, frames: torch.Tensor, case: dict) -> torch.Tensor:
    """The tokens of the videos of a case, `(videos, frames * rows * columns, D)`."""
    shown = [repeated(len(own), case["num_frames"]) for own in frames.chunk(case["num_videos"])]
    views = torch.cat([own[rows] for own, rows in zip(frames.chunk(case["num_videos"]), shown, strict=True)])
    rows, cols = case["grid"]
    whole = (rows, cols, 0, rows, 0, cols)
    images, first = [], 0
    for own in shown:
        shapes = tuple((int(Kind.FRAME), len(own), 1, number, 0, *whole) for number in range(len(own)))
        images.append(ImageGeometry(first, shapes, 0))
        first += len(own)
    group = ViewGroup(int(Kind.FRAME), views, (rows, cols), tuple(range(first)))
    tokens = connector.layout(connector.adapt(ViewFeatures([group], images)), None)
    assert len(set(tokens.lengths)) == 1
    return tokens.features.unflatten(0, (len(images), -1))


@pytest.mark.parametrize("case", GOLDEN.cases["cases"], ids=lambda case: case["case"])
def test_tokens_of_videos(case):
    connector = load(build(GOLDEN.cases["settings"], case), GOLDEN.under("weight."))
    GOLDEN.close(run(connector, GOLDEN[f"{case['case']}.input"], case), f"{case['case']}.output", atol=1e-5)


@pytest.mark.parametrize("case", GOLDEN.cases["cases"], ids=lambda case: case["case"])
def test_pooling_does_not_change_what_is_repeated(case):
    """A picture needs no repetition: one frame gives the tokens of so many equal ones."""
    connector = load(build(GOLDEN.cases["settings"], case), GOLDEN.under("weight."))
    frame = GOLDEN[f"{case['case']}.input"][:1]
    once = run(connector, frame, {**case, "num_videos": 1, "num_frames": 1})
    torch.testing.assert_close(once, run(connector, frame, {**case, "num_videos": 1}), atol=1e-6, rtol=1e-5)


# ---- a set at other sizes


def remake(folder: Path, seed: int) -> None:
    settings = {"vision_width": 6, "text_width": 10}
    rows = [(7, [5, 4], 7, [3, 2, 4], 1), (2, [3, 3], 9, [5, 3, 1], 1), (12, [4, 6], 6, [4, 3, 5], 2)]
    names = ("frames", "grid", "num_frames", "pooling_shape", "num_videos")
    cases = [{"case": f"c{n}", **dict(zip(names, row, strict=True))} for n, row in enumerate(rows)]
    made = randomise(build(settings, cases[0]), seed)
    weights = {name.removeprefix("adapter.mlp."): value for name, value in made.state_dict().items()}
    tensors = {f"weight.{name}": value for name, value in weights.items()}
    for case in cases:
        frames = torch.randn(case["frames"], case["grid"][0] * case["grid"][1], settings["vision_width"])
        tensors[f"{case['case']}.input"] = frames
        tensors[f"{case['case']}.output"] = run(load(build(settings, case), weights), frames, case)
    write_set(folder, {"seed": seed, "settings": settings, "cases": cases}, tensors)

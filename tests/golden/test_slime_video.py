"""SliME's video: the released order of eight frames, the separator, the global view of the first frame or the mean."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from hires_lmm import HiResLmmConnectorConfig
from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.carriers_hires_lmm import ViewFeatures, ViewGroup, read_geometry
from hires_lmm.modeling.configuration_hires_lmm import PRESETS
from hires_lmm.modeling.connector_hires_lmm import HiResLmmConnector
from hires_lmm.modeling.geometry_hires_lmm import MAIN_TOWER, Grid, Kind
from hires_lmm.processing.image_processing_hires_lmm import HiResLmmImageProcessor

from .base import GoldenSet, write_set


NAME = "slime_video"
GOLDEN = GoldenSet(NAME)


class Pool(nn.Module):
    """Given weights of the patches in place of learned queries, as the set has them."""

    def __init__(self, weights: torch.Tensor):
        super().__init__()
        self.weights = weights

    def forward(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return self.weights @ features


def grid_of(settings: dict) -> tuple[int, int]:
    """Rows and columns of frames."""
    words = settings["grid"].split()
    return int(words[0]), int(words[3])


def build(settings: dict, projection: torch.Tensor, weights: torch.Tensor, rule: str) -> HiResLmmConnector:
    """The preset's order and separator around the set's own projection and compression, without a router."""
    layout = {**PRESETS["slime_video"]["connector_config"]["layout"], "order": ["global", "frames"]}
    separator = {**layout["separators"]["separator"], "value": "learned"}
    compress = {"part": "query_compressor", "on": "frames", "num_queries": len(weights), "num_heads": 1}
    config = HiResLmmConnectorConfig(
        view_ops=[{"part": "mean_global", "rule": rule}, compress],
        adapter={"part": "linear", "bias": False},
        layout={**layout, "separators": {"separator": separator}},
    )
    config._attn_implementation = "eager"
    side, width = math.isqrt(settings["tokens_per_view"]), len(projection)
    grids = {(int(kind), MAIN_TOWER): Grid(side, side) for kind in (Kind.GLOBAL, Kind.FRAME)}
    connector = HiResLmmConnector(config, PartContext(config, width, width, grids, (side, side))).eval()
    connector.view_ops[1].query_former = Pool(weights)
    with torch.no_grad():
        connector.adapter.linear.weight.copy_(projection.T)
    return connector


@torch.no_grad()
def sequence_of(connector: HiResLmmConnector, frames: torch.Tensor, separator: torch.Tensor, settings: dict):
    """The tokens of a video of frames `(T, L, C)`, planned by the preset's planner, and where they come from."""
    side = connector.patch_grid[0]
    planner = {**PRESETS["slime_video"]["video_planner"], "grid": list(grid_of(settings))}
    planner.pop("num_frames")
    processor = HiResLmmImageProcessor(video_planner=planner, view_size=14 * side, patch_size=14)
    plan = processor.plan_video(len(frames), 100, 200)
    positions = [[*view.shape[:5], 0, *view.shape[5:7], not number] for number, view in enumerate(plan.views)]
    images = read_geometry(positions, [list(view.shape.span) for view in plan.views])
    group = ViewGroup(int(Kind.FRAME), frames, (side, side), tuple(range(len(frames))))
    connector.layout.separators.separator.copy_(separator)
    return connector.layout(connector.adapt(ViewFeatures([group], images)), None)


def released(rule: str):
    """Our sequence of the set: its view 0 is its own first frame, or stands before the others."""
    settings = GOLDEN.cases["settings"]
    connector = build(settings, GOLDEN["projection"], GOLDEN["query_weights"], rule)
    frames = GOLDEN["views"][-settings["frames"] :]
    return sequence_of(connector, frames, GOLDEN["separator"], settings)


@pytest.mark.skipif("global_of_mean" not in GOLDEN.tensors, reason="the set has no mean")
def test_the_global_view_is_the_mean_of_all_frames():
    tokens = released("mean")
    GOLDEN.close(tokens.features[: len(GOLDEN["global_of_mean"])], "global_of_mean", atol=1e-5)


def test_separator_and_local_tokens():
    settings, tokens = GOLDEN.cases["settings"], released("first")
    start = settings["tokens_per_view"]
    assert len(tokens.features) == len(GOLDEN["sequence"])
    torch.testing.assert_close(tokens.features[start:], GOLDEN["sequence"][start:], atol=1e-5, rtol=1e-5)
    size = settings["compressed_per_frame"]
    cells = tokens.cell[start + 1 :] @ torch.tensor([math.isqrt(size), 1])
    assert (tokens.view[start + 1 :] * size + cells).tolist() == GOLDEN["local_order"].tolist()


@torch.no_grad()
def test_the_first_view_where_no_mean_is_taken():
    settings, views = GOLDEN.cases["settings"], GOLDEN["views"]
    connector = build(settings, GOLDEN["projection"], GOLDEN["query_weights"], "first")
    size = settings["tokens_per_view"]
    frames = views[-settings["frames"] :]
    first = sequence_of(connector, torch.cat([views[:1], frames[1:]]), GOLDEN["separator"], settings)
    torch.testing.assert_close(first.features[:size], GOLDEN["sequence"][:size], atol=1e-5, rtol=1e-5)


# ---- a set at other sizes


def remake(folder: Path, seed: int) -> None:
    settings = {"frames": 6, "grid": "3 rows x 2 columns", "tokens_per_view": 25, "compressed_per_frame": 4}
    projection, weights, separator = torch.randn(7, 7), torch.rand(4, 25), torch.randn(7)
    views = torch.randn(7, 25, 7)
    local = sequence_of(build(settings, projection, weights, "first"), views[1:], separator, settings)
    whole = sequence_of(build(settings, projection, weights, "mean"), views[1:], separator, settings)
    order = local.view[26:] * 4 + local.cell[26:] @ torch.tensor([2, 1])
    tensors = {"projection": projection, "query_weights": weights, "separator": separator, "views": views}
    tensors["sequence"] = torch.cat([views[0] @ projection, local.features[25:]])
    tensors |= {"global_of_mean": whole.features[:25], "local_order": order.int()}
    write_set(folder, {"seed": seed, "settings": settings}, tensors)

"""MERV: pooled encoders, the released mixers."""

from pathlib import Path

import pytest
import torch

from builders import randomise
from hires_lmm import HiResLmmConnectorConfig
from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.carriers_hires_lmm import ImageGeometry, ViewFeatures, ViewGroup
from hires_lmm.modeling.connector_hires_lmm import HiResLmmConnector
from hires_lmm.modeling.geometry_hires_lmm import MAIN_TOWER, WHOLE_KINDS, Grid, Kind
from hires_lmm.modeling.mixer_hires_lmm import HiResLmmTowerMixer
from hires_lmm.modeling.video_hires_lmm import pool_frames

from .base import GoldenSet, write_set


NAME = "merv"
GOLDEN = GoldenSet(NAME)
TOWERS = "abcdefgh"


def build(settings: dict, weights: str = "query") -> HiResLmmConnector:
    """The connector of a set: the first encoder is the main tower."""
    widths, sides = settings["encoder_widths"], settings["encoder_grids"]
    names = TOWERS[1 : len(widths)]
    shape = [settings["frames_out"], *[settings["pooled_side"]] * 2]
    mixer = {"part": "tower_mixer", "shape": shape, "weights": weights, "query_width": settings["query_width"]}
    config = HiResLmmConnectorConfig(
        adapter={"part": "linear"},
        tower_adapters={name: {"part": "linear"} for name in names},
        map_ops=[mixer],
        layout={"order": ["frames"]},
    )
    grids = {(int(Kind.FRAME), MAIN_TOWER): Grid(sides[0], sides[0])}
    for name, side in zip(names, sides[1:], strict=True):
        grids[int(Kind.DETAIL), name] = Grid(side, side, stride=None, whole=True, source=WHOLE_KINDS)
    by_name = dict(zip(names, widths[1:], strict=True))
    context = PartContext(config, widths[0], settings["text_width"], grids, (sides[0], sides[0]), tower_widths=by_name)
    return HiResLmmConnector(config, context).eval()


def load(connector: HiResLmmConnector, released: dict[str, torch.Tensor]) -> HiResLmmConnector:
    """Give it the released weights; the released attention has projections that nothing reads."""
    named = {}
    for number, name in enumerate(["", *connector.tower_adapters]):
        place = f"tower_adapters.{name}" if name else "adapter"
        for kind in ("weight", "bias"):
            named[f"{place}.linear.{kind}"] = released[f"projector{number}.projector.projector.{kind}"]
    if connector.map_ops[0].options.weights == "scalar":
        named["map_ops.0.logits"] = released["scalar.scalar"]
    else:
        biases = released["mixer.attention.in_proj_bias"].chunk(3)
        named["map_ops.0.query"] = released["mixer.Q"][0]
        for name, bias in zip("qk", biases, strict=False):
            named[f"map_ops.0.{name}_proj.weight"] = released[f"mixer.attention.{name}_proj_weight"]
            named[f"map_ops.0.{name}_proj.bias"] = bias
    connector.load_state_dict(named)
    return connector


def views_of(inputs: list[torch.Tensor], sides: list[int]) -> ViewFeatures:
    """Features `(B, T, L, C)` of each encoder as groups of the frames of B videos, as many frames as the main one."""
    videos, frames = inputs[0].shape[:2]
    whole = (sides[0], sides[0], 0, sides[0], 0, sides[0])
    shapes = tuple((int(Kind.FRAME), frames, 1, number, 0, *whole) for number in range(frames))
    rows = tuple(range(videos * frames))
    groups = [ViewGroup(int(Kind.FRAME), inputs[0].flatten(0, 1), (sides[0],) * 2, rows)]
    for name, own, side in zip(TOWERS[1:], inputs[1:], sides[1:], strict=False):
        groups.append(ViewGroup(int(Kind.DETAIL), own.flatten(0, 1), (side, side), rows, name))
    return ViewFeatures(groups, [ImageGeometry(video * frames, shapes, 0) for video in range(videos)])


@torch.no_grad()
def project(connector: HiResLmmConnector, inputs: list[torch.Tensor], settings: dict) -> list[torch.Tensor]:
    """The pooled tokens `(B, M, D)` of each encoder, whatever its number of frames."""
    shape, found = connector.map_ops[0].options.shape, []
    adapters = [connector.adapter, *connector.tower_adapters.values()]
    for adapter, own, side in zip(adapters, inputs, settings["encoder_grids"], strict=True):
        tokens = adapter(own.flatten(0, 1), int(Kind.FRAME))
        pooled = pool_frames(tokens, (side, side), [own.shape[1]] * len(own), shape)
        found.append(pooled.reshape(len(own), -1, pooled.shape[2]))
    return found


@torch.no_grad()
def mixed(mixer: HiResLmmTowerMixer, tokens: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and mixture."""
    stacked = torch.stack(tokens, dim=1)
    return mixer.weigh(stacked), mixer.mix(stacked, mixer.weigh(stacked))


@pytest.fixture(scope="module")
def inputs() -> list[torch.Tensor]:
    return [GOLDEN[f"input{number}"] for number in range(len(GOLDEN.cases["settings"]["encoder_widths"]))]


def test_pooled_and_projected_encoders(inputs):
    settings = GOLDEN.cases["settings"]
    for number, own in enumerate(project(load(build(settings), GOLDEN.under("weight.")), inputs, settings)):
        GOLDEN.close(own, f"projected{number}", atol=1e-5)


@pytest.mark.parametrize("kind", ["query", "scalar"])
def test_weights_and_mixture(inputs, kind):
    settings, names = GOLDEN.cases["settings"], {"query": ("weights", "mixed")}
    connector = load(build(settings, kind), GOLDEN.under("weight."))
    weights, mixture = mixed(connector.map_ops[0], project(connector, inputs, settings))
    names = names.get(kind, ("scalar_weights", "scalar_mixed"))
    GOLDEN.close(weights[: len(GOLDEN[names[0]])], names[0], atol=1e-5)
    GOLDEN.close(mixture, names[1], atol=1e-5)


@torch.no_grad()
def test_the_whole_connector_mixes_videos_of_as_many_frames(inputs):
    """The part inside a connector gives what the pieces give; of a longer encoder it sees as many frames."""
    settings = GOLDEN.cases["settings"]
    connector = load(build(settings), GOLDEN.under("weight."))
    frames = inputs[0].shape[1]
    equal = [own[:, :frames] for own in inputs]
    _, wanted = mixed(connector.map_ops[0], project(connector, equal, settings))
    tokens = connector.layout(connector.adapt(views_of(equal, settings["encoder_grids"])), None)
    torch.testing.assert_close(tokens.features.view_as(wanted), wanted, atol=1e-5, rtol=1e-5)
    one = connector.layout(connector.adapt(views_of([own[1:] for own in equal], settings["encoder_grids"])), None)
    torch.testing.assert_close(one.features, wanted[1], atol=1e-5, rtol=1e-5)


# ---- a set at other sizes


def remake(folder: Path, seed: int) -> None:
    settings = {
        "text_width": 10,
        "query_width": 9,
        "encoder_widths": [7, 5, 12],
        "encoder_grids": [6, 3, 5],
        "frames": [6, 9, 6],
        "frames_out": 4,
        "pooled_side": 3,
    }
    made = {kind: randomise(build(settings, kind), seed) for kind in ("query", "scalar")}
    made["scalar"].adapter, made["scalar"].tower_adapters = made["query"].adapter, made["query"].tower_adapters
    sizes = zip(settings["frames"], settings["encoder_grids"], settings["encoder_widths"], strict=True)
    inputs = [torch.randn(3, frames, side * side, width) for frames, side, width in sizes]
    mixer, state = made["query"].map_ops[0], made["query"].state_dict()
    tensors = {f"input{number}": own for number, own in enumerate(inputs)}
    for number, name in enumerate(["adapter", *(f"tower_adapters.{name}" for name in made["query"].tower_adapters)]):
        for kind in ("weight", "bias"):
            tensors[f"weight.projector{number}.projector.projector.{kind}"] = state[f"{name}.linear.{kind}"]
    tokens = project(made["query"], inputs, settings)
    tensors |= {f"projected{number}": own for number, own in enumerate(tokens)}
    tensors["weights"], tensors["mixed"] = mixed(mixer, tokens)
    tensors["scalar_weights"], tensors["scalar_mixed"] = mixed(made["scalar"].map_ops[0], tokens)
    unread = torch.zeros(settings["query_width"])
    tensors["weight.mixer.Q"] = mixer.query[None]
    tensors["weight.mixer.attention.in_proj_bias"] = torch.cat([mixer.q_proj.bias, mixer.k_proj.bias, unread])
    tensors["weight.mixer.attention.q_proj_weight"] = mixer.q_proj.weight
    tensors["weight.mixer.attention.k_proj_weight"] = mixer.k_proj.weight
    tensors["weight.scalar.scalar"] = made["scalar"].map_ops[0].logits
    write_set(folder, {"seed": seed, "settings": settings}, tensors)

"""LLaVA-ST: three packers on a video and on a picture, and the tables of coordinates."""

from pathlib import Path

import pytest
import torch

from builders import randomise
from hires_lmm import HiResLmmConnectorConfig
from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.carriers_hires_lmm import ImageGeometry, ViewFeatures, ViewGroup
from hires_lmm.modeling.geometry_hires_lmm import MAIN_TOWER, Grid, Kind
from hires_lmm.modeling.region_pack_hires_lmm import HiResLmmRegionPack

from .base import GoldenSet, fuse_attention, split_attention, write_set


NAME = "llava_st"
GOLDEN = GoldenSet(NAME)
PACKERS = {"token_packer": "packer", "token_packer_slow": "slow_packer", "token_packer_fast": "fast_packer"}


def build(settings: dict) -> HiResLmmRegionPack:
    config = HiResLmmConnectorConfig()
    config._attn_implementation = "sdpa"
    options = HiResLmmRegionPack.Options(
        spatial_factor=settings["spatial_factor"], temporal_factor=settings["temporal_factor"],
        width=settings["embed_dim"], num_heads=settings["heads"],
    )  # fmt: skip
    grids = {(int(kind), MAIN_TOWER): Grid(*settings["grid"]) for kind in (Kind.GLOBAL, Kind.FRAME)}
    width = settings["width"]
    return HiResLmmRegionPack(PartContext(config, width, width, grids, tuple(settings["grid"])), options).eval()


def ours(released: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a packer by our names."""
    inner = {name.removeprefix("devide_attention."): value for name, value in released.items()}
    attention = {name.removeprefix("attn."): value for name, value in inner.items() if name.startswith("attn.")}
    found = {f"attention.{name}": value for name, value in split_attention(attention).items()}
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        for kind in ("weight", "bias"):
            layers = {0: f"to_{letter}.0", 2: f"to_{letter}.2", 3: f"ln_{letter}"}
            found |= {f"{name}_mlp.{place}.{kind}": inner[f"{theirs}.{kind}"] for place, theirs in layers.items()}
    return found | {"output.weight": inner["to_out.weight"]}


def theirs(part: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The way back."""
    own = part.state_dict()
    attention = {name.removeprefix("attention."): value for name, value in own.items() if name.startswith("attention")}
    found = {f"attn.{name}": value for name, value in fuse_attention(attention).items()}
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        for kind in ("weight", "bias"):
            layers = {0: f"to_{letter}.0", 2: f"to_{letter}.2", 3: f"ln_{letter}"}
            found |= {f"{released}.{kind}": own[f"{name}_mlp.{place}.{kind}"] for place, released in layers.items()}
    found["to_out.weight"] = own["output.weight"]
    return {f"devide_attention.{name}": value for name, value in found.items()}


@torch.no_grad()
def pack(part: HiResLmmRegionPack, features: torch.Tensor, kind: Kind, settings: dict) -> dict[str, torch.Tensor]:
    """What the part makes of one video, or of one picture."""
    rows, cols = settings["grid"]
    shape = (int(kind), len(features), 1, 0, 0, rows, cols, 0, rows, 0, cols)
    group = ViewGroup(int(kind), features, (rows, cols), tuple(range(len(features))))
    first = part.pack(part.packer, group).features
    views = part(ViewFeatures([group], [ImageGeometry(0, (shape,) * len(features), 1)]))
    names = {Kind.DETAIL: "slow", Kind.FRAME: "fast", Kind.GLOBAL: "slow"}
    return {"first": first, **{names[Kind(group.kind)]: group.features for group in views.groups}}


@pytest.mark.parametrize("name, kind", [("video", Kind.FRAME), ("image", Kind.GLOBAL)])
def test_packers(name, kind):
    settings = GOLDEN.cases["settings"]
    part = build(settings)
    for released, own in PACKERS.items():
        getattr(part, own).load_state_dict(ours(GOLDEN.under(f"weight.{released}.")))
    found = pack(part, GOLDEN[f"{name}.input"], kind, settings)
    assert set(found) == ({"first", "slow", "fast"} if name == "video" else {"first", "slow"})
    for own, value in found.items():
        GOLDEN.close(value, f"{name}.{own}", atol=1e-5, rtol=1e-5)


# ---- a set at other sizes


def remake(folder: Path, seed: int) -> None:
    settings = {"width": 6, "embed_dim": 12, "heads": 3, "grid": [8, 4], "frames": 9, "spatial_factor": 2}
    settings |= {"temporal_factor": 3}
    part = randomise(build(settings), seed)
    tensors = {f"weight.{released}.{name}": value for released, own in PACKERS.items()
               for name, value in theirs(getattr(part, own)).items()}  # fmt: skip
    for name, kind, count in (("video", Kind.FRAME, settings["frames"]), ("image", Kind.GLOBAL, 1)):
        features = torch.randn(count, 32, settings["width"])
        tensors[f"{name}.input"] = features
        tensors |= {f"{name}.{own}": value for own, value in pack(part, features, kind, settings).items()}
    write_set(folder, {"seed": seed, "settings": settings}, tensors)

"""LLaVA-ST: three packers on a video and on a picture, and the tables of coordinates."""

from pathlib import Path

import pytest
import torch

from builders import randomise
from hires_lmm import HiResLmmConnectorConfig
from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.carriers_hires_lmm import ImageGeometry, ViewFeatures, ViewGroup
from hires_lmm.modeling.coordinates_hires_lmm import HiResLmmCoordinates, propagate
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


STEPS = 1000
"""Tokens from row to row that say the positions of the set exactly."""


def tables(**rows: torch.Tensor) -> HiResLmmCoordinates:
    """A part with the given rows of one axis or more in both tables, zeros elsewhere."""
    number, channels = next(iter(rows.values())).shape
    grids = {(int(Kind.FRAME), MAIN_TOWER): Grid(1, 1)}
    context = PartContext(None, channels, channels, grids, (1, 1), vocab_size=10**9)
    part = HiResLmmCoordinates(context, HiResLmmCoordinates.Options(first_token_id=0, num_rows=number, steps=STEPS))
    stacked = torch.stack([rows.get(name, torch.zeros(number, channels)) for name in ("time", "height", "width")])
    for table in (part.input_rows, part.output_rows):
        table.weight.data = stacked.clone()
    return part


def embed_position(rows: torch.Tensor, position: float) -> torch.Tensor:
    """The embedding of a coordinate in text."""
    part = tables(time=rows)
    token = torch.tensor([[round(min(max(position, 0.0), 1.0) * (part.length - 1))]])
    return part.embed(token, torch.zeros(1, 1, rows.shape[1]))[0, 0]


def inject(height: torch.Tensor, width: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """What the places of a grid get."""
    part = tables(height=height, width=width)
    group = ViewGroup(int(Kind.GLOBAL), torch.zeros(1, grid[0] * grid[1], height.shape[1]), grid, (0,))
    image = ImageGeometry(0, ((0, 1, 1, 0, 0, *grid, 0, grid[0], 0, grid[1]),), 1)
    return part(ViewFeatures([group], [image])).groups[0].features[0].unflatten(0, grid)


def learn(weight: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as they are read, and their gradient."""
    weight = weight.clone().requires_grad_()
    value = propagate(weight)
    value.backward(upstream)
    return value.detach(), weight.grad


def test_neighbours_learn_together():
    value, gradient = learn(GOLDEN["lape.weight"], GOLDEN["lape.upstream"])
    assert torch.equal(value, GOLDEN["lape.weight"])
    GOLDEN.close(value, "lape.value", atol=1e-6)
    GOLDEN.close(gradient, "lape.grad", atol=1e-5)


@pytest.mark.parametrize("case", GOLDEN.cases["coordinates"], ids=lambda case: str(case["position"]))
@torch.no_grad()
def test_a_coordinate_in_text(case):
    GOLDEN.close(embed_position(GOLDEN["lape.weight"], case["position"]), case["case"], atol=1e-5)


@torch.no_grad()
def test_places_of_features():
    found = inject(GOLDEN["injection.height"], GOLDEN["injection.width"], tuple(GOLDEN.cases["settings"]["grid"]))
    GOLDEN.close(found, "injection.output", atol=1e-5)


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
    weight, upstream = torch.randn(2, 6, 5)
    value, gradient = learn(weight, upstream)
    tensors |= {"lape.weight": weight, "lape.upstream": upstream, "lape.value": value, "lape.grad": gradient}
    height, width = torch.randn(2, 6, 5)
    tensors |= {"injection.height": height, "injection.width": width}
    cases = [{"case": f"coordinate{number}", "position": place} for number, place in enumerate((0.0, 0.37, 0.8, 1.2))]
    with torch.no_grad():
        tensors["injection.output"] = inject(height, width, tuple(settings["grid"]))
        tensors |= {case["case"]: embed_position(weight, case["position"]) for case in cases}
    write_set(folder, {"seed": seed, "settings": settings, "coordinates": cases}, tensors)

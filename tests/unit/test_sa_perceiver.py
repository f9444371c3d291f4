"""The spatially aware perceiver against loops in float64, its stability over the number of crops, and its refusals."""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch

import reference_silu as reference
from builders.tiny import randomise, tiny_config, tiny_model
from hires_lmm import HiResLmmConnectorConfig
from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.carriers_hires_lmm import ImageGeometry, ViewFeatures, ViewGroup
from hires_lmm.modeling.connector_hires_lmm import HiResLmmConnector
from hires_lmm.modeling.geometry_hires_lmm import Grid
from hires_lmm.modeling.sa_perceiver_hires_lmm import HiResLmmSaPerceiver


WIDTH, GRID = 12, (2, 3)
DEFAULTS = {
    "activation": "silu",
    "self_attention": "silu",
    "score_scale": "none",
    "norm": "rms",
    "num_heads": 1,
}
COMBINATIONS = [
    {},
    {"norm": "none"},
    {"norm": "layer", "score_scale": "1/sqrt(d)"},
    {"norm": "none", "score_scale": "1/sqrt(d)", "num_heads": 3},
    {"norm": "none", "score_scale": "1/num_keys"},
    {"score_scale": "1/num_keys", "num_heads": 2},
    {"self_attention": "none", "norm": "none"},
    {"self_attention": "softmax"},
    {"activation": "softmax", "self_attention": "softmax", "score_scale": "1/sqrt(d)", "num_heads": 2},
    {"activation": "softmax", "self_attention": "silu", "norm": "none"},
    {"activation": "softmax", "self_attention": "none"},
]
combinations = pytest.mark.parametrize(
    "options", COMBINATIONS, ids=lambda o: ",".join(map(str, o.values())) or "default"
)


def build(width: int = WIDTH, backend: str = "eager", **options) -> HiResLmmSaPerceiver:
    config = SimpleNamespace(_attn_implementation=backend, initializer_range=0.02)
    grids = {(0, "vision_tower"): Grid(*GRID), (1, "vision_tower"): Grid(*GRID)}
    context = PartContext(config, width, 32, grids, GRID)
    return HiResLmmSaPerceiver(context, HiResLmmSaPerceiver.Options(**options))


def geometry(first_view: int, crops: int) -> ImageGeometry:
    """An image of one row of crops; a few columns of each view are cut away."""
    cells = [(0, 0), *((1, column) for column in range(crops))]
    views = tuple((kind, kind, crops, 0, column, *GRID, 0, GRID[0], 0, GRID[1] - 1) for kind, column in cells)
    return ImageGeometry(first_view, views, 6)


def make_views(counts: list[int], width: int = WIDTH, dtype=torch.float64, size: int = 6) -> ViewFeatures:
    """Views of images with so many crops, `size` tokens each."""
    generator = torch.Generator().manual_seed(0)
    starts = list(itertools.accumulate([count + 1 for count in counts[:-1]], initial=0))
    features = [torch.randn(n, size, width, generator=generator).to(dtype) for n in (len(counts), sum(counts))]
    images = [geometry(*pair) for pair in zip(starts, counts, strict=True)]
    crops = tuple(row for image in images for row in image.rows(1))
    groups = [ViewGroup(0, features[0], GRID, tuple(starts)), ViewGroup(1, features[1], GRID, crops)]
    return ViewFeatures(groups, images)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@combinations
@torch.no_grad()
def test_each_combination_equals_the_reference(options, backend):
    op = randomise(build(backend=backend, **options).double(), seed=3)
    weights = {name: value.numpy() for name, value in op.state_dict().items()}
    counts = [2, 0, 3, 2]
    tolerance = 1e-5 if backend == "eager" and "softmax" in options.values() else 1e-12  # it works in float32
    views = make_views(counts)
    found = op(views)
    crops = views.groups[1].features.split(counts)
    for image, own in enumerate(crops):
        wanted = reference.perceive(
            views.groups[0].features[image].numpy(), own.numpy(), weights, {**DEFAULTS, **options}
        )
        assert reference.relative_error(found.groups[0].features[image], wanted[0]) < tolerance
        assert reference.relative_error(found.aux["global_embedding"][image], wanted[1]) < tolerance


@pytest.mark.parametrize("options", COMBINATIONS[1:], ids=lambda options: ",".join(map(str, options.values())))
@torch.no_grad()
def test_options_change_the_result(options):
    """No option is dead: with equal weights every combination differs from the default."""
    views = make_views([2, 3])
    results = []
    for given in (options, {}):
        op, default = build(**given).double(), randomise(build().double(), seed=3).state_dict()
        randomise(op, seed=3)
        op.load_state_dict({name: default.get(name, value) for name, value in op.state_dict().items()})
        results.append(op(views).groups[0].features)
    assert (results[0] - results[1]).abs().max() > 1e-3


def test_the_crops_leave_and_the_whole_view_stays():
    views = make_views([2, 0])
    views.aux["other"] = torch.ones(1)
    found = build().double()(views)
    assert [group.kind for group in found.groups] == [0]
    assert found.groups[0].features.shape == views.groups[0].features.shape and found.groups[0].grid == GRID
    assert set(found.aux) == {"other", "global_embedding"} and found.aux["global_embedding"].shape == (2, WIDTH)
    assert set(views.aux) == {"other"} and len(views.groups) == 2  # the input is not changed


# ---- magnitude over the number of crops


@functools.cache
@torch.no_grad()
def largest_activation(crops: int, **options) -> float:
    """Largest activation of any step at initialisation, in bfloat16, on features of unit variance."""
    width = 512
    config = HiResLmmConnectorConfig(view_ops=[{"part": "sa_perceiver", **options}])
    torch.manual_seed(0)
    op = HiResLmmConnector(config, PartContext(config, width, 32, {}, GRID)).view_ops[0].bfloat16()
    sizes = []

    def record(module, inputs, output):
        assert torch.isfinite(output).all()
        sizes.append(float(output.abs().max()))

    for module in (op.cross_norm, op.cross_out, op.self_norm, op.self_out):
        module.register_forward_hook(record)
    found = op(make_views([crops], width, torch.bfloat16, size=64))
    return max(*sizes, float(found.groups[0].features.abs().max()), float(found.aux["global_embedding"].abs().max()))


@pytest.mark.parametrize("crops", [2, 6, 36, 64])
@pytest.mark.parametrize(
    "options",
    [{}, {"norm": "layer"}, {"norm": "none", "score_scale": "1/num_keys"}, {"score_scale": "1/sqrt(d)"}],
    ids=["default", "layer", "mean", "scaled"],
)
def test_activations_stay_within_a_factor_of_ten(options, crops):
    assert 0.1 < largest_activation(crops, **options) / largest_activation(1, **options) < 10


@torch.no_grad()
def test_what_was_hardly_read_is_not_blown_up():
    """A query with scores far below zero reads rounding errors; a norm with a small epsilon would make them large."""
    op = randomise(build(64), seed=1)
    views = make_views([2], 64, torch.float32)
    views.groups[1].features = views.groups[1].features + 3  # keys share a direction, as those of real towers do
    sizes = []
    op.cross_norm.register_forward_hook(lambda module, inputs, output: sizes.append((inputs[0], output)))
    op(views)
    read, normed = (part[0].pow(2).mean(-1).sqrt() for part in sizes[0])
    assert read.min() < 1e-3 < 1 < read.max()  # both kinds of queries are there
    assert (normed <= 1.5 * read).all() and normed.max() < 1.5


# ---- training


def test_the_loss_reaches_the_crops():
    op = randomise(build().double())
    views = make_views([2, 1])
    views.groups[1].features.requires_grad_()
    op(views).groups[0].features[0].sum().backward()
    grad = views.groups[1].features.grad
    assert grad[:2].abs().amin(dim=(1, 2)).min() > 0 and not grad[2].any()  # the other image is not read


# ---- refusals


@pytest.mark.parametrize("options", [{"activation": "softmax"}, {"self_attention": "softmax"}])
def test_one_wide_head_under_flash_attention_is_refused(options):
    message = r"num_heads=1 of 1024 channels, but flash_attention_2 runs at most 256; use num_heads=4 or more"
    with pytest.raises(ValueError, match=message):
        build(1024, "flash_attention_2", **options)
    op = build(1024, "sdpa", **options)
    op.config._attn_implementation = "flash_attention_2"  # chosen after construction
    with pytest.raises(ValueError, match=message):
        op(make_views([1], 1024, torch.float32))
    build(1024, "flash_attention_2", num_heads=4, **options)
    build(1024, "flash_attention_2")  # SiLU does not go through the backend


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 5}, "num_heads=5 does not divide the width 12"),
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"activation": "softmax", "score_scale": "1/num_keys"}, "softmax weights sum to one already"),
        ({"self_attention": "softmax", "score_scale": "1/num_keys"}, "softmax weights sum to one already"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        build(**options)


def test_an_operation_on_crops_behind_it_is_refused():
    ops = [{"part": "sa_perceiver"}, {"part": "query_compressor", "on": "crops", "num_queries": 4}]
    with pytest.raises(ValueError, match=r"has on='crops', but no such views are there"):
        tiny_config("vlsa", connector_config={"view_ops": ops})
    ops[1]["on"] = "global"
    config = tiny_config("vlsa", connector_config={"view_ops": ops})
    assert config.token_layout()["grids"] == {"global": {"rows": 2, "cols": 2, "stride": None, "whole": True}}
    tiny_model(config)
    ops.reverse()
    ops[0]["on"] = "crops"
    assert tiny_config("vlsa", connector_config={"view_ops": ops}).token_layout()["grids"]["global"]["rows"] == 4

"""Adapters and view operations against their formulas."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hires_lmm.modeling.adapters_hires_lmm import HiResLmmGate, HiResLmmMixtureAdapter
from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.compressors_hires_lmm import HiResLmmQueryCompressor
from hires_lmm.modeling.geometry_hires_lmm import Grid, Kind
from hires_lmm.modeling.parts_hires_lmm import ADAPTERS, resolve_part


def context(crop_grid=(3, 3)) -> PartContext:
    grids = {(0, "vision_tower"): Grid(3, 3), (1, "vision_tower"): Grid(*crop_grid)}
    return PartContext(SimpleNamespace(_attn_implementation="eager"), 16, 24, grids, (3, 3))


def build(spec: dict, **kwargs) -> nn.Module:
    slot = "adapter" if spec["part"] in ADAPTERS else "view_ops"
    resolved = resolve_part(slot, spec, "test")
    part = resolved.part(context(**kwargs), resolved.options)
    torch.manual_seed(1)
    for parameter in part.parameters():
        nn.init.normal_(parameter)
    for module in part.modules():
        if type(module).__name__ == "HiResLmmQueryFormer":
            module.positions.normal_()
    return part.eval()


def test_identity_and_linear():
    features = torch.randn(2, 9, 16)
    assert build({"part": "identity"})(features, Kind.CROP) is features
    linear = build({"part": "linear"})
    wanted = features @ linear.linear.weight.T + linear.linear.bias
    torch.testing.assert_close(linear(features, Kind.GLOBAL), wanted)
    assert build({"part": "linear", "bias": False}).linear.bias is None


def test_mlp_is_two_layers_with_exact_gelu():
    features, adapter = torch.randn(2, 9, 16), build({"part": "mlp"})
    first, second = adapter.mlp.linear_1, adapter.mlp.linear_2
    wanted = nn.functional.gelu(features @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(adapter(features, Kind.GLOBAL), wanted)


def mixture_by_hand(adapter: HiResLmmMixtureAdapter, features: torch.Tensor, epsilon: float) -> torch.Tensor:
    raw, queried = adapter.mlp(features), adapter.mlp(adapter.query_former(features))
    weights = torch.exp(features @ adapter.gate.gate_weight)
    weights = weights / weights.sum(-1, keepdim=True) / (1 + epsilon)
    return weights[..., 0:1] * raw + weights[..., 1:2] * queried


@pytest.mark.parametrize("gate, epsilon", [("paper", 0.0), ("release", 1e-6)])
def test_mixture_weighs_two_experts_on_the_global_view(gate, epsilon):
    features, adapter = torch.randn(2, 9, 16), build({"part": "mixture", "gate": gate})
    wanted = mixture_by_hand(adapter, features, epsilon)
    torch.testing.assert_close(adapter(features, Kind.GLOBAL), wanted, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(adapter(features, Kind.CROP), adapter.mlp(features))


def test_mixture_may_mix_crops_instead():
    features, adapter = torch.randn(2, 9, 16), build({"part": "mixture", "mix_on": "crops"})
    wanted = mixture_by_hand(adapter, features, 0.0)
    torch.testing.assert_close(adapter(features, Kind.CROP), wanted, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(adapter(features, Kind.GLOBAL), adapter.mlp(features))


@pytest.mark.parametrize("expert", ["mlp", "query_former"])
def test_forced_expert(expert):
    features, adapter = torch.randn(2, 9, 16), build({"part": "mixture", "forced_expert": expert})
    wanted = adapter.mlp(features if expert == "mlp" else adapter.query_former(features))
    torch.testing.assert_close(adapter(features, Kind.GLOBAL), wanted)


@pytest.mark.parametrize("rule", ["paper", "release"])
def test_gate_noise_exists_only_in_training_and_scales_as_stated(rule):
    gate = HiResLmmGate(4, rule)
    with torch.no_grad():
        gate.gate_weight.zero_()
        gate.noise_weight.fill_(3.0)
    features = torch.ones(1, 20_000, 4)
    assert gate.eval()(features).std() < 1e-6
    torch.manual_seed(0)
    gates = gate.train()(features).detach()
    spread = (gates[..., 0].log() - gates[..., 1].log()).std() / 2**0.5  # difference of two noises
    raw = features[0, 0] @ (gate.noise_weight if rule == "paper" else gate.gate_weight).detach()
    wanted = nn.functional.softplus(raw[0]) + 0.01
    assert abs(float(spread) / float(wanted) - 1) < 0.03


def test_query_compressor_refuses_two_grids_at_once():
    with pytest.raises(ValueError, match="needs views of one token grid"):
        build({"part": "query_compressor", "on": "all", "num_queries": 4}, crop_grid=(2, 2))
    assert isinstance(
        build({"part": "query_compressor", "on": "crops", "num_queries": 4}, crop_grid=(2, 2)),
        HiResLmmQueryCompressor,
    )

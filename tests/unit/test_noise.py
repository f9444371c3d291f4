"""Noise in training: where it is, how it is switched off, and that no parameter loses its gradient by that."""

import pytest
import torch
from torch import nn

from builders.tiny import make_batch, random_image, tiny_model, tiny_processor
from builders.training import slime_config
from hires_lmm.modeling.adapters_hires_lmm import HiResLmmGate
from hires_lmm.modeling.noise_hires_lmm import HiResLmmNoise
from hires_lmm.training import Stage


NOISY_ROUTER = {"part": "router", "on": "crops", "keep": {"rule": "threshold", "gamma": 0.75}, "noise": 3.0}


def noisy_parts(**changes):
    """A SliME model in training mode with noise in gate and router and dropout beside it, and a batch."""
    config = slime_config(token_ops=[NOISY_ROUTER], **changes)
    config.answer_prefix_ids = [1, 1, 1]
    model = tiny_model(config)
    model.model.connector.adapter.mlp.act = nn.Sequential(model.model.connector.adapter.mlp.act, nn.Dropout(0.0))
    return model, make_batch(tiny_processor(config), [("<image>What is it?", [random_image(90, 160)])])


def test_noise_has_the_deviation_that_is_asked_for():
    torch.manual_seed(0)
    noise, scores = HiResLmmNoise().train(), torch.full((2, 20_000), 5.0)
    scale = torch.tensor([[0.1], [3.0]])
    added = noise(scores, scale) - scores
    for row, wanted in zip(added, scale[:, 0], strict=True):
        assert abs(float(row.std() / wanted) - 1) < 0.03 and abs(float(row.mean())) < 0.03 * wanted


@pytest.mark.parametrize("switch", ["eval", "p"])
def test_noise_that_is_off_changes_nothing(switch):
    noise, scores = HiResLmmNoise().train(), torch.randn(7)
    noise = noise.eval() if switch == "eval" else noise
    noise.p = 0 if switch == "p" else noise.p
    assert torch.equal(noise(scores, 3.0), scores)


@pytest.mark.parametrize("rule", ["paper", "release"])
def test_every_parameter_of_the_gate_keeps_its_gradient_without_noise(rule):
    gate = HiResLmmGate(4, rule).train()
    nn.init.normal_(gate.gate_weight)
    nn.init.normal_(gate.noise_weight)
    gate.noise.p = 0
    features = torch.randn(1, 3, 4)
    gates = gate(features)
    torch.testing.assert_close(gates, gate.eval()(features), atol=0, rtol=0)
    gates[..., 0].sum().backward()
    assert gate.gate_weight.grad.abs().sum() > 0
    if rule == "paper":  # the released rule never reads the other table
        assert gate.noise_weight.grad is not None and not gate.noise_weight.grad.any()


def test_a_stage_switches_noise_and_no_dropout():
    model, batch = noisy_parts()
    calm = model(**batch).logits
    dropout = next(module for module in model.modules() if type(module) is nn.Dropout)
    dropout.p = 0.25
    Stage("quiet", {"connector": 1e-3}, noise=False).apply(model)
    assert dropout.p == 0.25
    dropout.p = 0.0
    torch.testing.assert_close(model.train()(**batch).logits, calm, atol=0, rtol=0)
    Stage("as it is", {"connector": 1e-3}).apply(model)
    torch.testing.assert_close(model(**batch).logits, calm, atol=0, rtol=0)
    Stage("noisy", {"connector": 1e-3}, noise=True).apply(model)
    assert not torch.equal(model(**batch).logits, calm)

"""MoE-LLaVA: without noise and capacity its experts are transformers'; where it draws or drops, rows differ."""

from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

from .base import GoldenSet, write_set


NAME = "moe_llava"
GOLDEN = GoldenSet(NAME)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def block_of(tensors: dict[str, torch.Tensor], top_k: int) -> MixtralSparseMoeBlock:
    """Our language model's layer of experts with the weights of a set."""
    gate = tensors["weight.gate.wg.weight"]
    number, width = gate.shape
    parts = {
        name: torch.stack([tensors[f"weight.experts.{expert}.{name}.weight"] for expert in range(number)])
        for name in PROJECTIONS
    }
    config = MixtralConfig(
        hidden_size=width,
        intermediate_size=parts["down_proj"].shape[2],
        num_local_experts=number,
        num_experts_per_tok=top_k,
    )
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config).eval()
    gate_up = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
    block.load_state_dict(
        {"gate.weight": gate, "experts.gate_up_proj": gate_up, "experts.down_proj": parts["down_proj"]}
    )
    return block


@torch.no_grad()
def measure(tensors: dict[str, torch.Tensor], top_k: int, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """What our layer gives for states `(tokens, width)`, by the names of the set."""
    block = block_of(tensors, top_k)
    logits, weights, chosen = block.gate(states)
    number = logits.shape[1]
    return {
        "gates": logits.softmax(dim=-1),
        "expert_weights": torch.zeros_like(logits).scatter_(1, chosen, weights),
        "output": block(states[None])[0],
        "l_aux": load_balancing_loss_func((logits,), number, 1),  # the release counts first choices alone
    }


@pytest.mark.parametrize("case", GOLDEN.cases["cases"], ids=lambda case: case["case"])
def test_experts_are_ours_but_where_the_release_draws_or_drops(case):
    name, top_k = case["case"], GOLDEN.cases["settings"]["top_k"]
    found = measure(GOLDEN.tensors, top_k, GOLDEN[f"{name}.input"])
    for each in ("gates", "l_aux"):  # neither noise nor capacity touches them
        GOLDEN.close(found[each], f"{name}.{each}")
    wanted = GOLDEN[f"{name}.expert_weights"]
    same = ((wanted > 0) == (found["expert_weights"] > 0)).all(dim=1)
    if not case["second_expert_noise"] and not case["tokens_with_a_dropped_choice"]:
        assert same.all()
    for each in ("expert_weights", "output"):
        torch.testing.assert_close(found[each][same], GOLDEN[f"{name}.{each}"][same], atol=1e-4, rtol=1e-4)
    lost = (wanted > 0).sum(dim=1) < top_k
    assert int(lost.sum()) == case["tokens_with_a_dropped_choice"]
    assert not (lost & same).any()


def remake(folder: Path, seed: int) -> None:
    number, width, inner, top_k = 6, 12, 10, 2
    tensors = {"weight.gate.wg.weight": torch.randn(number, width)}
    for expert in range(number):
        for name in PROJECTIONS:
            shape = (width, inner) if name == "down_proj" else (inner, width)
            tensors[f"weight.experts.{expert}.{name}.weight"] = torch.randn(shape) * 0.5
    cases = []
    for index, tokens in enumerate((7, 30)):
        states = torch.randn(tokens, width)
        found = measure(tensors, top_k, states)
        tensors |= {f"case{index}.{each}": value for each, value in {"input": states, **found}.items()}
        none = {"second_expert_noise": False, "tokens_with_a_dropped_choice": 0}
        cases.append({"case": f"case{index}", "tokens": tokens, **none})
    write_set(folder, {"seed": seed, "settings": {"experts": number, "top_k": top_k}, "cases": cases}, tensors)

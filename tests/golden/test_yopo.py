"""YOPO: the released simulation and what it simulates, in a small decoder, and the rule that chooses heads."""

from pathlib import Path

import pytest
import torch

from hires_lmm.modeling.yopo_hires_lmm import head_ratios, near_cells, vote_heads

from . import decoder
from .base import GoldenSet, write_set


NAME = "yopo"
GOLDEN = GoldenSet(NAME)
PARTS = {
    "neighbour": ("window",),
    "heads": ("heads",),
    "ffn": ("neurons",),
    "drop": ("drop_from",),
    "all": ("window", "heads", "neurons", "drop_from"),
    "bidirectional_only": ("everywhere",),
}
"""Options that a variant of a set turns on."""


def options_of(settings: dict, variant: str, mode: str, heads: torch.Tensor) -> dict:
    """The part that a case `variant.mode` describes."""
    values = {
        "window": settings["window"], "heads": heads.long().tolist(), "neurons": 1 / settings["mlpcut"],
        "drop_from": settings["layercut"],
    }  # fmt: skip
    off = {"window": None, "heads": None, "neurons": 1.0, "drop_from": None}
    chosen = {**off, **{name: values[name] for name in PARTS[variant] if name in values}}
    if variant == "bidirectional_only":
        chosen["window"] = 2 * max(settings["gh"], settings["gw"]) + 1
    causal, renormalise = "causal" in mode, "renorm" in mode
    return {"part": "yopo", **chosen, "causal": causal, "renormalise": renormalise}


def prompt_of(numbers, settings: dict, tensors: dict) -> dict:
    parts = [tensors[f"input.{name}"] for name in ("ids_system", "visual", "ids_text")]
    return decoder.prompt(
        [tuple(part[number] for part in parts) for number in numbers], (settings["gh"], settings["gw"])
    )


def build(variant: str, mode: str):
    settings = GOLDEN.cases["settings"]
    return decoder.build(
        settings, [options_of(settings, variant, mode, GOLDEN["input.head_mask"])], GOLDEN.under("weight.")
    )


CASES = [case for case in GOLDEN.cases["cases"] if "greedy_8" in case]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_every_variant(case):
    settings, (_, variant, mode) = GOLDEN.cases["settings"], case["name"].split(".")
    model, wanted = build(variant, mode), f"output.{case['name']}.logits_text"
    batch = prompt_of([case["prompt"]], settings, GOLDEN.tensors)
    logits, lengths, _ = decoder.prefill(model, batch, len(GOLDEN[wanted]))
    GOLDEN.close(logits[0], wanted)
    tokens, steps = decoder.generate(model, batch, len(case["greedy_8"]))
    assert tokens == [case["greedy_8"]]
    if f"output.{case['name']}.logits_steps" in GOLDEN.tensors:
        GOLDEN.close(steps[0], f"output.{case['name']}.logits_steps")
    gone = "renorm" in mode and "drop_from" in PARTS[variant]
    short = settings["prompt_length"] - settings["gh"] * settings["gw"]
    cut = settings["layercut"] if gone else settings["layers"]
    assert lengths == [settings["prompt_length"]] * cut + [short] * (settings["layers"] - cut)


@pytest.mark.parametrize("mode", ["compat", "renorm"])
def test_every_row_of_a_batch_is_pruned_alike(mode):
    """The release masks heads of the first row alone while it decodes."""
    cases = {case["prompt"]: case for case in CASES if case["name"].endswith(f".all.{mode}")}
    batch = prompt_of(list(cases), GOLDEN.cases["settings"], GOLDEN.tensors)
    tokens, _ = decoder.generate(build("all", mode), batch, 8)
    assert tokens == [case["greedy_8"] for case in cases.values()]


def test_neighbours():
    settings = GOLDEN.cases["settings"]
    count = settings["gh"] * settings["gw"]
    cells = torch.stack([torch.arange(count) // settings["gw"], torch.arange(count) % settings["gw"]], dim=1)[None]
    near = near_cells(torch.zeros(1, count), cells, settings["window"])[0]
    assert torch.equal(near, GOLDEN["output.neighbour_allowed_compat"].bool())
    assert torch.equal(near.tril(), GOLDEN["output.neighbour_allowed_causal"].bool())


def test_the_rule_that_chooses_heads():
    case = next(case for case in GOLDEN.cases["cases"] if case["name"] == "head_rule")
    attention, size = GOLDEN["input.rule.attention"], GOLDEN["input.rule.attention"].shape[-1]
    places = torch.arange(size).expand(attention.shape[1], -1)
    visual = (places >= case["system"]) & (places < case["system"] + case["visual"])
    ratios = torch.stack([head_ratios(layer, visual, torch.ones_like(visual)) for layer in attention], dim=1)
    assert (ratios > case["threshold"]).sum(dim=0)[2:].tolist() == case["votes"][2:]
    assert vote_heads(ratios, case["threshold"]) == case["keep"]


# ---- a set at other sizes


@torch.no_grad()
def remake(folder: Path, seed: int) -> None:
    settings = {
        "hidden": 32, "layers": 5, "heads": 4, "kv": 2, "inter": 40, "vocab": 50, "sys": 3, "gh": 4, "gw": 6,
        "txt": 5, "theta": 8000.0, "eps": 1e-5, "window": 3, "layercut": 3, "mlpcut": 4, "prompt_length": 32,
        "seed": seed,
    }  # fmt: skip
    weights = decoder.released(decoder.build(settings, []))
    heads, count, cases = torch.randint(0, 2, (settings["layers"], settings["heads"])), 24, []
    tensors = {f"weight.{key}": value for key, value in weights.items()} | {"input.head_mask": heads.float()}
    for name, size in (("ids_system", settings["sys"]), ("ids_text", settings["txt"])):
        tensors[f"input.{name}"] = torch.randint(1, settings["vocab"], (2, size))
    tensors["input.visual"] = torch.randn(2, count, settings["hidden"])
    for number in range(2):
        for variant, mode in (("neighbour", "compat"), ("heads", "compat"), ("heads", "renorm"), ("ffn", "compat"),
                              ("all", "compat"), ("all", "renorm"), ("all", "causal_renorm")):  # fmt: skip
            model = decoder.build(settings, [options_of(settings, variant, mode, heads)], weights)
            batch, name = prompt_of([number], settings, tensors), f"{number}.{variant}.{mode}"
            tensors[f"output.{name}.logits_text"] = decoder.prefill(model, batch, settings["txt"])[0][0]
            tokens, steps = decoder.generate(model, batch, 8)
            tensors[f"output.{name}.logits_steps"] = steps[0]
            cases.append({"name": name, "prompt": number, "greedy_8": tokens[0]})
    cells = torch.stack([torch.arange(count) // settings["gw"], torch.arange(count) % settings["gw"]], dim=1)[None]
    near = near_cells(torch.zeros(1, count), cells, settings["window"])[0]
    tensors |= {"output.neighbour_allowed_compat": near.byte(), "output.neighbour_allowed_causal": near.tril().byte()}
    attention = torch.rand(3, 50, 2, 6, 6)
    visual = ((torch.arange(6) > 1) & (torch.arange(6) < 4)).expand(50, -1)
    ratios = torch.stack([head_ratios(layer, visual, torch.ones_like(visual)) for layer in attention], dim=1)
    threshold = float(ratios.median())
    tensors["input.rule.attention"] = attention
    cases.append({"name": "head_rule", "threshold": threshold, "system": 2, "visual": 2,
                  "votes": (ratios > threshold).sum(0).tolist(), "keep": vote_heads(ratios, threshold)})  # fmt: skip
    write_set(folder, {"seed": seed, "settings": settings, "cases": cases}, tensors)

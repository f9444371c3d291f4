"""M3ID: the rule on given scores, and greedy answers of a tiny LLaVA."""

import re
from pathlib import Path

import pytest
import torch

from hires_lmm.decoding import M3ID, raise_images

from . import llava
from .base import GoldenSet, write_set


NAME = "m3id"
GOLDEN = GoldenSet(NAME)
SETTINGS = GOLDEN.cases["settings"]
GIVEN = [case for case in GOLDEN.cases["cases"] if case["name"].startswith("given.")]
DECODED = [case for case in GOLDEN.cases["cases"] if "tokens_8" in case]


def options_of(case: dict) -> dict:
    """Options of the rule that a case describes; third parties' one has no indicator."""
    return {"alpha": case.get("alpha") or 1.0, "rate": case["lam"], "beta": case.get("beta")}


def apply_rule(tensors: dict, options: dict) -> torch.Tensor:
    """The rule on the given scores, step by step."""
    pairs = [tensors[f"input.given.logits_{kind}"].log_softmax(-1) for kind in ("conditioned", "unconditioned")]
    steps = [
        raise_images(own[None], other[None], step, **options)[0]
        for step, (own, other) in enumerate(zip(*pairs, strict=True), 1)
    ]
    return torch.stack(steps)


@pytest.fixture(scope="module")
def model():
    return llava.build(SETTINGS, GOLDEN.under("weight."))


@pytest.mark.parametrize("case", GIVEN, ids=lambda case: case["name"])
def test_the_rule_on_given_scores(case):
    combined = apply_rule(GOLDEN.tensors, options_of(case))
    wanted = GOLDEN[f"output.{case['name']}"]
    GOLDEN.close(combined.masked_fill(combined.isneginf(), -1e30), f"output.{case['name']}")
    assert combined.argmax(dim=-1).tolist() == case["tokens"]
    if "plausible" in case:
        assert combined.isfinite().sum(dim=-1).tolist() == case["plausible"]
    else:
        own = GOLDEN["input.given.logits_conditioned"].log_softmax(-1)
        changed = (combined != own).any(dim=-1)
        assert [step for step, each in enumerate(changed, 1) if each] == case["corrected_steps"]
    assert wanted.shape == combined.shape


def test_growth():
    """The weight of what the image adds, read off two tokens of even odds that it moves apart by one."""
    rates, steps = table_of(GOLDEN.cases)
    own, other = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -1.0]])
    for row, rate in enumerate(rates):
        for column, step in enumerate(steps):
            found = raise_images(own, other, step, alpha=2.0, rate=rate)[0, 1]
            torch.testing.assert_close(found, GOLDEN["output.factor"][row, column], rtol=1e-5, atol=1e-6)
    assert raise_images(own, other, max(steps), alpha=2.0, rate=max(rates), max_growth=1.5)[0, 1] == 1.5


def table_of(cases: dict) -> tuple[list[float], list[int]]:
    """Rates and steps of the table of growth, which its description names."""
    rates, _, steps = cases["tensors"]["output.factor"]["what"].rpartition("t =")
    return [float(each) for each in re.findall(r"\d+\.\d+", rates)], [int(each) for each in re.findall(r"\d+", steps)]


@pytest.mark.parametrize("case", DECODED, ids=lambda case: case["name"])
def test_greedy_answers(case, model):
    row, name = int(case["name"].split(".")[0]), f"output.{case['name']}"
    inputs, count = llava.inputs_of(model, GOLDEN.tensors, [row]), len(case["tokens_8"])
    processor, seen = M3ID(model, inputs, **options_of(case)), []
    rule = processor.combine
    processor.combine = lambda *scores: seen.append(scores) or rule(*scores)
    tokens, scores, logits = llava.generate(model, inputs, count, processor)
    assert tokens == [case["tokens_8"]]
    llava.same_scores(scores[0], GOLDEN[f"{name}.combined"], name)
    if f"{name}.logits" in GOLDEN.tensors:
        GOLDEN.close(logits[0], f"{name}.logits")
        negative = torch.cat([other for _, other, _ in seen])
        llava.same_scores(negative, GOLDEN[f"{name}.logits_unconditioned"], name)
    if case["rule"] == "paper":
        own, unsure = logits[0].log_softmax(-1), torch.tensor(case["corrected"])
        assert (own.exp().amax(-1) < case["alpha"]).tolist() == case["corrected"]
        assert torch.equal(((scores[0] - own).abs() > 1e-5).any(-1), unsure)


def test_both_prompts_in_a_batch(model):
    rows = sorted({int(case["name"].split(".")[0]) for case in DECODED})
    inputs = llava.inputs_of(model, GOLDEN.tensors, rows)
    for case in (case for case in DECODED if case["name"].startswith("0.")):
        others = [each for each in DECODED if each["name"].split(".", 1)[1] == case["name"].split(".", 1)[1]]
        tokens, _, _ = llava.generate(model, inputs, len(case["tokens_8"]), M3ID(model, inputs, **options_of(case)))
        assert tokens == [each["tokens_8"] for each in others]


# ---- a set at other sizes


def remake(folder: Path, seed: int) -> None:
    settings = {
        "vh": 16, "vl": 3, "vheads": 2, "vi": 24, "img": 28, "patch": 7, "h": 32, "l": 2, "heads": 4, "kv": 2,
        "inter": 40, "vocab": 45, "pre": 2, "txt": 6, "image_token": 1, "seed": seed,
    }  # fmt: skip
    model, cases, steps, rates = llava.build(settings), [], [1, 3, 20], [0.05, 0.3]
    tensors = {f"weight.{name}": value for name, value in llava.released(model).items()} | llava.drawn(settings, 2)
    kinds = ("conditioned", "unconditioned")
    tensors |= {f"input.given.logits_{kind}": 2 * torch.randn(9, 30) for kind in kinds}
    tensors["output.factor"] = torch.tensor([[rate * step for step in steps] for rate in rates]).expm1()
    what = f"lambda {', '.join(map(str, rates))} (rows) and t = {','.join(map(str, steps))}"
    own = tensors["input.given.logits_conditioned"].log_softmax(-1)
    rules = [{"rule": "paper", "lam": 0.1, "alpha": 0.5}, {"rule": "paper", "lam": 0.3, "alpha": 1.0},
             {"rule": "avisc", "lam": 0.1, "beta": 0.2}]  # fmt: skip
    for number, rule in enumerate(rules):
        combined, name = apply_rule(tensors, options_of(rule)), f"given.{number}"
        tensors[f"output.{name}"] = combined.masked_fill(combined.isneginf(), -1e30)
        case = {"name": name, **rule, "tokens": combined.argmax(-1).tolist()}
        unsure = own.exp().amax(-1) < rule.get("alpha", 1.0)
        extra = {"plausible": combined.isfinite().sum(-1).tolist()}
        if rule["rule"] == "paper":
            extra = {"corrected_steps": [step for step, each in enumerate(unsure, 1) if each]}
        cases.append({**case, **extra})
        for row in range(2):
            inputs = llava.inputs_of(model, tensors, [row])
            tokens, scores, logits = llava.generate(model, inputs, 8, M3ID(model, inputs, **options_of(rule)))
            corrected = (logits[0].softmax(-1).amax(-1) < rule.get("alpha", 1.0)).tolist()
            tensors[f"output.{row}.{number}.combined"] = scores[0].masked_fill(scores[0].isneginf(), -1e30)
            cases.append({"name": f"{row}.{number}", **rule, "tokens_8": tokens[0], "corrected": corrected})
    described = {"output.factor": {"what": what}}
    write_set(folder, {"seed": seed, "settings": settings, "cases": cases, "tensors": described}, tensors)

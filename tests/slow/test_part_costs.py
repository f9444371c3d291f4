"""Counted operations and bytes of every part at true sizes, against a committed budget: no clock is read."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from hires_lmm.modeling.parts_hires_lmm import SLOTS


ROOT = Path(__file__).parents[2]
BUDGET = ROOT / "tests" / "fixtures" / "part_costs.json"
SLACK = 1.02  # another version may write a small operation in another way
RENEW = "if that is wanted, renew the budget: python benchmarks/parts.py --write-budget"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def parts():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("parts")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def budget() -> dict:
    return json.loads(BUDGET.read_text())


def test_every_part_has_a_budget(parts, budget):
    assert {parts.label(*part) for part in parts.part_names()} == set(budget), RENEW
    called = {name for slot in parts.CALLED for name in SLOTS[slot]} - parts.OTHERWISE
    assert called == {name for _, name, _ in parts.part_names()}


def compare(parts, budget) -> tuple[dict, dict]:
    """What became dearer and what became cheaper, each with (found, budget)."""
    dearer, cheaper = {}, {}
    for part in parts.part_names():
        name, costs = parts.label(*part), parts.count_part(*part)
        for kind, value in costs.items():
            if value > budget[name][kind] * SLACK:
                dearer[f"{name} {kind}"] = (value, budget[name][kind])
            if value * SLACK < budget[name][kind]:
                cheaper[f"{name} {kind}"] = (value, budget[name][kind])
    return dearer, cheaper


def test_costs_stay_within_the_budget(parts, budget):
    dearer, cheaper = compare(parts, budget)
    assert not dearer, f"more work than before (found, budget): {dearer}; {RENEW}"
    assert not cheaper, f"less work than before, so the budget guards nothing (found, budget): {cheaper}; {RENEW}"


@pytest.mark.parametrize("name", ["query_compressor", "conv_merge", "sa_perceiver", "mixture", "router", "fusion"])
def test_a_part_that_does_more_is_named(parts, budget, monkeypatch, name):
    """The parts of SliME, VLSA and fusion in turn: one small product more in each, 3 % of its work."""
    slot, part, options = next(entry for entry in parts.part_names() if entry[1] == name)
    call, cost = parts.part_call, budget[parts.label(slot, part, options)]["operations"]
    extra = torch.zeros(max(cost * 3 // 100 // 2, 1), 1, device="meta")

    def slower(*args):
        run = call(*args)
        return lambda: (run(), extra.T @ extra)

    monkeypatch.setattr(parts, "part_names", lambda: [(slot, part, options)])
    assert compare(parts, budget) == ({}, {})
    monkeypatch.setattr(parts, "part_call", slower)
    dearer, cheaper = compare(parts, budget)
    assert f"{parts.label(slot, part, options)} operations" in dearer and not cheaper


def test_operations_are_those_of_the_formulas(parts):
    """Counted by hand for one image of 1 + 4 views: the counter and the sizes are what they are said to be."""
    patches, width, text_width, views = 576, 1024, 4096, 5
    mlp = 2 * views * patches * (width * text_width + text_width * text_width)
    assert parts.count_part("adapter", "mlp", {})["operations"] == mlp
    queries, crops = 144, 4
    projections = 2 * width * width * (queries + 2 * crops * patches + crops * queries)
    attention = 2 * 2 * crops * queries * patches * width
    found = parts.count_part("view_ops", "query_compressor", {"num_queries": queries})["operations"]
    resizing = 2 * 24 * 12 * width * (12 + 24)  # of 12 x 12 positions to the 24 x 24 patches, line by line
    assert found == projections + attention + resizing

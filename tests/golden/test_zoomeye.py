"""ZoomEye: trees, weights, thresholds, every question of scripted searches in order, and the pictures of boxes."""

import ast
import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hires_lmm.search import Prompt, ZoomEye, ZoomPrompts, read_cues
from hires_lmm.search.oracle import confidence_of
from hires_lmm.search.tree import Node, Showing, merge

from .base import GoldenSet, write_set


NAME = "zoomeye"
GOLDEN = GoldenSet(NAME)
KINDS = {"existence": 1, "latent": 2, "answering": 3}


def cases(kind: str) -> list:
    return [pytest.param(case, id=case["name"]) for case in GOLDEN.cases["cases"] if case["name"].startswith(kind)]


# ---- the tree


def tree_of(case: dict) -> dict:
    levels = [[Node((0, 0, case["width"], case["height"]), case["side"])]]
    while below := [child for node in levels[-1] for child in node.children]:
        levels.append(below)
    boxes = [[list(node.box) for node in level] for level in levels]
    leaves = [node for level in levels for node in level if not node.children]
    return {
        "depth": levels[0][0].levels(99),
        "count_per_level": [len(level) for level in levels],
        "sum_of_boxes_per_level": [np.sum(level, axis=0).tolist() for level in boxes],
        "leaves": len(leaves),
        "boxes_per_level": boxes,
        "first_and_last_3_per_level": [[level[:3], level[-3:]] for level in boxes],
        "leaf_depths": sorted({node.depth for node in leaves}),
    }


@pytest.mark.parametrize("case", cases("tree"))
def test_trees(case):
    found = tree_of(case)
    assert {name: found[name] for name in case if name in found} == {n: case[n] for n in case if n in found}


# ---- numbers


def weights_of(case: dict) -> list[float]:
    policy, deepest = ZoomEye(bias=case["bias"]), case["max_depth"]
    return [policy.priority(1.0, 0.0, depth, deepest) for depth in range(deepest + 1)]


@pytest.mark.parametrize("case", cases("weights"))
def test_weights(case):
    assert weights_of(case) == case["weight_per_depth"]


def trace_of(threshold: float, floor: float, decreases: tuple) -> list[float]:
    trace = []
    for value in ZoomEye(threshold=threshold, floor=floor, decreases=decreases).thresholds():
        trace.append(value)
        if value < floor:
            return trace
    raise AssertionError


@pytest.mark.parametrize("case", cases("threshold"))
def test_thresholds_fall_without_rounding(case):
    for settings, trace in case["traces"].items():
        assert trace_of(*ast.literal_eval(settings)) == trace


def test_confidences():
    found = [confidence_of(row, [0], [1]) for row in GOLDEN["input.yes_no_logits"]]
    GOLDEN.close(torch.tensor(found), "output.confidence", atol=1e-6)


@pytest.mark.parametrize("case", cases("cue_text"))
def test_cues_of_a_text(case):
    assert read_cues(case["text"]) == case["cues"]


# ---- pictures


def ramps(width: int, height: int) -> Image.Image:
    pixels = np.full((height, width, 3), 64, dtype=np.uint8)
    pixels[..., 0] = 255 * np.arange(width) // (width - 1)
    pixels[..., 1] = (255 * np.arange(height) // (height - 1))[:, None]
    return Image.fromarray(pixels)


def pictures_of(width: int, height: int, side: int, scale: float | None, crop_only: bool, boxes: list) -> dict:
    showing, size = Showing(side, scale or 1.0, crop_only), (width, height)
    boxes = [tuple(box) for box in boxes]
    views = showing.views(ramps(width, height), boxes)
    found = {"view_sizes": [list(view.size) for view in views]}
    found["view_means"] = [np.asarray(view).mean(axis=(0, 1)).round(3).tolist() for view in views]
    if boxes and (0, 0, width, height) not in boxes:
        patches = showing.patches(boxes, size)
        frames = showing.rectangles(merge(patches), size)
        corners = np.array(frames)
        zoom = [*corners[:, :2].min(axis=0).tolist(), *corners[:, 2:].max(axis=0).tolist()]
        square = max(size)
        found |= {"patch_boxes": [*map(list, patches)], "merged_boxes": [*map(list, merge(patches))]}
        found |= {"square_side": square, "square_offset": [(square - width) // 2, (square - height) // 2]}
        found |= {"zoom_box_in_square": zoom, "side_by_side": crop_only and found["view_sizes"] == [[2 * side] * 2]}
        found |= {} if crop_only else {"rectangle_boxes": [*map(list, frames)], "thickness": square // 120}
    return found


def same_pictures(found: dict, wanted: dict) -> None:
    np.testing.assert_allclose(found.pop("view_means"), wanted["view_means"], atol=2e-3)
    assert found == {name: wanted[name] for name in found}
    assert found.keys() >= {name for name in wanted if name.endswith(("boxes", "sizes", "square", "side"))}


@pytest.mark.parametrize("case", cases("views"))
def test_what_is_shown_of_boxes(case):
    names = ("width", "height", "side", "patch_scale", "crop_only", "boxes")
    wanted = {name: value for name, value in case.items() if name not in (*names, "name")}
    same_pictures(pictures_of(*(case[name] for name in names)), wanted)


# ---- searches


class Scripted:
    """Answers by the rule of the set, from box, kind and number of the cue."""

    def __init__(self, scenario: dict, template: str):
        self.scenario, self.side, self.asked = scenario, scenario["patch"], Counter()
        self.numbers = {}
        for number, cue in enumerate(scenario["cues"]):
            single = cue.removeprefix("all ").removesuffix("s") if cue.startswith("all ") else cue
            self.numbers |= {cue: number, single: number, template.format(cue): number}

    def confidences(self, asks):
        return [self.value(ask) for ask in asks]

    def value(self, ask) -> float:
        (left, top, width, height), own = ask.box, self.scenario
        self.asked[ask.kind, ask.subject, ask.box] += 1
        code = 73 * left + 151 * top + 199 * width + 283 * height + 911 * KINDS[ask.kind] + own["salt"]
        value = 2 * ((code + 613 * self.numbers.get(ask.subject, 0)) % 2003) / 2002 - 1
        if ask.kind == "answering":
            value = own["scale"] * value + own["shift"]
        return round(max(-1.0, min(1.0, value)), 6)

    def answer(self, images, turns, **options):
        self.views = images
        return "an answer"


def search_of(own: dict, settings: dict) -> dict:
    """What the set says of a search; `walks` are the questions that follow those at the root."""
    words = {"template": settings["template"]}
    policy = ZoomEye(
        ZoomPrompts(Prompt("{}"), Prompt("{}"), Prompt("{}"), **words), own["cues"], own["local"], own["bias"],
        own["upper"], own["lower"], tuple(own["decrease"]), own["cue_thr"], settings["depth_limit"],
        settings["all_depth_limit"], int(settings["pop_limit"].split("*")[0]), settings["pop_interval"],
        own["patch_scale"], own.get("split", 4),
    )  # fmt: skip
    oracle = Scripted(own, settings["template"])
    result = policy.run([ramps(own["W"], own["H"])], own["question"], oracle)
    assert result.answer == "an answer"
    assert set(oracle.asked.values()) <= {1}, "asked once of a node"
    pictures = pictures_of(own["W"], own["H"], own["patch"], own["patch_scale"], own["local"], result.boxes)
    assert [list(view.size) for view in oracle.views] == pictures["view_sizes"]
    log = [[s.kind, s.asked, list(s.box), s.depth, s.confidence] for s in result.steps if s.kind != "root"]
    return {
        "root_filter": [[step.asked, step.confidence] for step in result.steps if step.kind == "root"],
        "log": log,
        "searched_bbox": [list(box) for box in result.boxes],
        "views": pictures,
    }


def zooms(log: list, force_no_root: bool) -> dict:
    """Visits of a walk, and how many went down and up."""
    depths = [0] * force_no_root + [depth for kind, _, _, depth, _ in log if kind == "answering"]
    pairs = list(itertools.pairwise(depths))
    return {
        "num_pop": len(depths),
        "num_zoom_in": sum(one < two for one, two in pairs),
        "num_zoom_out": sum(one > two for one, two in pairs),
    }


@pytest.mark.parametrize("case", cases("search"))
def test_every_question_of_a_search_in_order(case):
    found = search_of(case["scenario"], GOLDEN.cases["settings"])
    walks = case["searches"]
    assert found["root_filter"] == case["root_filter"]
    assert found["log"] == [entry for walk in walks for entry in walk["log"]]
    assert found["searched_bbox"] == case["searched_bbox"] == [box for walk in walks for box in walk["candidates"]]
    same_pictures(found["views"], case["views"])
    for walk in walks:
        if walk["kind"] == "specific":
            counted = zooms(walk["log"], walk["force_no_root"])
            assert counted == {name: walk[name] for name in counted}


# ---- a set with other sizes


def remake(folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    settings = {**GOLDEN.cases["settings"], "all_depth_limit": 1, "pop_interval": 3, "template": "Where is {}?"}
    made = []
    for number in range(4):
        case = {"width": draw.randint(50, 3000), "height": draw.randint(50, 3000), "side": draw.randint(200, 500)}
        made.append({"name": f"tree_{number}", **case, **tree_of(case)})
        case |= {"patch_scale": draw.choice([1.0, 1.4]), "crop_only": bool(number % 2)}
        sides = (case["width"] // 3, case["height"] // 3)
        case["boxes"] = [[x * sides[0], y * sides[1], *sides] for x, y in draw.sample([(0, 0), (1, 0), (2, 2)], 2)]
        made.append({"name": f"views_{number}", **case, **pictures_of(*case.values())})
        weights = {"bias": draw.random(), "max_depth": draw.randint(1, 6)}
        made.append({"name": f"weights_{number}", **weights, "weight_per_depth": weights_of(weights)})
    traces = {str(setting): trace_of(*setting) for setting in [(0.7, -0.1, (0.3,)), (0.5, 0.1, (0.1, 0.2))]}
    made.append({"name": "threshold_traces", "traces": traces})
    cues = ["a cat", "the sandy hat", "2 dogs"]
    made.append({"name": "cue_text", "text": "Here: a cat, the sandy hat and 2 dogs.", "cues": cues})
    for number, cues in enumerate((["a red cup"], ["hat", "pen"], ["all owls"], ["all owls", "hat"], ["my hat"], [])):
        own = {
            "W": draw.randint(900, 2500), "H": draw.randint(900, 2500), "patch": draw.randint(200, 500), "bias": 0.4,
            "patch_scale": 1.3, "upper": 0.5, "lower": -0.1, "decrease": [0.1, 0.2], "cue_thr": 0.7, "scale": 0.6,
            "shift": 0.0, "salt": draw.randint(0, 999), "cues": cues, "question": "What is it?",
            "local": number % 3 == 2, "split": draw.choice([4, 9]),
        }  # fmt: skip
        found = search_of(own, settings)
        # walks in one: what a set counts of each is not remade
        walk = {"kind": "walks", "log": found["log"], "candidates": found["searched_bbox"]}
        case = {"name": f"search_{number}", "scenario": own, "root_filter": found["root_filter"], "searches": [walk]}
        made.append({**case, "searched_bbox": found["searched_bbox"], "views": found["views"]})
    logits = torch.randn(5, 2)
    confidence = torch.tensor([confidence_of(row, [0], [1]) for row in logits])
    tensors = {"input.yes_no_logits": logits, "output.confidence": confidence}
    write_set(folder, {"settings": settings, "cases": made}, tensors)

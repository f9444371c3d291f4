"""What the numbers of the benchmarks mean: operations, bytes, memory, floors, and the same work on both sides."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from builders.tiny import random_image


pytest.importorskip("matplotlib")
pytest.importorskip("psutil")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def load():
    """Import a module of the folder."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def measure(load):
    return load("measure")


@pytest.mark.slow
def test_true_sizes_cost_what_was_counted(load):
    """CLIP ViT-L/14-336 and Llama-3-8B at 2048 x 2048, on `meta`: nothing is computed."""
    cases, shapes, measure = load("cases"), load("shapes"), load("measure")
    shared = cases.Shared(shapes.SHAPES["cuda"], "meta")
    assert round(cases.num_parameters(shared.body) / 1e9, 2) == 7.50
    image = random_image(2048, 2048)
    work = {}
    for name in ("llava_next", "slime, 4 crops", "slime, 4 crops, 144 local"):
        case = cases.ours(name, shared).take([image])
        work[name] = measure.count_work(case.prefill)[0]
        assert round(cases.num_parameters(case.tower) / 1e6) == 304
    assert work["slime, 4 crops"] / work["llava_next"] == pytest.approx(0.40, abs=0.02)
    assert work["slime, 4 crops, 144 local"] / work["llava_next"] == pytest.approx(0.27, abs=0.02)


@pytest.mark.parametrize("name, alone", [("slime, 4 crops", 2), ("fusion", 3)])
def test_the_floor_runs_what_the_model_runs(load, name, alone):
    """Whole models alone see the inputs that they have in the prefill and give the same logits."""
    cases, shapes, prefill = load("cases"), load("shapes"), load("prefill")
    torch.manual_seed(0)
    shared = cases.Shared(shapes.SHAPES["tiny"], "cpu")
    case = cases.ours(name, shared).take([prefill.picture(336, 400)])
    survey, measure = case.survey(), load("measure")
    parts = survey.alone()
    torch.testing.assert_close(parts["language_model"](), case.prefill().logits)
    assert parts["tower"]().last_hidden_state.shape[0] == len(case.inputs["pixel_values"])
    assert survey.operations == measure.count_work(case.prefill)[0]
    apart = [measure.count_work(part)[0] for part in parts.values()]
    assert len(apart) == alone
    assert survey.between == survey.operations - sum(apart) > 0 and min(apart) > 0
    again = case.survey()  # no hook of the first one is left
    assert again.between == survey.between


def test_ours_and_the_peer_do_the_same_work_on_equal_views(load):
    cases, shapes, measure = load("cases"), load("shapes"), load("measure")
    shared = cases.Shared(shapes.SHAPES["tiny"], "cpu")
    image = random_image(300, 500)
    mine = cases.ours("llava_next", shared).take([image])
    theirs = cases.PEERS["llava_next"](shared).take([image])
    assert mine.tokens == theirs.tokens
    ours, peers = (measure.count_work(case.prefill)[0] for case in (mine, theirs))
    mine.model.model.vision_tower.config.output_hidden_states = True
    assert measure.count_work(mine.prefill)[0] == peers  # with the layer of the tower that nobody reads
    assert 0 < peers - ours < peers / 3


@torch.no_grad()
def test_an_exit_is_measured_and_its_cache_counted(load):
    """At a size at which times say nothing."""
    module, shapes = load("layer_ops"), load("shapes").SHAPES["tiny"]
    rows = module.measure("cpu", shapes, [1], 1, visual=40)
    assert [row["layers"] for row in rows] == [2, 1] and all(row["bytes_as_counted"] for row in rows)
    assert rows[1]["cache_mib"] / rows[0]["cache_mib"] == pytest.approx((104 + 64) / 208)
    assert rows[1]["most"] == pytest.approx((1 + 64 / 104) / 2 + 0.03)


@torch.no_grad()
def test_operations_by_formula_are_those_that_are_counted(load):
    """Of the layers of the language model, which the frontier lowers."""
    frontier, shapes = load("frontier"), load("shapes")
    counted = frontier.count(("llava_next",), "tiny", 400)["llava_next"]
    cases = load("cases")
    case = cases.ours("llava_next", cases.Shared(shapes.SHAPES["tiny"], "cpu")).take([random_image(400, 400)])
    layers = load("measure").count_work(case.survey().alone()["language_model"])[0]
    config = shapes.SHAPES["tiny"].llama()
    head = 2 * config.hidden_size * config.vocab_size
    assert counted["tokens"] == sum(case.tokens) and counted["layers"] == pytest.approx(layers - head, rel=0.01)


def test_the_frontier_takes_the_cheapest_row_that_keeps_its_accuracy(load):
    frontier, shapes = load("frontier"), load("shapes").SHAPES["tiny"]
    full = {"total": 10.0e9, "layers": load("needle_exits").operations(shapes.llama(), [100, 100], 32), "tokens": 100}

    def row(method: str, visual: list[float], *right: float) -> dict:
        return {
            "method": method,
            "visual": visual,
            "scores": {"all": {"accuracy": right[0]}, "fine": {"accuracy": right[1]}},
        }

    measured = [row("all", [8, 8], 0.8, 0.5), row("a", [8, 4], 0.79, 0.5), row("b", [8, 2], 0.79, 0.5)]
    rows = frontier.frontier([*measured, row("c", [8, 0], 0.8, 0.4)], dict.fromkeys(frontier.MODELS, full), "tiny")
    assert [each["method"] for each in rows] == ["c", "b", "a", "all"] and rows[-1]["ratio"] == 1
    assert [each["method"] for each in rows if each["is_best"]] == ["b"]
    assert frontier.stretch([8, 4, 2, 1], 8, 16) == [16, 16, 8, 8, 4, 4, 2, 2]


@torch.no_grad()
def test_a_pair_makes_its_tokens_in_turn(load):
    decode, prefill = load("decode"), load("prefill")
    cases = [case.take([random_image(300, 300)]) for case in prefill.build_cases("cpu", "tiny", ["llava_next"])]
    row = decode.measure_pair(cases * 2, 6, 2)
    assert row["pairs"] == 2 * (6 - 2) and row["quarters"][0] <= row["ratio"] <= row["quarters"][1]


def test_threads_and_sources_are_measured_on_equal_views(load):
    preprocess = load("preprocess")
    made = {}
    for source in preprocess.SOURCES:
        given = preprocess.make_source(random_image(90, 120), source)
        made[source] = preprocess.processors(source)[preprocess.OURS](given)["pixel_values"]
    assert torch.equal(made["decoded"], made["array"]) and torch.equal(made["decoded"], made["png"])
    assert made["jpeg"].shape == made["jpeg, scaled"].shape
    one, two = (call()["pixel_values"] for call in preprocess.many_calls(2, "decoded").values())
    assert torch.equal(one, two)


def test_a_video_is_the_same_work_for_the_language_model_as_in_the_peer(load):
    """Where every frame is pooled alone; our tower stops behind the layer that is read, the peer's does not."""
    pytest.importorskip("av")
    video, cases, shapes, measure = load("video"), load("cases"), load("shapes"), load("measure")
    shared = cases.Shared(shapes.SHAPES["tiny"], "cpu")
    frames = [random_image(120, 160, seed) for seed in range(3)]
    preset, changes = video.presets(3)["pllava, every frame"]
    mine, _ = video.ours(preset, changes, shared)
    mine = mine.take([frames])
    theirs = video.peer(shared, mine.inputs["pixel_values"])
    assert mine.tokens == theirs.tokens == [3 * 144]
    work = [
        {name: measure.count_work(call)[0] for name, call in case.survey().alone().items()} for case in (mine, theirs)
    ]
    assert work[0]["language_model"] == work[1]["language_model"] > 0
    assert 0 < work[0]["tower"] < work[1]["tower"]


def test_shares_of_a_video_add_up_and_memory_follows_the_chunk(load, tmp_path):
    pytest.importorskip("av")
    import argparse

    video = load("video")
    video.write_video(tmp_path / "clip.mp4", 8, 120, 160)
    arguments = argparse.Namespace(shapes="tiny", device="cpu", frames=8, repeats=1, models=["pllava, every frame"])
    rows, memory = video.measure(arguments, tmp_path / "clip.mp4")
    assert [row["model"] for row in rows] == ["pllava, every frame", video.PEER]
    for row in rows[:-1]:
        assert sum(row[f"share_{stage}"] for stage in video.STAGES) == pytest.approx(100)
        assert row["share_decode"] > 0 and row["share_views"] > 0
    peaks = [row["peak_mib"] for row in memory[:-1]]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < 0.6 * peaks[0]

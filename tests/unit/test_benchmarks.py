"""The measuring of the benchmarks: medians, floors, counts, tables; and that every model can be built at true size."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from builders import random_image


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


def test_cases_run_in_turn_and_the_warm_up_does_not_count(measure):
    order = []
    cases = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = measure.interleave(cases, repeats=2, warmup=1)
    assert order == list("abc" + "cba" + "abc")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_slow_case_takes_longer(measure):
    seconds = measure.interleave({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, 3)
    assert measure.median(seconds["slow"]) >= 0.02 and measure.median(seconds["fast"]) < 0.01


def test_short_cases_get_more_rounds_up_to_a_limit(measure):
    assert len(measure.interleave({"a": lambda: time.sleep(0.01)}, 2, 0, least_seconds=0.045)["a"]) in (4, 5)
    assert len(measure.interleave({"a": lambda: None}, 3, 1, least_seconds=9.0)["a"]) == measure.MOST_ROUNDS
    assert len(measure.interleave({"a": lambda: time.sleep(0.01)}, 3, 0, least_seconds=0.001)["a"]) == 3


def test_a_busy_round_cancels_in_a_ratio_of_rounds(measure):
    """Medians of each alone are 20 and 12, which would give 1.67."""
    assert measure.median_ratio([10.0, 100.0, 20.0], [5.0, 50.0, 12.0]) == 2.0


@pytest.mark.parametrize("values, expected", [([3.0, 1.0, 2.0], 2.0), ([4.0, 1.0], 2.5), ([7.0], 7.0)])
def test_median(measure, values, expected):
    assert measure.median(values) == expected


def test_the_floor_is_the_sum_of_what_cannot_be_avoided(measure):
    assert measure.floor_seconds([0.5, 2.0], 3e9, 1e9) == pytest.approx(5.5)
    assert measure.floor_seconds([1.0], 0, 1e12) == 1.0


def test_operations_and_bytes_of_a_product(measure):
    a, b = torch.zeros(3, 5, device="meta"), torch.zeros(5, 7, device="meta")
    operations, moved = measure.count_work(lambda: a @ b)
    assert operations == 2 * 3 * 5 * 7 and moved == 4 * (3 * 5 + 5 * 7 + 3 * 7)
    assert measure.count_work(lambda: a.view(15).view(5, 3).t()) == (0, 0)


def test_attention_of_the_cpu_is_counted(measure):
    query, key = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        found = measure.count_work(lambda: attend(query, key, key, enable_gqa=True))[0]
    assert found == 2 * 2 * (2 * 4 * 5 * 7 * 8)


def test_peak_memory_is_that_of_the_tensors_held_at_once(measure):
    def call():
        first = torch.zeros(3 * 2**20, dtype=torch.uint8)
        second = torch.zeros(5 * 2**20, dtype=torch.uint8)
        del first, second
        torch.zeros(4 * 2**20, dtype=torch.uint8)

    kept = torch.zeros(2**20, dtype=torch.uint8)
    assert measure.peak_memory(call) == pytest.approx(8 * 2**20, abs=4096)
    assert measure.peak_memory(lambda: kept.add_(1)) < 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux keeps the peak of a process")
def test_resident_memory_of_a_call_is_seen_though_it_was_given_back(measure):
    def call():
        block = bytearray(200 * 2**20)
        block[::4096] = b"x" * len(block[::4096])

    assert 180 * 2**20 < measure.peak_resident(call) < 300 * 2**20
    assert measure.peak_resident(lambda: None) < 20 * 2**20


@pytest.mark.slow
def test_the_peak_of_a_program_is_not_that_of_the_one_that_started_it(measure, tmp_path):
    script = tmp_path / "child.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\nfrom measure import own_peak\nprint(own_peak())\n"
    )
    small = measure.in_subprocess(str(script), {})
    block = bytearray(400 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert measure.in_subprocess(str(script), {}) < small + 100 * 2**20 < measure.own_peak()
    assert block[0] == ord("x")


@pytest.mark.parametrize(
    "value, text", [(None, "-"), (0.12345, "0.123"), (1234.5, "1,234"), (12, "12"), (25600, "25,600"), ("x", "x")]
)
def test_cells(measure, value, text):
    assert measure.show(value) == text


def test_results_say_where_they_come_from(load, tmp_path, monkeypatch):
    record = load("record")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    written = json.loads(record.write_result("name", [{"value": 1}], [0]).read_text())
    assert written["rows"] == [{"value": 1}] and written["seeds"] == [0]
    assert {"device", "versions", "commit", "date", "command", "threads"} <= set(written)


def test_rows_are_padded_on_the_left(load):
    shapes = load("shapes")
    rows = shapes.rows_of_ids([2, 5], "cpu")
    ids, mask = rows["input_ids"], rows["attention_mask"]
    assert ids.shape == (2, 5 + shapes.TEXT_LENGTH)
    assert (ids == shapes.IMAGE_TOKEN).sum(1).tolist() == [2, 5]
    assert mask.sum(1).tolist() == [2 + shapes.TEXT_LENGTH, 5 + shapes.TEXT_LENGTH] and mask[0, :3].tolist() == [0] * 3


@pytest.mark.slow
def test_true_sizes_are_those_of_the_issue_and_cost_what_was_counted(load):
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


@pytest.mark.slow
def test_every_model_is_built_at_true_size_on_meta(load):
    cases, shapes = load("cases"), load("shapes")
    shared = cases.Shared(shapes.SHAPES["cuda"], "meta")
    built = [cases.ours(name, shared) for name in cases.ours_known()]
    built += [build(shared) for build in cases.PEERS.values()]
    for case in built:
        assert cases.num_parameters(case.language_model) == pytest.approx(7.5e9, rel=0.01), case.name
        assert 3e8 < cases.num_parameters(case.tower) < 6e8, case.name


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


def test_every_row_has_its_floor_and_dear_models_run_once(load, monkeypatch):
    shapes, prefill = load("shapes"), load("prefill")
    monkeypatch.setitem(shapes.IMAGE_SIZES, "wide", [(40, 60), (30, 30), (30, 30)])
    monkeypatch.setitem(prefill.DEAR, "monkey", "elsewhere")
    cases = prefill.build_cases("cpu", "tiny", ["slime, 4 crops", "monkey", prefill.BASELINE])
    rows = prefill.measure_batch(cases, "wide", 1, 1e12, "cpu")
    assert [row["model"] for row in rows] == ["slime, 4 crops", prefill.BASELINE]
    for row in rows:
        assert row["floor_ms"] >= row["tower_ms"] + row["language_model_ms"] > 0
        assert row["overhead"] == pytest.approx(row["milliseconds"] / row["floor_ms"])
        assert row["peak_mib"] > 0 and row["rounds"] == 1
    assert rows[1]["ratio"] == 1.0 and rows[0]["tokens"] == 2 * 720  # the first two rows of the batch


def test_counted_ratios_are_against_the_first_model(load):
    prefill = load("prefill")
    rows = prefill.count_batch(prefill.build_cases("meta", "tiny", ["llava_next", "slime, 4 crops"]), "336x336")
    assert [row["tokens"] for row in rows] == [1176, 720] and rows[0]["ratio"] == 1.0
    assert rows[1]["ratio"] == pytest.approx(rows[1]["tera_operations"] / rows[0]["tera_operations"])
    assert 0.4 < rows[1]["ratio"] < 0.8


def test_ours_and_the_peer_do_the_same_work_on_equal_views(load):
    cases, shapes, measure = load("cases"), load("shapes"), load("measure")
    shared = cases.Shared(shapes.SHAPES["tiny"], "cpu")
    image = random_image(300, 500)
    mine = cases.ours("llava_next", shared).take([image])
    theirs = cases.PEERS["llava_next"](shared).take([image])
    assert mine.tokens == theirs.tokens
    assert measure.count_work(mine.prefill)[0] == measure.count_work(theirs.prefill)[0]

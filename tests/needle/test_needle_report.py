"""Tables of docs/evidence.md from results, on made-up numbers."""

import json
import shutil
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import needle_report  # noqa: E402


def result(name: str, seed: int, fine: int, views: str | None = None, share: float = 1.0) -> dict:
    """What benchmarks/needle_evidence.py writes for one run, 100 questions a group."""
    entry = {"questions": 100, "right": fine, "accuracy": fine / 100}
    scores = dict.fromkeys(("fine", "fine_whole", "fine_cut", "scene", "all", "shape"), entry)
    stages = [{"name": "a", "visits": 10, "processor": 60.0}, {"name": "b", "visits": 30, "processor": 120.0}]
    run = {"text": f"run {name}", "views": views}
    return {
        "name": name, "seed": seed, "run": run, "share": share, "scenes": 5, "split": "validation",
        "stages": stages,
        "scores": {views or "all": scores},
    }  # fmt: skip


def write(folder: Path, *results: dict) -> None:
    """Results as files."""
    for entry in results:
        (folder / f"{entry['name']}-{entry['seed']}-validation.json").write_text(json.dumps(entry))


def test_intervals_are_t_over_seeds_and_wilson_for_one(tmp_path):
    write(tmp_path, result("alternating", 0, 80), result("alternating", 1, 90), result("end_to_end", 0, 50))
    results = needle_report.read_results(tmp_path, "validation")
    table = needle_report.run_table(results, ("alternating", "end_to_end", "absent"))
    assert "| % of 5 validation scenes | fine questions |" in table
    assert f"| run alternating |{' 85.0 ± 63.5 |' * 5} 2 | 10 | 30 | 3 |" in table  # 12.706 · 0.0707 / √2
    assert f"| run end_to_end |{' 50.0 (40.4–59.6) |' * 5} 1 | 10 | 30 | 3 |" in table
    assert needle_report.run_table(results, ("absent",)) == needle_report.NOT_RUN


def test_the_page_has_a_place_for_every_table(tmp_path):
    (tmp_path / "docs" / "images").mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "evidence.md", tmp_path / "docs")
    results = tmp_path / "results"
    (results / "sweeps").mkdir(parents=True)
    write(results, result("alternating", 0, 80), result("global", 0, 30, views="global"))
    score = {"accuracy": 0.5, "wilson": [0.4, 0.6], "bootstrap": [0.35, 0.55], "chance": 0.1}
    settings = [
        {"setting": {"gamma": gamma}, "tokens": tokens, "scores": {"fine": score, "scene": score}}
        for gamma, tokens in ((0.5, 100.0), (1.0, 200.0))
    ]
    (results / "sweeps" / "gamma-free-validation.json").write_text(json.dumps({"settings": settings}))
    needle_report.write_evidence(results, tmp_path / "docs", "validation")
    page = (tmp_path / "docs" / "evidence.md").read_text()
    assert "| `0.5` | 100 | 50.0 (35.0–60.0) | 50.0 (35.0–60.0) |" in page
    assert "run alternating" in page and "run global" in page
    assert {file.name for file in (tmp_path / "docs" / "images").iterdir()} == {"needle_runs.png", "needle_sweeps.png"}
    with pytest.raises(ValueError, match="no lines"):
        needle_report.put("a page without markers", "plans", "table")

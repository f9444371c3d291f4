"""Each example runs as a user would run it, on random or shipped weights; the image is what its script draws."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builders.docs import ROOT


EXAMPLES = ROOT / "examples"
LONGER = {"make_images": 200, "bilinear_alternation": 200, "train": 200}  # a drawing, a proof, every kind of plan
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from hires_lmm.conversion import compose_random

    return str(compose_random(tmp_path_factory.mktemp("examples")))


def run(name: str, *arguments: str, monkeypatch, capsys) -> str:
    """Standard output of one example, run in this process with the working folder of the test."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_one_file_with_their_dependencies(name: str):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert re.match(r'# /// script\n(# requires-python = .+\n)?# dependencies = \[.+\]\n# ///\n"""', text)
    assert len(text.splitlines()) <= LONGER.get(name, 150)


def test_quickstart_gives_the_right_answer(monkeypatch, capsys):
    assert run("quickstart", monkeypatch=monkeypatch, capsys=capsys) == "3\n"


def test_quickstart_takes_another_checkpoint(checkpoint, monkeypatch, capsys):
    image = str(EXAMPLES / "images" / "needle_2.jpg")
    assert run("quickstart", checkpoint, image, "Which?", monkeypatch=monkeypatch, capsys=capsys).strip() != "3"


def test_batch_mixed_sizes_counts_rows_and_images(checkpoint, monkeypatch, capsys):
    text = run("batch_mixed_sizes", checkpoint, monkeypatch=monkeypatch, capsys=capsys)
    assert "4 rows, 4 images, 23 views" in text
    assert [line.partition(":")[0] for line in text.splitlines()[-4:]] == ["row 0", "row 1", "row 2", "row 3"]


def test_token_budget_is_exact_and_refuses_what_is_too_small(checkpoint, monkeypatch, capsys):
    text = run("token_budget", checkpoint, monkeypatch=monkeypatch, capsys=capsys)
    assert [int(found) for found in re.findall(r"^budget (\d+): \1 tokens", text, re.MULTILINE)] == [1440, 1080, 720]
    assert "the smallest value for this image is 577" in text
    moved = [float(found) for found in re.findall(r"moved by ([\d.]+)", text)]
    assert moved[0] == 0 and max(moved) > 0


def test_show_kept_tokens_draws_two_different_pictures(tmp_path, monkeypatch, capsys):
    text = run("show_kept_tokens", str(tmp_path), monkeypatch=monkeypatch, capsys=capsys)
    assert "kept_0.png: 167 of 208 visual tokens kept for 'Which digit is blue?'" in text
    first, second = (np.asarray(Image.open(tmp_path / f"kept_{index}.png")) for index in (0, 1))
    assert first.shape != second.shape or (first != second).any()
    assert "kept for both" in text


def test_fusion_reads_only_what_a_turn_adds(monkeypatch, capsys):
    text = run("fusion_turns", monkeypatch=monkeypatch, capsys=capsys)
    assert "n = 1: 1 tokens for the image, 1 for the second question" in text
    assert "n = 256: 256 tokens for the image, 8 for the second question" in text
    read = [int(number) for number in re.findall(r"turn \d: the fusion transformer read (\d+) positions", text)]
    # 5 views of 144 tokens and a mark, the question, 64 queries; later questions are bytes, with 8 queries
    assert read[0] == 5 * 145 + len("\nWhich ferry is cancelled?") + 64 + 2
    assert read[1:] == [len("When does the next one leave?") + 8 + 2, len("From which pier?") + 8 + 2]


def test_vlsa_has_576_tokens_for_every_size(monkeypatch, capsys):
    text = run("vlsa_tokens", monkeypatch=monkeypatch, capsys=capsys)
    assert re.findall(r"pixels: (\d+) crops, (\d+) tokens", text) == [
        ("0", "576"),
        ("0", "576"),
        ("24", "576"),
        ("35", "576"),
        ("36", "576"),
    ]
    moved = [float(found) for found in re.findall(r"576 tokens, cosine to those of one crop ([\d.]+)", text)]
    assert moved[0] == 1 and len(moved) == 3 and max(moved[1:]) < 1
    assert "answer: " in text


def test_vlsa_cognition_asks_trains_and_scores(monkeypatch, capsys):
    text = run("vlsa_cognition", monkeypatch=monkeypatch, capsys=capsys)
    assert text.count("assistant: ") in (2, 3) and re.search(r"assistant: \d+,\d+,\d+ \d+,\d+,\d+\n", text)
    assert re.search(r"loss of 4 steps: \d", text)
    assert "right answers score {'parsed': 1.0, 'error': 0.0}" in text
    assert float(re.search(r"grey answers score \{'parsed': 1.0, 'error': ([\d.]+)", text)[1]) > 10


def test_the_image_is_what_its_script_draws():
    spec = importlib.util.spec_from_file_location("make_images", EXAMPLES / "make_images.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    file: Path = module.OUTPUT
    stored, drawn = Image.open(file).convert("RGB"), module.make_board()
    assert min(stored.size) >= 2000 and max(stored.size) >= 3000
    assert file.stat().st_size < 400_000
    difference = np.abs(np.asarray(stored, dtype=int) - np.asarray(drawn, dtype=int))
    assert stored.size == drawn.size
    assert difference.mean() < 3  # 64 colours, and fonts differ a little between Pillow versions

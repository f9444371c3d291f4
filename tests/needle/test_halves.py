"""The committed halves: they load as what they are, see and read above stated floors, and fit into a model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

from builders.needle import joined
from hires_lmm import PRESETS
from hires_lmm.conversion import ConversionError, export
from needle.halves.evaluate import text_scores, vision_scores
from needle.halves.files import Halves, load_halves
from needle.runs import with_token_ops


FOLDER = Path(__file__).parents[2] / "checkpoints" / "halves"
FLOORS = {
    "vision": {
        "crop all": 0.86,
        "crop digit": 0.86,
        "crop shape": 0.95,
        "crop word": 0.9,
        "crop colour": 0.98,
        "crop empty": 0.99,
        "cut all": 0.6,
        "global colour": 0.9,
        "global background": 0.95,
    },
    "language": {"all": 0.7, "read_digit": 0.7, "colour_of_value": 0.75, "count": 0.9, "background": 0.95},
}
"""Below the measured accuracies by what 60 or 100 scenes may vary."""


@pytest.fixture(scope="module")
def halves() -> Halves:
    return load_halves(FOLDER)


def test_they_are_plain_transformers_checkpoints_of_a_few_megabytes():
    for model_class, part in ((CLIPVisionModel, "vision"), (LlamaForCausalLM, "language")):
        model, info = model_class.from_pretrained(FOLDER / part, output_loading_info=True)
        assert model.dtype == torch.float32
        assert not any(info.values()), info
        assert model.num_parameters() < 2e6
    assert AutoTokenizer.from_pretrained(FOLDER / "language").chat_template
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 6e6


def test_the_tower_recognises_small_objects_on_fresh_views(halves: Halves):
    scores = vision_scores(halves.vision, 60, seed=1)
    for name, floor in FLOORS["vision"].items():
        part, kind = name.split(" ")
        assert scores[part][kind] >= floor, (name, scores)
    assert scores["global"]["all"] <= 0.45  # the global view does not resolve them


def test_the_language_model_retrieves_from_fresh_texts(halves: Halves):
    scores = text_scores(halves.language, halves.tokenizer, 100, seed=1)
    for kind, floor in FLOORS["language"].items():
        assert scores[kind] >= floor, (kind, scores)


def test_the_code_of_the_page_runs(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    page = (root / "docs" / "needle.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "docs/needle.md", "exec"), {})


@pytest.mark.slow
def test_the_command_makes_halves(tmp_path: Path):
    command = [sys.executable, "-m", "needle.pretrain_halves", "--out", str(tmp_path), "--seed", "3"]
    command += ["--vision-steps", "2", "--language-steps", "2", "--scenes", "2"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    record = json.loads((tmp_path / "halves.json").read_text())
    assert record["seed"] == 3 and record["held_out"]["vision"]["crop"]
    assert not (tmp_path / "unfinished").exists()
    assert load_halves(tmp_path).language.num_parameters() == record["parameters"]["language"]


def test_a_processor_of_another_model_is_not_exported(tmp_path):
    model, processor = joined()
    with_token_ops(model, PRESETS["slime"]["connector_config"]["token_ops"]).save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ConversionError, match=r"counts tokens for another model: budget is .* there and"):
        export(tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()

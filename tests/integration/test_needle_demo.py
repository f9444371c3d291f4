"""The demonstration on five pictures, with a model that is not trained; the pictures are what their script draws."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from builders_needle import joined
from hires_lmm import PRESETS, HiResLmmConfig
from hires_lmm.conversion import ConversionError, export
from hires_lmm.processing.chat_templates_hires_lmm import answer_prefix_ids
from hires_lmm.training.needle_runs import with_token_ops


EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_five_questions_are_answered_through_remote_code(tmp_path):
    model, processor = joined()
    model = with_token_ops(model, PRESETS["slime"]["connector_config"]["token_ops"])
    processor.image_processor.token_layout = model.config.token_layout()
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    command = [sys.executable, str(EXAMPLES / "demo.py"), str(tmp_path / "out")]
    command += ["--checkpoint", str(tmp_path / "checkpoint")]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent / "src")}
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert "code came from transformers_modules" in text
    assert text.count("question: ") == text.count("answer: ") == 5 and re.search(r"\n   \d of 5 right\n", text)
    kept = [int(number) for number in re.findall(r"(\d+) of 208 visual tokens kept", text)]
    assert len(kept) == 5 and max(kept) < 208
    assert Image.open(tmp_path / "out" / "kept_tokens.png").width >= 1000


def test_the_shipped_checkpoint_answers_four_of_five(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent / "src")}
    command = [sys.executable, str(EXAMPLES / "demo.py"), str(tmp_path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert int(re.search(r"\n   (\d) of 5 right\n", text)[1]) >= 4
    assert "code came from transformers_modules" in text


def test_the_shipped_processor_counts_what_the_shipped_model_makes():
    folder = EXAMPLES.parent / "checkpoints" / "needle-slime"
    processor, config = AutoProcessor.from_pretrained(folder), HiResLmmConfig.from_pretrained(folder)
    assert processor.image_processor.token_layout == json.loads(json.dumps(config.token_layout()))
    assert config.answer_prefix_ids == answer_prefix_ids(processor)
    with pytest.raises(ValueError, match="the smallest value for this image is 65"):
        processor.image_tokens(1536, 1536, max_image_tokens=10)


def test_a_processor_of_another_model_is_not_exported(tmp_path):
    model, processor = joined()
    with_token_ops(model, PRESETS["slime"]["connector_config"]["token_ops"]).save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(ConversionError, match=r"counts tokens for another model: budget is .* there and"):
        export(tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_a_checkpoint_the_demonstration_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo", "--checkpoint", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no checkpoint"):
        load("demo").main()


def test_the_pictures_are_what_their_script_draws():
    script = load("make_needle_scenes")
    entries = script.pick_scenes()
    assert entries == json.loads((script.FOLDER / script.LIST).read_text())
    assert len({entry["kind"] for entry in entries}) == len(entries) == 5
    for entry in entries:
        stored = Image.open(script.FOLDER / entry["image"])
        assert min(stored.size) >= 1500 and (script.FOLDER / entry["image"]).stat().st_size < 600_000
    drawn = np.asarray(script.draw(entries[0]), dtype=int)
    assert np.abs(np.asarray(Image.open(script.FOLDER / entries[0]["image"]), dtype=int) - drawn).mean() < 6

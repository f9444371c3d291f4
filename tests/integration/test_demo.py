"""The demonstration on five committed pictures; it needs nothing of the needle task but the checkpoint."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoProcessor

from hires_lmm import HiResLmmConfig
from hires_lmm.processing.chat_templates_hires_lmm import answer_prefix_ids


ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo.py"


def test_four_of_five_are_right_through_remote_code_where_the_needle_task_is_not_installed(tmp_path):
    (tmp_path / "needle.py").write_text("raise ImportError('the demonstration must not need it')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}
    command = [sys.executable, str(DEMO), str(tmp_path / "out")]
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert "code came from transformers_modules" in text
    assert text.count("question: ") == text.count("answer: ") == 5
    assert int(re.search(r"\n   (\d) of 5 right\n", text)[1]) >= 4
    kept = [int(number) for number in re.findall(r"(\d+) of 208 visual tokens kept", text)]
    assert len(kept) == 5 and all(number < 208 for number in kept)
    assert Image.open(tmp_path / "out" / "kept_tokens.png").width >= 1000


def test_the_shipped_processor_counts_what_the_shipped_model_makes():
    folder = ROOT / "checkpoints" / "needle-slime"
    processor, config = AutoProcessor.from_pretrained(folder), HiResLmmConfig.from_pretrained(folder)
    assert processor.image_processor.token_layout == json.loads(json.dumps(config.token_layout()))
    assert config.answer_prefix_ids == answer_prefix_ids(processor)
    with pytest.raises(ValueError, match="the smallest value for this image is 65"):
        processor.image_tokens(1536, 1536, max_image_tokens=10)


def test_without_a_checkpoint_the_demonstration_says_so(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    monkeypatch.setattr(sys, "argv", ["demo", "--checkpoint", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds no checkpoint"):
        demo.main()

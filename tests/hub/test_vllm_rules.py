"""What vLLM's Transformers backend does with a checkpoint before any model runs, without vLLM: three of its rules."""

import json
import os
import re
import subprocess
import sys
import typing

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText

from builders.reload import PRESETS, case_config
from builders.tiny import tiny_config, tiny_model, tiny_processor, tiny_text_config
from hires_lmm.processing.image_processing_hires_lmm import HiResLmmImageProcessorKwargs
from hires_lmm.processing.processing_hires_lmm import HiResLmmProcessorKwargs


pytest.importorskip("cloudpickle")

WRITE = """
import sys
sys.modules["hires_lmm"] = None  # not installed
import cloudpickle, json, pathlib, transformers
folder, out = map(pathlib.Path, sys.argv[1:])
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
import transformers_modules
cloudpickle.register_pickle_by_value(transformers_modules)
(out / "config.pickle").write_bytes(cloudpickle.dumps(config))
(out / "config.json").write_text(json.dumps(config.to_dict()))
"""
READ = """
import sys
sys.modules["hires_lmm"] = None
import json, pathlib, pickle
out = pathlib.Path(sys.argv[1])
config = pickle.loads((out / "config.pickle").read_bytes())
(out / "again.json").write_text(json.dumps(config.to_dict()))
assert not [name for name in sys.modules if name.startswith("transformers_modules")]
"""


def run(code: str, *arguments, home) -> None:
    """Run code in a process of its own with an own cache of modules."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_configuration_travels_by_value_and_brings_no_part_along(tmp_path):
    folder = tmp_path / "checkpoint"
    tiny_model(case_config("vlsa", "clip", "llama")).save_pretrained(folder)
    run(WRITE, folder, tmp_path, home=tmp_path / "first")
    run(READ, tmp_path, home=tmp_path / "second")  # nothing to import there
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads((tmp_path / "config.json").read_text())
    payload = (tmp_path / "config.pickle").read_bytes()
    assert b"HiResLmmConnectorConfig" in payload
    for name in (b"HiResLmmRouter", b"HiResLmmSaPerceiver", b"autograd", b"resolve_part"):
        assert name not in payload, name


@pytest.mark.parametrize("preset", PRESETS)
def test_no_tensor_that_a_checkpoint_needs_is_on_the_list_of_what_may_be_ignored(preset):
    """vLLM leaves out every tensor that a pattern matches, whichever class carries the pattern."""
    model = tiny_model(case_config(preset, "siglip", "llama", tie_word_embeddings=False))
    patterns = [
        pattern
        for module in model.modules()
        for pattern in (getattr(module, "_keys_to_ignore_on_load_unexpected", None) or [])
    ]
    assert not [name for name in model.state_dict() for pattern in patterns if re.search(pattern, name)]


def test_an_untied_head_loads_with_its_class_and_is_no_news_without_it(tmp_path, caplog):
    config = tiny_config("slime", text=tiny_text_config("llama", tie_word_embeddings=False))
    model = tiny_model(config)
    model.save_pretrained(tmp_path)
    tiny_processor(config).save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight) and not any(info.values())
    assert not torch.equal(again.lm_head.weight, again.get_input_embeddings().weight)
    caplog.clear()
    base, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and "lm_head" not in caplog.text
    assert torch.equal(base.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("options", [HiResLmmImageProcessorKwargs, HiResLmmProcessorKwargs])
def test_the_types_of_options_resolve(options):
    hints = typing.get_type_hints(options, include_extras=True)
    assert hints and set(hints) >= set(options.__annotations__)
    assert not [name for name, hint in hints.items() if "ForwardRef" in repr(hint)]

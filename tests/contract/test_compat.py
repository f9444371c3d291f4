"""What depends on the minor of transformers stands in `compat` alone; shipped code names an untested one, once."""

import ast
import copy
import importlib.metadata
import inspect
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from builders import tiny_config, tiny_model, tiny_processor
from hires_lmm.modeling import compat_hires_lmm as compat
from hires_lmm.processing import compat_hires_lmm as compat_of_processing


ROOT = Path(__file__).parents[2]
CODE = [
    path
    for folder in ("src", "benchmarks", "examples", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path.name != "compat_hires_lmm.py"
]
RENAMED = {"past_key_values", "cache_params", "image_hidden_states"}  # 5.24
VERSIONS = {"transformers.__version__", "is_transformers_version", "packaging", "transformers.utils.versions"}
MINOR = tuple(int(part) for part in importlib.metadata.version("transformers").split(".")[:2])


# ---- nobody else asks


def version_readers(source: str) -> list[str]:
    """Renamed names and versions of transformers that a file reads; words within texts are none."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Name | ast.Attribute):
            names = [ast.unparse(node), getattr(node, "attr", "")]
        elif isinstance(node, ast.keyword | ast.arg):
            names = [node.arg or ""]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [name for name in names if name in RENAMED | VERSIONS]
    return found


def test_nobody_else_reads_a_version_or_a_renamed_name():
    found = {path.relative_to(ROOT): version_readers(path.read_text(encoding="utf-8")) for path in CODE}
    assert len(found) > 100 and {path: names for path, names in found.items() if names} == {}


# ---- untested minors


@pytest.fixture
def lines():
    """What the shipped code says, which has said nothing before."""
    logging.Logger.warning_once.cache_clear()
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("transformers.hires_lmm")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


@pytest.fixture
def pretend(monkeypatch):
    """Sets the version that shipped code sees; transformers runs its `__init__` twice, so there are two modules."""

    def as_version(version: str) -> None:
        for module in (compat, compat_of_processing):
            monkeypatch.setattr(module.transformers, "__version__", version)

    return as_version


@pytest.mark.parametrize("version", ["5.19.9", "5.25.0", "5.25.0.dev0", "6.0.0"])
def test_an_untested_minor_is_named_once(pretend, lines, version):
    pretend(version)
    for _ in range(2):
        tiny_processor(tiny_config("slime"))
    assert len(lines) == 1 and version in lines[0] and "5.20 to 5.24" in lines[0]


@pytest.mark.parametrize("module", [compat, compat_of_processing])
def test_either_folder_says_it_alone(pretend, lines, module):
    pretend("5.25.0")
    module.warn_if_untested()
    assert len(lines) == 1


@pytest.mark.parametrize("version", ["5.20.0", "5.20.2", "5.22.1", "5.24.0", "5.24.3.dev0"])
def test_a_tested_minor_is_not(pretend, lines, version):
    pretend(version)
    tiny_processor(tiny_config("slime"))
    assert lines == []


LOAD = """
import sys
sys.modules["hires_lmm"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
sys.modules["transformers"].__version__ = "5.25.0"
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
"""


def test_a_checkpoint_without_the_package_says_it_once(tmp_path):
    config = tiny_config("slime")
    tiny_model(config).save_pretrained(tmp_path / "checkpoint")
    tiny_processor(config).save_pretrained(tmp_path / "checkpoint")
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, str(tmp_path / "checkpoint")],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("5.25.0 is installed") == 1, done.stderr


# ---- the name of the cache


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("llava_next"))


def test_the_cache_has_the_name_of_the_minor(model):
    assert (MINOR >= (5, 24)) == (compat.CACHE == "cache")
    for network in (model, model.model):
        shown = inspect.signature(network.forward).parameters
        assert compat.CACHE in shown and len(RENAMED & {*shown, "cache"}) + ("cache" in shown) == 1
        output = network(input_ids=torch.tensor([[1, 2]]), use_cache=True)
        assert compat.CACHE in output and output[compat.CACHE].get_seq_length() == 2


@torch.no_grad()
def test_forward_takes_either_name_and_says_which_is_old(model):
    ids = torch.tensor([[1, 2, 3]])
    for network in (model, model.model):
        whole = network(input_ids=ids)[0]
        cache = network(input_ids=ids[:, :2], use_cache=True)[compat.CACHE]
        for name in compat.CACHE_NAMES:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = network(input_ids=ids[:, 2:], **{name: copy.deepcopy(cache)})[0]
            torch.testing.assert_close(found, whole[:, 2:])
            old = [str(each.message) for each in said if "`past_key_values` is deprecated" in str(each.message)]
            assert len(old) == (name == "past_key_values" and compat.CACHE == "cache")
            assert all(each.category is FutureWarning for each in said)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(input_ids=ids, cache=cache, past_key_values=cache)


@torch.no_grad()
def test_generate_goes_on_from_either_name_of_its_own_or_refuses_it(model):
    ids = torch.tensor([[11, 12, 13, 14]])
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(ids, **options)
    cache = DynamicCache(config=model.config.text_config)
    torch.testing.assert_close(model.generate(ids, **{compat.CACHE: cache}, **options), wanted)
    assert cache.get_seq_length() == 6
    if compat.CACHE != "cache":
        with pytest.raises(ValueError, match="not used by the model: \\['cache'\\]"):
            model.generate(ids, cache=DynamicCache(), **options)


def test_the_cache_stays_in_place_and_out_of_evaluations(model):
    assert {*compat.CACHE_NAMES} <= {*model._skip_keys_device_placement}
    assert {*compat.CACHE_NAMES} <= {*model.config.keys_to_ignore_at_inference}

"""Damaged, incomplete or hostile sources end in a clear error and leave nothing behind."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from convert_tools import (
    GOLDEN,
    TOWER,
    golden_config,
    language_part,
    no_output,
    save_bin_shards,
    tensors_of,
    write_json,
    write_language_model,
    write_released,
    write_tower,
)
from safetensors.torch import save_file

from hires_lmm.conversion import ConversionError, convert_slime, convert_to_slime


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the golden checkpoint that a test may damage."""
    shutil.copytree(GOLDEN, tmp_path / "source")
    return tmp_path / "source"


def refused(tmp_path: Path, source: Path, match: str, **kwargs) -> str:
    """Convert, expect an error, and find no output folder; returns the message."""
    with no_output(tmp_path), pytest.raises(ConversionError, match=match) as caught:
        convert_slime(source, tmp_path / "out", **kwargs)
    return str(caught.value)


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def test_a_corrupted_shard(tmp_path, source):
    data = bytearray((source / SHARDS[1]).read_bytes())
    data[8:40] = b"x" * 32
    (source / SHARDS[1]).write_bytes(data)
    refused(tmp_path, source, SHARDS[1])


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_a_truncated_shard(tmp_path, source, size):
    data = (source / SHARDS[0]).read_bytes()
    (source / SHARDS[0]).write_bytes(data[:size])
    refused(tmp_path, source, f"{SHARDS[0]} is damaged or cut off")


@pytest.mark.parametrize("size", [0, 100, -30])
def test_a_truncated_pickle(tmp_path, source, size):
    for name in SHARDS:
        (source / name).unlink()
    (source / "model.safetensors.index.json").unlink()
    torch.save(tensors_of(GOLDEN), source / "pytorch_model.bin")
    data = (source / "pytorch_model.bin").read_bytes()
    (source / "pytorch_model.bin").write_bytes(data[:size])
    refused(tmp_path, source, r"pytorch_model.bin")


class Payload:
    """What unpickling must never run."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "mm_projector.bin"])
def test_a_pickle_with_code(tmp_path, name, legacy):
    source, trap = tmp_path / "source", tmp_path / "trap"
    write_json(source / "config.json", golden_config())
    content = {**tensors_of(GOLDEN), "model.extra": Payload(trap)}
    torch.save(content, source / name, _use_new_zipfile_serialization=not legacy)
    refused(tmp_path, source, "holds more than tensors", base=None)
    assert not trap.exists()


def test_a_bare_pickle_with_code(tmp_path):
    source, trap = tmp_path / "source", tmp_path / "trap"
    write_json(source / "config.json", golden_config())
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(trap)))
    refused(tmp_path, source, "pytorch_model.bin")
    assert not trap.exists()


def test_a_pickle_of_something_else(tmp_path):
    source = tmp_path / "source"
    write_json(source / "config.json", golden_config())
    torch.save({"state_dict": tensors_of(GOLDEN)}, source / "pytorch_model.bin")
    refused(tmp_path, source, "no table of tensors")


def edit_index(source: Path, change) -> None:
    path = source / "model.safetensors.index.json"
    table = json.loads(path.read_text())
    change(table["weight_map"])
    path.write_text(json.dumps(table))


@pytest.mark.parametrize("name", ["../other/{}", "/etc/{}", "a/../../{}", "..\\{}"])
def test_an_index_that_leaves_the_folder(tmp_path, source, name):
    (tmp_path / "other").mkdir()
    shutil.copy(source / SHARDS[1], tmp_path / "other" / SHARDS[1])
    edit_index(source, lambda table: table.update({"lm_head.weight": name.format(SHARDS[1])}))
    refused(tmp_path, source, "leaves the folder")


def test_a_link_that_leaves_the_folder(tmp_path, source):
    shutil.move(source / SHARDS[1], tmp_path / "elsewhere.safetensors")
    (source / SHARDS[1]).symlink_to(tmp_path / "elsewhere.safetensors")
    refused(tmp_path, source, "link that leaves the folder")


def test_links_of_the_hub_cache_are_fine(tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    shutil.copytree(GOLDEN, snapshot)
    blobs.mkdir()
    for path in list(snapshot.glob("*.safetensors")):
        shutil.move(path, blobs / path.stem)
        path.symlink_to(Path("..") / ".." / "blobs" / path.stem)
    convert_slime(snapshot, tmp_path / "done")
    assert (tmp_path / "done" / "model.safetensors").is_file()


def test_a_wrong_index(tmp_path, source):
    edit_index(source, lambda table: table.update({"model.extra": SHARDS[0], "lm_head.weight": SHARDS[0]}))
    text = refused(tmp_path, source, "disagree")
    assert "missing" in text and "model.extra" in text
    assert "misplaced" in text and "lm_head.weight" in text


def test_an_index_that_forgets_a_tensor(tmp_path, source):
    edit_index(source, lambda table: table.pop("model.norm.weight"))
    assert "not listed  model.norm.weight" in refused(tmp_path, source, "disagree")


def test_an_index_with_an_absent_file(tmp_path, source):
    (source / SHARDS[1]).unlink()
    refused(tmp_path, source, "no such file")


def test_an_incomplete_set_of_shards(tmp_path, source):
    (source / "model.safetensors.index.json").unlink()
    (source / SHARDS[1]).unlink()
    refused(tmp_path, source, "not one complete set")


def test_an_index_that_is_no_json(tmp_path, source):
    (source / "model.safetensors.index.json").write_text('{"weight_map": ')
    refused(tmp_path, source, "cannot be read as JSON")


def test_missing_unexpected_and_misshaped_tensors_share_one_table(tmp_path):
    tensors = tensors_of(GOLDEN)
    del tensors["model.norm.weight"], tensors["model.mm_projector.attn.attn.in_proj_bias"]
    tensors["model.image_newline"] = torch.zeros(64)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 5)
    tensors["model.mm_projector.std"] = torch.tensor([2.0])
    text = refused(tmp_path, write_released(tmp_path / "source", tensors), "do not fit its configuration")
    rows = {tuple(line.split()[:2]) for line in text.splitlines()[1:]}
    assert rows == {
        ("missing", "model.norm.weight"),
        ("missing", "model.mm_projector.attn.attn.in_proj_bias"),
        ("unexpected", "model.image_newline"),
        ("mis-shaped", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("unfit", "model.mm_projector.std"),
    }
    assert "3 x 5" in text and "128 x 64" in text


def test_a_missing_tower_that_nobody_has(tmp_path):
    tensors = {key: value for key, value in tensors_of(GOLDEN).items() if not key.startswith(TOWER)}
    refused(
        tmp_path, write_released(tmp_path / "source", tensors, mm_vision_tower="no such"), "vision tower 'no such'"
    )


def test_a_projector_file_that_holds_the_sampler(tmp_path):
    golden, source = tensors_of(GOLDEN), tmp_path / "source"
    base = write_language_model(tmp_path / "base", language_part(golden))
    write_json(source / "config.json", golden_config())
    sampler = {key: value for key, value in golden.items() if ".sampler." in key}
    for name in ("mm_projector.bin", "sampler.bin"):
        torch.save(sampler, source / name)
    refused(tmp_path, source, "middle of a run", base=base, vision_config=write_tower(tmp_path / "tower"))


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"peft_type": "LOHA"},
        {"bias": "all"},
        {"alpha_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_adapters_that_are_more_than_lora(tmp_path, option):
    source = tmp_path / "source"
    write_json(source / "config.json", golden_config())
    write_json(source / "adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **option})
    refused(tmp_path, source, f"{next(iter(option))}=")


def test_an_adapter_for_another_base(tmp_path):
    golden, source = tensors_of(GOLDEN), tmp_path / "source"
    base = write_language_model(tmp_path / "base", language_part(golden))
    write_json(source / "config.json", golden_config())
    write_json(source / "adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    torch.save({k: v for k, v in golden.items() if ".mm_projector." in k}, source / "non_lora_trainables.bin")
    root = "base_model.model.model.layers."
    adapter = {
        f"{root}0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32),
        f"{root}0.self_attn.q_proj.lora_B.weight": torch.zeros(64, 4),
        f"{root}7.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64),
        f"{root}7.self_attn.q_proj.lora_B.weight": torch.zeros(64, 4),
        f"{root}0.self_attn.k_proj.lora_A.weight": torch.zeros(4, 64),
        f"{root}0.self_attn.v_proj.lora_magnitude_vector": torch.zeros(64),
    }
    save_file(adapter, source / "adapter_model.safetensors")
    text = refused(tmp_path, source, "does not fit its base", base=base)
    assert all(word in text for word in ("mis-shaped", "layers.7", "pairs", "DoRA"))


# ---- the destination


def test_a_destination_that_holds_something(tmp_path):
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "file").write_text("mine")
    with pytest.raises(ConversionError, match="not empty"):
        convert_slime(GOLDEN, tmp_path / "busy")
    assert (tmp_path / "busy" / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "empty").mkdir()
    convert_slime(GOLDEN, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    def interrupt(done, total, description):
        names = [path.name for path in tmp_path.iterdir()]
        assert len(names) == 1 and names[0].startswith("out.incomplete-")
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_slime(GOLDEN, tmp_path / "out", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_conversion_leaves_a_folder_that_says_so(tmp_path):
    script = (
        "import sys, time; from hires_lmm.conversion import convert_slime\n"
        "def wait(done, total, text):\n"
        "    if done == 60: print('here', flush=True); time.sleep(60)\n"
        "convert_slime(sys.argv[1], sys.argv[2], progress=wait)"
    )
    root = str(Path(__file__).parents[2] / "src")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(GOLDEN), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert process.stdout.readline() == b"here\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("out.incomplete-")
    assert not (left / "config.json").exists()


def test_progress_counts_every_tensor(tmp_path):
    seen = []
    convert_slime(GOLDEN, tmp_path / "out", progress=lambda *step: seen.append(step))
    assert [step[0] for step in seen] == list(range(1, len(seen) + 1))
    assert {step[1] for step in seen} == {len(seen)} == {len(tensors_of(tmp_path / "out"))}


def test_the_way_back_refuses_too(tmp_path):
    convert_slime(GOLDEN, tmp_path / "ours")
    data = (tmp_path / "ours" / "model.safetensors").read_bytes()
    (tmp_path / "ours" / "model.safetensors").write_bytes(data[:-100])
    with no_output(tmp_path), pytest.raises(ConversionError, match="damaged"):
        convert_to_slime(tmp_path / "ours", tmp_path / "out")
    with no_output(tmp_path), pytest.raises(ConversionError, match="not a hires_lmm checkpoint"):
        convert_to_slime(GOLDEN, tmp_path / "out")


def test_no_file_names_this_machine(tmp_path):
    convert_slime(GOLDEN, tmp_path / "out")
    named = [p.name for p in (tmp_path / "out").glob("*.json") if str(tmp_path) in p.read_text()]
    assert named == []


def test_bin_shards_with_a_wrong_index(tmp_path):
    source = tmp_path / "source"
    write_json(source / "config.json", golden_config())
    save_bin_shards(source, tensors_of(GOLDEN))
    path = source / "pytorch_model.bin.index.json"
    table = json.loads(path.read_text())
    table["weight_map"].pop("lm_head.weight")
    path.write_text(json.dumps(table))
    assert "not listed" in refused(tmp_path, source, "disagree")

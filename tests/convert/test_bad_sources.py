"""Damaged, incomplete and hostile sources end in a clear error and leave nothing behind."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from convert_tools import (
    GOLDEN,
    convert_slime,
    convert_to_slime,
    golden_config,
    language_part,
    no_output,
    tensors_of,
    tokenizer_without_image_token,
    write_json,
    write_language_model,
    write_released,
    write_tower,
)
from safetensors.torch import load_file, save_file
from test_llava_next import save_source, their_model

from builders.tiny import tiny_config, tiny_model, tiny_processor
from hires_lmm.conversion import ConversionError, convert_llava_next, export


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the golden checkpoint that a test may damage."""
    return shutil.copytree(GOLDEN, tmp_path / "source")


def bare_source(folder: Path) -> Path:
    """A released configuration, to which a test adds weights."""
    write_json(folder / "config.json", golden_config())
    return folder


def refused(folder: Path, match: str, convert=convert_slime, **options) -> str:
    """Convert, expect an error, and find no output folder; returns the message."""
    out = folder.parent / "out"
    with no_output(folder.parent), pytest.raises(ConversionError, match=match) as caught:
        convert(folder, out, **options)
    return str(caught.value)


# ---- files


@pytest.mark.parametrize("size", [0, 1000, -1])
def test_a_shard_that_is_cut_off_is_named(source, size):
    data = (source / SHARDS[0]).read_bytes()
    (source / SHARDS[0]).write_bytes(data[:size])
    refused(source, f"{SHARDS[0]} is damaged or cut off")


@pytest.mark.parametrize("size", [0, 100, -30])
def test_a_pickle_that_is_cut_off_is_named(tmp_path, size):
    source = bare_source(tmp_path / "source")
    torch.save(tensors_of(GOLDEN), source / "pytorch_model.bin")
    data = (source / "pytorch_model.bin").read_bytes()
    (source / "pytorch_model.bin").write_bytes(data[:size])
    refused(source, r"pytorch_model.bin")


def test_an_empty_file_is_named_with_a_reason(tmp_path):
    source = bare_source(tmp_path / "source")
    (source / "pytorch_model.bin").touch()
    refused(source, r"pytorch_model.bin is damaged or cut off: \S+")


class Payload:
    """What unpickling must never run."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "mm_projector.bin"])
def test_code_in_a_pickle_does_not_run(tmp_path, name, legacy):
    source, trap = bare_source(tmp_path / "source"), tmp_path / "trap"
    content = {**tensors_of(GOLDEN), "model.extra": Payload(trap)}
    torch.save(content, source / name, _use_new_zipfile_serialization=not legacy)
    refused(source, "holds more than tensors")
    assert not trap.exists()


def test_a_pickle_of_something_else_is_refused(tmp_path):
    source = bare_source(tmp_path / "source")
    torch.save({"state_dict": tensors_of(GOLDEN)}, source / "pytorch_model.bin")
    refused(source, "no table of tensors")


def test_tensors_that_share_memory_in_an_old_pickle_are_written_apart(tmp_path):
    source, tensors = bare_source(tmp_path / "source"), tensors_of(GOLDEN)
    (source / "vision_config.json").write_bytes((GOLDEN / "vision_config.json").read_bytes())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.1.input_layernorm.weight"] = tensors["model.layers.0.input_layernorm.weight"]
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert_slime(source, tmp_path / "out")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    norms = [ours[f"model.language_model.layers.{number}.input_layernorm.weight"] for number in range(2)]
    assert torch.equal(*norms) and torch.equal(norms[0], tensors["model.layers.0.input_layernorm.weight"])


@pytest.mark.parametrize("text", ['{"a": ', "\xff", "", "[]"], ids=["cut", "bytes", "empty", "list"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_json_file_that_is_none_is_named(source, name, text):
    (source / name).write_bytes(text.encode("latin-1"))
    refused(source, f"{name} (cannot be read|holds no JSON object)")


def test_the_hub_cache_with_its_links_converts(tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    shutil.copytree(GOLDEN, snapshot)
    blobs.mkdir()
    for path in list(snapshot.glob("*.safetensors")):
        shutil.move(path, blobs / path.stem)
        path.symlink_to(Path("..") / ".." / "blobs" / path.stem)
    convert_slime(snapshot, tmp_path / "done")
    assert (tmp_path / "done" / "model.safetensors").is_file()


# ---- the index, and what it names


def edit_index(path: Path, change) -> None:
    table = json.loads(path.read_text())
    change(table["weight_map"])
    path.write_text(json.dumps(table))


def test_an_index_that_disagrees_with_the_files_is_one_table(source):
    def change(table: dict) -> None:
        table.update({"model.extra": SHARDS[0], "lm_head.weight": SHARDS[0]})
        table.pop("model.norm.weight")

    edit_index(source / "model.safetensors.index.json", change)
    rows = {tuple(line.split()[:3]) for line in refused(source, "disagree").splitlines()[1:]}
    assert rows == {
        ("missing", "model.extra", "the"),
        ("misplaced", "lm_head.weight", "in"),
        ("not", "listed", "model.norm.weight"),
    }


def test_a_shard_that_was_not_downloaded_is_named(source):
    (source / SHARDS[1]).unlink()
    refused(source, f"no such file as '{SHARDS[1]}'; download it again")
    (source / "model.safetensors.index.json").unlink()
    refused(source, "not one complete set")


# ---- tensors


def test_missing_unexpected_and_misshaped_tensors_share_one_table(tmp_path):
    tensors = tensors_of(GOLDEN)
    del tensors["model.norm.weight"], tensors["model.mm_projector.attn.attn.in_proj_bias"]
    tensors["model.image_newline"] = torch.zeros(64)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 5)
    tensors["model.mm_projector.std"] = torch.tensor([2.0])
    tensors["model.mm_projector.attn.attn.in_proj_weight"] = torch.tensor(1.0)
    tensors["lm_head.weight"] = torch.tensor(1.0)
    text = refused(write_released(tmp_path / "source", tensors), "do not fit its configuration")
    rows = {tuple(line.split()[:2]) for line in text.splitlines()[1:]}
    assert rows == {
        ("missing", "model.norm.weight"),
        ("missing", "model.mm_projector.attn.attn.in_proj_bias"),
        ("missing", "model.mm_projector.attn.attn.in_proj_weight"),
        ("unexpected", "model.image_newline"),
        ("mis-shaped", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("mis-shaped", "lm_head.weight"),
        ("unfit", "model.mm_projector.std"),
        ("unfit", "model.mm_projector.attn.attn.in_proj_weight"),
    }
    assert "3 x 5" in text and "128 x 64" in text


def test_a_projector_file_that_holds_the_sampler(tmp_path):
    golden, source = tensors_of(GOLDEN), bare_source(tmp_path / "source")
    base = write_language_model(tmp_path / "base", language_part(golden))
    sampler = {key: value for key, value in golden.items() if ".sampler." in key}
    for name in ("mm_projector.bin", "sampler.bin"):
        torch.save(sampler, source / name)
    refused(source, "middle of a run", base=base, vision_config=write_tower(tmp_path / "tower"))


@pytest.mark.parametrize(
    "option",
    [{"use_dora": True}, {"peft_type": "LOHA"}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}],
    ids=lambda option: next(iter(option)),
)
def test_an_adapter_that_is_more_than_lora_is_refused(tmp_path, option):
    source = bare_source(tmp_path / "source")
    write_json(source / "adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **option})
    refused(source, f"{next(iter(option))}=")


def test_an_adapter_for_another_base_is_one_table(tmp_path):
    golden, source = tensors_of(GOLDEN), bare_source(tmp_path / "source")
    base = write_language_model(tmp_path / "base", language_part(golden))
    write_json(source / "adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    torch.save({k: v for k, v in golden.items() if ".mm_projector." in k}, source / "non_lora_trainables.bin")
    root = "base_model.model.model.layers."
    adapter = {
        f"{root}0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32),
        f"{root}0.self_attn.q_proj.lora_B.weight": torch.zeros(64, 4),
        f"{root}1.self_attn.q_proj.lora_A.weight": torch.zeros(4),
        f"{root}1.self_attn.q_proj.lora_B.weight": torch.zeros(64, 4),
        f"{root}7.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64),
        f"{root}7.self_attn.q_proj.lora_B.weight": torch.zeros(64, 4),
        f"{root}0.self_attn.k_proj.lora_A.weight": torch.zeros(4, 64),
        f"{root}0.self_attn.v_proj.lora_magnitude_vector": torch.zeros(64),
    }
    save_file(adapter, source / "adapter_model.safetensors")
    rows = [line.split(None, 2) for line in refused(source, "does not fit its base", base=base).splitlines()[1:]]
    assert {(kind, name.removeprefix("model.layers."), detail) for kind, name, detail in rows} == {
        ("unexpected", "0.self_attn.v_proj.lora_magnitude_vector", "DoRA"),
        ("mis-shaped", "0.self_attn.q_proj.weight", "(64, 64), but B A gives (64, 32)"),
        ("mis-shaped", "1.self_attn.q_proj.weight", "A is (4,) and B is (64, 4)"),
        ("missing", "7.self_attn.q_proj.weight", "the adapter changes it, but the base does not have it"),
        ("missing", "0.self_attn.k_proj", "lora_A and lora_B do not come in pairs"),
    }


# ---- options and templates


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}", "{% for %}"])
def test_a_template_that_cannot_be_rendered_leaves_the_openings_unknown(tmp_path, template):
    save_source(tmp_path / "source", their_model("llama"))
    (tmp_path / "source" / "chat_template.jinja").write_text(template)
    convert_llava_next(tmp_path / "source", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["answer_prefix_ids"] is None and config["question_prefix_ids"] is None
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template


# ---- the destination


def test_a_destination_that_holds_something_is_left_alone(tmp_path):
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


# ---- the way back, and export


def test_the_way_back_refuses_what_is_damaged_not_whole_or_not_ours(tmp_path, source):
    convert_slime(source, tmp_path / "ours")
    path, name = tmp_path / "ours" / "model.safetensors", "model.language_model.layers.0.mlp.up_proj.weight"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused(tmp_path / "ours", "damaged", convert_to_slime)
    path.write_bytes(whole)
    save_file({key: value for key, value in load_file(path).items() if key != name}, path, {"format": "pt"})
    refused(tmp_path / "ours", f"missing *{name}", convert_to_slime)
    refused(source, "not a hires_lmm checkpoint", convert_to_slime)


def test_export_names_no_foreign_code(tmp_path):
    """A `auto_map` that leads to another repository would run that code for whoever trusts the exported folder."""
    ours, config = tmp_path / "ours", tiny_config("llava_next")
    tiny_model(config).save_pretrained(ours)
    tiny_processor(config).save_pretrained(ours)
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        values = json.loads((ours / name).read_text())
        foreign = {"AutoModelForImageTextToText": "evil/repo--evil.Model", "AutoTokenizer": ["evil.T", None]}
        write_json(ours / name, {**values, "auto_map": foreign})
    export(ours, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.json"):
        assert "evil" not in path.read_text(), path.name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]["AutoModel"].startswith("modeling_")


def test_a_tokenizer_with_code_is_not_asked_about_it(source, tmp_path):
    tokenizer_without_image_token().save_pretrained(source)
    values = json.loads((source / "tokenizer_config.json").read_text())
    write_json(source / "tokenizer_config.json", {**values, "auto_map": {"AutoTokenizer": ["evil.T", None]}})
    (source / "evil.py").write_text("raise RuntimeError('this code ran')")
    convert_slime(source, tmp_path / "out")
    assert "evil" not in (tmp_path / "out" / "tokenizer_config.json").read_text()

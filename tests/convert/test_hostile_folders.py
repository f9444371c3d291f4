"""Folders made to harm: what the fuzz cases of `tests/fuzz` found once, one test each."""

import json
import os
import shutil
import time
import zipfile
from pathlib import Path

import pytest
import torch
from convert_tools import GOLDEN, golden_config, no_output, tensors_of, tokenizer_without_image_token, write_json
from fusion_tools import released_config, write_released_fusion
from safetensors.torch import load_file, save_file
from test_llava_next import TEMPLATE, save_source, their_model

from builders import tiny_config, tiny_model, tiny_processor
from hires_lmm import HiResLmmConfig
from hires_lmm.conversion import (
    ConversionError,
    convert_fusion,
    convert_llava_next,
    convert_slime,
    convert_to_slime,
    export,
    rendering,
)
from hires_lmm.conversion.rendering import foreign_template
from hires_lmm.conversion.tensors import read_json, safe_path


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the golden checkpoint that a test may damage."""
    shutil.copytree(GOLDEN, tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A small checkpoint of ours."""
    folder, config = tmp_path_factory.mktemp("made"), tiny_config("llava_next")
    tiny_model(config).save_pretrained(folder)
    tiny_processor(config).save_pretrained(folder)
    return folder


@pytest.fixture
def ours(tmp_path, made) -> Path:
    """A copy of it that a test may damage."""
    return shutil.copytree(made, tmp_path / "ours")


def refused(tmp_path: Path, convert, source: Path, match: str) -> None:
    with no_output(tmp_path), pytest.raises(ConversionError, match=match):
        convert(source, tmp_path / "out")


# ---- text files


def test_a_pipe_in_place_of_a_file(tmp_path, source):
    """Opening a pipe would wait for ever."""
    (source / "config.json").unlink()
    os.mkfifo(source / "config.json")
    refused(tmp_path, convert_slime, source, "no such file as 'config.json'")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' + "9" * 10_000 + "}", "\xff", ""], ids=["deep", "digits", "bytes", "empty"]
)
def test_json_that_is_hard_to_read(tmp_path, source, text):
    (source / "config.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, convert_slime, source, "config.json cannot be read as")


def test_an_enormous_config(tmp_path, source):
    with (source / "config.json").open("ab") as file:
        file.truncate(200_000_000)
    refused(tmp_path, convert_slime, source, "config.json has 200000000 bytes, more than 100000000")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "loop"])
def test_names_that_no_file_can_have(tmp_path, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConversionError, match=r"names no file|no such file"):
        safe_path(tmp_path, name)


@pytest.mark.parametrize("name", ["config.json", "vision_config.json"])
def test_a_config_that_is_a_link_to_a_secret(tmp_path, source, name):
    shutil.move(source / name, tmp_path / "secret.json")
    (source / name).symlink_to(tmp_path / "secret.json")
    refused(tmp_path, convert_slime, source, f"'{name}' is a link that leaves the folder")


def test_configs_of_the_hub_cache_in_a_folder_below(tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc" / "clip", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_json(blobs / "123", {"a": 1})
    (snapshot / "config.json").symlink_to(Path("..") / ".." / ".." / "blobs" / "123")
    assert read_json(snapshot / "config.json") == {"a": 1}


# ---- values


@pytest.mark.parametrize(
    "changes",
    [
        {"mm_projector_type": ["linear"]},
        {"mm_resampler_type": {}},
        {"mm_patch_merge_type": []},
        {"mm_resampler_topp": "0.9"},
        {"seperator": True},
        {"mm_resampler_dim": 10**400},
        {"mm_vision_tower": {"a": 1}},
        {"use_mm_proj": "yes"},
        {"num_hidden_layers": 10**9},
        {"vocab_size": "64"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_released_options_of_another_type(tmp_path, source, changes):
    write_json(source / "config.json", golden_config(**changes))
    if "mm_vision_tower" in changes:
        (source / "vision_config.json").unlink()
    refused(tmp_path, convert_slime, source, next(iter(changes)))


def test_a_tower_in_the_home_of_nobody(tmp_path, source):
    write_json(source / "config.json", golden_config(mm_vision_tower="~nobody-here/x"))
    (source / "vision_config.json").unlink()
    refused(tmp_path, convert_slime, source, "'~nobody-here/x' is neither a folder nor a Hub repository")


@pytest.mark.parametrize("name", ["eos_token_id", "suppress_tokens"])
def test_generation_settings_of_another_type(tmp_path, source, name):
    write_json(source / "generation_config.json", {name: {"a": 1}})
    tokenizer_without_image_token().save_pretrained(source)
    refused(tmp_path, convert_slime, source, f"{name}=.* must be token ids")


def test_a_generation_setting_that_the_library_cannot_compare(tmp_path, source):
    write_json(source / "generation_config.json", {"max_length": [1], "max_new_tokens": [1], "num_beams": [2]})
    refused(tmp_path, convert_slime, source, "The generation configuration does not fit")


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"length_que_end": 10**9}, "length_que_end=1000000000"),
        ({"length_que_end": None}, "no length_que_end"),
        ({"llm_config": []}, "llm_config"),
        ({"llm_config": {"model_type": "no such"}}, "no such"),
        ({"imgque_config": "x"}, "imgque_config"),
        ({"imgque_config": {**released_config()["imgque_config"], "vision_config": None}}, "no vision_config"),
    ],
)
def test_fusion_options_of_another_type(tmp_path, changes, text):
    refused(tmp_path, convert_fusion, write_released_fusion(tmp_path / "source", **changes), text)


# ---- pickles


def test_a_tensor_that_is_larger_than_its_file(tmp_path):
    """One number, expanded to 16 GB: written out it would fill disk and memory."""
    source = tmp_path / "source"
    write_json(source / "config.json", golden_config())
    tensors = {**tensors_of(GOLDEN), "lm_head.weight": torch.zeros(1).expand(1 << 20, 1 << 12)}
    torch.save(tensors, source / "pytorch_model.bin")
    refused(tmp_path, convert_slime, source, r"lm_head.weight in pytorch_model.bin claims 17179869184 bytes")


@pytest.mark.parametrize("extra", [torch.eye(3).to_sparse(), torch.empty(3, device="meta"), torch.zeros(3) * 1j])
def test_tensors_that_hold_no_plain_numbers(tmp_path, extra):
    source = tmp_path / "source"
    write_json(source / "config.json", golden_config())
    torch.save({**tensors_of(GOLDEN), "lm_head.weight": extra}, source / "pytorch_model.bin")
    refused(tmp_path, convert_slime, source, "lm_head.weight in pytorch_model.bin is a tensor of")


def test_tensors_without_names(tmp_path):
    source = tmp_path / "source"
    write_json(source / "config.json", golden_config())
    torch.save({**tensors_of(GOLDEN), 7: torch.zeros(3)}, source / "pytorch_model.bin")
    refused(tmp_path, convert_slime, source, "names a tensor 7")


def test_a_pickle_that_takes_from_an_empty_stack(tmp_path):
    source = tmp_path / "source"
    write_json(source / "config.json", golden_config())
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02R.")
    refused(tmp_path, convert_slime, source, "pytorch_model.bin is damaged or cut off: pop from empty list")


def test_a_pickle_that_unpacks_to_more(tmp_path):
    source = tmp_path / "source"
    write_json(source / "config.json", golden_config())
    torch.save(tensors_of(GOLDEN), tmp_path / "plain")
    with zipfile.ZipFile(tmp_path / "plain") as plain, zipfile.ZipFile(source / "pytorch_model.bin", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    refused(tmp_path, convert_slime, source, "compressed inside")


def test_a_scalar_in_place_of_a_table(tmp_path, source):
    for path in source.glob("model*"):
        path.unlink()
    for name in ("lm_head.weight", "model.mm_projector.attn.attn.in_proj_weight"):
        tensors = {**tensors_of(GOLDEN), name: torch.tensor(1.0)}
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        refused(tmp_path, convert_slime, source, f"(mis-shaped|unfit) *.*{name.split('.')[-1]}")


# ---- chat templates


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template, reason",
    [(LOOP, "more than 1 seconds"), ("{{ 'a' * 10**11 }}", "memory"), ("{{ 'a' * 10**7 }}", "10000000 characters")],
)
def test_a_template_that_exhausts_ends_the_conversion(tmp_path, monkeypatch, template, reason):
    monkeypatch.setattr(rendering, "SECONDS", 1)
    save_source(tmp_path / "source", their_model("llama"))
    (tmp_path / "source" / "chat_template.jinja").write_text(template)
    start = time.monotonic()
    refused(tmp_path, convert_llava_next, tmp_path / "source", f"chat template of the checkpoint wants .*{reason}")
    assert time.monotonic() - start < 60


def test_a_foreign_template_renders_as_in_transformers():
    tokenizer = tokenizer_without_image_token()
    text = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | tojson }}{% endfor %}"
    text += "{% generation %}{% if add_generation_prompt %}>{% endif %}{% endgeneration %}{% break %}"
    text = text.replace("{% break %}", "{%- for x in messages %}{% break %}{% endfor %}")
    messages = [{"role": "user", "content": "é <b>"}, {"role": "assistant", "content": "no"}]
    with foreign_template(text, tokenizer.special_tokens_map) as foreign:
        for prompt in (True, False):
            expected = tokenizer.apply_chat_template(
                messages, chat_template=text, tokenize=False, add_generation_prompt=prompt
            )
            assert foreign.render(messages, prompt) == expected
    for text, reason in (("{{ raise_exception('roles') }}", "roles"), ("{{ ''.__class__.__mro__ }}", "SecurityError")):
        with foreign_template(text, {}) as foreign, pytest.raises(ValueError, match=reason):
            foreign.render(messages)


def test_prefixes_are_found_in_a_foreign_template(tmp_path):
    save_source(tmp_path / "source", their_model("llama"))
    convert_llava_next(tmp_path / "source", tmp_path / "out")
    config = HiResLmmConfig.from_pretrained(tmp_path / "out")
    assert "assistant:" in TEMPLATE and config.answer_prefix_ids


# ---- export and the way back


def test_export_names_no_foreign_code(tmp_path, ours):
    """A `auto_map` that leads to another repository would run that code for whoever trusts the exported folder."""
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        values = json.loads((ours / name).read_text())
        values["auto_map"] = {
            "AutoModelForImageTextToText": "evil/repo--evil.Model",
            "AutoTokenizer": ["evil.T", None],
        }
        write_json(ours / name, values)
    export(ours, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.json"):
        assert "evil" not in path.read_text(), path.name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]["AutoModel"].startswith("modeling_")


@pytest.mark.parametrize("name", ["README.md", "conversion_report.json", "generation_config.json"])
def test_export_copies_no_secret_through_a_link(tmp_path, ours, name):
    (tmp_path / "secret").write_text('{"key": "secret"}')
    (ours / name).unlink(missing_ok=True)
    (ours / name).symlink_to(tmp_path / "secret")
    refused(tmp_path, export, ours, f"'{name}' is a link that leaves the folder")


def test_the_way_back_needs_every_tensor(tmp_path, source):
    convert_slime(source, tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    tensors.pop(name)
    save_file(tensors, tmp_path / "ours" / "model.safetensors", {"format": "pt"})
    refused(tmp_path, convert_to_slime, tmp_path / "ours", f"missing *{name}")


# ---- configurations


@pytest.mark.parametrize(
    "half, changes, text",
    [
        ("vision_config", {"patch_size": 0}, r"vision_config.patch_size=0"),
        ("vision_config", {"image_size": 10**6, "patch_size": 1}, "1 to 1024 patches a side"),
        ("vision_config", {"image_size": 7, "patch_size": 14}, "1 to 1024 patches a side"),
        (
            "vision_config",
            {"num_hidden_layers": 10**9},
            "vision_config.num_hidden_layers=1000000000 is more than 1000",
        ),
        ("text_config", {"num_hidden_layers": 10**9}, "text_config.num_hidden_layers=1000000000 is more than 1000"),
        ("text_config", {"vocab_size": -1}, "text_config.vocab_size=-1"),
        ("vision_config", {"model_type": "bert"}, "vision_config.image_size=None of a 'bert'"),
    ],
)
def test_halves_that_cannot_be_built(half, changes, text):
    values = tiny_config("llava_next").to_dict()
    values[half] = changes if "model_type" in changes else {**values[half], **changes}
    with pytest.raises(ValueError, match=text):
        HiResLmmConfig(**{key: values[key] for key in ("vision_config", "text_config", "connector_config", "planner")})


def test_an_id_far_above_the_vocabulary(tmp_path, ours):
    """Saving such a tokenizer takes memory for every id below and ends the process."""
    file = ours / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary[next(reversed(vocabulary))] = 2**31
    file.write_text(json.dumps(values))
    refused(tmp_path, export, ours, "has the id 2147483648; ids can be at most 16777216")

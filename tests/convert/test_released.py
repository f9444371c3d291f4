"""MQT-LLaVA, LLaVA-UHD v1, INF-LLaVA, LLaVA-Mini, MG-LLaVA: released checkpoints in and out, with golden numbers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from convert_tools import leftovers, tensors_of
from PIL import Image
from released_tools import (
    LLAMA3_SCALING,
    RELEASED,
    between_weights,
    convnext,
    golden,
    language_weights,
    mg_weights,
    released_config,
    released_weights,
    tower_weights,
    write_config,
    write_mg,
    write_open_clip,
    write_released,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from golden import test_inf_llava, test_llava_mini, test_llava_uhd, test_mg_convgate, test_mqt
from hires_lmm import HiResLmmConfig
from hires_lmm.cli import app
from hires_lmm.cli_convert import RELEASED as COMMANDS
from hires_lmm.conversion import ConversionError, convert_fusion, convert_released, convert_to_released
from hires_lmm.conversion.llava_formats import FORMATS


NAMES = list(RELEASED)
LLAVA = [name for name in NAMES if name != "mg-llava"]


def convert(name: str, work: Path, destination: Path, **changes) -> dict:
    """Write the small release of a format and convert it."""
    if name == "mg-llava":
        files = write_mg(work)
        return convert_released(name, files.pop("source"), destination, **files)
    return convert_released(name, write_released(work, name, **changes), destination)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> dict[str, Path]:
    """Each format, converted."""
    folders = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for name, folder in folders.items():
        convert(name, folder / "released", folder / "ours")
    return {name: folder / "ours" for name, folder in folders.items()}


def draw(height: int, width: int) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def load(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()


# ---- values: the connector of the converted model gives the golden numbers


def every(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The rows that a set keeps."""
    return found[:, :: -(-found.shape[1] // wanted.shape[1])]


def test_mqt_gives_the_golden_tokens_at_every_number(converted):
    connector, numbers = load(converted["mqt"]).model.connector, golden("mqt")
    parts = torch.nn.Sequential(connector.view_ops[0], connector.adapter)
    found = test_mqt.run(parts, numbers["input.x0"], (24, 24))
    for m in numbers.cases["settings"]["m"]:
        numbers.close(every(found[:, :m], numbers[f"output.x0.m{m}"]), f"output.x0.m{m}")


def test_llava_uhd_gives_the_golden_tokens(converted, tmp_path):
    """The released rule gives one head to so narrow a model; the set has four."""
    numbers = golden("llava-uhd")
    shutil.copytree(converted["llava-uhd"], tmp_path / "ours")
    values = json.loads((tmp_path / "ours" / "config.json").read_text())
    values["connector_config"]["view_ops"][0]["num_heads"] = numbers.cases["resampler"]["settings"]["num_heads"]
    (tmp_path / "ours" / "config.json").write_text(json.dumps(values))
    part = load(tmp_path / "ours").model.connector.view_ops[0]
    for number, shape in enumerate(numbers.cases["resampler"]["shapes"]):
        found = test_llava_uhd.run(part, numbers[f"input.resampler.x{number}"], tuple(shape["feature_hw"]))["y"]
        numbers.close(every(found, numbers[f"output.resampler.y{number}"]), f"output.resampler.y{number}")


def test_inf_llava_gives_the_golden_map_and_tokens(converted):
    connector, numbers = load(converted["inf-llava"]).model.connector, golden("inf-llava")
    settings = numbers.cases["settings"]
    found = test_inf_llava.numbers(connector.view_ops[0], settings, numbers["input.features"])
    numbers.close(found["fused"], "output.fused")
    weights = numbers.under("weight.")
    projector = {key: connector.adapter.linear.get_parameter(key.rpartition(".")[2]) for key in KEYS}
    views = test_inf_llava.pictures(settings, numbers["input.small_image"])
    found = test_inf_llava.encode(connector.view_ops[0], settings, views, weights | projector)
    numbers.close(every(found, numbers["output.encode_images"]), "output.encode_images")


KEYS = ("mm_projector.weight", "mm_projector.bias")


def test_llava_mini_gives_the_golden_image_token_and_prompt(converted):
    connector, numbers = load(converted["llava-mini"]).model.connector, golden("llava-mini")
    given = numbers.under("input.std_c1.")
    found = test_llava_mini.run(
        connector, numbers["weight.embed_tokens.weight"], given["features"], given["input_ids"].long()
    )
    for name in ("compressor", "image_tokens", "inputs_embeds"):
        numbers.close(getattr(found, name), f"output.std_c1.{name}")


def test_mg_llava_gives_the_golden_mixture(converted):
    part, numbers = load(converted["mg-llava"]).model.connector.view_ops[1], golden("mg-llava")
    found = test_mg_convgate.run(part, numbers["input.low"], numbers["input.high"], 24)
    for name in ("fused", "gate"):
        numbers.close(every(found[name], numbers[f"output.{name}"]), f"output.{name}")


def test_both_towers_of_mg_llava_are_those_of_their_folders(converted):
    model = load(converted["mg-llava"]).model
    pixels = torch.randn(1, 3, 96, 96)
    wanted, found = (tower(pixels, output_hidden_states=True) for tower in (convnext(), model.extra_towers["hires"]))
    torch.testing.assert_close(found.hidden_states[-1], wanted.hidden_states[-1])
    weights = model.vision_tower.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in tower_weights("mg-llava").items())


# ---- settings


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_is_the_preset_with_the_released_settings(converted, name):
    config = HiResLmmConfig.from_pretrained(converted[name])
    preset = HiResLmmConfig.from_preset(
        name.replace("-", "_"),
        config.vision_config,
        config.text_config,
        **({"extra_towers": config.extra_towers} if config.extra_towers else {}),
    )
    squares = {"mqt": "pad", "inf-llava": "pad", "llava-mini": "crop", "mg-llava": "pad"}
    views = {"views": "global"} if name == "llava-mini" else {}
    square = {"square": squares[name]} if name in squares else {}
    assert config.planner == {**preset.planner, **square, **views}
    parts = [[op["part"] for op in own.connector_config.view_ops] for own in (config, preset)]
    assert parts[0] == parts[1] and config.vision_feature_layer == -2
    assert config.connector_config.layout == preset.connector_config.layout
    assert config.question_scope == ("prompt" if name == "llava-mini" else "turn")
    if name == "llava-mini":
        (fuser,) = config.connector_config.token_ops
        text = {"num_heads": 4, "num_key_value_heads": 2, "intermediate_size": 80, "rms_norm_eps": 1e-6}
        assert text.items() <= fuser.items() and fuser["rope_theta"] == 500000 and fuser["compat"] == "release"
    if name == "mg-llava":
        assert config.extra_towers["hires"]["hidden_sizes"] == [8, 16, 40]


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
MINI_SYSTEM = (
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
PROMPTS = {
    "vicuna": "<s>SYSTEM USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:",
    "xtuner": "<s>USER: <image>\nWhat? ASSISTANT: A cat.</s>\nUSER: Why? ASSISTANT:",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nSYSTEM<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
}
SPOKEN = {
    "mqt": PROMPTS["vicuna"].replace("SYSTEM", VICUNA_SYSTEM),
    "llava-uhd": PROMPTS["vicuna"].replace("SYSTEM", VICUNA_SYSTEM),
    "inf-llava": PROMPTS["llama3"].replace("SYSTEM", VICUNA_SYSTEM),
    "llava-mini": PROMPTS["llama3"].replace("SYSTEM", MINI_SYSTEM),
    "mg-llava": PROMPTS["xtuner"],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_conversation_is_written_as_in_training_and_answered(converted, name):
    processor, model = AutoProcessor.from_pretrained(converted[name]), load(converted[name])
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert prompt == SPOKEN[name]
    inputs = processor(images=[draw(60, 100)], text=[prompt], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=2)
    assert output.shape[1] - inputs["input_ids"].shape[1] in (1, 2)
    values = json.loads((converted[name] / "generation_config.json").read_text())
    assert values["suppress_tokens"] == [model.config.image_token_id]
    ends = {processor.tokenizer.convert_tokens_to_ids("<|eot_id|>"), 1} if RELEASED[name].family == "llama3" else {1}
    found = values["eos_token_id"]
    assert set(found if isinstance(found, list) else [found]) == ends
    card = (converted[name] / "README.md").read_text()
    assert FORMATS[name].title in card if name in FORMATS else "MG-LLaVA" in card


def test_both_towers_of_mg_llava_see_the_padded_image_with_the_numbers_of_clip(converted):
    processor = AutoProcessor.from_pretrained(converted["mg-llava"]).image_processor
    clip = processor.extra_towers["hires"]
    assert clip["size"] == 768 and clip["image_mean"] == pytest.approx(list(processor.image_mean))
    batch = processor([draw(30, 90)])
    for name in ("pixel_values", "pixel_values_hires"):
        edge = batch[name][0][:, :4]  # the mean colour, which normalisation makes about zero
        assert abs(edge).max() < 0.02 and abs(batch[name]).max() > 0.1


def test_positions_of_the_prompt_fuser_are_scaled_as_those_of_the_language_model(tmp_path):
    convert("llava-mini", tmp_path / "released", tmp_path / "ours", rope_scaling=LLAMA3_SCALING)
    model = load(tmp_path / "ours")
    fuser, language = model.model.connector.token_ops[0].model, model.model.language_model
    torch.testing.assert_close(fuser.rotary_emb.inv_freq, language.rotary_emb.inv_freq)
    plain = 500000.0 ** -(torch.arange(0, 12, 2) / 12)
    assert (fuser.rotary_emb.inv_freq - plain).abs().max() > 1e-4


# ---- the way back


@pytest.mark.parametrize("name", LLAVA)
def test_the_way_back_is_key_for_key_and_bit_for_bit(converted, tmp_path, name):
    convert_to_released(name, converted[name], tmp_path / "back")
    back, wanted = tensors_of(tmp_path / "back"), released_weights(name)
    assert set(back) == set(wanted)
    same = {key: back[key].dtype == own.dtype and torch.equal(back[key], own) for key, own in wanted.items()}
    assert [key for key in wanted if not same[key]] == []
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    released = released_config(name)
    assert {key: config[key] for key in released if key != "architectures"} == {
        key: value for key, value in released.items() if key != "architectures"
    }
    convert_released(name, tmp_path / "back", tmp_path / "again")
    again, ours = tensors_of(tmp_path / "again"), tensors_of(converted[name])
    assert set(again) == set(ours) and all(torch.equal(again[key], ours[key]) for key in ours)


@pytest.mark.parametrize("name", LLAVA)
def test_without_the_report_the_configuration_tells_the_options(converted, tmp_path, name):
    shutil.copytree(converted[name], tmp_path / "ours")
    (tmp_path / "ours" / "conversion_report.json").unlink()
    convert_to_released(name, tmp_path / "ours", tmp_path / "back")
    assert set(tensors_of(tmp_path / "back")) == set(released_weights(name))
    convert_released(name, tmp_path / "back", tmp_path / "again")
    ours, again = (
        HiResLmmConfig.from_pretrained(folder).to_dict() for folder in (converted[name], tmp_path / "again")
    )
    assert {**again, "_name_or_path": ""} == {**ours, "_name_or_path": ""}


def test_mg_llava_goes_back_into_one_file_without_towers(converted, tmp_path):
    convert_to_released("mg-llava", converted["mg-llava"], tmp_path / "back")
    back, wanted = torch.load(tmp_path / "back" / "mg_llava.pth", weights_only=True)["state_dict"], mg_weights()
    assert set(back) == set(wanted) and all(torch.equal(back[key], wanted[key]) for key in wanted)


def test_tensors_in_several_number_formats_keep_theirs(tmp_path):
    weights = {
        key: value.half() if "query" in key else value.bfloat16() for key, value in released_weights("mqt").items()
    }
    convert_released("mqt", write_released(tmp_path / "released", "mqt", weights), tmp_path / "ours")
    convert_to_released("mqt", tmp_path / "ours", tmp_path / "back")
    back = tensors_of(tmp_path / "back")
    assert all(back[key].dtype == value.dtype and torch.equal(back[key], value) for key, value in weights.items())


# ---- forms


def test_stage_files_on_a_base_give_the_same_model(converted, tmp_path):
    """As the released trainer saves a first stage: without the table of positions."""
    write_config(tmp_path / "stage", "mqt")
    trained = {key: value for key, value in between_weights("mqt").items() if not key.endswith("pos_embed")}
    torch.save(trained, tmp_path / "stage" / "query_abstractor.bin")
    (tmp_path / "base").mkdir()
    tower = {key: value for key, value in released_weights("mqt").items() if "vision_tower" in key}
    save_file({**language_weights("mqt"), **tower}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    convert_released("mqt", tmp_path / "stage", tmp_path / "ours", base=tmp_path / "base")
    found, wanted = tensors_of(tmp_path / "ours"), tensors_of(converted["mqt"])
    assert set(found) == set(wanted) and all(torch.equal(found[key].float(), wanted[key]) for key in wanted)


def test_a_folder_of_safetensors_and_a_convnext_of_transformers_do_as_well(converted, tmp_path):
    files = write_mg(tmp_path / "released")
    (tmp_path / "folder").mkdir()
    save_file(mg_weights(), tmp_path / "folder" / "model.safetensors", {"format": "pt"})
    convnext().save_pretrained(tmp_path / "convnext")
    del files["source"]
    files["extra_tower"] = tmp_path / "convnext"
    convert_released("mg-llava", tmp_path / "folder", tmp_path / "ours", **files)
    found, wanted = tensors_of(tmp_path / "ours"), tensors_of(converted["mg-llava"])
    assert set(found) == set(wanted) and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_weights_that_a_stage_of_mg_llava_did_not_train_come_from_the_base(converted, tmp_path):
    files = write_mg(tmp_path / "released", {k: v for k, v in mg_weights().items() if not k.startswith("llm.")})
    convert_released("mg-llava", files.pop("source"), tmp_path / "ours", **files)
    base = load_file(files["base"] / "model.safetensors")
    found = tensors_of(tmp_path / "ours")
    assert torch.equal(found["model.language_model.norm.weight"], base["model.norm.weight"])


# ---- what is said


def test_keys_that_nobody_reads_are_listed_and_kept(converted, tmp_path):
    report = json.loads((converted["mg-llava"] / "conversion_report.json").read_text())
    assert report["unused"] == [] and "3237152" in report["keys_from"]
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    folder = write_released(tmp_path / "released", "mqt", {**released_weights("mqt"), **frequencies})
    result = CliRunner().invoke(app, ["convert", "mqt", str(folder), str(tmp_path / "ours")])
    assert result.exit_code == 0, result.output
    assert f"not used: {next(iter(frequencies))}" in result.output
    result = CliRunner().invoke(app, ["convert", "to-mqt", str(tmp_path / "ours"), str(tmp_path / "back")])
    assert result.exit_code == 0 and set(frequencies) <= set(tensors_of(tmp_path / "back"))


def test_the_commands_of_mg_llava(tmp_path):
    files = {key: str(value) for key, value in write_mg(tmp_path / "released").items()}
    arguments = ["--base", files["base"], "--vision-config", files["vision_config"]]
    arguments += ["--extra-tower", files["extra_tower"], files["source"], str(tmp_path / "ours")]
    result = CliRunner().invoke(app, ["convert", "mg-llava", *arguments])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["convert", "to-mg-llava", str(tmp_path / "ours"), str(tmp_path / "back")])
    assert result.exit_code == 0, result.output


def test_every_format_has_its_two_commands():
    assert list(COMMANDS) == list(FORMATS)
    assert {form.title for form in FORMATS.values()} == set(COMMANDS.values())
    assert all(" at " in form.origin for form in FORMATS.values())


# ---- what is refused


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("mqt", {"model_type": "llama"}, "type 'llama'; released MQT-LLaVA checkpoints are of type llava_llama"),
        ("mqt", {"mm_resampler_type": "cosine"}, "unknown option 'mm_resampler_type'"),
        ("mqt", {"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres'"),
        ("mqt", {"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type='spatial_unpad'"),
        ("llava-uhd", {"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type='mlp2x_gelu'"),
        ("inf-llava", {"mm_projector_type": "mlp3x_gelu"}, "the known types are identity, linear"),
        ("inf-llava", {"mm_projector_type": "mlp2x_gelu"}, r"missing +model\.mm_projector\.0\.weight"),
        ("llava-mini", {"model_type": "llava_llama"}, "released LLaVA-Mini checkpoints are of type llava_mini_llama"),
        ("llava-mini", {"resolution_ratio": 2}, "resolution_ratio=2 .* squares each block"),
        ("llava-mini", {"compressor_size": "1"}, "compressor_size='1'"),
        ("llava-mini", {"compressor_size": 2}, r"mis-shaped +model\.connector\.view_ops\.0\.queries"),
        ("llava-mini", {"prefusion_layer_num": 3}, r"missing +model\.prefusion_layers\.2\."),
    ],
)
def test_options_without_a_counterpart_are_refused(tmp_path, name, changes, message):
    folder = write_released(tmp_path / "released", name, **changes)
    with pytest.raises(ConversionError, match=message):
        convert_released(name, folder, tmp_path / "out")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", LLAVA)
def test_unknown_and_missing_keys_are_refused_by_name(tmp_path, name):
    weights = released_weights(name)
    (lost,) = [key for key in between_weights(name) if key.endswith(("ln_q.weight", "ln_fuse.weight"))][:1]
    extra = {"model.image_newline": torch.ones(4)}
    folder = write_released(tmp_path / "released", name, {k: v for k, v in {**weights, **extra}.items() if k != lost})
    with pytest.raises(ConversionError) as error:
        convert_released(name, folder, tmp_path / "out")
    assert "model.image_newline" in str(error.value) and lost in str(error.value)
    assert leftovers(tmp_path) == []


def test_a_checkpoint_of_another_format_is_refused_by_what_it_is(converted, tmp_path):
    with pytest.raises(ConversionError, match="type 'hires_lmm' without mm_vision_tower; released MQT-LLaVA"):
        convert_released("mqt", converted["mqt"], tmp_path / "out")
    with pytest.raises(
        ConversionError, match=r"config\.json has model_type='hires_lmm', imgque_config\.model_type=None"
    ):
        convert_fusion(converted["mqt"], tmp_path / "out")
    with pytest.raises(ConversionError, match="The format of LLaVA-UHD v1 for this model cannot be used"):
        convert_to_released("llava-uhd", converted["mqt"], tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_folders_in_the_wrong_place_are_named(tmp_path):
    files = write_mg(tmp_path / "released")
    source = files.pop("source")
    for swap, message in (
        ({"extra_tower": files["vision_config"]}, "clip is a clip_vision_model, no ConvNeXt; pass one as extra_tower"),
        ({"base": files["vision_config"]}, "clip has no tokenizer; pass the whole language model as base"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert_released("mg-llava", source, tmp_path / "out", **{**files, **swap})
    assert leftovers(tmp_path) == []


def test_what_is_no_mg_llava_is_refused(tmp_path):
    files = write_mg(tmp_path / "released", {"projector.model.0.weight": torch.ones(2, 2)})
    source = files.pop("source")
    with pytest.raises(ConversionError, match=r"mg\.pth is no MG-LLaVA checkpoint"):
        convert_released("mg-llava", source, tmp_path / "out", **files)
    with pytest.raises(ConversionError, match="pass base"):
        convert_released("mg-llava", source, tmp_path / "out", **{**files, "base": None})
    torch.save({"state_dict": mg_weights() | {"fuse_module.more": torch.ones(1)}}, source)
    with pytest.raises(ConversionError, match=r"unexpected +fuse_module\.more"):
        convert_released("mg-llava", source, tmp_path / "out", **files)
    torch.save({"state_dict": mg_weights()}, source)
    shutil.copy(source, source.with_name("second.pth"))
    with pytest.raises(ConversionError, match=r"mg\.pth, second\.pth; pass one"):
        convert_released("mg-llava", source.parent, tmp_path / "out", **files)
    weights = torch.load(files["extra_tower"] / "open_clip_pytorch_model.bin", weights_only=True)
    torch.save({**weights, "visual.trunk.stages.0.blocks.0.mlp.grn.weight": torch.ones(1)}, tmp_path / "other.bin")
    shutil.move(tmp_path / "other.bin", files["extra_tower"] / "open_clip_pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"no plain ConvNeXt[\s\S]*mlp\.grn\.weight"):
        convert_released("mg-llava", source, tmp_path / "out", **files)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("mqt", {"planner": {"name": "slime", "views": "all", "square": "pad"}}, "cannot express the planner"),
        ("mqt", {"question_scope": "prompt"}, "cannot express question_scope"),
        ("inf-llava", {"planner": {"name": "dual", "square": "pad", "n": 2}}, "cannot express the planner"),
        ("llava-mini", {"vision_feature_layer": -1, "question_scope": "turn"}, "cannot express question_scope"),
        ("mg-llava", {"extra_towers": None, "connector_config": {"view_ops": []}}, "cannot express extra towers"),
        (
            "mg-llava",
            {"planner": {"name": "multiple", "views": "global"}},
            "cannot express square of the planner=None",
        ),
    ],
)
def test_what_the_released_code_cannot_do_does_not_go_back(converted, tmp_path, name, change, message):
    folder = shutil.copytree(converted[name], tmp_path / "ours")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(ConversionError, match=message):
        convert_to_released(name, folder, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_formats_without_a_name_are_refused():
    with pytest.raises(ValueError, match="'llava' is no released format; known ones are slime, mqt"):
        convert_released("llava", "x", "y")


def test_a_convnext_of_open_clip_without_its_last_norm_gets_one_that_nobody_reads(tmp_path):
    files = write_mg(tmp_path / "released")
    path = write_open_clip(tmp_path / "second") / "open_clip_pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in weights.items() if "head.norm" not in key}, path)
    convert_released("mg-llava", files.pop("source"), tmp_path / "ours", **{**files, "extra_tower": path.parent})
    assert load(tmp_path / "ours").model.extra_towers["hires"].layernorm.weight.eq(1).all()

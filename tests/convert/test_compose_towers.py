"""New models from every family of towers: weights, numbers, layer; what was chosen is said."""

import json

import pytest
import torch
from convert_tools import no_output, tokenizer_without_image_token
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    ViTForImageClassification,
)
from typer.testing import CliRunner

from builders import make_batch, random_image, randomise, tiny_text_config
from builders.towers import TIMM_TOWERS, TOWERS, tiny_tower
from hires_lmm.cli import app
from hires_lmm.conversion import ConversionError, compose, read_settings
from hires_lmm.conversion.towers import tower_config
from hires_lmm.modeling.tower_table_hires_lmm import known_stats, tower_family


PLAIN = {"planner": {"name": "slime", "max_crops": 4}}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A language model with its tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    tokenizer = tokenizer_without_image_token()
    randomise(AutoModelForCausalLM.from_config(tiny_text_config("qwen2", vocab_size=len(tokenizer)))).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def save_tower(name: str, folder) -> torch.nn.Module:
    """A tower with clear weights as its publishers save it: one of timm without the wrapper's names."""
    tower = randomise(AutoModel.from_config(tiny_tower(name)))
    tower.save_pretrained(folder)
    if name in TIMM_TOWERS:
        tensors = load_file(folder / "model.safetensors")
        tensors = {key.removeprefix("timm_model."): value for key, value in tensors.items()}
        save_file({**tensors, "head.fc.weight": torch.zeros(3, 4)}, folder / "model.safetensors")
        values = json.loads((folder / "config.json").read_text())
        kept = ("architecture", "pretrained_cfg", "model_args", "view_size")
        kept = {key: values[key] for key in kept if key in values}
        kept["num_features"] = tower.config.hidden_size
        (folder / "config.json").write_text(json.dumps({"pretrained_cfg": {}, **kept}))
    return tower


QUICK = ("DINOv2", "ConvNeXt", "timm FastViTHD", "timm PE")


@pytest.mark.parametrize(
    "name", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in (*TOWERS, *TIMM_TOWERS)]
)
@torch.no_grad()
def test_every_family_is_composed_with_its_own_numbers_and_weights(name, text, tmp_path):
    tower = save_tower(name, tmp_path / "tower")
    report = compose(tmp_path / "tower", text, "llava_hd", tmp_path / "out", **PLAIN)
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ours, theirs = model.model.vision_tower.state_dict(), tower.state_dict()
    read = {key for key in theirs if not key.startswith(("head.", "pooler."))}
    assert read <= set(ours) and all(torch.equal(ours[key], theirs[key]) for key in read)
    has_layers = tower_family(tower.config).has_layers
    assert model.config.vision_feature_layer == (-2 if has_layers else -1)
    assert any("gives its last features alone" in each for each in report["choices"]) is not has_layers
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    stats = known_stats(tower.config)
    assert list(processor.image_processor.image_mean) == pytest.approx(stats["image_mean"])
    assert processor.image_processor.resample == stats["resample"]
    batch = make_batch(processor, [("<image>\nWho?", [random_image(90, 130)])])
    assert torch.isfinite(model(**batch).logits).all()


def test_a_classifier_loses_its_classes(text, tmp_path):
    classifier = randomise(ViTForImageClassification(tiny_tower("ViT")))
    classifier.save_pretrained(tmp_path / "vit")
    for name in ("a", "b"):
        compose(tmp_path / "vit", text, "llava_hd", tmp_path / name, **PLAIN)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())  # the pooler, which is new, as well
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "a").model.vision_tower.state_dict()
    assert all(torch.equal(model[name], value) for name, value in classifier.vit.state_dict().items())


@pytest.mark.parametrize(
    "name, kind, prefix",
    [
        ("InternViT", "internvl", "vision_tower."),
        ("InternViT", "internvl", "model.vision_tower."),
        ("AIMv2", "aimv2", "vision_model."),
    ],
)
def test_the_tower_of_a_model_of_image_and_text_is_taken_alone(name, kind, prefix, text, tmp_path):
    tower = save_tower(name, tmp_path / "tower")
    tensors = load_file(tmp_path / "tower" / "model.safetensors")
    values = json.loads((tmp_path / "tower" / "config.json").read_text())
    (tmp_path / "tower" / "config.json").write_text(json.dumps({"model_type": kind, "vision_config": values}))
    tensors = {f"{prefix}{key}": value for key, value in tensors.items()}
    save_file({**tensors, "language_model.model.norm.weight": torch.ones(4)}, tmp_path / "tower" / "model.safetensors")
    compose(tmp_path / "tower", text, "llava_hd", tmp_path / "out", **PLAIN)
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").model.vision_tower.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in tower.state_dict().items() if "head." not in key)


def test_towers_that_cannot_work_are_refused(text, tmp_path):
    for model_type, match in (
        ("pixtral", "one sequence"),
        ("swin", "merges patches"),
        ("siglip2", "fixed resolution"),
    ):
        with pytest.raises(ConversionError, match=match):
            tower_config({"model_type": model_type}, "it")
    with pytest.raises(ConversionError, match=r"vision towers can be: clip_vision_model, .*timm_wrapper"):
        tower_config({"model_type": "qwen2"}, "it")
    tower = save_tower("DINOv2", tmp_path / "tower")
    state = {key: value for key, value in tower.state_dict().items() if "layer.1." not in key}
    save_file(state, tmp_path / "tower" / "model.safetensors")
    with (
        no_output(tmp_path),
        pytest.raises(ConversionError, match=r"holds no vision tower.* it has no encoder.layer"),
    ):
        compose(tmp_path / "tower", text, "llava_hd", tmp_path / "out", **PLAIN)


# ---- what was chosen


def test_the_command_says_what_it_chose_and_sets_what_it_is_told(text, tmp_path):
    save_tower("DINOv2", tmp_path / "tower")
    command = ["compose", str(tmp_path / "out"), "--vision", str(tmp_path / "tower"), "--text", str(text)]
    command += ["--set", "connector.view_ops.0.num_queries=4", "--set", "vision_feature_layer=-1"]
    result = CliRunner().invoke(app, [*command, "--set", "planner.max_crops=2"], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.vision_feature_layer, config.planner["max_crops"]) == (-1, 2)
    assert config.connector_config.view_ops[0]["num_queries"] == 4
    said = result.output
    assert "chat template: the tokenizer has none" in said and "layer of the vision tower: -1" in said
    assert "mean [0.485, 0.456, 0.406]" in said
    result = CliRunner().invoke(app, [*command[:1], str(tmp_path / "b"), *command[2:], "--set", "depth=3"])
    assert result.exit_code == 1 and "sets no field" in result.output and not (tmp_path / "b").exists()


def test_settings_are_paths_into_a_preset():
    assert read_settings("slime", ["vision_view_size=512", "question_scope=prompt"]) == {
        "vision_view_size": 512,
        "question_scope": "prompt",
    }
    changes = read_settings("slime", ["connector.view_ops.0.num_queries=64", "connector.token_ops=[]"])
    assert changes["connector_config"]["view_ops"][0]["num_queries"] == 64
    assert changes["connector_config"]["token_ops"] == []
    assert read_settings("slime", []) == {}
    for pair, message in (
        ("depth=3", "sets no field"),
        ("vision_feature_layer", "write FIELD=VALUE"),
        ("connector.view_ops.1.num_queries=3", "has 1 there, counted from 0"),
        ("connector.view_ops.first.num_queries=3", "has 1 there, counted from 0"),
    ):
        with pytest.raises(ConversionError, match=message):
            read_settings("slime", [pair])


def test_what_a_gguf_model_leaves_behind_is_dropped_and_said(text, tmp_path):
    """transformers saves no model that has it."""
    import shutil

    save_tower("CLIP", tmp_path / "tower")
    shutil.copytree(text, tmp_path / "text")
    values = json.loads((tmp_path / "text" / "config.json").read_text())
    left = {"quantization_config": {"quant_method": "gguf"}}
    (tmp_path / "text" / "config.json").write_text(json.dumps({**values, **left}))
    report = compose(tmp_path / "tower", tmp_path / "text", "llava_hd", tmp_path / "out", **PLAIN)
    assert any("DROPPED" in each and "gguf" in each for each in report["choices"])
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert not hasattr(model.config.text_config, "quantization_config")
    model.save_pretrained(tmp_path / "again")
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].to(torch.int8)}, tmp_path / "text" / "model.safetensors")
    with pytest.raises(ConversionError, match=f"is quantised: {name} is torch.int8"):
        compose(tmp_path / "tower", tmp_path / "text", "llava_hd", tmp_path / "b", **PLAIN)

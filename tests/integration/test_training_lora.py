"""LoRA presets, saving and merging, and the modules that stay whole in 4 bit."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from builders.tiny import tiny_model
from builders.training import conversations, make_trainer, slime_config, slime_parts
from hires_lmm.training import HiResLmmCollator, Stage, get_plan, set_options
from hires_lmm.training.lora import LORA_TARGETS, connector_modules, lora_config, merge_lora, scale_adapter
from hires_lmm.training.plans import FORCED_EXPERT
from hires_lmm.training.quantization import four_bit_config, skip_modules


peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize(
    "preset, parts",
    [
        ("language_only", ("model.language_model.",)),
        ("language_and_vision", ("model.language_model.", "model.vision_tower.")),
        ("adapters", ("model.connector.",)),
    ],
)
def test_a_preset_names_all_linear_layers_of_its_parts_and_no_other(preset, parts):
    model = tiny_model(slime_config())
    matched = [name for name, _ in model.named_modules() if re.fullmatch(LORA_TARGETS[preset], name)]
    assert matched == [name for name in linear_names(model) if name.startswith(parts)] and matched
    wrapped = peft.get_peft_model(model, lora_config(model, preset, r=2))
    prefix = "base_model.model."
    adapted = [
        name for name, module in wrapped.named_modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    ]
    assert [name.removeprefix(prefix) for name in adapted] == matched


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="'all'; known presets: language_only"):
        lora_config(tiny_model(slime_config()), "all")


def test_the_connector_is_saved_whole():
    model = tiny_model(slime_config())
    assert connector_modules(model) == ["connector.view_ops.0", "connector.adapter"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base checkpoint, an adapter folder that two steps of the Trainer wrote, and the live model's logits."""
    folder = tmp_path_factory.mktemp("lora")
    model, processor = slime_parts()
    set_options(model, {FORCED_EXPERT: None})
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    model = AutoModelForImageTextToText.from_pretrained(folder / "base")
    stage = get_plan("slime", "llama3_70b_lora")[3]
    stage = Stage(**{**stage.to_dict(), "trainable": dict.fromkeys(stage.trainable, 1e-2)})
    wrapped = peft.get_peft_model(model, lora_config(model, stage.lora, r=4, alpha=8))
    trainer = make_trainer(wrapped, processor, stage, conversations(4), folder / "run", max_steps=2)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    batch = HiResLmmCollator(processor)(conversations(2))
    return folder, wrapped.eval(), batch, stage


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_only_lora_and_the_connector_were_trained(trained):
    folder, wrapped, _, stage = trained
    base = AutoModelForImageTextToText.from_pretrained(folder / "base")
    originals = {f"base_model.model.{name}": p for name, p in base.named_parameters()}
    moved = set()
    for name, parameter in wrapped.named_parameters():
        plain = name.replace("modules_to_save.default.", "").replace("base_layer.", "").replace("original_module.", "")
        if parameter.requires_grad:
            assert "lora_" in name or "modules_to_save" in name
            if "lora_B" in name or "modules_to_save" in name:
                moved.add("language_model" if "lora_B" in name else "connector")
        elif plain in originals:
            assert torch.equal(parameter, originals[plain]), name
    assert moved == {"language_model", "connector"}
    assert stage.pattern_of("base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight")


def test_the_adapter_folder_loads_through_the_auto_class(trained):
    folder, wrapped, batch, _ = trained
    base = AutoModelForImageTextToText.from_pretrained(folder / "base")
    assert not torch.allclose(logits(base, batch), logits(wrapped, batch), atol=1e-3)
    again = AutoModelForImageTextToText.from_pretrained(folder / "adapter")
    torch.testing.assert_close(logits(again, batch), logits(wrapped, batch), atol=1e-5, rtol=1e-5)


def test_merging_writes_a_whole_checkpoint(trained):
    folder, wrapped, batch, _ = trained
    merge_lora(folder / "adapter", folder / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(folder / "merged")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged, batch), logits(wrapped, batch), atol=1e-5, rtol=1e-5)
    assert AutoProcessor.from_pretrained(folder / "merged").image_tokens(60, 90) > 0
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        merge_lora(folder / "base", folder / "nothing")


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


def wrapped_model(**options) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model with an adapter of random weights in language model and tower, and the weights it stands on."""
    model = tiny_model(slime_config())
    wrapped = peft.get_peft_model(model, lora_config(model, "language_and_vision", r=4, alpha=32, **options))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped, {name: layer.weight.detach().clone() for name, layer in lora_layers(wrapped).items()}


def merged_weights(wrapped: nn.Module, names) -> dict[str, torch.Tensor]:
    merged = dict(wrapped.merge_and_unload().named_modules())
    return {name: merged[name.removeprefix("base_model.model.")].weight.detach() for name in names}


@pytest.mark.parametrize("factor", [0.0, 0.125, 0.3, 1.0])
@pytest.mark.parametrize("options, scale", [({}, 8), ({"use_rslora": True}, 16)])
def test_scaling_an_adapter_weighs_what_it_added_and_no_other_weight(factor, options, scale, tmp_path):
    """W = W_base + factor · alpha / r · B A, written out here, after merging and after saving."""
    wrapped, base = wrapped_model(**options)
    layers = lora_layers(wrapped)
    added = {
        name: scale * (each.lora_B["default"].weight @ each.lora_A["default"].weight).detach()
        for name, each in layers.items()
    }
    assert scale_adapter(wrapped, factor) is wrapped
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny_model(slime_config()), tmp_path / "adapter")
    for model in (wrapped, again):
        found = merged_weights(model, base)
        assert any("vision_tower" in name for name in found) and any("language_model" in name for name in found)
        for name, weight in found.items():
            torch.testing.assert_close(weight, base[name] + factor * added[name], rtol=1e-5, atol=1e-6)


def test_scaling_twice_multiplies_and_alphas_of_single_layers_follow():
    wrapped, _ = wrapped_model(alpha_pattern={"up_proj": 8})
    before = {name: layer.scaling["default"] for name, layer in lora_layers(wrapped).items()}
    assert set(before.values()) == {8, 2}
    scale_adapter(scale_adapter(wrapped, 0.5), 0.25)
    assert {name: layer.scaling["default"] for name, layer in lora_layers(wrapped).items()} == {
        name: scale / 8 for name, scale in before.items()
    }
    config = wrapped.peft_config["default"]
    assert (config.lora_alpha, config.alpha_pattern) == (4, {"up_proj": 1})


def test_a_scaled_adapter_folder_gives_the_logits_of_the_scaled_model(trained, tmp_path):
    """By the command; what the connector learnt stays, the state of the Trainer is left out."""
    from hires_lmm.cli import app

    folder, _, batch, _ = trained
    checkpoint = Path(shutil.copytree(folder / "adapter", tmp_path / "checkpoint-2"))
    for name in ("optimizer.pt", "trainer_state.json"):
        (checkpoint / name).write_text("{}")
    out = tmp_path / "scaled"
    done = CliRunner().invoke(app, ["scale-adapter", str(checkpoint), str(out), "--factor", "0.125"])
    assert done.exit_code == 0, done.output
    assert not [file.name for file in out.iterdir() if file.name in ("optimizer.pt", "trainer_state.json")]
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 1
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    whole = logits(model, batch)
    for layer in lora_layers(model).values():
        layer.lora_B["default"].weight.data.mul_(0.125)
    assert not torch.allclose(logits(model, batch), whole, atol=1e-3)
    scaled = AutoModelForImageTextToText.from_pretrained(out)
    torch.testing.assert_close(logits(scaled, batch), logits(model, batch), atol=1e-5, rtol=1e-5)
    merge_lora(out, tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, batch), logits(model, batch), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_scaled_is_named(trained, tmp_path):
    wrapped, _ = wrapped_model()
    for factor in (-0.5, float("nan"), float("inf"), True, "0.1"):
        with pytest.raises(ValueError, match=f"factor={factor!r} must be a number of at least 0"):
            scale_adapter(wrapped, factor)
    with pytest.raises(ValueError, match="HiResLmmForConditionalGeneration holds no LoRA adapter"):
        scale_adapter(tiny_model(slime_config()), 0.5)
    with pytest.raises(ValueError, match=r"base' holds no adapter_config\.json"):
        scale_adapter(trained[0] / "base", 0.5, tmp_path / "nothing")
    with pytest.raises(ValueError, match="name a new folder"):
        scale_adapter(trained[0] / "adapter", 0.5)
    with pytest.raises(FileExistsError):
        scale_adapter(trained[0] / "adapter", 0.5, tmp_path)
    wrapped.merge_adapter()
    with pytest.raises(ValueError, match="merged into the weights; call unmerge_adapter"):
        scale_adapter(wrapped, 0.5)
    model = tiny_model(slime_config())
    with pytest.raises(ValueError, match="The adapter is DoRA"):
        scale_adapter(peft.get_peft_model(model, lora_config(model, r=2, use_dora=True)), 0.5)


def test_an_expert_that_the_adapter_folder_could_not_hold_is_refused():
    model, _ = slime_parts()
    set_options(model, {FORCED_EXPERT: "mlp"})
    wrapped = peft.get_peft_model(model, lora_config(model, r=2))
    with pytest.raises(ValueError, match=r"set_options\(model, \{.*forced_expert': None\}\).*before get_peft_model"):
        Stage("x", {"connector": 1e-3}, settings={FORCED_EXPERT: None}).apply(wrapped)


@pytest.mark.parametrize("quantize_tower", [False, True])
def test_the_skip_list_leaves_head_connector_and_tower_whole(quantize_tower):
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = tiny_model(slime_config())
    config = four_bit_config(quantize_tower)
    assert config.load_in_4bit and config.llm_int8_skip_modules == skip_modules(quantize_tower)
    converted = [name for name in linear_names(model) if should_convert_module(name, config.llm_int8_skip_modules)]
    parts = ("model.language_model.", "model.vision_tower.") if quantize_tower else ("model.language_model.",)
    assert converted == [name for name in linear_names(model) if name.startswith(parts)]

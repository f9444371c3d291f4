"""Extra towers: known by name to stages, LoRA, quantisation, cached features, export and loading."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, ConvNextConfig

from builders import (
    geometry_of,
    make_batch,
    random_image,
    randomise,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_vision_config,
)
from builders.training import conversations, make_trainer
from hires_lmm.conversion import export
from hires_lmm.training import HiResLmmCollator, Stage, cache_vision_features, get_plan
from hires_lmm.training.lora import LORA_TARGETS, connector_modules, lora_config
from hires_lmm.training.parameters import learnable_parameters, list_parts
from hires_lmm.training.quantization import skip_modules


NEWLINE = {"newline": {"place": "token_row_end", "on": "crops"}}
ORDER = {"layout": {"order": ["global", "crops", "detail"], "separators": NEWLINE}}
MLP = {"fine": {"part": "mlp"}}
FINE, WIDE = "extra_towers.fine", "vision_tower"


def convnext():
    return ConvNextConfig(image_size=64, patch_size=4, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 2, 1])


def siglip(**changes):
    return tiny_vision_config("siglip", image_size=84, hidden_size=16, **changes)


def parts(tower=None, seed=0, **connector):
    """A LLaVA-NeXT whose sequence ends with the tokens of a second tower, in training mode, and its processor."""
    towers = {"fine": siglip() if tower is None else tower}
    config = tiny_config("llava_next", extra_towers=towers, connector_config={**ORDER, **connector})
    return tiny_model(config, seed).train(), tiny_processor(config, "chatml")


def batch_of(processor, **options):
    return HiResLmmCollator(processor, **options)(conversations(2))


@torch.no_grad()
def loss_of(model, batch):
    return model(**batch).loss.item()


@pytest.mark.parametrize("tower", [siglip, convnext], ids=["siglip", "convnext"])
def test_all_that_a_stage_may_train_of_a_tower_gets_a_gradient(tower):
    model, processor = parts(tower())
    Stage("all", dict.fromkeys((WIDE, FINE, "connector", "language_model", "lm_head"), 1e-3)).apply(model)
    text = processor(text=["a b"], return_tensors="pt")
    for batch in (batch_of(processor), {**text, "labels": text["input_ids"]}):
        model.zero_grad()
        model(**batch).loss.backward()
        assert not [name for name, parameter in learnable_parameters(model) if parameter.grad is None]
    assert list_parts(model) == [
        "vision_tower", FINE, "connector.adapter.mlp", "connector.tower_adapters.fine", "connector.layout.separators",
        "language_model", "lm_head",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "stage",
    [
        Stage("adapter", {"connector.tower_adapters.fine": 1e-2}),
        Stage("fine", {FINE: 1e-2, "connector": 1e-3}),
        Stage("main", {WIDE: 1e-2}),
        get_plan("end_to_end", tower_rate={FINE: 1e-2})[1],
        Stage("global", {FINE: 1e-2, "connector": 1e-3}, views="global"),
    ],
    ids=lambda stage: stage.name,
)
def test_a_stage_moves_the_parts_that_it_names_and_no_bit_of_the_others(stage, tmp_path):
    model, processor = parts()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_trainer(model, processor, stage, conversations(4), tmp_path, max_steps=2).train()
    moved = {
        name.removeprefix("model.")
        for name, value in model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert moved and all(name.startswith(tuple(stage.trainable)) for name in moved)
    for pattern in set(stage.trainable) - {"lm_head"}:
        assert any(name.startswith(pattern) for name in moved), pattern


def test_a_tower_rate_by_name_is_that_of_the_tower(tmp_path):
    stage = get_plan("slime", tower_rate={FINE: 3e-6, WIDE: 2e-6})[3]
    assert stage.trainable[FINE] == 3e-6 and stage.trainable[WIDE] == 2e-6
    assert get_plan("fusion", tower_rate={FINE: 3e-6})[0].trainable[FINE] == 3e-6
    with pytest.raises(ValueError, match="tower_rate names 'fine'; towers are 'vision_tower' and 'extra_towers"):
        get_plan("vlsa", tower_rate={"fine": 1e-6})


def test_a_stage_on_crops_runs_no_extra_tower():
    """It sees whole images, as the global view does."""
    compress = {"part": "query_compressor", "on": "crops", "num_queries": 4}
    config = tiny_config(
        "slime", extra_towers={"fine": siglip()}, planner={"name": "slime", "max_crops": 4},
        connector_config={**ORDER, "view_ops": [compress], "token_ops": [], "tower_adapters": MLP},
    )  # fmt: skip
    model, processor = tiny_model(config).train(), tiny_processor(config, "chatml")
    Stage("crops", {"connector.view_ops": 1e-3}, views="crops").apply(model)
    model.model.extra_towers["fine"].register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    batch = batch_of(processor, views="crops")
    assert {"pixel_values", "pixel_values_fine"} < set(batch)
    model(**batch).loss.backward()
    text = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    model(**HiResLmmCollator(processor, views="crops")(text)).loss.backward()
    assert all(p.grad is not None for p in model.model.connector.view_ops.parameters())


@pytest.mark.parametrize("tower", [siglip, convnext], ids=["siglip", "convnext"])
def test_training_on_cached_features_runs_no_tower_and_has_the_same_loss(tower, tmp_path):
    model, processor = parts(tower())
    images = [image for example in conversations(2) for image in example["images"]]
    store = cache_vision_features(model, processor, images, tmp_path)
    plain, cached = batch_of(processor), batch_of(processor, features=store)
    expected = loss_of(model, plain)
    assert {"vision_features", "vision_features_fine"} < set(cached) and not [n for n in cached if "pixel" in n]
    text = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    silent = HiResLmmCollator(processor, features=store)(text)
    without = loss_of(model, HiResLmmCollator(processor)(text))
    for each in (model.model.vision_tower, model.model.extra_towers["fine"]):
        each.register_forward_pre_hook(lambda *_: pytest.fail("a tower ran"))
    assert loss_of(model, cached) == pytest.approx(expected, abs=1e-6)
    assert loss_of(model, silent) == pytest.approx(without, abs=1e-6)
    other, _ = parts(tower())
    randomise(other.model.extra_towers["fine"], 5)
    with pytest.raises(ValueError, match="was made with towers="):
        cache_vision_features(other, processor, images, tmp_path)
    wrong = {**cached, "vision_features_fine": cached["vision_features_fine"][:1]}
    with pytest.raises(ValueError, match=r"vision_features_fine has the shape \(1, .*one row a global view"):
        model(**wrong)
    with pytest.raises(ValueError, match="vision_features came without vision_features_fine"):
        model(**{**{name: v for name, v in cached.items() if name != "vision_features_fine"},
                 "pixel_values_fine": plain["pixel_values_fine"]})  # fmt: skip


def test_views_of_an_extra_tower_are_looked_at_as_those_of_the_main_one():
    model, processor = parts()
    batch = batch_of(processor)
    batch["pixel_values_fine"][1, 0, 0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"pixel_values_fine holds values that are NaN or infinite, in the views \[1\]"
    ):
        model(**batch)


def linear_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("tower", [siglip, convnext], ids=["siglip", "convnext"])
def test_lora_and_skip_lists_name_every_tower(tower):
    from transformers.quantizers.quantizers_utils import should_convert_module

    model, _ = parts(tower())
    towers = ("model.vision_tower.", "model.extra_towers.")
    for preset, own in (("language_only", ()), ("language_and_vision", towers)):
        pattern = re.compile(LORA_TARGETS[preset])
        matched = [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
        assert matched == [name for name in linear_names(model) if name.startswith(("model.language_model.", *own))]
    for quantize_tower, own in ((False, ()), (True, towers)):
        skipped = skip_modules(quantize_tower)
        converted = [name for name in linear_names(model) if should_convert_module(name, skipped)]
        assert converted == [name for name in linear_names(model) if name.startswith(("model.language_model.", *own))]
    names = ["connector.adapter", "connector.tower_adapters.fine", "connector.layout"]
    assert connector_modules(model) == names


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
def test_lora_on_towers_merges_to_the_trained_model(tmp_path):
    peft = pytest.importorskip("peft")
    model, processor = parts()
    wrapped = peft.get_peft_model(model, lora_config(model, "language_and_vision", r=2, alpha=4))
    stage = Stage("lora", {FINE: 1e-2, "connector.tower_adapters": 1e-2, "language_model": 1e-2})
    make_trainer(wrapped, processor, stage, conversations(4), tmp_path, max_steps=2).train()
    learned = {name: p for name, p in wrapped.named_parameters() if "lora_B" in name and "extra_towers.fine" in name}
    assert learned and any(p.abs().sum() > 0 for p in learned.values())
    batch = batch_of(processor)
    expected = loss_of(wrapped.eval(), batch)
    merged = wrapped.merge_and_unload()
    assert loss_of(merged.eval(), batch) == pytest.approx(expected, abs=1e-5)
    fresh = parts()[0].eval()
    assert abs(loss_of(fresh, batch) - expected) > 1e-3


@torch.no_grad()
def test_a_checkpoint_exports_with_every_tower(tmp_path):
    model, processor = parts()
    model.eval().save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    export(tmp_path / "own", tmp_path / "out")
    batch = make_batch(processor, [("<image>a", [random_image(90, 60)])])
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", attn_implementation="eager")
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)
    fine = loaded.model.extra_towers["fine"]
    assert fine.config._attn_implementation == "eager" and "SiglipEncoderLayer" in loaded._no_split_modules
    assert not [name for name in loaded.state_dict() if "head." in name and "lm_head" not in name]


@pytest.mark.parametrize(
    "towers, match",
    [
        ({"keys": "clip"}, "extra_towers has the name 'keys'"),
        ({"a.b": "clip"}, "extra_towers has the name 'a.b'"),
        ({"vision_tower": "clip"}, "extra_towers has the name 'vision_tower'"),
        ({"fine": {"hidden_size": 8}}, "extra_towers.fine has no model_type"),
        ({"fine": 7}, "extra_towers.fine=7 is no configuration"),
        ({"fine": {"model_type": "clip_vision_model", "image_size": 0}}, "extra_towers.fine.image_size=0"),
        ({"fine": "clip", "wide": "siglip"}, "Tokens of the views 'detail' come from two towers"),
    ],
)
def test_towers_that_cannot_be_are_refused_by_name(towers, match):
    given = {name: tiny_vision_config(each) if isinstance(each, str) else each for name, each in towers.items()}
    with pytest.raises(ValueError, match=match):
        tiny_config("llava_next", extra_towers=given, connector_config=ORDER)


def test_a_tower_has_an_adapter_of_its_own():
    model, processor = parts(tower_adapters={"fine": {"part": "query_former", "num_queries": 9, "num_heads": 2}})
    batch = make_batch(processor, [("<image>a", [random_image(90, 60)])])
    pixels = batch["pixel_values_fine"]
    with torch.no_grad():
        states = model.model.extra_towers["fine"](pixels, output_hidden_states=True).hidden_states[-1]
        wanted = model.model.connector.tower_adapters["fine"](states, 4)[0]
        found = model.eval().model.get_image_features(**geometry_of(batch), pixel_values_fine=pixels).pooler_output[0]
    torch.testing.assert_close(found[-9:], wanted)
    with pytest.raises(ValueError, match="'mixture' mixes on 'global' views of the main tower, and there are none"):
        parts(adapter={"part": "mixture"})


def test_a_tower_that_nothing_reads_is_refused():
    with pytest.raises(ValueError, match=r"Nothing reads the extra tower 'fine': add 'detail' to layout\.order"):
        tiny_config("llava_next", extra_towers={"fine": siglip()})

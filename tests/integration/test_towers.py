"""Every family of vision towers: its features, where it stops, what learns, what it cannot do."""

import copy
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModel
from transformers.image_utils import PILImageResampling

from builders import make_batch, tiny_config, tiny_processor
from builders.towers import TIMM_TOWERS, TOWERS, has_timm, tiny_tower
from families import towers
from hires_lmm import HiResLmmConfig
from hires_lmm.modeling.bases_hires_lmm import Needs
from hires_lmm.modeling.compat_hires_lmm import layers_of
from hires_lmm.modeling.tower_table_hires_lmm import known_stats, prefix_tokens, tower_grid
from hires_lmm.modeling.towers_hires_lmm import build_tower, class_products, run_tower
from hires_lmm.training import Stage
from hires_lmm.training.parameters import part_name


ALL = [*TOWERS, *TIMM_TOWERS]
LAYERED = [name for name in TOWERS if "ConvNeXt" not in name]
MAPS = [name for name in TOWERS if "ConvNeXt" in name]


def built(name: str):
    """A tiny tower with clear weights."""
    model = towers.tower_model(name)
    return model.model.vision_tower


def pixels(config, side: int | None = None) -> torch.Tensor:
    side = config.view_size if side is None and hasattr(config, "view_size") else side or config.image_size
    side = side[0] if isinstance(side, list) else side
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))


def count_runs(tower) -> list[int]:
    """A list that grows by the number of each layer that runs."""
    runs: list[int] = []
    for number, layer in enumerate(layers_of(tower)):
        layer.register_forward_hook(lambda *_, number=number: runs.append(number))
    return runs


# ---- features


@pytest.mark.parametrize("name", LAYERED)
@torch.no_grad()
def test_features_are_those_of_the_layer_to_the_bit_and_no_later_layer_runs(name):
    tower = built(name)
    views, before = pixels(tower.config), prefix_tokens(tower.config)
    wanted = tower(views, output_hidden_states=True, return_dict=True).hidden_states
    runs = count_runs(tower)
    for layer in (-1, -2, -3, 1, 3):
        runs.clear()
        found = run_tower(tower, views, layer)
        assert torch.equal(found.features, wanted[layer][:, before:])
        assert found.features.shape[1] == 16 and len(wanted) == 4
        assert torch.equal(found.output.last_hidden_state, wanted[layer])
        assert runs == list(range(layer % 4))


@torch.no_grad()
def test_whoever_asks_for_all_layers_gets_them():
    tower = built("CLIP")
    views, runs = pixels(tower.config), count_runs(tower)
    wanted = tower(views, output_hidden_states=True, return_dict=True)
    runs.clear()
    for asked in ({"output_hidden_states": True}, {"output_attentions": True}):
        found = run_tower(tower, views, 1, **asked).output
        assert torch.equal(found.last_hidden_state, wanted.hidden_states[1]) and runs == [0, 1, 2]
        runs.clear()
    tower.config.output_hidden_states = True
    assert len(run_tower(tower, views, 1).output.hidden_states) == 4
    tower.config.output_hidden_states = False
    assert torch.equal(run_tower(tower, views, 1, Needs(layers=(-1,))).hidden[-1], wanted.hidden_states[-1][:, 1:])
    runs.clear()
    run_tower(tower, views, 1, Needs(scores=("cls_logits",)))
    assert runs == [0, 1]  # what enters the last layer is enough
    for other in (copy.deepcopy(tower), pickle.loads(pickle.dumps(AutoModel.from_config(tower.config)))):
        assert len(layers_of(other)) == 3
    assert "encoder.layers.2.mlp.fc1.weight" in tower.state_dict()


@torch.no_grad()
def test_a_tower_that_is_spread_over_processes_runs_whole(monkeypatch):
    tower = built("CLIP")
    runs = count_runs(tower)
    monkeypatch.setattr("hires_lmm.modeling.towers_hires_lmm.is_sharded", lambda module: True)
    run_tower(tower, pixels(tower.config), 1)
    assert runs == [0, 1, 2]


@pytest.mark.parametrize("name", [*MAPS, *TIMM_TOWERS])
@torch.no_grad()
def test_features_of_maps_are_the_last_map_row_by_row(name):
    tower = built(name)
    views = pixels(tower.config)
    last = tower(views, return_dict=True).last_hidden_state
    if "convnext" in tower.config.model_type:
        last = tower(views, output_hidden_states=True, return_dict=True).hidden_states[-1]
    rows, cols = tower_grid(tower.config)
    found = run_tower(tower, views, -1).features
    assert found.shape[1] == rows * cols
    if last.ndim == 4:
        for row, col in ((0, 0), (0, 1), (1, 0)):
            assert torch.equal(found[:, row * cols + col], last[:, :, row, col])
    else:
        assert torch.equal(found, last[:, 1:])


@pytest.mark.parametrize("name", [name for name in TOWERS if name != "AIMv2"])
@torch.no_grad()
def test_views_may_have_another_size_than_the_tower_was_made_for(name):
    side = 96 if name in MAPS else 84
    model = towers.tower_model(name, vision_view_size=side)
    tower = model.model.vision_tower
    views = pixels(tower.config, side)
    free = {} if name in MAPS else {"interpolate_pos_encoding": True}
    wanted = tower(views, output_hidden_states=True, return_dict=True, **free).hidden_states
    found = run_tower(tower, views, model.config.vision_feature_layer).features
    last = wanted[model.config.vision_feature_layer]
    last = last.flatten(2).mT if last.ndim == 4 else last[:, prefix_tokens(tower.config) :]
    assert torch.equal(found, last)
    batch = make_batch(tiny_processor(model.config), towers.samples(model))
    assert batch["pixel_values"].shape[2] == side and torch.isfinite(model(**batch).logits).all()
    assert HiResLmmConfig.from_dict(model.config.to_dict()).view_size == side


@pytest.mark.parametrize("name", ["DINOv3 ViT", "InternViT", "ConvNeXt v2"])
def test_views_of_unequal_size_give_in_a_batch_what_they_give_alone(name):
    layout = {"order": ["crops", "global"], "crop_order": "views"}
    changes = {"planner": {"name": "llava_uhd"}, "connector_config": {"layout": layout}}
    model = towers.tower_model(name, "llava_uhd", **changes)
    batch = make_batch(tiny_processor(model.config), towers.samples(model))
    assert len(set(map(tuple, batch["view_positions"][:, 5:7].tolist()))) > 1
    assert towers.is_single(model)


@pytest.mark.parametrize("name", ["CLIP", "DINOv2", "DINOv2 with registers", "ViT"])
@torch.no_grad()
def test_scores_of_the_class_token_are_the_attention_that_the_tower_computes(name):
    tower = built(name)
    tower.set_attn_implementation("eager")
    views = pixels(tower.config)
    output = tower(views, output_hidden_states=True, output_attentions=True, return_dict=True)
    products = class_products(tower, output.hidden_states)
    torch.testing.assert_close(products.softmax(dim=-1), output.attentions[-1][:, :, 0].float())
    scores = run_tower(tower, views, -2, Needs(scores=("cls_probabilities",))).scores["cls_probabilities"]
    wanted = output.attentions[-1][:, :, 0].mean(dim=1)[:, prefix_tokens(tower.config) :]
    torch.testing.assert_close(scores, wanted)


# ---- training


@pytest.mark.parametrize("name, layer", [*((name, -1) for name in ALL), *((name, -2) for name in LAYERED)])
def test_a_stage_trains_what_a_gradient_reaches(name, layer):
    """So no parameter of a trained tower keeps processes waiting: neither a mask token nor a pooling head."""
    model = towers.tower_model(name, vision_feature_layer=layer)
    batch = make_batch(tiny_processor(model.config), towers.samples(model)[:1])
    model(**batch).logits.sum().backward()
    named = model.model.vision_tower.named_parameters()
    reached = {f"vision_tower.{name}" for name, parameter in named if parameter.grad is not None}
    chosen = Stage("mine", {"vision_tower": 1e-4}).parameters(model)["vision_tower"]
    assert {part_name(name) for name, _ in chosen} == reached


def test_mask_tokens_are_there_and_rest():
    for name in ("DINOv2", "DINOv2 with registers", "DINOv3 ViT", "InternViT"):
        parameters = dict(built(name).named_parameters())
        assert any(name.endswith("mask_token") for name in parameters)


@pytest.mark.parametrize("name", ["CLIP", "DINOv3 ViT", *TIMM_TOWERS])
def test_checkpointing_changes_no_gradient(name):
    """DINOv3 would move its positions at random in training."""
    model = towers.tower_model(name).train()
    batch = make_batch(tiny_processor(model.config), towers.samples(model)[:1])
    found, kind = [], "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    for is_on in (False, True):
        if is_on:
            getattr(model, f"{kind}_checkpointing_enable")()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        found.append({name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None})
        model.zero_grad()
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
    if name == "timm ViT":
        assert model.model.vision_tower.timm_model.grad_checkpointing
        getattr(model, f"{kind}_checkpointing_disable")()
        assert not model.model.vision_tower.timm_model.grad_checkpointing


def test_batch_norms_of_a_tower_keep_their_statistics():
    """FastViTHD has 44 of them; in training they would change with every batch, in a frozen tower too."""
    model = towers.tower_model("timm FastViTHD")
    before = {name: value.clone() for name, value in model.named_buffers()}
    batch = make_batch(tiny_processor(model.config), towers.samples(model)[:1])
    with torch.no_grad():
        wanted = model(**batch, return_logits=True).logits
        found = model.train()(**batch, return_logits=True).logits
    torch.testing.assert_close(found, wanted)
    assert sum(name.endswith("running_mean") for name in before) > 3
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@pytest.mark.parametrize("name", ["ConvNeXt", "timm ViT"])
def test_towers_without_attention_of_their_own_go_with_any(name):
    model = towers.tower_model(name)
    batch = make_batch(tiny_processor(model.config), towers.samples(model)[:1])
    with torch.no_grad():
        found = [
            (model.set_attn_implementation(kind), model(**batch).logits)[1] for kind in ("eager", "sdpa", "eager")
        ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert model.config.text_config._attn_implementation == "eager"


# ---- numbers of image processors


STATS = {
    "clip_vision_model": ("0.4815 0.4578 0.4082", "0.2686 0.2613 0.2758", "BICUBIC"),
    "siglip_vision_model": ("0.5 0.5 0.5", "0.5 0.5 0.5", "BICUBIC"),
    "dinov2": ("0.485 0.456 0.406", "0.229 0.224 0.225", "BICUBIC"),
    "dinov2_with_registers": ("0.485 0.456 0.406", "0.229 0.224 0.225", "BICUBIC"),
    "dinov3_vit": ("0.485 0.456 0.406", "0.229 0.224 0.225", "BILINEAR"),
    "vit": ("0.5 0.5 0.5", "0.5 0.5 0.5", "BILINEAR"),
    "aimv2_vision_model": ("0.4815 0.4578 0.4082", "0.2686 0.2613 0.2758", "BICUBIC"),
    "mlcd_vision_model": ("0.4815 0.4578 0.4082", "0.2686 0.2613 0.2758", "BICUBIC"),
    "internvl_vision": ("0.485 0.456 0.406", "0.229 0.224 0.225", "BICUBIC"),
    "convnext": ("0.485 0.456 0.406", "0.229 0.224 0.225", "BICUBIC"),
    "convnextv2": ("0.485 0.456 0.406", "0.229 0.224 0.225", "BICUBIC"),
    "dinov3_convnext": ("0.485 0.456 0.406", "0.229 0.224 0.225", "BILINEAR"),
}
"""Of the image processors that come with the published weights."""


@pytest.mark.parametrize("name", TOWERS)
def test_each_family_brings_its_own_numbers(name):
    config = tiny_config("slime", vision=tiny_tower(name), vision_feature_layer=-1)
    processor = tiny_processor(config).image_processor
    mean, std, resample = STATS[config.vision_config.model_type]
    assert processor.image_mean == pytest.approx([float(value) for value in mean.split()], abs=1e-4)
    assert processor.image_std == pytest.approx([float(value) for value in std.split()], abs=1e-4)
    assert processor.resample == PILImageResampling[resample]


def timm_config(**changes):
    values = {"model_type": "timm_wrapper", "architecture": "resnet18", "hidden_size": 512, "patch_size": 32}
    return AutoConfig.for_model(**{**values, **changes})


def test_timm_towers_bring_those_of_their_checkpoint():
    said = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "input_size": [3, 288, 288]}
    config = tiny_config("slime", vision=timm_config(pretrained_cfg=said), vision_feature_layer=-1)
    assert (config.view_size, config.patch_grid, config.vision_width) == (288, (9, 9), 512)
    processor = tiny_processor(config).image_processor
    assert (processor.view_size, processor.patch_size) == (288, 32)
    assert list(processor.image_mean) == [0.1, 0.2, 0.3] and list(processor.image_std) == [0.4, 0.5, 0.6]
    assert processor.resample == PILImageResampling.BILINEAR
    fast = tiny_config(
        "slime", vision=AutoConfig.for_model("timm_wrapper", architecture="fastvit_mci3"), vision_feature_layer=-1
    )
    assert (fast.view_size, fast.patch_grid, fast.vision_width) == (1024, (16, 16), 3072)
    assert known_stats(fast.vision_config)["image_mean"] == (0.0, 0.0, 0.0)
    assert known_stats(fast.vision_config)["image_std"] == (1.0, 1.0, 1.0)
    again = HiResLmmConfig.from_dict(fast.to_dict())
    assert (again.view_size, again.patch_grid, again.vision_width) == (1024, (16, 16), 3072)


# ---- refusals


def test_lists_of_sides_are_squares():
    config = tiny_config("slime", vision=tiny_tower("InternViT"))
    assert (config.view_size, config.patch_size, config.patch_grid) == (56, 14, (4, 4))
    vision = AutoConfig.for_model("internvl_vision", image_size=[56, 84], patch_size=[14, 14])
    with pytest.raises(ValueError, match=r"vision_config.image_size=.*56, 84.* is no square"):
        tiny_config("slime", vision=vision)


REFUSED = {
    "pixtral": "one sequence",
    "qwen2_vl_vision": "one sequence",
    "qwen2_5_vl_vision": "one sequence",
    "qwen3_vl_vision": "one sequence",
    "qwen3_vl_moe_vision": "one sequence",
    "qwen3_5_vision": "one sequence",
    "siglip2_vision_model": "siglip2-so400m-patch14-384",
    "swin": "merges patches",
    "swinv2": "merges patches",
    "hiera": "merges patches",
    "pvt": "merges patches",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_towers_that_cannot_work_are_refused_with_the_reason(model_type):
    tower = AutoConfig.for_model(model_type)
    with pytest.raises(ValueError, match=f"{tower.model_type}.* does not work here: .*{REFUSED[model_type]}"):
        HiResLmmConfig.from_preset("slime", vision_config=tower)


ODD = {
    "a layer of maps": ("ConvNeXt", {}, "'convnext' gives its last features alone; pass vision_feature_layer=-1"),
    "another size": (
        "AIMv2",
        {"vision_view_size": 84},
        "views of 84 pixels, but a tower of type 'aimv2_vision_model' takes views of 56 alone",
    ),
    "unequal views": ("AIMv2", {"unequal_views": True}, "one of type 'aimv2_vision_model' takes its own alone"),
    "another stride": ("CLIP", {"vision_patch_size": 16}, "vision_patch_size=16, but .* has patches of 14"),
    "scores": (
        "MLCD",
        {"connector_config": {"token_ops": [{"part": "globalcom2"}]}},
        "needs cls_logits, but a tower of type 'mlcd_vision_model' has no class token",
    ),
    "layer ops of maps": (
        "ConvNeXt",
        {"vision_feature_layer": -1, "connector_config": {"layer_ops": [{"part": "slice_restore", "layers": [0]}]}},
        "A layer op of the vision tower needs layers to run behind, which a tower of type 'convnext' does not show",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_what_a_tower_cannot_do_is_refused_by_name(case):
    name, changes, message = ODD[case]
    with pytest.raises(ValueError, match=message):
        tiny_config("slime", vision=tiny_tower(name), **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "image_size=None of a 'timm_wrapper' must be an integer above 0; name it .*vision_view_size"),
        ({"patch_size": None, "image_size": 224}, "patch_size=None of a 'timm_wrapper'.*vision_patch_size"),
        ({"hidden_size": None, "image_size": 224}, "hidden_size=None of a 'timm_wrapper'"),
    ],
)
def test_a_timm_tower_must_say_its_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("slime", vision=timm_config(**changes), vision_feature_layer=-1)
    known = {"vision_feature_layer": -1, "vision_view_size": 224, "vision_patch_size": 32}
    vision = timm_config(**{**changes, "hidden_size": 512})
    assert tiny_config("slime", vision=vision, **known).patch_grid == (7, 7)


@pytest.mark.skipif(not has_timm(), reason="timm is not installed")
def test_a_timm_tower_must_be_what_its_configuration_says():
    for changes, message in (
        ({"architecture": "resnet18", "hidden_size": 256}, "resnet18 has hidden_size=512, not 256"),
        ({"architecture": "resnet18", "patch_size": 16}, "resnet18 has patch_size=32, not 16"),
        ({"architecture": "swin_tiny_patch4_window7_224", "hidden_size": 768}, "shrinks its maps as Swin"),
    ):
        with pytest.raises(ValueError, match=message):
            build_tower(timm_config(image_size=224, **changes))
    vision = copy.deepcopy(tiny_tower("timm ViT"))
    vision.view_size = 84
    with pytest.raises(ValueError, match=r"takes views of 56 pixels alone, not 84.*dynamic_img_size"):
        build_tower(vision)
    vision.model_args = {**vision.model_args, "dynamic_img_size": True}
    tower = build_tower(vision)
    assert run_tower(tower, torch.zeros(1, 3, 84, 84), -1).features.shape == (1, 36, 32)


# ---- whole models


@pytest.mark.parametrize("name", ["DINOv2 with registers", "timm FastViTHD"])
def test_a_row_of_the_table_is_what_is_found(name):
    tiny_tower(name)
    assert towers.read_rows()[name] == towers.row(name)

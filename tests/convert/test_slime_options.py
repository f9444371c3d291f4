"""Every option of the released configuration is read, listed as irrelevant, or refused."""

import json

import pytest
import torch
from convert_tools import GOLDEN, convert_slime, convert_to_slime, golden_config, tensors_of, write_released
from torch import nn
from transformers import AutoModelForImageTextToText

from hires_lmm.conversion import ConversionError
from hires_lmm.conversion.slime_options import connector_settings


def chain(**changes) -> dict:
    return connector_settings(golden_config(**changes))["connector_config"]


def test_the_golden_options():
    settings = connector_settings(golden_config())
    assert settings["planner"] == {"name": "slime_release", "global_view": "squeeze"}
    assert settings["question_scope"] == "prompt" and settings["vision_feature_layer"] == -2
    assert settings["connector_config"]["adapter"] == {"part": "mixture", "gate": "release"}
    assert settings["connector_config"]["layout"] == {
        "crop_order": "raster",
        "separators": {"separator": {"place": "between_views", "value": [1919]}},
    }


def test_values_are_read():
    assert chain(mm_learnable_gated=0)["adapter"]["forced_expert"] == "mlp"
    assert chain(mm_learnable_gated=1)["adapter"]["forced_expert"] == "query_former"
    assert chain(mm_projector_type="linear")["adapter"] == {"part": "linear"}
    assert chain(mm_projector_type="mlp1x_gelu")["adapter"] == {"part": "linear"}
    assert chain(mm_projector_type="mlp2x_gelu")["adapter"] == {"part": "mlp"}
    keep = chain(mm_resampler_topp=0.5, mm_resampler_temp=0.25)["token_ops"][0]["keep"]
    assert keep == {"rule": "threshold", "gamma": 0.5, "temperature": 0.25}
    assert chain(mm_resampler_dim=64)["view_ops"][0]["num_queries"] == 64
    assert chain(seperator=11)["layout"]["separators"]["separator"]["value"] == [11]
    assert connector_settings(golden_config(mm_vision_select_layer=-3))["vision_feature_layer"] == -3
    assert connector_settings(golden_config(use_local_only=True))["planner"]["views"] == "crops"
    assert connector_settings(golden_config(use_global_only=True))["planner"]["views"] == "global"
    router = chain(mm_resampler_type="qformer")["token_ops"][0]
    assert router["score"] == "attention" and router["double_softmax"] is True
    plain = chain(mm_resampler_type="identity", mm_projector_type="linear", mm_patch_merge_type="flat")
    assert plain == {"view_ops": [], "adapter": {"part": "linear"}, "layout": {"crop_order": "views"}, "token_ops": []}


def test_absent_options_take_the_released_defaults():
    config = golden_config()
    for name in ("mm_resampler_topp", "mm_resampler_temp", "seperator", "mm_vision_select_layer"):
        del config[name]
    settings = connector_settings(config)
    keep = settings["connector_config"]["token_ops"][0]["keep"]
    assert (keep["gamma"], keep["temperature"], settings["vision_feature_layer"]) == (0.9, 0.5, -1)
    assert settings["connector_config"]["layout"]["separators"]["separator"]["value"] == [1919]


@pytest.mark.parametrize(
    "option, value",
    [
        ("mm_projector_type", "qformer"),
        ("mm_projector_type", "qformer_text"),
        ("mm_projector_type", "mlp3x_gelu"),
        ("mm_projector_type", "mamba"),
        ("mm_resampler_type", "spatial"),
        ("mm_resampler_type", "new"),
        ("mm_resampler_type", None),
        ("mm_patch_merge_type", "spatial_unpad"),
        ("mm_patch_merge_type", "flat"),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_vision_select_layer", [-2, -1]),
        ("mm_learnable_gated", 2),
        ("mm_use_im_start_end", True),
        ("use_mm_proj", False),
        ("image_aspect_ratio", "pad"),
        ("image_aspect_ratio", "square"),
        ("mm_something_new", 3),
    ],
)
def test_what_has_no_counterpart_is_refused(option, value):
    with pytest.raises(
        ConversionError, match=option if option != "mm_resampler_type" or value else "mm_projector_type"
    ):
        connector_settings(golden_config(**{option: value}))


def test_every_mm_option_of_the_golden_configuration_is_in_the_report(tmp_path):
    report = convert_slime(GOLDEN, tmp_path / "out")
    missing = [key for key in golden_config() if key.startswith("mm_") and key not in report["options"]]
    assert missing == []
    assert report["options"]["mm_use_im_start_end"] == "absent; taken as False"
    assert report["options"]["image_grid_pinpoints"].startswith("written, but not read")


# ---- the attention router


class ReleasedRouter(nn.Module):
    """What the released attention router computes, with the library's own attention."""

    def __init__(self, width: int, heads: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.query = nn.Parameter(torch.randn(1, width))
        self.self_attn = nn.MultiheadAttention(width, heads)
        self.cross_attn = nn.MultiheadAttention(width, heads)
        self.ln_q, self.ln_kv, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.prob_proj = nn.Sequential(nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, 1))

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        text = self.ln_kv(text)
        states = self.ln_post(self.cross_attn(self.ln_q(image), text, text)[0])
        return (self.prob_proj(states)[:, 0] / self.temperature).softmax(dim=0)


def attention_checkpoint(folder, temperature: float = 0.5):
    torch.manual_seed(5)
    router = ReleasedRouter(64, 1, temperature).eval()
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.3)
    tensors = tensors_of(GOLDEN) | {
        f"model.sampler.selector.{key}": value for key, value in router.state_dict().items()
    }
    write_released(folder, tensors, mm_resampler_type="qformer", mm_resampler_temp=temperature, num_attention_heads=4)
    return router, tensors


@torch.no_grad()
def test_the_attention_router_scores_as_released(tmp_path):
    router, _ = attention_checkpoint(tmp_path / "source")
    convert_slime(tmp_path / "source", tmp_path / "out", dtype="float32")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    part = model.model.connector.token_ops[0]
    image, text = torch.randn(50, 64), torch.randn(9, 64)
    scores = part.attention_score(image, text)
    torch.testing.assert_close((scores / 0.5).softmax(0), router(image, text), atol=1e-6, rtol=1e-4)
    assert router(image, text).std() > 1e-3
    assert part.options.double_softmax is True


def test_unused_tensors_of_the_attention_router_come_back(tmp_path):
    _, tensors = attention_checkpoint(tmp_path / "source")
    report = convert_slime(tmp_path / "source", tmp_path / "out")
    assert "model.sampler.selector.query" in report["unused"]
    convert_to_slime(tmp_path / "out", tmp_path / "back")
    back = tensors_of(tmp_path / "back")
    assert set(back) == set(tensors)
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    (tmp_path / "out" / "conversion_unused.safetensors").unlink()
    with pytest.raises(ConversionError, match="never uses"):
        convert_to_slime(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("kind, layers", [("linear", [""]), ("mlp1x_gelu", ["0."]), ("mlp2x_gelu", ["0.", "2."])])
def test_the_other_adapters_go_there_and_back(tmp_path, kind, layers):
    tensors = {key: value for key, value in tensors_of(GOLDEN).items() if ".mm_projector." not in key}
    for width, layer in zip((128, 64), layers, strict=False):
        tensors[f"model.mm_projector.{layer}weight"] = torch.randn(64, width)
        tensors[f"model.mm_projector.{layer}bias"] = torch.randn(64)
    write_released(tmp_path / "source", tensors, mm_projector_type=kind)
    convert_slime(tmp_path / "source", tmp_path / "out")
    last = "linear" if len(layers) == 1 else "mlp.linear_2"
    ours = tensors_of(tmp_path / "out")[f"model.connector.adapter.{last}.bias"]
    assert torch.equal(ours, tensors[f"model.mm_projector.{layers[-1]}bias"])
    convert_to_slime(tmp_path / "out", tmp_path / "back")
    back = tensors_of(tmp_path / "back")
    assert set(back) == set(tensors) and all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["mm_projector_type"] == kind

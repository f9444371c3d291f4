"""The released SliME implementation, number by number (tests/fixtures/slime_tiny, see its README for the origin)."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig

from hires_lmm import HiResLmmConfig, HiResLmmForConditionalGeneration, HiResLmmImageProcessor
from hires_lmm.conversion.keys import convert_tensors, match_sources
from hires_lmm.conversion.slime import connector_settings, key_table
from hires_lmm.modeling.compat_hires_lmm import CACHE


FOLDER = Path(__file__).parents[1] / "fixtures" / "slime_tiny"
CASES = json.loads((FOLDER / "cases.json").read_text())
IMAGE_TOKEN = 2047  # unused by every prompt of the cases
STEP = 16  # the fixture keeps every 16th token of long tensors


@pytest.fixture(scope="module")
def expected() -> dict:
    return load_file(FOLDER / "expected.safetensors")


@pytest.fixture(scope="module")
def released() -> HiResLmmForConditionalGeneration:
    config = json.loads((FOLDER / "config.json").read_text())
    text = {key: config[key] for key in LlamaConfig.__dataclass_fields__ if key in config and key != "dtype"}
    vision = json.loads((FOLDER / "vision_config.json").read_text())
    vision = {key: vision[key] for key in CLIPVisionConfig.__dataclass_fields__ if key in vision and key != "dtype"}
    model = HiResLmmForConditionalGeneration(
        HiResLmmConfig(
            vision_config=CLIPVisionConfig(**vision),
            text_config=LlamaConfig(**{k: v for k, v in text.items() if k not in ("model_type", "architectures")}),
            image_token_id=IMAGE_TOKEN,
            **connector_settings(config),
        )
    ).eval()
    source = {}
    for shard in sorted(FOLDER.glob("model-*.safetensors")):
        source.update(load_file(shard))
    matches, unknown = match_sources(key_table(config["mm_projector_type"]), source)
    assert unknown == []
    converted = {}
    for _, pairs in convert_tensors(matches, source.__getitem__):
        converted.update({name: tensor.float() for name, tensor in pairs})
    model.load_state_dict(converted, strict=True)
    return model


def inputs_of(case: dict, model: HiResLmmForConditionalGeneration) -> dict:
    processor = HiResLmmImageProcessor(planner="slime_release", token_layout=model.config.token_layout())
    views = processor(Image.open(FOLDER / case["image"]), return_tensors="pt")
    count = int(views["view_positions"][0, 5])
    ids = []
    for token in case["input_ids"]:
        ids += [IMAGE_TOKEN] * count if token == -200 else [token]
    return {"input_ids": torch.tensor([ids]), **views}


def capture(module, store: dict, name: str):
    return module.register_forward_hook(lambda _, args, output: store.__setitem__(name, output))


@pytest.mark.parametrize("number", range(5))
def test_every_stage_equals_the_published_one(number, released, expected):
    case, seen = CASES[number], {}

    def want(name: str) -> torch.Tensor:
        return expected[f"case{number}.{name}"]

    def close(found: torch.Tensor, name: str, atol: float = 1e-4) -> None:
        torch.testing.assert_close(
            found, want(name).to(found.dtype), atol=atol, rtol=1e-4, msg=lambda m: f"{name}: {m}"
        )

    inputs = inputs_of(case, released)
    connector = released.model.connector
    hooks = [
        capture(connector.adapter.gate, seen, "gates"),
        capture(connector.view_ops[0], seen, "compressed"),
        capture(connector.layout, seen, "tokens"),
    ]
    with torch.no_grad():
        features = released.model.encode_pixels(inputs["pixel_values"], -2)
        output = released(**inputs, output_token_map=True)
    for hook in hooks:
        hook.remove()

    assert inputs["view_positions"].shape[0] == case["crops"]
    close(inputs["pixel_values"].mean((2, 3)), "pixel_values_mean")
    close(inputs["pixel_values"][0, :, ::STEP, ::STEP], "pixel_values_crop0")
    close(inputs["pixel_values"][-1, :, ::STEP, ::STEP], "pixel_values_last")
    close(features.mean(1), "vision_features_mean")
    close(seen["gates"][0, ::STEP], "gates")
    close(seen["compressed"].group("crops").features.mean(1), "compressed_mean")
    close(seen["compressed"].group("crops").features[-1, ::STEP], "compressed_last")
    tokens, local = seen["tokens"], output.token_map.kind == 1
    close(tokens.features[:576][::STEP], "global_tokens")
    close(tokens.features[local][::STEP], "local_tokens")
    close(output.token_map.score[local], "router_scores", atol=2e-4)  # sums of up to 22 cosines
    assert output.token_map.kept[local].nonzero()[:, 0].tolist() == want("selected").tolist()
    assert int(output.token_map.kept.sum()) + len(case["input_ids"]) - 1 == case["sequence_length"]
    assert int(output.kept_mask.sum()) == case["sequence_length"]
    close(output.logits[0, -1], "logits_last")
    close(output.logits[0, -len(want("logits_text")) :], "logits_text")


@pytest.mark.parametrize("number", range(5))
def test_greedy_tokens_equal_the_published_ones(number, released):
    inputs = inputs_of(CASES[number], released)
    generated = released.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert generated[0, inputs["input_ids"].shape[1] :].tolist() == CASES[number]["generated"][1:]


@pytest.mark.parametrize("number", [0, 4])
def test_forced_steps_agree_with_and_without_cache(number, released):
    """Greedy text is nearly constant here, so twelve other tokens are forced and all logits compared."""
    inputs = inputs_of(CASES[number], released)
    forced = torch.randint(3, 2000, (1, 12), generator=torch.Generator().manual_seed(number))
    prompt_length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        views = {k: v for k, v in inputs.items() if k != "input_ids"}
        features = released.model.get_image_features(**views)
        features.prompt_length = prompt_length  # what generate notes: the forced ids are no part of the question
        whole = released(
            input_ids=torch.cat([inputs["input_ids"], forced], dim=1), mm_encoder_outputs={"image": features}
        ).logits[0, prompt_length - 1 : -1]
        output = released(**inputs, use_cache=True)
        cache, steps = output[CACHE], [output.logits[0, -1]]
        for position in range(11):
            output = released(input_ids=forced[:, position : position + 1], cache=cache)
            steps.append(output.logits[0, -1])
    torch.testing.assert_close(torch.stack(steps), whole, atol=1e-4, rtol=1e-4)
    assert (whole - whole[0]).abs().amax() > 0.1  # the steps do differ

"""FastVLM in transformers' format: the same logits as transformers' own class, on pixels as its processor makes."""

import json

import pytest
import torch
from convert_tools import no_output, tokenizer_without_image_token
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessorPil

from builders import random_image, randomise, tiny_text_config
from builders.towers import TIMM_TOWERS, tiny_tower
from hires_lmm.conversion import ConversionError, convert_fast_vlm


SIDE = 128
PIXELS = {
    "crop_size": {"height": SIDE, "width": SIDE},
    "size": {"shortest_edge": SIDE},
    "image_mean": [0.0, 0.0, 0.0],
    "image_std": [1.0, 1.0, 1.0],
}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A tiny FastVLM model as transformers saves it, with tokenizer and image processor."""
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration

    tower = tiny_tower("timm FastViTHD")
    folder = tmp_path_factory.mktemp("released")
    tokenizer = tokenizer_without_image_token()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    vision = {key: TIMM_TOWERS["timm FastViTHD"][key] for key in ("model_type", "architecture", "model_args")}
    config = FastVlmConfig(
        vision_config={**vision, "hidden_size": tower.hidden_size, "do_pooling": True},
        text_config=tiny_text_config("qwen2", vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = randomise(FastVlmForConditionalGeneration(config)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(**PIXELS, resample=3).save_pretrained(folder)
    return folder, model


@torch.no_grad()
def test_logits_and_pixels_are_those_of_transformers(released, tmp_path):
    folder, theirs = released
    convert_fast_vlm(folder, tmp_path / "out")
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    config, processor = model.config, AutoProcessor.from_pretrained(tmp_path / "out")
    assert (config.view_size, config.patch_grid, config.vision_feature_layer) == (SIDE, (2, 2), -1)
    for height, width in ((SIDE, SIDE), (300, 170), (90, 260)):
        image = random_image(height, width)
        batch = processor(text="<image>\nWho is it?", images=image, return_tensors="pt")
        pixels = CLIPImageProcessorPil(**PIXELS, resample=3)(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(batch["pixel_values"], pixels)
        assert (batch["input_ids"] == config.image_token_id).sum() == 4
        text = {name: batch[name] for name in ("input_ids", "attention_mask")}
        wanted = theirs(**text, pixel_values=pixels).logits
        torch.testing.assert_close(model.eval()(**batch).logits, wanted, rtol=1e-4, atol=1e-4)


def test_what_is_no_fast_vlm_is_refused(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps({"model_type": "llava_qwen2"}))
    with no_output(tmp_path), pytest.raises(ConversionError, match=r"'llava_qwen2', not fast_vlm.*Apple's own code"):
        convert_fast_vlm(tmp_path / "source", tmp_path / "out")

"""Another `torch.set_default_dtype` changes nothing that a model with its own dtype computes."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from builders.reload import PRESETS, case_config
from builders.tiny import tiny_model, tiny_processor
from builders.training import conversation
from hires_lmm.processing.chat_templates_hires_lmm import answer_prefix_ids
from hires_lmm.training import HiResLmmCollator
from hires_lmm.training.settings import set_noise


TEXT_ONLY = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]}


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def gradients(model, batch):
    model.zero_grad()
    loss = model.train()(**batch).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def everything(folder, processor):
    """What a loaded model gives: logits, token map, generated ids, losses and gradients with and without images."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    set_noise(model, False)
    collator = HiResLmmCollator(processor)
    batch = collator([conversation(1)])
    with torch.no_grad():
        output = model(**batch, output_token_map=True)
        prompt = {name: value for name, value in batch.items() if name != "labels"}
        new = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    return {
        "logits": output.logits,
        **{f"map.{name}": value for name, value in vars(output.token_map).items()},
        "generated": new,
        **dict(zip(("loss", "gradients"), gradients(model, batch), strict=True)),
        **dict(zip(("text loss", "text gradients"), gradients(model, collator([TEXT_ONLY])), strict=True)),
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_gives_the_same_under_every_default(preset, tmp_path, default_dtype):
    config = case_config(preset, "clip", "llama")
    processor = tiny_processor(config, "chatml")
    config.answer_prefix_ids = answer_prefix_ids(processor)
    tiny_model(config).save_pretrained(tmp_path)
    wanted = everything(tmp_path, processor)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        default_dtype(dtype)
        found = everything(tmp_path, processor)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, atol=0, rtol=0, equal_nan=True, msg=f"{name}, {dtype}")

"""The golden numbers of the released fusion code, and text encoders for its contrastive loss."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from builders.text import tiny_tokenizer


FIXTURES = Path(__file__).parents[1] / "fixtures" / "fusion"


def golden_cases() -> dict:
    """Settings and scalars."""
    return json.loads((FIXTURES / "cases.json").read_text())


def golden_tensors() -> dict[str, torch.Tensor]:
    """Weights, inputs and outputs."""
    return load_file(FIXTURES / "tensors.safetensors")


def golden_encoder(golden: dict[str, torch.Tensor], **changes) -> CLIPTextModelWithProjection:
    """The text encoder of the golden contrastive model."""
    config = CLIPTextConfig(
        vocab_size=55,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=48,
        projection_dim=24,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        **{"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 3, **changes},
    )
    encoder = CLIPTextModelWithProjection(config)
    prefix = "weight.clip_model."
    names = ("text_model.", "text_projection.")
    states = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    states = {key: value for key, value in states.items() if key.startswith(names)}
    found = encoder.load_state_dict(states, strict=False)
    assert not found.unexpected_keys and all("position_ids" in key for key in found.missing_keys)
    return encoder.eval()


def tiny_text_encoder() -> tuple[CLIPTextModelWithProjection, object]:
    """A text encoder of one layer with 20 positions and the tiny tokenizer, random weights."""
    tokenizer = tiny_tokenizer(None)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=20,
        projection_dim=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config), tokenizer

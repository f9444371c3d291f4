"""A text encoder for the contrastive loss of fusion."""

from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from builders.text import tiny_tokenizer


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

"""Logits come out as each language model's own class gives them."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from builders.tiny import tiny_config, tiny_model
from hires_lmm.modeling.logits_hires_lmm import select_positions


SCALED = {
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 16, "query_pre_attn_scalar": 16},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "llama": {},
}


@pytest.mark.parametrize("family", SCALED)
def test_logits_equal_those_of_the_causal_lm(family):
    text = CONFIG_MAPPING[family](
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=600,
        pad_token_id=0,
        tie_word_embeddings=False,
        **SCALED[family],
    )
    model = tiny_model(tiny_config("llava_next", text=text))
    reference = AutoModelForCausalLM.from_config(text).eval()
    reference.model.load_state_dict(model.model.language_model.state_dict())
    reference.lm_head.load_state_dict(model.lm_head.state_dict())
    ids = torch.randint(5, 500, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, reference(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_positions_by_number_index_and_mask():
    hidden = torch.randn(2, 5, 3)
    assert select_positions(hidden, 0) is hidden
    torch.testing.assert_close(select_positions(hidden, 2), hidden[:, 3:])
    torch.testing.assert_close(select_positions(hidden, torch.tensor([0, 4])), hidden[:, [0, 4]])
    picked = select_positions(hidden, torch.tensor([[1], [3]]))
    torch.testing.assert_close(picked, torch.stack([hidden[0, [1]], hidden[1, [3]]]))
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 1] = mask[1, 4] = True
    torch.testing.assert_close(select_positions(hidden, mask), torch.stack([hidden[0, 1], hidden[1, 4]]))

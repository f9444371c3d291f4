"""New weights: every tensor gets a value, towers by their own rules; and a vocabulary that changes its size."""

import pytest
import torch

from builders.tiny import make_batch, random_image, tiny_config, tiny_model, tiny_processor, tiny_text_config
from hires_lmm import PRESETS, HiResLmmForConditionalGeneration
from hires_lmm.modeling.attention_hires_lmm import HiResLmmQueryFormer, sincos_positions
from reference_routing import SMALL_CONNECTORS


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_missing_tensor_starts_as_in_a_new_model(preset):
    config = tiny_config(preset, connector_config=SMALL_CONNECTORS.get(preset, {}))
    new = HiResLmmForConditionalGeneration(config).state_dict()
    torch.use_deterministic_algorithms(True)  # memory without a value is NaN then
    try:
        started = HiResLmmForConditionalGeneration.from_pretrained(None, config=config, state_dict={}).state_dict()
    finally:
        torch.use_deterministic_algorithms(False)
    assert started.keys() == new.keys()
    for name, tensor in started.items():
        assert torch.isfinite(tensor).all(), name
        if tensor.numel() > 500:  # the spread of fewer numbers says little
            assert float(tensor.std()) == pytest.approx(float(new[name].std()), rel=0.2, abs=1e-6), name


def test_positions_are_there_before_any_weight():
    config = tiny_config("slime", connector_config=SMALL_CONNECTORS["slime"]).connector_config
    bare = HiResLmmQueryFormer(config, 32, 9, (4, 4))
    assert torch.equal(bare.positions, sincos_positions(32, 3))


# ---- another number of tokens


def fusion_model(**options):
    part = {"part": "fusion", "num_queries": 12, "later_queries": 3, "num_layers": 2, "num_heads": 4, **options}
    config = tiny_config("fusion", text=tiny_text_config("llama"), connector_config={"token_ops": [part]})
    return tiny_model(config), tiny_processor(config)


@pytest.mark.parametrize("more", [7, -5])
@torch.no_grad()
def test_fusion_follows_the_vocabulary(more, tmp_path):
    model, processor = fusion_model()
    rows = model.config.text_config.vocab_size
    before = model.model.connector.token_ops[0].model.embed_tokens.weight.clone()
    model.resize_token_embeddings(rows + more)
    after = model.model.connector.token_ops[0].model.embed_tokens.weight
    assert after.shape[0] == rows + more and torch.equal(after[: rows + min(more, 0)], before[: rows + min(more, 0)])
    batch = make_batch(processor, [("<image> What is it?", [random_image(90, 130)])])
    batch["input_ids"][0, -1] = rows + more - 1
    logits = model(**batch).logits
    assert logits.shape[-1] == rows + more
    model.save_pretrained(tmp_path)
    again = HiResLmmForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, logits)


def test_a_vocabulary_of_its_own_stays():
    model, _ = fusion_model(vocab_size=50)
    model.resize_token_embeddings(model.config.text_config.vocab_size + 7)
    assert model.model.connector.token_ops[0].model.embed_tokens.weight.shape[0] == 50

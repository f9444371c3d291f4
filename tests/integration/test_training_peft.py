"""Other methods of PEFT: virtual tokens equal real ones that nobody reads; the embeddings are the right ones."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, Trainer

from builders.reload import case_config
from builders.tiny import make_batch, random_image, tiny_model, tiny_processor
from builders.training import QUIET_ROUTER, conversation, training_arguments
from hires_lmm.modeling.compat_hires_lmm import CACHE
from hires_lmm.modeling.question_hires_lmm import PromptText, recover_text
from hires_lmm.processing.chat_templates_hires_lmm import answer_prefix_ids, question_prefix_ids
from hires_lmm.training import HiResLmmCollator, set_options


peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT

FRONT = [40, 41, 42, 43]
COMMON = {"task_type": "CAUSAL_LM", "num_virtual_tokens": len(FRONT)}
PRESETS = ("llava_next", "slime", "fusion", "vlsa")
all_presets = pytest.mark.parametrize("preset", PRESETS)


def parts(preset):
    """A model without noise, its processor, and a batch of two conversations of different lengths."""
    config = case_config(preset, "clip", "llama")
    if preset == "slime":
        config.connector_config.token_ops = [QUIET_ROUTER]
    processor = tiny_processor(config, "chatml")
    config.answer_prefix_ids, config.question_prefix_ids = answer_prefix_ids(processor), question_prefix_ids(processor)
    model = tiny_model(config)
    if preset == "slime":
        set_options(model, {"connector.adapter.forced_expert": "mlp"})
    examples = [conversation(1), conversation(2)]
    examples[1]["messages"][0]["content"] += " Tell me more about them."
    return model, processor, HiResLmmCollator(processor)(examples)


def with_front(batch):
    """The batch with real tokens in front, which nobody reads or learns."""
    front = torch.tensor([FRONT, FRONT])
    filled = {"input_ids": front, "attention_mask": front * 0 + 1, "labels": front * 0 - 100, "prompt_mask": front < 0}
    return {
        **batch,
        **{name: torch.cat([value, batch[name]], dim=1) for name, value in filled.items() if name in batch},
    }


def tuned(model, config):
    """The model under a method, with virtual tokens or prefix set to what real tokens have."""
    with torch.no_grad():
        values = model.get_input_embeddings()(torch.tensor(FRONT))
        layers = model.eval()(input_ids=torch.tensor([FRONT]), use_cache=True)[CACHE].layers
    if isinstance(config, peft.PrefixTuningConfig):
        states = [state[0].transpose(0, 1).flatten(1) for layer in layers for state in (layer.keys, layer.values)]
        values = torch.cat(states, dim=1)
    wrapped = peft.get_peft_model(model, config)
    wrapped.prompt_encoder["default"].embedding.weight.data = values.detach().clone()
    return wrapped


@all_presets
def test_prompt_tuning_equals_real_tokens_in_front(preset):
    model, _, batch = parts(preset)
    wanted = model.train()(**with_front(batch)).loss.detach()
    asked = {name: value for name, value in batch.items() if name not in ("labels", "prompt_mask")}
    with torch.no_grad():
        logits = model.eval()(**with_front(asked)).logits
    wrapped = tuned(model, peft.PromptTuningConfig(**COMMON))
    assert wrapped.word_embeddings is model.get_input_embeddings()
    with torch.no_grad():  # the question is found by the ids of the embeddings
        torch.testing.assert_close(wrapped.eval()(**asked).logits, logits, atol=1e-4, rtol=1e-5)
    loss = wrapped.train()(**batch).loss
    torch.testing.assert_close(loss.detach(), wanted, atol=1e-5, rtol=1e-5)
    loss.backward()
    gradients = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(gradients) == 1 and all(gradient.abs().sum() > 0 for gradient in gradients.values())


@all_presets
def test_prefix_tuning_equals_a_cache_of_real_tokens(preset):
    model, _, batch = parts(preset)
    wanted = model.train()(**with_front(batch)).loss.detach()
    wrapped = tuned(model, peft.PrefixTuningConfig(**COMMON))
    loss = wrapped.train()(**batch).loss
    torch.testing.assert_close(loss.detach(), wanted, atol=1e-5, rtol=1e-5)
    loss.backward()
    assert wrapped.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0


@all_presets
def test_p_tuning_and_ia3_learn(preset):
    configs = {
        "p-tuning": peft.PromptEncoderConfig(**COMMON, encoder_hidden_size=16),
        "ia3": peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    }
    for name, config in configs.items():
        model, _, batch = parts(preset)
        plain = model.train()(**batch).loss.detach()
        wrapped = peft.get_peft_model(model, config)
        optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(3):
            loss = wrapped.train()(**batch).loss
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[2] < losses[0], name
        if name == "ia3":  # it starts from ones
            assert losses[0] == pytest.approx(float(plain), abs=1e-5)
        else:
            assert wrapped.word_embeddings is model.get_input_embeddings()


def test_a_prompt_tuned_model_is_trained_saved_and_loaded(tmp_path):
    model, processor, batch = parts("slime")
    model.save_pretrained(tmp_path / "base")
    wrapped = tuned(model, peft.PromptTuningConfig(**COMMON))
    args = training_arguments(tmp_path / "out", max_steps=2, learning_rate=0.1)
    data = [conversation(1), conversation(2)]
    trainer = Trainer(wrapped, args, train_dataset=data, data_collator=HiResLmmCollator(processor))
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        found, wanted = again(**batch).logits, wrapped.eval()(**batch).logits
        start = tuned(parts("slime")[0], peft.PromptTuningConfig(**COMMON))(**batch).logits
    assert torch.equal(found, wanted) and not torch.allclose(found, start, atol=1e-3)


@pytest.mark.skipif(CACHE == "cache", reason="PEFT's generate looks for past_key_values, with every model")
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@all_presets
@torch.no_grad()
def test_generation_equals_that_behind_real_tokens(preset, method):
    model, processor, _ = parts(preset)
    given = make_batch(processor, [("How many cats? <image>", [random_image(80, 120)])])
    front = torch.tensor([FRONT])
    behind = {**given, "input_ids": torch.cat([front, given["input_ids"]], dim=1)}
    behind["attention_mask"] = torch.ones_like(behind["input_ids"])
    if method == "prefix":  # its virtual tokens are no embeddings, so nobody can take them for words
        behind["prompt_mask"] = torch.arange(behind["input_ids"].shape[1])[None] >= len(FRONT)
    wanted = model.generate(**behind, max_new_tokens=5, do_sample=False)[:, len(FRONT) :]
    wrapped = tuned(model, (peft.PromptTuningConfig if method == "prompt" else peft.PrefixTuningConfig)(**COMMON))
    assert wrapped.eval().generate(**given, max_new_tokens=5, do_sample=False).tolist() == wanted.tolist()


def test_ids_are_recovered_where_an_embedding_is_one_of_the_vocabulary():
    torch.manual_seed(0)
    table = torch.nn.Embedding(50, 8)
    ids = torch.tensor([[3, 49, 0, 7, 7]])
    embeds = table(ids).detach().clone()
    embeds[0, 2] += 0.01
    placeholder = torch.tensor([[False, False, False, True, False]])
    text = recover_text(
        PromptText(None, embeds, prompt_mask=torch.ones(1, 3, dtype=torch.bool)), placeholder, table, 50
    )
    assert text.ids.tolist() == [[3, 49, -1, -1, 7]]
    assert text.prompt_mask.tolist() == [[False, False, True, True, True]]
    assert recover_text(PromptText(None, torch.randn(1, 5, 8)), placeholder, table, 50).ids is None

"""In training the head sees the positions with a label and no others; everything that needs logits gets them."""

import numpy as np
import pytest
import torch

from builders.training import conversation, conversations, make_trainer, slime_parts
from hires_lmm.modeling.logits_hires_lmm import select_learned
from hires_lmm.training import HiResLmmCollator, Stage
from hires_lmm.training.plans import FORCED_EXPERT


STAGE = Stage(
    "all",
    {"connector": 1e-3, "language_model": 1e-3, "lm_head": 1e-3},
    settings={FORCED_EXPERT: "mlp"},
)


@pytest.fixture
def parts():
    model, processor = slime_parts()
    STAGE.apply(model)
    return model, HiResLmmCollator(processor)([conversation(1), conversation(2, images=2)])


def run(model, batch, **changes) -> tuple[torch.Tensor, dict, object]:
    """Loss, gradients and output of one training step."""
    model.zero_grad()
    output = model(**{**batch, **changes})
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), gradients, output


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys() and "lm_head.weight" in found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("extra", [{}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(5)}])
def test_loss_and_gradients_equal_those_of_all_logits(parts, extra):
    model, batch = parts
    loss, gradients, output = run(model, batch, **extra)
    full_loss, full_gradients, full = run(model, batch, **extra, return_logits=True)
    assert "logits" not in output
    assert full.logits.shape == (*batch["labels"].shape, model.config.text_config.vocab_size)
    torch.testing.assert_close(loss, full_loss, atol=1e-6, rtol=1e-6)
    same(gradients, full_gradients)


def test_the_loss_is_cross_entropy_of_the_next_token(parts):
    model, batch = parts
    output = model(**batch, return_logits=True)
    logits, labels = output.logits[:, :-1].double(), batch["labels"][:, 1:]
    rows = [
        -logits[row, column].log_softmax(-1)[labels[row, column]]
        for row in range(labels.shape[0])
        for column in range(labels.shape[1])
        if labels[row, column] >= 0
    ]
    assert float(model(**batch).loss.detach()) == pytest.approx(float((sum(rows) / len(rows)).detach()), rel=1e-5)


def test_the_head_sees_exactly_the_label_positions(parts):
    model, batch = parts
    seen = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    hidden = []
    model.model.register_forward_hook(lambda module, args, output: hidden.append(output.last_hidden_state.detach()))
    model(**batch)
    handle.remove()
    labels = batch["labels"].tolist()
    expected = [
        hidden[0][row, column]
        for row, ids in enumerate(labels)
        for column in range(len(ids) - 1)
        if ids[column + 1] >= 0
    ]
    assert 0 < len(expected) < batch["labels"].numel() / 2
    assert torch.equal(seen[0][0], torch.stack(expected))


def test_what_asks_for_logits_gets_them(parts):
    model, batch = parts
    vocabulary = model.config.text_config.vocab_size
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    assert model(**unlabelled).logits.shape[:2] == batch["labels"].shape
    every = torch.arange(batch["labels"].shape[1])
    assert model(**batch, logits_to_keep=every).logits.shape == (*batch["labels"].shape, vocabulary)
    assert model.eval()(**batch).logits.shape == (*batch["labels"].shape, vocabulary)


def test_shifted_labels_of_the_caller_are_taken(parts):
    model, batch = parts
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    shifted = torch.where(torch.arange(shifted.shape[1]) % 2 == 0, shifted, -100)
    found, expected = model(**batch, shift_labels=shifted), model(**batch, shift_labels=shifted, return_logits=True)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(found.loss, model(**batch).loss)


def test_a_batch_without_labels_gives_zero_gradients_everywhere(parts):
    model, batch = parts
    labels = torch.full_like(batch["labels"], -100)
    loss, gradients, _ = run(model, batch, labels=labels, prompt_mask=batch["prompt_mask"], num_items_in_batch=3)
    _, expected, _ = run(model, batch, num_items_in_batch=3)
    assert loss == 0 and gradients.keys() == expected.keys()
    assert all(not gradient.any() for gradient in gradients.values())


def test_positions_are_picked_in_order_and_may_be_none():
    hidden = torch.arange(12.0).view(2, 6, 1)
    labels = torch.tensor([[-100, 3, -100, -100, 4, 5], [9, -100, -100, 2, -100, -100]])
    picked, targets = select_learned(hidden, labels)
    assert picked.flatten().tolist() == [0, 3, 4, 8] and targets.tolist() == [[3, 4, 5, 2]]
    picked, targets = select_learned(hidden, torch.full_like(labels, -100))
    assert picked.shape == (1, 0, 1) and targets.shape == (1, 0)


def test_evaluation_with_metrics_sees_logits(tmp_path):
    model, processor = slime_parts()
    shapes = []

    def reduce(logits, labels):
        shapes.append((tuple(logits.shape), tuple(labels.shape)))
        return logits.argmax(-1)

    def metrics(prediction) -> dict:
        labels = prediction.label_ids[:, 1:]
        return {"right": float((prediction.predictions[:, :-1] == labels)[labels >= 0].mean())}

    trainer = make_trainer(model, processor, STAGE, conversations(2), tmp_path, max_steps=1)
    trainer.preprocess_logits_for_metrics, trainer.compute_metrics = reduce, metrics
    trainer.train()
    assert shapes == []
    numbers = trainer.evaluate(conversations(3))
    assert np.isfinite(numbers["eval_loss"]) and 0 <= numbers["eval_right"] <= 1
    assert shapes and all(logits[:2] == labels and len(logits) == 3 for logits, labels in shapes)

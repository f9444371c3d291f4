"""What users of the plain Trainer meet, without our callback: smoothed labels, and a loss of their own."""

import copy
import pickle

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32, gather
from torch.distributed.utils import _apply_to_tensors
from torch.utils import _pytree as pytree
from transformers import Trainer

from builders.training import conversation, slime_parts, training_arguments
from hires_lmm import HiResLmmForConditionalGeneration
from hires_lmm.training import HiResLmmCollator, set_options
from hires_lmm.training.lora import lora_config
from hires_lmm.training.settings import set_noise


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT


class Mine(HiResLmmForConditionalGeneration):
    """A user's own class."""


def smoothed_loss(model, batch, share: float) -> float:
    """Cross entropy of the next token, with a share spread over the vocabulary."""
    with torch.no_grad():
        scores = model(**batch).logits[:, :-1].double().log_softmax(-1)
    targets = batch["labels"][:, 1:]
    each = [
        -(1 - share) * scores[row, column, target] - share * scores[row, column].mean()
        for row, column in (targets != -100).nonzero().tolist()
        for target in [targets[row, column]]
    ]
    return float(sum(each) / len(each))


@pytest.mark.parametrize("way", ["bare", "lora", "subclass", "fsdp"])
def test_smoothed_labels_are_those_of_the_next_token(way, tmp_path):
    model, processor = slime_parts()
    set_noise(model.eval(), False)
    if way in ("subclass", "fsdp"):  # FSDP makes a class of the class
        model.__class__ = Mine if way == "subclass" else type(f"FSDP{type(model).__name__}", (type(model),), {})
    collator, data = HiResLmmCollator(processor), [conversation(1), conversation(2)]
    wanted = smoothed_loss(model, collator(data), 0.1)
    if way == "lora":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, lora_config(model, "language_only"))
    args = training_arguments(tmp_path, max_steps=1, label_smoothing_factor=0.1, learning_rate=0.0)
    trainer = Trainer(model, args, train_dataset=data, data_collator=collator)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted, abs=1e-4)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(wanted, abs=1e-4)


@pytest.fixture(scope="module")
def step():
    """The output of a training step and its batch."""
    model, processor = slime_parts()
    batch = HiResLmmCollator(processor)([conversation(1)])
    return model.train()(**batch), batch


READS = {
    "attribute": lambda output: output.logits,
    "item": lambda output: output["logits"],
    "get": lambda output: output.get("logits"),
    "number": lambda output: output[1],
}


@pytest.mark.parametrize("read", READS)
def test_reading_the_logits_of_a_training_step_names_the_remedy(read, step):
    with pytest.raises((AttributeError, LookupError), match="return_logits=True"):
        READS[read](step[0])


def test_a_loss_of_ones_own_gets_logits_when_it_asks_for_them(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            output = model(**inputs, return_logits=True)
            loss = torch.nn.functional.cross_entropy(
                output.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100
            )
            return (loss, output) if return_outputs else loss

    logged = []
    for trainer_class in (Trainer, Own):
        model, processor = slime_parts(token_ops=[])
        set_options(model, {"connector.adapter.forced_expert": "mlp"})
        collator = HiResLmmCollator(processor)
        args = training_arguments(tmp_path, max_steps=1)
        trainer = trainer_class(model, args, train_dataset=[conversation(1), conversation(2)], data_collator=collator)
        trainer.train()
        logged.append(trainer.state.log_history[0]["loss"])
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_an_output_without_logits_passes_what_wraps_models(step):
    output, _ = step
    names = [name for name, value in output.items()]
    assert names[0] == "loss" and "logits" not in names and output[0] is output.loss
    assert not hasattr(output, "logits") and getattr(output, "logits", None) is None
    leaves, spec = pytree.tree_flatten(output)  # FSDP, DDP with a static graph
    copies = {
        "pytree": pytree.tree_unflatten(leaves, spec),
        "fsdp1": _apply_to_tensors(lambda tensor: tensor, output),
        "accelerate": convert_outputs_to_fp32(lambda: output)(),
        "gather": gather(output),
        "copy": copy.copy(output),
        "pickle": pickle.loads(pickle.dumps(type(output)(loss=output.loss.detach()))),
    }
    for name, found in copies.items():
        assert type(found) is type(output), name
        torch.testing.assert_close(found.loss, output.loss.detach() if name == "pickle" else output.loss)
    assert output.to_tuple()[0] is output.loss

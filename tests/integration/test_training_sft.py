"""TRL's SFTTrainer with our collator: loss and gradients of the Trainer, and a router that reads no answer."""

import pytest
import torch
from transformers import Trainer

from builders.training import conversation, conversations, losses, make_trainer, slime_parts, training_arguments
from hires_lmm.training import HiResLmmCollator, Stage, StageCallback
from hires_lmm.training.plans import FORCED_EXPERT


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # by TRL

STAGE = Stage(
    "sft",
    {"connector": 1e-3, "language_model": 1e-3, "lm_head": 1e-3},
    settings={FORCED_EXPERT: "mlp"},
)


def sft_trainer(model, processor, folder, data, stage=STAGE, **changes):
    arguments = training_arguments(folder, **changes).to_dict()
    names = ("per_device_train_batch_size", "max_steps", "logging_steps", "save_strategy", "report_to", "use_cpu")
    values = {name: arguments[name] for name in (*names, "disable_tqdm", "remove_unused_columns", "optim")}
    args = trl.SFTConfig(
        str(folder),
        **values,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return trl.SFTTrainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(data),
        data_collator=HiResLmmCollator(processor, views=stage.views),
        processing_class=processor,
        callbacks=[StageCallback(stage, show_table=False)],
        optimizer_cls_and_kwargs=stage.optimizer_cls_and_kwargs(args),
    )


def gradients(trainer, batch) -> tuple[torch.Tensor, dict]:
    count = (batch["labels"][:, 1:] != -100).sum()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model.train(), dict(batch), num_items_in_batch=count)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    model, processor = slime_parts()
    return sft_trainer(model, processor, folder, conversations(4)), processor, folder


def test_loss_and_gradients_equal_the_trainer(parts):
    sft, processor, folder = parts
    batch = HiResLmmCollator(processor)([conversation(1), conversation(2, images=2)])
    model, _ = slime_parts()
    STAGE.apply(model)
    plain = Trainer(model, training_arguments(folder))
    (loss, found), (expected_loss, expected) = gradients(sft, batch), gradients(plain, batch)
    torch.testing.assert_close(loss, expected_loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_the_kept_set_does_not_move_with_the_answer(parts):
    sft, processor, _ = parts
    kept = []
    router = sft.model.model.connector.token_ops[0]
    handle = router.register_forward_hook(lambda module, args, output: kept.append(output[0].kept.clone()))
    examples = [conversation(1) for _ in range(3)]
    for example, answer in zip(examples, ("Yes.", "Seven red boats on a lake!", "<|im_start|>"), strict=True):
        example["messages"][1]["content"] = answer
        gradients(sft, HiResLmmCollator(processor)([example]))
    handle.remove()
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])
    other = conversation(1)
    other["messages"][0]["content"] = "<image>\nZZ?"
    handle = router.register_forward_hook(lambda module, args, output: kept.append(output[0].kept.clone()))
    gradients(sft, HiResLmmCollator(processor)([other]))
    handle.remove()
    assert not torch.equal(kept[0], kept[3]) and 0 < kept[0].float().mean() < 1


def test_a_run_gives_the_losses_of_the_trainer(tmp_path):
    model, processor = slime_parts()
    sft = sft_trainer(model, processor, tmp_path / "a", conversations(6))
    sft.train()
    model, processor = slime_parts()
    plain = make_trainer(model, processor, STAGE, conversations(6), tmp_path / "b")
    plain.train()
    assert losses(sft) == pytest.approx(losses(plain), rel=1e-5)
    assert {"kept_share", "stage"} <= set(sft.state.log_history[0])


def test_stages_with_auxiliary_losses_are_refused(tmp_path):
    model, processor = slime_parts()
    stage = Stage(
        "aux",
        {"connector": 1e-3},
        settings={FORCED_EXPERT: None},
        loss_weights={"gate_balance": 0.1},
    )
    with pytest.raises(ValueError, match="never computes; use Trainer"):
        sft_trainer(model, processor, tmp_path, conversations(2), stage=stage)

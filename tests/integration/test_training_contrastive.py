"""The contrastive objective and the switch of the question in runs of the stock Trainer."""

import dataclasses

import pytest
import torch

from builders.fusion import tiny_text_encoder
from builders.text import tiny_tokenizer
from builders.training import conversation, conversations, fusion_parts, losses, slime_parts, training_arguments
from hires_lmm.training import HiResLmmCollator, Stage, StageCallback, set_options
from hires_lmm.training.collator import read_messages
from hires_lmm.training.objectives import Contrastive, StepValues, load_objectives
from hires_lmm.training.objectives.contrastive_math import (
    compose_answers,
    contrast,
    encode_answers,
    identity_term,
    normalise_texts,
)
from hires_lmm.training.plans_fusion import QUESTION
from training_run import text


STAGE = Stage(
    "warm-up",
    {"connector": 1e-2, "objectives.contrastive": 1e-2},
    loss_weights={"contrastive": 1.0, "generation": 0.0},
    max_image_tokens=6,
)


def objective(**options) -> Contrastive:
    torch.manual_seed(3)
    encoder, tokenizer = tiny_text_encoder()
    return Contrastive(encoder, 32, tokenizer, **{"max_length": 40, **options})


def trainer_for(folder, contrastive, data, stage=STAGE, **changes):
    model, processor = fusion_parts()
    collator = HiResLmmCollator(processor, max_image_tokens=6, columns=contrastive.columns())
    return make_trainer(model, processor, stage, data, folder, collator, contrastive=contrastive, **changes)


def make_trainer(model, processor, stage, data, folder, collator, contrastive, **changes):
    from transformers import Trainer

    args = training_arguments(folder, **changes)
    return Trainer(
        model,
        args,
        train_dataset=data,
        data_collator=collator,
        processing_class=processor,
        callbacks=[StageCallback(stage, show_table=False, objectives={"contrastive": contrastive})],
        optimizer_cls_and_kwargs=stage.optimizer_cls_and_kwargs(args),
    )


def read_answers(row: dict) -> dict:
    return {"messages": read_messages(row)}


class Recorder(HiResLmmCollator):
    """Keeps the rows of its last batch."""

    def __call__(self, examples):
        self.rows = examples
        return super().__call__(examples)


def test_the_loss_of_a_step_is_the_formula(tmp_path):
    contrastive = objective(block_tokens=list(range(20, 30)), identity_weight=0.5)
    model, processor = fusion_parts()
    collator = Recorder(processor, max_image_tokens=6, columns=contrastive.columns())
    options = {"per_device_train_batch_size": 3, "max_steps": 1}
    trainer = make_trainer(model, processor, STAGE, conversations(3), tmp_path, collator, contrastive, **options)
    seen = []
    model.model.connector.token_ops[0].register_forward_hook(lambda module, args, output: seen.append(output[0].aux))
    before = {name: tensor.clone() for name, tensor in contrastive.state_dict().items()}
    trainer.train()
    after = {name: tensor.clone() for name, tensor in contrastive.state_dict().items()}
    contrastive.load_state_dict(before)
    slots, tokenizer = seen[0]["fusion_slots"].detach(), contrastive.tokenizer
    texts = [row["messages"][1]["content"][0]["text"] for row in map(read_answers, collator.rows)]
    ids = [torch.tensor(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in texts]
    ids, mask = compose_answers(ids, [6] * 3, tokenizer.eos_token_id, 40, list(range(20, 30)))
    answers = normalise_texts(encode_answers(contrastive.encoder, ids, mask))
    queries = torch.nn.functional.normalize(contrastive.projection(slots[5::6]), dim=-1)
    pairs = contrast(queries, answers, contrastive.logit_scale)
    wrong = contrast(queries, answers.roll(1, 0), contrastive.logit_scale)
    assert len(slots) == 18 and (pairs - wrong).abs() > 1e-2
    assert losses(trainer)[0] == pytest.approx((pairs + 0.5 * identity_term(slots)).item(), rel=1e-4)
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert all("k_proj.bias" in name for name in still), still


def test_only_the_slots_of_a_block_are_pushed_apart_where_asked(tmp_path):
    values = [
        losses(run)[0]
        for scope in ("batch", "block")
        for run in [trainer_for(tmp_path, objective(identity_scope=scope), conversations(2), max_steps=1)]
        if run.train()
    ]
    assert values[0] != pytest.approx(values[1], rel=1e-3)
    with pytest.raises(ValueError, match="identity_scope='image' is unknown; use batch or block"):
        objective(identity_scope="image")


def test_training_pulls_answers_and_states_together(tmp_path):
    stage = dataclasses.replace(STAGE, trainable=dict.fromkeys(STAGE.trainable, 3e-3))
    contrastive = objective(outlier_sigma=None, logit_scale=1.5)  # elements that leap to zero make a jagged path
    options = {"per_device_train_batch_size": 4, "max_steps": 30, "lr_scheduler_type": "constant"}
    trainer = trainer_for(tmp_path, contrastive, conversations(4), stage, **options)
    trainer.train()
    found = losses(trainer)
    assert found[-1] < 0.6 * found[0]
    entry = next(entry for entry in trainer.state.log_history if "loss/contrastive" in entry)
    assert entry["loss"] == pytest.approx(entry["loss/contrastive"], rel=1e-4) and entry["loss/generation"] > 0


def test_the_warm_up_does_not_learn_to_speak(tmp_path):
    trainer = trainer_for(tmp_path, objective(), conversations(2), max_steps=1)
    output = trainer.model.model.connector.token_ops[0].output
    before = output.weight.detach().clone()
    trainer.train()
    assert torch.equal(before, output.weight)


def test_batches_with_and_without_images(tmp_path):
    mixed = trainer_for(tmp_path, objective(), [conversation(2), text(1)] * 2, max_steps=2)
    mixed.train()
    bare = trainer_for(tmp_path, objective(), [text(1), text(2)], max_steps=2)
    before = {name: tensor.clone() for name, tensor in bare.model.named_parameters()}
    bare.train()
    assert losses(bare) == [0.0, 0.0] and all(value > 0 for value in losses(mixed))
    for name, parameter in bare.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_every_turn_has_a_block_and_an_answer(tmp_path):
    two = conversation(1)
    two["messages"] += [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "No boats."}]
    contrastive, seen = objective(), []
    trainer = trainer_for(tmp_path, contrastive, [two, conversation(2)], max_steps=1)
    trainer.model.model.connector.token_ops[0].register_forward_hook(
        lambda module, args, output: seen.append(output[0].aux["fusion_blocks"].bincount().tolist())
    )
    encoder_rows = []
    contrastive.encoder.register_forward_hook(lambda module, args, output: encoder_rows.append(len(output[0])))
    trainer.train()
    assert sorted(seen[0]) == [3, 6, 6] and encoder_rows == [3]
    batch = HiResLmmCollator(trainer.processing_class, max_image_tokens=6, columns=contrastive.columns())([two])
    assert batch["answers"]["turns"].tolist() == [2]
    batch["answers"]["lengths"] = torch.cat([batch["answers"]["lengths"], torch.zeros(1, dtype=torch.long)])
    outputs = trainer.model.train()(**{name: value for name, value in batch.items() if name != "answers"})
    step = StepValues(outputs, {"answers": batch["answers"]}, batch, True, None)
    with pytest.raises(ValueError, match="3 user turns, but the fusion transformer made 2 blocks"):
        contrastive(step)


def test_a_turn_without_an_answer_is_left_out():
    column = objective().columns()[0]
    image = {"type": "image", "image": None}
    words = lambda text: [{"type": "text", "text": text}]  # noqa: E731
    messages = [
        {"role": "system", "content": words("S")},
        {"role": "user", "content": [image, *words("Q")]},
        {"role": "user", "content": words("Q")},
        {"role": "assistant", "content": words("boat")},
    ]
    first, second = column.encode(messages)
    assert len(first) == 0 and second.tolist() == tiny_tokenizer(None)("boat", add_special_tokens=False)["input_ids"]
    assert column.encode(messages[2:]) is None
    assert len(column.encode([*messages[2:], *messages[1:]])) == 2  # a turn before the image has no block
    joined = column.join([[first, second], [second]])
    assert joined["lengths"].tolist() == [0, len(second), len(second)] and joined["turns"].tolist() == [2, 1]


def test_it_is_gone_from_the_checkpoint_and_comes_back_from_its_folder(tmp_path):
    contrastive = objective(outlier_sigma=None, identity_weight=0.25)
    trainer = trainer_for(tmp_path / "run", contrastive, conversations(2), max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    from safetensors.torch import load_file

    assert not any("objectives" in name for name in load_file(tmp_path / "final" / "model.safetensors"))
    again = load_objectives(tmp_path / "run" / "objectives")["contrastive"]
    assert again.settings() == contrastive.settings() and again.settings()["identity_weight"] == 0.25
    for name, tensor in contrastive.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    with pytest.raises(ValueError, match="has no tokenizer; set objective"):
        again.columns()


def test_what_does_not_fit_is_refused(tmp_path):
    contrastive = objective()
    contrastive.projection = torch.nn.Linear(12, 8, bias=False)
    with pytest.raises(ValueError, match="states of width 12, but the fusion transformer has width 32"):
        trainer_for(tmp_path, contrastive, conversations(2))
    model, processor = slime_parts()
    collator = HiResLmmCollator(processor, columns=objective().columns())
    with pytest.raises(ValueError, match="needs the token op 'fusion', but the token ops of the model are: 'router'"):
        make_trainer(model, processor, STAGE, conversations(2), tmp_path, collator, objective())
    with pytest.raises(ValueError, match="CLIPTextModel has no text_projection"):
        Contrastive(objective().encoder.text_model, 32)


def test_a_stage_switches_the_question(tmp_path):
    model, processor = fusion_parts()
    batch = HiResLmmCollator(processor)([conversation(1)])
    other = HiResLmmCollator(processor)([{**conversation(1), "messages": conversation(7)["messages"]}])

    @torch.no_grad()
    def slots(batch, model=model):
        return torch.cat(model.train()(**batch).image_outputs.pooler_output)

    assert not torch.allclose(slots(batch), slots(other), atol=1e-3)
    Stage("silent", {"connector": 1e-3}, settings={QUESTION: False}).apply(model)
    assert torch.equal(slots(batch), slots(other))
    for config in (model.config.connector_config, model.model.connector.config):
        assert config.token_ops[0]["question"] is False
    silent = slots(batch)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.model.connector.token_ops[0].question is False
    assert torch.allclose(slots(batch, again), silent, atol=1e-5)
    set_options(model, {QUESTION: True})
    assert not torch.allclose(slots(batch), silent, atol=1e-3)
    model.peft_config = {}
    with pytest.raises(ValueError, match=r"An adapter folder cannot hold \{'connector.token_ops.0.question': False\}"):
        Stage("silent", {"connector": 1e-3}, settings={QUESTION: False}).apply(model)
    with pytest.raises(ValueError, match=r"no switch .connector\.token_ops\.0\.question"):
        Stage("silent", {"connector": 1e-3}, settings={QUESTION: False}).apply(slime_parts()[0])

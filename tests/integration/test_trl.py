"""TRL's trainers on our models: each starts at the value that its mathematics gives, and cuts batches rightly."""

import copy
import math

import pytest
import torch
from torch.nn.functional import log_softmax

from builders.trl import as_dataset, assistant, logged, preferences, prompts, saved_parts, trl_arguments
from hires_lmm.training import Stage
from hires_lmm.training.lora import lora_config


trl = pytest.importorskip("trl")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # by TRL and PEFT
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
]

LN2 = math.log(2)
WHOLE = {"max_length": None}  # else prompts with their image tokens are cut


def dpo_trainer(folder, preset="slime", images=(1, 2), parts=None, reference=None, peft=None, **changes):
    model, processor = parts or saved_parts(preset, folder / "model")
    arguments = trl_arguments(trl.DPOConfig, folder / "out", **{**WHOLE, **changes})
    return trl.DPOTrainer(
        model,
        reference,
        args=arguments,
        train_dataset=as_dataset(preferences(list(images))),
        processing_class=processor,
        peft_config=peft,
    )


def first_loss(trainer) -> float:
    trainer.train()
    return logged(trainer)[0]


def labelled(batch: dict) -> tuple[dict, torch.Tensor]:
    """The model's inputs of a batch of TRL's collators, and its labels."""
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    return inputs, batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)


def log_probs_of(model, inputs: dict, labels: torch.Tensor) -> torch.Tensor:
    """Of every label, from all logits of the plain `forward`; 0 where there is none."""
    logits = model(**inputs).logits[:, :-1].double()
    wanted = labels[:, 1:]
    found = log_softmax(logits, dim=-1).gather(2, wanted.clamp(min=0)[..., None])[..., 0]
    return found.masked_fill(wanted == -100, 0).float()


# ---- preferences ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset, images", [("slime", (1, 2)), pytest.param("fusion", (1, 0), marks=pytest.mark.slow)])
def test_the_first_step_of_dpo_has_the_loss_ln_2(preset, images, tmp_path):
    assert first_loss(dpo_trainer(tmp_path, preset, images)) == pytest.approx(LN2, abs=1e-4)


def test_it_has_with_lora_and_recomputed_activations(tmp_path):
    parts = saved_parts("slime", tmp_path / "model")
    trainer = dpo_trainer(
        tmp_path, parts=parts, peft=lora_config(parts[0], "language_only"), gradient_checkpointing=True
    )
    assert first_loss(trainer) == pytest.approx(LN2, abs=1e-4)


@pytest.mark.parametrize("noise", [False, None])
def test_a_stage_makes_policy_and_reference_alike(noise, tmp_path):
    """Dropout of zero in these models: only the noise of gates and routers could part the two."""
    parts = saved_parts("slime", tmp_path / "model")
    reference = copy.deepcopy(parts[0])
    stage = Stage("align", {"language_model": 1e-3, "lm_head": 1e-3}, noise=noise)
    for model in (parts[0], reference):
        stage.apply(model)
    trainer = dpo_trainer(tmp_path, parts=parts, reference=reference, disable_dropout=False)
    if noise is False:
        assert first_loss(trainer) == pytest.approx(LN2, abs=1e-4)
        assert {model.training for model in (trainer.model, reference)} == {True, False}
    else:
        assert first_loss(trainer) != pytest.approx(LN2, abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["slime", "fusion"])
def test_trl_reads_our_log_probabilities_and_both_answers_see_the_same_tokens(preset, tmp_path):
    trainer = dpo_trainer(tmp_path, preset, (1, 1))
    batch = dict(next(iter(trainer.get_train_dataloader())))
    inputs, labels = labelled(batch)
    model = trainer.model.eval()
    found = model(**inputs, labels=labels, fused_lm_head=True, use_cache=False).log_probs
    torch.testing.assert_close(found, log_probs_of(model, inputs, labels), atol=1e-4, rtol=1e-4)
    token_map = model(**inputs, output_token_map=True).token_map
    kept = [token_map.kept[token_map.image == image] for image in range(4)]
    assert torch.equal(kept[0], kept[2]) and torch.equal(kept[1], kept[3])
    if preset == "slime":
        assert 0 < token_map.kept.float().mean() < 1
        scores = [token_map.score[token_map.image == image] for image in range(4)]
        torch.testing.assert_close(scores[0], scores[2], equal_nan=True)


@pytest.mark.parametrize(
    "kinds, weights",
    [
        (["sigmoid", "sft"], [1.0, 0.5]),
        pytest.param(["ipo"], None, marks=pytest.mark.slow),
        pytest.param(["hinge"], None, marks=pytest.mark.slow),
    ],
)
def test_other_losses_of_dpo_start_where_they_must(kinds, weights, tmp_path):
    trainer = dpo_trainer(tmp_path, "llava_next", (1, 2), loss_type=kinds, loss_weights=weights, beta=0.1)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    inputs, labels = labelled(batch)
    with torch.no_grad():
        chosen = log_probs_of(trainer.model.eval(), inputs, labels)[:2]
    sft = -chosen.sum() / (labels[:2] != -100).sum()
    start = {"sigmoid": LN2, "sft": sft.item(), "ipo": (1 / 0.2) ** 2, "hinge": 1.0}
    wanted = sum(weight * start[kind] for kind, weight in zip(kinds, weights or [1.0], strict=True))
    trainer.model.train()
    assert first_loss(trainer) == pytest.approx(wanted, abs=1e-3)


def test_the_first_step_of_kto_has_the_loss_one_half(tmp_path):
    """Policy and reference agree, so each row has the loss 1 - sigmoid(0)."""
    model, processor = saved_parts("slime", tmp_path / "model")
    rows = [
        {"prompt": own["prompt"], "completion": assistant(answer), "label": label, "images": own["images"]}
        for own in prompts(2)
        for answer, label in (("a dog", True), ("a cat or so", False))
    ]
    trainer = trl.KTOTrainer(
        model,
        args=trl_arguments(trl.KTOConfig, tmp_path / "out", per_device_train_batch_size=4, **WHOLE),
        train_dataset=as_dataset(rows),
        processing_class=processor,
    )
    assert first_loss(trainer) == pytest.approx(0.5, abs=1e-4)


# ---- online ---------------------------------------------------------------------------------------------------------
def lengths(completion_ids, **columns) -> list[float]:
    """A reward that no two completions need share."""
    return [float(sum(ids)) for ids in completion_ids]


def online_trainer(name, folder, preset="slime", images=2, layout=None, **changes):
    model, processor = saved_parts(preset, folder / "model", image_layout=layout)
    values = {"per_device_train_batch_size": 4, "max_completion_length": 5, "disable_dropout": True, **changes}
    extra = {"teacher_model": copy.deepcopy(model)} if name == "Distillation" else {"reward_funcs": lengths}
    if name != "Distillation":
        values |= {"num_generations": 2, "temperature": 1.0}
    return getattr(trl, f"{name}Trainer")(
        model,
        args=trl_arguments(getattr(trl, f"{name}Config"), folder / "out", **values),
        train_dataset=as_dataset(prompts(4, images)),
        processing_class=processor,
        **extra,
    )


def test_grpo_cuts_batches_of_pictures_rightly(tmp_path):
    """Its log-probabilities, in pieces of one row, are ours of the whole batch in the flat layout."""
    trainer = online_trainer("GRPO", tmp_path, layout="dense", steps_per_generation=2, beta=0.1)
    trainer.train()
    assert logged(trainer, "kl") == [pytest.approx(0, abs=1e-5)]
    assert trainer.state.log_history[0]["grad_norm"] > 0
    model, processor = trainer.model.eval(), trainer.processing_class
    images = [image for row in prompts(2, 2) for image in row["images"]]
    options = {
        "text": ["<image><image> what is it", "<image> <image> and this"],
        "padding": True,
        "return_tensors": "pt",
    }
    dense = dict(processor(images=[images[:2], images[2:]], **options))
    flat = dict(processor(images=images, image_layout="flat", **options))
    text = {name: dense.pop(name) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(
            model, *text.values(), logits_to_keep=4, batch_size=1, num_images=[2, 2], **dense
        )[0]
        wanted = log_probs_of(model, flat, text["input_ids"])[:, -4:]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_rloo_starts_with_no_loss(tmp_path):
    """Advantages of a group sum to zero, and policy and sampler agree."""
    trainer = online_trainer("RLOO", tmp_path, beta=0.0)
    assert first_loss(trainer) == pytest.approx(0, abs=1e-4)
    assert trainer.state.log_history[0]["grad_norm"] > 0


@pytest.mark.slow
def test_distillation_from_itself_has_no_loss(tmp_path):
    assert first_loss(online_trainer("Distillation", tmp_path)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    "layout, words",
    [("flat", 'set image_layout="dense"'), pytest.param("dense", "not one each", marks=pytest.mark.slow)],
)
def test_what_grpo_would_cut_wrongly_stops_it(layout, words, tmp_path):
    trainer = online_trainer("GRPO", tmp_path, layout=layout)
    rows = prompts(4, 2)
    if layout == "dense":
        for row in rows[1::2]:
            row["images"] = []
    trainer.train_dataset = as_dataset(rows)
    with pytest.raises(ValueError, match=words):
        trainer.train()

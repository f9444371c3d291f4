"""Mimic distillation in the Trainer: a teacher with views, sizes and padding of its own, and the same answers."""

import pytest
import torch
from transformers import Qwen2MoeConfig

from builders.objectives import objective_trainer
from builders.tiny import tiny_config, tiny_model, tiny_processor, tiny_text_config
from builders.training import conversations
from hires_lmm.conversion.random_model import build_byte_tokenizer
from hires_lmm.training import HiResLmmCollator, Stage, get_plan
from hires_lmm.training.objectives import Mimic, StepValues, mimic_losses
from training_run import text


RATES = {"connector": 1e-2, "language_model": 1e-3}
WIDE = {"hidden_size": 48, "num_hidden_layers": 3}


def student(seed=0):
    config = tiny_config("llava_next")
    return tiny_model(config, seed).train(), tiny_processor(config, "chatml")


def save(folder, config, template="chatml"):
    """Model and processor in a folder; padding on the left."""
    model, processor = tiny_model(config, 5), tiny_processor(config, template)
    processor.tokenizer.padding_side = "left"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A wider and deeper model that routes by the question and cuts images in another way."""
    planner = {"name": "llava_next", "pinpoints": [[56, 112]]}
    router = {"part": "router", "on": "crops", "keep": {"rule": "threshold", "gamma": 0.3}}
    changes = {"text": tiny_text_config("llama", **WIDE), "connector_config": {"token_ops": [router]}}
    return save(tmp_path_factory.mktemp("teacher"), tiny_config("llava_next", planner=planner, **changes))


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """A deeper model that cuts and counts as the student does."""
    config = tiny_config("llava_next", text=tiny_text_config("llama", **WIDE))
    return save(tmp_path_factory.mktemp("alike"), config)


def trainer_of(folder, data, objective, weights=None, **changes):
    model, processor = student()
    stage = Stage("mimic", RATES, loss_weights=weights or {"mimic": 0.5})
    changes = {"max_steps": 1, "train_sampling_strategy": "sequential", **changes}
    return objective_trainer(model, processor, stage, {"mimic": objective}, data, folder, **changes)


@torch.no_grad()
def answers_of(model, processor, example, shift):
    """Logits at the answer of one conversation, by itself, and the tokens that belong to them."""
    batch = HiResLmmCollator(processor)([example])
    logits, labels = model.eval()(**batch).logits[0], batch["labels"][0]
    places = [place for place in range(len(labels)) if labels[place] >= 0]
    return torch.stack([logits[place - shift] for place in places]), labels[places].tolist()


def divergences(mine, theirs):
    """KL(teacher | student), position by position, in double precision."""
    pairs = zip(mine.double().softmax(-1), theirs.double().softmax(-1), strict=True)
    return torch.stack([(p * (p / q).log()).sum() for q, p in pairs])


def loss_by_hand(model, processor, objective, data, shift=1):
    """The mean over all answer tokens."""
    from transformers import AutoProcessor

    own = objective.teacher
    theirs = AutoProcessor.from_pretrained(own.settings()["name"])
    theirs.tokenizer.padding_side = "right"
    found, tokens = [], []
    for example in data:
        mine, ids = answers_of(model, processor, example, shift)
        wanted, same = answers_of(own.model, theirs, example, shift)
        assert ids == same
        found.append(divergences(mine, wanted))
        tokens += ids
    return torch.cat(found).mean().item()


@pytest.mark.parametrize("kind", ["images", "text", "mixed"])
def test_the_loss_is_that_of_the_two_models_run_by_hand(teacher, tmp_path, kind):
    data = {"images": conversations(2), "text": [text(0), text(12345)], "mixed": [conversations(3)[2], text(1)]}[kind]
    objective = Mimic(teacher)
    objective.teacher.model.config.answer_prefix_ids = None  # nothing but the mask says which text is the question
    trainer = trainer_of(tmp_path, data, objective)
    expected = loss_by_hand(trainer.model, trainer.processing_class, objective, data)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss/mimic"] == pytest.approx(expected, rel=1e-3) and expected > 0.05
    assert log["loss"] == pytest.approx(log["loss/generation"] + 0.5 * expected, rel=1e-3)


def test_only_the_student_learns_and_gets_nearer(teacher, tmp_path):
    objective = Mimic(teacher)
    before = {name: value.clone() for name, value in objective.teacher.model.state_dict().items()}
    weights = {"generation": 0.0, "mimic": 1.0}
    trainer = trainer_of(tmp_path, conversations(2), objective, weights, max_steps=6)
    trainer.train()
    losses = [log["loss/mimic"] for log in trainer.state.log_history if "loss/mimic" in log]
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in objective.teacher.model.state_dict().items())
    assert not objective.state_dict() and not any("teacher" in name for name, _ in trainer.model.named_parameters())


def step_of(model, batch, objective):
    outputs = model(**{name: batch[name] for name in batch if name != "teacher_inputs"}, **objective.asks)
    inputs = {name: value for name, value in batch.items() if name != "teacher_inputs"}
    return StepValues(outputs, {n: batch[n] for n in batch if n == "teacher_inputs"}, inputs, True, model.model)


def test_the_students_own_batch_gives_a_like_teacher_the_same_answers(alike):
    model, processor = student()
    found = []
    for same_inputs in (False, True):
        objective = Mimic(alike, same_inputs=same_inputs)
        batch = HiResLmmCollator(processor, columns=objective.columns())([*conversations(2), text(3)])
        assert ("teacher_inputs" in batch) != same_inputs
        found.append(objective(step_of(model, batch, objective)))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    assert found[0].shape == (3,) and bool((found[0] > 1e-3).all())


def test_released_positions_are_not_shifted(teacher):
    model, processor = student()
    objective, data = Mimic(teacher, compat="release"), conversations(2)
    batch = HiResLmmCollator(processor, columns=objective.columns())(data)
    rows = objective(step_of(model, batch, objective))
    shares = (batch["labels"] >= 0).sum(dim=1) / (batch["labels"] >= 0).sum()
    theirs = batch["teacher_inputs"]["labels"]
    logits = objective.teacher({n: v for n, v in batch["teacher_inputs"].items() if n != "labels"}).logits[theirs >= 0]
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean().item()
    expected = loss_by_hand(model, processor, objective, data, shift=0) + entropy
    assert (rows * shares).sum().item() == pytest.approx(expected, rel=1e-3)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path):
    model, processor = student()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    objective = Mimic(str(tmp_path))
    batch = HiResLmmCollator(processor, columns=objective.columns())(conversations(2))
    loss = objective(step_of(model, batch, objective)).sum()
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert all(p.grad is None or p.grad.abs().max() < 1e-5 for p in model.parameters())


def test_temperature_and_ids_that_one_model_lacks():
    torch.manual_seed(0)
    mine, theirs = torch.randn(5, 12), torch.randn(5, 9)
    wanted = 4 * divergences(mine[:, :9] / 2, theirs / 2)
    torch.testing.assert_close(mimic_losses(mine, theirs, 2.0).double(), wanted, atol=1e-6, rtol=1e-5)
    other = 4 * divergences(theirs / 2, mine[:, :9] / 2)
    torch.testing.assert_close(mimic_losses(theirs, mine, 2.0).double(), other, atol=1e-5, rtol=1e-5)


def test_a_batch_that_lost_its_samples_counts_nothing(teacher):
    model, processor = student()
    objective = Mimic(teacher)
    collator = HiResLmmCollator(processor, columns=objective.columns(), max_length=3, too_long="drop")
    rows = objective(step_of(model, collator(conversations(2)), objective))
    assert rows.tolist() == [0.0]


def test_a_teacher_with_another_tokenizer_is_refused_by_name(tmp_path):
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = student()[1].chat_template
    config = tiny_config("llava_next", text=tiny_text_config("llama", vocab_size=len(tokenizer)))
    tiny_model(config).model.language_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    alone = {"model_class": "AutoModelForCausalLM", "processor_class": "AutoTokenizer"}
    objective = Mimic({"name": str(tmp_path), **alone})
    model, processor = student()
    batch = HiResLmmCollator(processor, columns=objective.columns())(conversations(1))
    with pytest.raises(
        ValueError, match=r"The teacher '.*' reads an answer as \d+ tokens .*the student as \d+ tokens"
    ):
        objective(step_of(model, batch, objective))


def test_a_teacher_whose_template_marks_no_answers_is_refused(alike):
    objective = Mimic(alike)
    objective.teacher.processor.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match=r"does not mark answers with {% generation %}"):
        objective.columns()


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"compat": "released"}])
def test_wrong_options_are_refused(alike, options):
    with pytest.raises(ValueError, match="must be None or 'release'"):
        Mimic(alike, **options)


def test_settings_build_it_anew(alike):
    objective = Mimic({"name": alike, "dtype": "bfloat16"}, temperature=2.0, compat="release", same_inputs=True)
    again = Mimic.from_settings(objective.settings())
    assert again.settings() == objective.settings() and again.teacher.model.dtype == torch.bfloat16


def test_the_published_plan_teaches_in_two_stages(alike, tmp_path):
    """One step of each stage: rates, what moves, and that the language loss counts nothing in the second."""
    stages = get_plan("llava_mod")
    assert [set(stage.trainable.values()) for stage in stages] == [{1e-3}, {2e-5}, {2e-5}, {2e-6}]
    own = tiny_text_config("qwen2").to_dict()
    shared = {name: own[name] for name in own if name in Qwen2MoeConfig.__dataclass_fields__ and name != "model_type"}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = tiny_config("llava_next", text=Qwen2MoeConfig(**{**shared, **experts}))
    model, processor = tiny_model(config).train(), tiny_processor(config, "chatml")
    wanted = [("connector",), ("connector", "language_model", "lm_head"), *[("language_model.layers.",)] * 2]
    for stage, parts in zip(stages, wanted, strict=True):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        objectives = {"mimic": Mimic(alike)} if stage.loss_weights else {}
        trainer = objective_trainer(
            model, processor, stage, objectives, conversations(2), tmp_path / stage.name, max_steps=1
        )
        trainer.train()
        log = trainer.state.log_history[0]
        if stage.loss_weights:
            total = log["loss/mimic"] + stage.loss_weights["generation"] * log["loss/generation"]
            assert log["loss"] == pytest.approx(total, abs=1e-3)
        names = [
            name.removeprefix("model.") for name in before if not torch.equal(before[name], model.state_dict()[name])
        ]
        assert names and all(name.startswith(parts) for name in names)
        assert len(parts) == 3 or parts == ("connector",) or all(".mlp." in name for name in names)
    assert any(".mlp.gate." in name for name in names) and any(".mlp.experts." in name for name in names)
    with pytest.raises(ValueError, match="Unknown column 'vicuna_7b' of the plan 'llava_mod'"):
        get_plan("llava_mod", "vicuna_7b")

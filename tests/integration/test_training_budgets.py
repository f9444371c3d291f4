"""Budgets drawn for each optimizer step: the same with workers, accumulation and after a resume."""

import dataclasses

import pytest
import torch
from torch.utils.data import DataLoader

from builders.training import conversations, make_trainer, slime_parts
from hires_lmm.training import HiResLmmCollator, Stage
from hires_lmm.training.collator import draw_budget
from hires_lmm.training.plans import FORCED_EXPERT


BUDGETS = [17, 18, 19, 20]
STAGE = Stage(
    "nested",
    {"connector.adapter": 1e-3},
    settings={FORCED_EXPERT: "mlp"},
    max_image_tokens=BUDGETS,
)


def budgets_of(batch: dict) -> set[int]:
    """The numbers of tokens that the images of a batch get."""
    return set(batch["view_positions"][:, 5].tolist())


def expected(steps: range, seed: int = 0) -> list[set[int]]:
    return [{draw_budget(BUDGETS, step, seed)} for step in steps]


@pytest.fixture(scope="module")
def parts():
    return slime_parts(token_ops=[{"part": "router", "score": "saliency", "on": "all"}])


def test_draws_are_even_stateless_and_differ_by_seed():
    drawn = [draw_budget(BUDGETS, step) for step in range(4000)]
    assert drawn[123] == draw_budget(BUDGETS, 123)
    assert all(900 < drawn.count(budget) < 1100 for budget in BUDGETS)
    assert drawn != [draw_budget(BUDGETS, step, seed=1) for step in range(4000)]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_worker_processes_draw_as_one_process_does(parts, workers):
    collator = HiResLmmCollator(parts[1], max_image_tokens=BUDGETS)
    loader = DataLoader(conversations(2) * 6, batch_size=1, collate_fn=collator, num_workers=workers)
    assert [budgets_of(batch) for batch in loader] == expected(range(12))
    collator.start(step=2, batches_per_step=3)
    found = [budgets_of(batch) for batch in loader]
    assert found == [expected(range(6))[2 + number // 3] for number in range(12)]


def test_a_single_example_gets_the_largest(parts):
    collator = HiResLmmCollator(parts[1], max_image_tokens=BUDGETS)
    assert budgets_of(collator.encode(conversations(1)[0])) == {20}
    assert budgets_of(collator.encode(conversations(1)[0], 18)) == {18}
    with pytest.raises(ValueError, match="holds no budget to draw"):
        HiResLmmCollator(parts[1], max_image_tokens=[])


def test_a_run_draws_once_a_step_and_goes_on_after_a_resume(tmp_path):
    def run(resume: bool, steps: int) -> list[set[int]]:
        model, processor = slime_parts(token_ops=[{"part": "router", "score": "saliency", "on": "all"}])
        collator = HiResLmmCollator(processor, max_image_tokens=BUDGETS)
        seen = []
        forward = model.forward
        model.forward = lambda *args, **kwargs: seen.append(budgets_of(kwargs)) or forward(*args, **kwargs)
        trainer = make_trainer(
            model,
            processor,
            STAGE,
            conversations(8),
            tmp_path,
            collator=collator,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_steps=6,
            save_steps=3,
            save_strategy="steps",
        )
        trainer.args.max_steps = steps
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        return seen

    twice = [step for step in expected(range(6)) for _ in range(2)]
    assert run(False, 6) == twice
    assert run(True, 6) == twice[6:]


def test_a_collator_with_other_budgets_is_refused(parts, tmp_path):
    model, processor = parts
    with pytest.raises(ValueError, match=r"max_image_tokens=\[17, 18, 19, 20\], but the collator has None"):
        make_trainer(model, processor, STAGE, conversations(2), tmp_path).train()
    free = dataclasses.replace(STAGE, max_image_tokens=None)
    collator = HiResLmmCollator(processor, max_image_tokens=19)
    make_trainer(model, processor, free, conversations(2), tmp_path, collator=collator, max_steps=1).train()
    assert Stage.from_dict(STAGE.to_dict()) == STAGE
    assert torch.isfinite(next(model.parameters())).all()

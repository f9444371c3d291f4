"""Cognition alignment in the stock Trainer: any preset, whole and streamed data, no other part of VLSA."""

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from builders.tiny import tiny_config, tiny_model, tiny_processor
from builders.training import conversation, losses, make_trainer, slime_config
from hires_lmm.training import HiResLmmCollator, Stage
from hires_lmm.training.data.cognition import CodebookTask, CognitionTransform, PixelTask, with_cognition
from training_run import text


STAGE = Stage("all", {"connector": 1e-3, "language_model": 1e-3, "lm_head": 1e-3})
CONFIGS = {"slime": slime_config, "llava_next": lambda: tiny_config("llava_next")}


class Brightness:
    """A codebook of four grey levels on 2 x 2 cells."""

    num_codes, grid = 4, (2, 2)

    def __call__(self, images):
        return np.stack([np.asarray(image.convert("L").resize((2, 2)), dtype=np.int64) // 64 for image in images])


class Stream(IterableDataset):
    """Conversations one after another, every third one without an image."""

    def __iter__(self):
        return (text(number) if number % 3 == 2 else conversation(number) for number in range(8))


class Listening(HiResLmmCollator):
    """A collator that keeps what it is given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rows = []

    def __call__(self, examples):
        self.rows += examples
        return super().__call__(examples)


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("streamed", [False, True])
def test_the_stock_trainer_learns_from_transformed_rows(tmp_path, preset, streamed):
    config = CONFIGS[preset]()
    model, processor = tiny_model(config).train(), tiny_processor(config, "chatml")
    tasks = {PixelTask((2, 2)): 1.0, CodebookTask(Brightness(), (2, 2)): 1.0}
    transform = CognitionTransform(tasks, processor=processor)
    data = with_cognition(Stream() if streamed else list(Stream()), transform)
    collator = Listening(processor)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    extra = {"accelerator_config": {"dispatch_batches": False}} if streamed else {}
    trainer = make_trainer(model, processor, STAGE, data, tmp_path, collator=collator, max_steps=3, **extra)
    trainer.train()
    assert len(losses(trainer)) == 3 and all(np.isfinite(losses(trainer)))
    for part in ("connector", "language_model", "lm_head"):
        assert any(part in name and not torch.equal(p, before[name]) for name, p in model.named_parameters()), part
    lengths = [len(row["messages"]) for row in collator.rows]
    assert sorted(set(lengths)) == [2, 6] and lengths.count(2) < lengths.count(6)  # a text row keeps its two


def test_a_second_epoch_asks_other_questions(tmp_path):
    config = tiny_config("llava_next")
    processor = tiny_processor(config, "chatml")
    data = with_cognition([conversation(n) for n in range(2)], CognitionTransform({PixelTask((2, 2)): 1.0}))
    collator = Listening(processor)
    options = {"max_steps": -1, "num_train_epochs": 2, "train_sampling_strategy": "sequential"}
    make_trainer(tiny_model(config).train(), processor, STAGE, data, tmp_path, collator=collator, **options).train()
    first, second = collator.rows[:2], collator.rows[2:4]
    assert [row["images"] for row in first] == [row["images"] for row in second]
    assert all(one["messages"] != other["messages"] for one, other in zip(first, second, strict=True))

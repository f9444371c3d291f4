"""The objective `cg_vlm` in runs of the stock Trainer, against a loop over images, captions, patches and words."""

from types import SimpleNamespace

import pytest
import torch

from builders.objectives import objective_trainer
from builders.tiny import tiny_config, tiny_model, tiny_processor
from builders.training import conversations, losses, make_trainer
from hires_lmm.training import Stage
from hires_lmm.training.objectives import CgVlm, StepValues
from training_run import text


STAGE = Stage("align", {"connector": 1e-2}, loss_weights={"generation": 0.0, "cg_vlm": 1.0})


def parts(preset: str = "llava_next"):
    config = tiny_config(preset)
    return tiny_model(config).train(), tiny_processor(config, "chatml")


def slow_loss(model, processor, data: list[dict], temperature: float) -> float:
    """The mean over all pairs of a token of the global view and a word, one image and caption after another."""
    from hires_lmm.training import HiResLmmCollator

    patches, words = [], []
    for row in data:
        batch = HiResLmmCollator(processor)([row])
        labels = batch.pop("labels")
        with torch.no_grad():
            tokens = model.model.get_image_features(
                **{name: batch[name] for name in ("pixel_values", "view_positions", "view_spans")}
            ).tokens
            embeds = model.get_input_embeddings()(batch["input_ids"][labels != -100])
        patches.append(tokens.features[tokens.kind == 0])
        words.append(embeds)
    similarity = torch.zeros(len(data), len(data))
    for i, own in enumerate(patches):
        for j, caption in enumerate(words):
            cosines = [torch.cosine_similarity(patch, word, dim=0) for patch in own for word in caption]
            similarity[i, j] = torch.stack(cosines).mean()
    chances = similarity / temperature
    own = torch.eye(len(data), dtype=torch.bool)
    return -(chances.log_softmax(0)[own].mean() + chances.log_softmax(1)[own].mean()).item() / 2


def test_the_loss_of_a_run_is_that_of_a_loop_and_falls(tmp_path):
    """Also beside a row without image."""
    model, processor = parts()
    data = conversations(3)
    wanted = slow_loss(model, processor, data, temperature=0.2)
    options = {"cg_vlm": CgVlm(temperature=0.2)}
    trainer = objective_trainer(
        model,
        processor,
        STAGE,
        options,
        [*data, text(3)],
        tmp_path,
        per_device_train_batch_size=4,
        max_steps=8,
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(wanted, rel=1e-3)
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]


def test_several_images_of_a_row_count_as_one_and_text_alone_as_none(tmp_path):
    model, processor = parts()
    two, one = conversations(1, images=2)[0], conversations(2)[1]
    wanted = slow_loss(model, processor, [two, one], temperature=0.07)
    trainer = make_trainer(
        model, processor, STAGE, [two, one, text(3)], tmp_path / "a", per_device_train_batch_size=3, max_steps=1
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(wanted, rel=1e-3)
    trainer = make_trainer(model, processor, STAGE, [text(3), text(4)], tmp_path / "b", max_steps=1)
    trainer.train()
    assert losses(trainer)[0] == 0


def test_rows_without_an_answer_are_left_out():
    model, _ = parts()
    token, tokens = model.config.image_token_id, torch.randn(3, 16, 32)
    ids = torch.tensor([[token] * 2 + [5, 6], [token] * 2 + [7, 8], [token] * 2 + [9, 5]])
    labels = torch.tensor([[-100, -100, -100, 6], [-100] * 4, [-100, -100, 9, 5]])
    positions = torch.tensor([[0, 1, 1, 0, 0, 2, 4, 4, 1]] * 3)

    def loss(rows: list[int]) -> torch.Tensor:
        inputs = {"input_ids": ids[rows], "labels": labels[rows], "view_positions": positions[rows]}
        outputs = SimpleNamespace(aux={"global_tokens": tokens[rows]})
        return CgVlm()(StepValues(outputs, {}, inputs, True, model.model))

    torch.testing.assert_close(loss([0, 1, 2]), loss([0, 2]))
    assert loss([0, 2]) > 0 and loss([1]) == 0


@pytest.mark.parametrize(("preset", "views"), [("llava_next", "crops"), ("fusion", "all")])
def test_models_and_stages_without_global_tokens_are_refused_by_name(tmp_path, preset, views):
    model, processor = parts(preset)
    stage = Stage("align", {"connector": 1e-2}, views=views, loss_weights={"cg_vlm": 1.0})
    with pytest.raises(ValueError, match="weighs 'cg_vlm'"):
        make_trainer(model, processor, stage, conversations(2), tmp_path)

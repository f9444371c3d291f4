"""The plans of the fusion paper: their values, and runs of the stock Trainer through them."""

import dataclasses

import pytest
import torch
from transformers import Trainer

from builders.fusion import tiny_text_encoder
from builders.training import conversations, fusion_parts, training_arguments
from hires_lmm.modeling.fusion_hires_lmm import HiResLmmFusion
from hires_lmm.training import HiResLmmCollator, StageCallback, get_plan
from hires_lmm.training.collator import draw_budget
from hires_lmm.training.objectives import Contrastive
from hires_lmm.training.plans_fusion import QUESTION, TOKENS, fusion, fusion_nested


def test_the_values_of_the_paper():
    stages = {stage.name: stage for stage in get_plan("fusion")}
    first, second = stages["fusion/contrastive"], stages["fusion/generation"]
    assert list(stages)[2:] == ["fusion/128", "fusion/64", "fusion/32", "fusion/16", "fusion/8", "fusion/1"]
    assert (first.batch_size, second.batch_size) == (256, 2560)
    assert first.trainable == {"connector": 2e-5, "objectives.contrastive": 2e-5}
    assert first.loss_weights == {"contrastive": 1.0, "generation": 0.0} and second.loss_weights == {}
    assert all(stage.trainable == {"connector": 2e-5} for name, stage in stages.items() if stage is not first)
    assert [stage.max_image_tokens for stage in stages.values()] == [256, 256, 128, 64, 32, 16, 8, 1]
    assert [stage.after for stage in stages.values()] == [None, None, *["fusion/generation"] * 6]
    assert all(stage.settings[QUESTION] and stage.views == "all" for stage in stages.values())
    assert max(TOKENS) == HiResLmmFusion.Options().num_queries


def test_columns_and_towers():
    silent = get_plan("fusion", "without_question", tower_rate=1e-6)
    assert [stage.name for stage in silent][2:4] == ["fusion/256", "fusion/128"]
    assert [stage.settings[QUESTION] for stage in silent] == [True, True, *[False] * 7]
    assert all(stage.trainable["vision_tower"] == 1e-6 for stage in silent)
    warm, nested = get_plan("fusion_nested", "without_question")
    assert warm.settings[QUESTION] and not nested.settings[QUESTION]
    assert nested.max_image_tokens == list(TOKENS) and nested.trainable == {"connector": 2e-5}
    with pytest.raises(ValueError, match="Unknown column 'vicuna_7b' of the plan; known columns: with_question"):
        get_plan("fusion", "vicuna_7b")


def run(model, processor, stage, folder, **options):
    """One stage at a rate that moves a tiny model; returns the numbers of tokens of its batches."""
    stage = dataclasses.replace(stage, trainable=dict.fromkeys(stage.trainable, 1e-2))
    objectives = {}
    if "contrastive" in stage.loss_weights:
        encoder, tokenizer = tiny_text_encoder()
        objectives["contrastive"] = Contrastive(encoder, 32, tokenizer, max_length=40)
    columns = [column for objective in objectives.values() for column in objective.columns()]
    collator = HiResLmmCollator(processor, max_image_tokens=stage.max_image_tokens, columns=columns)
    args = training_arguments(folder, **{"max_steps": 2, **options})
    trainer = Trainer(
        model,
        args,
        train_dataset=conversations(4),
        data_collator=collator,
        processing_class=processor,
        callbacks=[StageCallback(stage, show_table=False, objectives=objectives)],
        optimizer_cls_and_kwargs=stage.optimizer_cls_and_kwargs(args),
    )
    counts = []
    handle = model.model.connector.token_ops[0].register_forward_hook(
        lambda module, args, output: counts.append(output[0].num_tokens)
    )
    trainer.train()
    handle.remove()
    return counts


def moved_by(model, action) -> set[str]:
    """Names of the parameters that an action changed."""
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if "objectives" not in name}
    action()
    after = dict(model.named_parameters())
    return {name.removeprefix("model.") for name, tensor in before.items() if not torch.equal(after[name], tensor)}


@pytest.mark.parametrize("column", ["with_question", "without_question"])
def test_the_whole_plan_runs_and_moves_what_each_stage_names(tmp_path, column):
    model, processor = fusion_parts()
    for stage in fusion(column, tokens=(12, 3, 1)):
        counts = []
        moved = moved_by(
            model, lambda stage=stage, counts=counts: counts.extend(run(model, processor, stage, tmp_path))
        )
        assert moved and all(name.startswith("connector.") for name in moved), stage.name
        is_warm_up = "contrastive" in stage.loss_weights
        # the contrastive loss looks at the states before the projection to the language model
        assert ("connector.token_ops.0.output.weight" in moved) is not is_warm_up, stage.name
        assert {"connector.token_ops.0.queries", "connector.view_ops.0.conv.weight"} <= moved
        words = "connector.token_ops.0.model.embed_tokens.weight" in moved
        assert words is stage.settings[QUESTION], stage.name
        assert counts == [[stage.max_image_tokens] * 2] * 2
        assert model.config.connector_config.token_ops[0]["question"] is stage.settings[QUESTION]
        assert model.config.training_stage == stage.name


def test_the_nested_plan_draws_one_number_a_step(tmp_path):
    model, processor = fusion_parts()
    tokens = (12, 6, 3, 1)
    stage = fusion_nested(tokens=tokens)[1]
    counts = run(model, processor, stage, tmp_path, max_steps=5, gradient_accumulation_steps=2)
    drawn = [draw_budget(list(tokens), step) for step in range(5)]
    assert counts == [[number] * 2 for number in drawn for _ in range(2)] and len(set(drawn)) > 1
    queries = model.model.connector.token_ops[0].queries
    assert queries.grad is None or torch.isfinite(queries.grad).all()

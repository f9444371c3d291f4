"""Joining the halves, packing questions behind one picture, caching scenes, scoring."""

import pytest
import torch

from builders.needle import halves, joined, scene_set
from hires_lmm.training import HiResLmmCollator
from needle import needle_row
from needle.questions import FINE_KINDS, SCENE_KINDS
from needle.runs import (
    SceneSet,
    cache_scenes,
    evaluate_packed,
    with_token_ops,
)
from needle.runs.collator import KINDS_BY_VIEWS, SceneCollator, packed_mask
from needle.runs.run import Visits


COSINE = {"part": "router", "on": "crops", "score": "cosine", "keep": {"rule": "threshold", "gamma": 0.5}}


# ---- joining


def test_a_joined_model_holds_both_halves_and_a_connector_of_its_seed():
    model, processor = joined(num_queries=None)
    tower, language = halves().vision.tower.state_dict(), halves().language.model.state_dict()
    assert all(torch.equal(value, tower[name]) for name, value in model.model.vision_tower.state_dict().items())
    assert all(torch.equal(value, language[name]) for name, value in model.model.language_model.state_dict().items())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert processor.image_tokens(384, 384) == 64 + 36 * 16
    first, again, other = (joined(seed=seed)[0].model.connector.adapter.mlp.linear_1.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert 0.018 < first.std() < 0.022


def test_token_operations_without_weights_are_added_and_others_refused():
    model, processor = joined()
    routed = with_token_ops(model, [COSINE])
    assert not routed.model.connector.is_count_static and model.model.connector.is_count_static
    batch = SceneCollator(processor, scene_set(1), questions=1, packed=False).build([{"scene": 0}]).inputs
    with torch.no_grad():
        kept = routed(**batch).kept_mask
    image = batch["input_ids"] == model.config.image_token_id
    assert 0 < int((image & ~kept).sum()) <= 36 * 4
    everything = with_token_ops(model, [{**COSINE, "keep": {"rule": "threshold", "gamma": 1.0}}])
    with torch.no_grad():
        assert torch.allclose(everything(**batch).logits, model(**batch).logits, atol=1e-4)
    with pytest.raises(ValueError, match="have weights"):
        with_token_ops(model, [{**COSINE, "score": "attention"}])


# ---- packing


@pytest.mark.parametrize("views", ["all", "crops", "global", "none"])
def test_packed_questions_answer_as_if_asked_alone(views):
    model, processor = joined()
    scenes = scene_set(2)
    batch = SceneCollator(processor, scenes, None, views, questions=4).build([{"scene": 0}, {"scene": 1}])
    with torch.no_grad():
        packed = model(**{name: value for name, value in batch.inputs.items() if name != "labels"}).logits
    for row, group in enumerate(batch.questions):
        assert len(group) == 4
        for number, question in enumerate(group, start=1):
            alone = ask(processor, scenes.picture(row), question, views)
            with torch.no_grad():
                expected = model(**alone).logits[0]
            places = (batch.number[row] == number).nonzero()[:, 0]
            length = alone["input_ids"].shape[1] - int((batch.number[row] == 0).sum())
            assert torch.equal(alone["input_ids"][0, -length:], batch.inputs["input_ids"][row, places[:length]])
            assert torch.allclose(expected[-length:], packed[row, places[:length]], atol=2e-4)


def ask(processor, picture, question, views):
    """A prompt as at inference."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question.text}]
    options = {} if views == "none" else {"views": views}
    return processor.apply_chat_template(
        [{"role": "user", "content": content[views == "none" :]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )


def test_unpacked_rows_equal_those_of_the_ordinary_collator():
    _, processor = joined()
    scenes = scene_set(2)
    batch = SceneCollator(processor, scenes, questions=2, packed=False).build([{"scene": 0}, {"scene": 1}])
    questions = [question for group in batch.questions for question in group]
    rows = [needle_row(scenes.picture(at // 2), question, at // 2) for at, question in enumerate(questions)]
    expected = HiResLmmCollator(processor)(rows)
    assert set(expected) == set(batch.inputs) and len(questions) == 4
    for name, value in expected.items():
        assert torch.equal(batch.inputs[name], value), name


def test_nothing_sees_another_question_or_the_future():
    number = torch.tensor([[0, 0, 1, 1, 2, 2, -1]])
    seen = packed_mask(number)[0, 0] == 0
    expected = [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 4}, {0, 1, 4, 5}, {0, 1, 6}]
    assert [set(row.nonzero()[:, 0].tolist()) for row in seen] == expected


def test_views_decide_over_the_kinds_and_a_mix_draws_views():
    _, processor = joined()
    assert set(KINDS_BY_VIEWS["global"]) == set(SCENE_KINDS)
    assert (
        set(KINDS_BY_VIEWS["crops"]) < {*FINE_KINDS, "background"} and "place_of_value" not in KINDS_BY_VIEWS["crops"]
    )
    collator = SceneCollator(processor, scene_set(3), mix={"all": 0.5, "global": 0.5}, questions=20)
    drawn = {views: [] for views in ("all", "global")}
    for visit in range(8):
        batch = collator.build([{"scene": 0, "visit": visit}])
        drawn[batch.views].append(int((batch.inputs["input_ids"] == processor.image_token_id).sum()))
        kinds = {question.kind for question in batch.questions[0]}
        assert (kinds <= set(SCENE_KINDS)) is (batch.views == "global")
    assert set(drawn["all"]) == {64 + 36 * 4} and set(drawn["global"]) == {64}
    with pytest.raises(ValueError, match="views='all'"):
        SceneCollator(processor, scene_set(3), views="crops", mix={"all": 1.0})


def test_visits_are_different_passes_over_all_scenes():
    rows = Visits(5, 12, seed=0).rows
    assert sorted(row["scene"] for row in rows[:5]) == sorted(row["scene"] for row in rows[5:10]) == [0, 1, 2, 3, 4]
    assert [row["visit"] for row in rows] == [0] * 5 + [1] * 5 + [2] * 2
    assert rows == Visits(5, 12, seed=0).rows != Visits(5, 12, seed=1).rows
    scenes = scene_set()
    assert scenes.questions(0, FINE_KINDS, 3, visit=0) != scenes.questions(0, FINE_KINDS, 3, visit=1)


# ---- features


def test_cached_scenes_are_what_the_tower_gives_and_grow(tmp_path):
    model, processor = joined()
    store = cache_scenes(model, processor, scene_set(1), tmp_path)
    store = cache_scenes(model, processor, scene_set(2), tmp_path)
    assert len(store) == 2 and store.get("0").shape == (37, 64, 128)
    for scene in range(2):
        pixels = processor.image_processor(scene_set().picture(scene), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = model.model.encode_pixels(pixels, -1)
        assert torch.allclose(store.first_views([scene], 37), expected, atol=1e-2, rtol=1e-3)
    assert torch.equal(store.first_views([1, 0], 1), torch.stack([store.get(key)[0].float() for key in "10"]))
    assert cache_scenes(model, processor, scene_set(1), tmp_path).folder == store.folder
    other = cache_scenes(model, processor, SceneSet("validation", 1, seed=1), tmp_path)
    assert other.folder != store.folder
    with pytest.raises(ValueError, match=r"does not hold the image 2; run cache_scenes"):
        store.first_views([2], 37)


# ---- scores


def test_scores_equal_greedy_answers(tmp_path):
    model, processor = joined()
    scenes = scene_set(2)
    right = total = 0
    for scene in range(2):
        for question in scenes.questions(scene, ("background", "place_of_colour"), 3):
            prompt = ask(processor, scenes.picture(scene), question, "all")
            output = model.generate(**prompt, max_new_tokens=4)[0, prompt["input_ids"].shape[1] :]
            ended = processor.tokenizer.eos_token_id in output.tolist()
            right += ended and processor.decode(output, skip_special_tokens=True) == question.answer
            total += 1
    scores = evaluate_packed(
        model, processor, scenes, tmp_path, questions=3, kinds=("background", "place_of_colour"), batch_size=1
    )
    assert scores["all"]["questions"] == total and scores["all"]["right"] == right
    assert scores["scene"] == scores["all"] and "fine" not in scores

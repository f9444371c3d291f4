"""Reward models: a score on the last token, TRL's RewardTrainer with our collator, facts, rewards as functions."""

import math

import pytest
import torch

from builders import plain_tokenizer, random_image
from builders.trl import as_dataset, assistant, logged, pictures, preferences, trl_arguments, trl_parts, user
from hires_lmm import HiResLmmForSequenceClassification
from hires_lmm.training.rewards import (
    RewardCollator,
    length_penalty,
    model_reward,
    rated_conversation,
    rating_request,
    right_answer,
)


FACTS = ["a dog lies on the mat", "the mat is red", "it is noon"]


def reward_parts(preset="slime", seed=0, **options):
    """A tiny reward model, and its processor."""
    generating, processor = trl_parts(preset, seed, **options)
    config = generating.config
    config.num_labels = 1
    model = HiResLmmForSequenceClassification(config)
    model.model.load_state_dict(generating.model.state_dict())
    torch.nn.init.normal_(model.score.weight, std=0.5, generator=torch.Generator().manual_seed(seed))
    return model.eval(), processor


def rows(count: int = 2) -> list[dict]:
    return [{**row, "facts": FACTS[: 1 + number]} for number, row in enumerate(preferences([1] * count))]


# ---- the head -------------------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("preset", ["slime", "fusion"])
def test_the_score_is_read_off_the_last_token_that_is_no_padding(preset, side):
    model, processor = reward_parts(preset)
    texts, images = ["<image> one", "<image> a longer one"], [random_image(60, 90), random_image(90, 200)]
    batch = processor(text=texts, images=images, padding=True, padding_side=side, return_tensors="pt")
    found = model(**batch).logits
    for row in (0, 1):
        alone = processor(text=texts[row], images=images[row], return_tensors="pt")
        hidden = model.model(**alone).last_hidden_state[0, -1]
        torch.testing.assert_close(found[row, 0], hidden @ model.score.weight[0], atol=1e-4, rtol=1e-4)
    assert abs(found[0] - found[1]) > 1e-3


@torch.no_grad()
def test_rows_that_end_in_the_padding_token_itself_are_scored_there():
    """The pad token of many tokenizers ends texts: the mask decides, not the id."""
    model, _ = reward_parts("llava_next")
    ids = torch.tensor([[7, 8, plain_tokenizer().pad_token_id]])
    whole, cut = (model(input_ids=ids, attention_mask=torch.tensor([mask])).logits for mask in ([1, 1, 1], [1, 1, 0]))
    assert torch.equal(whole, model(input_ids=ids).logits)
    torch.testing.assert_close(cut, model(input_ids=ids[:, :2]).logits)


def test_labels_give_a_loss():
    model, _ = reward_parts("llava_next")
    ids, labels = torch.tensor([[7, 8], [9, 7]]), torch.tensor([1.0, 3.0])
    outputs = model(input_ids=ids, labels=labels)
    assert outputs.loss.item() == pytest.approx((outputs.logits[:, 0] - labels).square().mean().item())


def test_a_generating_checkpoint_loads_with_a_new_head_and_a_reward_model_with_its_own(tmp_path):
    from transformers import AutoModelForSequenceClassification

    trl_parts("slime")[0].save_pretrained(tmp_path / "source")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "source", num_labels=1)
    assert isinstance(model, HiResLmmForSequenceClassification)
    assert model.score.weight.shape == (1, model.config.text_config.hidden_size) and model.score.weight.any()
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert again.config.num_labels == 1 and torch.equal(again.score.weight, model.score.weight)


# ---- data -----------------------------------------------------------------------------------------------------------
def text_parts(messages: list[dict]) -> str:
    return "\n".join(part["text"] for message in messages for part in message["content"] if part["type"] == "text")


def test_a_request_lists_every_fact_once_in_any_order():
    orders = set()
    for seed in range(20):
        lines = rating_request(FACTS, seed).splitlines()
        assert sorted(lines[-3:]) == sorted(f"- {fact}" for fact in FACTS)
        orders.add(tuple(lines[-3:]))
    assert len(orders) > 3
    assert rating_request(FACTS).splitlines()[-3:] == [f"- {fact}" for fact in FACTS]
    assert "facts" not in rating_request()


def test_images_stand_where_the_text_says_or_before_it():
    first, second = pictures(0, 2)
    for content in ("what", [{"type": "text", "text": "what"}]):
        front = rated_conversation([{"role": "user", "content": content}, *assistant("a")], [first, second])
        assert [part["type"] for part in front[0]["content"]] == ["image", "image", "text"]
    inside = rated_conversation(user("what <image> is <image>"), [first, second])[0]["content"]
    assert [part.get("image", part.get("text")) for part in inside] == ["what ", first, " is ", second]
    held = [{"role": "user", "content": [{"type": "image", "image": second}, {"type": "text", "text": "what"}]}]
    assert rated_conversation(held, [first])[0]["content"][0]["image"] is second


def test_the_collator_puts_chosen_rows_first_and_the_facts_behind_both_answers():
    _, processor = reward_parts("llava_next")
    examples = [{**row, "margin": 0.5} for row in rows()]
    batch = RewardCollator(processor, shuffle=False)(examples)
    assert batch["margin"].tolist() == [0.5, 0.5]
    texts = [processor.tokenizer.decode(ids) for ids in batch["input_ids"]]
    for number, text in enumerate(texts):
        assert ("a dog" if number < 2 else "a cat or so") in text.replace(FACTS[0], "")
        assert f"table {number % 2}" in text
        shown = [fact for fact in FACTS if f"- {fact}" in text]
        assert shown == FACTS[: 1 + number % 2]
        assert text.index("- " + FACTS[0]) > text.index("table")
    assert torch.equal(
        batch["view_boxes"][: len(batch["view_boxes"]) // 2], batch["view_boxes"][len(batch["view_boxes"]) // 2 :]
    )
    bare = RewardCollator(processor, facts=False)(examples)
    assert "facts" not in processor.tokenizer.decode(bare["input_ids"][0])
    joined = [
        {**row, "chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
        for row in examples
    ]
    again = RewardCollator(processor, facts=False)(joined)
    assert torch.equal(again["input_ids"], bare["input_ids"])


# ---- training and use -----------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning", "ignore::UserWarning:trl")
def test_reward_trainer_starts_at_the_loss_of_the_scores(tmp_path):
    trl = pytest.importorskip("trl")
    model, processor = reward_parts("slime")
    data = as_dataset(preferences([1, 2]))
    args = trl_arguments(trl.RewardConfig, tmp_path, remove_unused_columns=False, max_length=None)
    trainer = trl.RewardTrainer(
        model,
        args=args,
        data_collator=RewardCollator(processor),
        train_dataset=data,
        processing_class=processor.tokenizer,
    )
    score = model_reward(model, processor)
    scores = [
        [score([row["prompt"]], [row[name]], images=[row["images"]])[0] for row in preferences([1, 2])]
        for name in ("chosen", "rejected")
    ]
    wanted = sum(math.log1p(math.exp(worse - better)) for better, worse in zip(*scores, strict=True)) / 2
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(wanted, abs=1e-3)
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_a_reward_reads_pictures_and_facts_and_is_the_same_alone_and_in_a_batch():
    model, processor = reward_parts("slime")
    prompts = [user("what is it"), user("what is it"), user("and this")]
    completions = [assistant("a dog"), assistant("a dog"), assistant("a cat")]
    images = [pictures(0), pictures(1), pictures(0)]
    score = model_reward(model, processor, batch_size=2)
    found = score(prompts, completions, images=images, facts=[FACTS, None, FACTS[:1]], completion_ids=[[1]] * 3)
    assert len(set(found)) == 3
    alone = [score([p], [c], image=i)[0] for p, c, i in zip(prompts, completions, images, strict=True)]
    assert found[1] == pytest.approx(alone[1], abs=1e-4)
    assert found[0] != pytest.approx(alone[0], abs=1e-3), "the facts are read"
    held = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": images[1][0]}, {"type": "text", "text": "what is it"}],
            }
        ]
    ]
    assert score(held, completions[:1], images=[images[1]])[0] == pytest.approx(alone[1], abs=1e-4)
    model.config.num_labels = 2
    with pytest.raises(ValueError, match="num_labels=2; load it with num_labels=1"):
        model_reward(model, processor)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"facts": "the mat is red"}, "facts='the mat is red' is one text"),
        ({"chosen": "a dog"}, "is no conversation"),
        ({"prompt": "what is it"}, "is no conversation"),
        ({"margin": None}, "Row 1 of the batch has no margin"),
    ],
)
def test_rows_that_cannot_be_rated_are_refused(changes, says):
    _, processor = reward_parts()
    first, second = ({**row, "margin": 1.0} for row in rows())
    with pytest.raises(ValueError, match=says):
        RewardCollator(processor)([first, {**second, **changes}])


def test_rewards_by_rule():
    completions = [
        assistant(" Owl "),
        assistant("cat"),
        "owl",
        [{"role": "assistant", "content": [{"type": "text", "text": "owl"}]}],
    ]
    assert right_answer(completions, answer=["owl"] * 4, prompts=None) == [1.0, 0.0, 1.0, 1.0]
    assert length_penalty(8, 0.5)([[1] * 4, [1] * 8], prompts=None) == [-0.25, -0.5]

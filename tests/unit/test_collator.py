"""The collator: labels, masks, mixed batches, samples that are too long, cached features."""

import pytest
import torch

from builders.tiny import random_image, tiny_processor
from builders.training import conversation, slime_config, slime_parts
from hires_lmm.training import HiResLmmCollator, VisionFeatureStore, cache_vision_features
from hires_lmm.training.image_store import pixel_key


TEXT_ONLY = {
    "messages": [
        {"role": "user", "content": "Which number?"},
        {"role": "assistant", "content": "Seven."},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "Eight, of course."},
    ]
}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(slime_config(), "chatml")


@pytest.fixture(scope="module")
def batch(processor):
    return HiResLmmCollator(processor)([conversation(1), TEXT_ONLY, conversation(3, images=3)])


def learned(processor, batch, row: int) -> str:
    ids = batch["labels"][row]
    return processor.tokenizer.decode(ids[ids != -100])


@pytest.mark.parametrize("template", ["chatml", "llama3", "vicuna", "plain"])
def test_labels_are_the_answers_with_their_end_and_nothing_else(template):
    processor = tiny_processor(slime_config(), template)
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(template, "</s>")
    batch = HiResLmmCollator(processor)([conversation(5), TEXT_ONLY])
    assert learned(processor, batch, 0).strip() == f"A small boat and 5 cats.{end}"
    assert "".join(learned(processor, batch, 1).split()) == f"Seven.{end}Eight,ofcourse.{end}"


def test_batches_mix_no_one_and_three_images(processor, batch):
    image_rows = (batch["input_ids"] == processor.image_token_id).sum(dim=1)
    starts = batch["view_positions"][:, 8] == 1
    assert starts.sum() == 4 and image_rows[1] == 0
    counts = batch["view_positions"][starts, 5]
    assert image_rows[[0, 2]].tolist() == [counts[0], counts[1:].sum()]
    assert len(batch["pixel_values"]) == len(batch["view_spans"]) == len(batch["view_boxes"]) == len(starts)


def test_padding_is_on_the_right(processor, batch):
    mask = batch["attention_mask"]
    assert (mask[:, :-1] >= mask[:, 1:]).all() and mask.sum(dim=1).tolist() != [mask.shape[1]] * 3
    assert (batch["labels"][mask == 0] == -100).all() and not batch["prompt_mask"][mask == 0].any()
    assert (batch["input_ids"][mask == 0] == processor.tokenizer.pad_token_id).all()
    assert processor.tokenizer.padding_side == "left"
    rounded = HiResLmmCollator(processor, pad_to_multiple_of=64)([TEXT_ONLY])
    assert rounded["input_ids"].shape[1] % 64 == 0


def test_placeholders_are_neither_learned_nor_read(processor, batch):
    is_image = batch["input_ids"] == processor.image_token_id
    assert (batch["labels"][is_image] == -100).all() and not batch["prompt_mask"][is_image].any()
    assert not (batch["prompt_mask"] & (batch["labels"] != -100)).any()
    text = batch["attention_mask"].bool() & ~is_image
    assert (batch["prompt_mask"] | (batch["labels"] != -100))[text].all()


def test_content_parts_and_strings_give_the_same_batch(processor):
    image = random_image(70, 80)
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "Which?"}]
    inline = [{"type": "image", "image": image}, {"type": "text", "text": "Which?"}]
    answer = {"role": "assistant", "content": "That."}
    batches = [
        HiResLmmCollator(processor)([example])
        for example in (
            {"messages": [{"role": "user", "content": "<image>\nWhich?"}, answer], "image": image},
            {"messages": [{"role": "user", "content": parts}, answer], "images": [image]},
            {"messages": [{"role": "user", "content": inline}, answer]},
        )
    ]
    for other in batches[1:]:
        assert batches[0].keys() == other.keys()
        assert all(torch.equal(batches[0][name], other[name]) for name in other)


def test_views_follow_the_stage(processor):
    every, one, local = (HiResLmmCollator(processor, views=v)([conversation(1)]) for v in ("all", "global", "crops"))
    assert len(one["pixel_values"]) == 1 and len(local["pixel_values"]) == len(every["pixel_values"]) > 1
    assert local["view_spans"][0].tolist() == [0, 0, 0, 0]
    counts = [int(batch["view_positions"][0, 5]) for batch in (every, one, local)]
    assert counts[0] == counts[1] + counts[2]


def test_wrong_numbers_of_images_and_missing_answers_are_named(processor):
    collator = HiResLmmCollator(processor)
    with pytest.raises(ValueError, match=r"1 places for images .* but 2 images"):
        collator([{**conversation(1), "images": [random_image(60, 60)] * 2}])
    with pytest.raises(ValueError, match="no answer to learn"):
        collator([{"messages": TEXT_ONLY["messages"][:1]}])
    with pytest.raises(ValueError, match="no messages"):
        collator([{"text": "hello"}])
    with pytest.raises(ValueError, match="too_long='cut'"):
        HiResLmmCollator(processor, too_long="cut")
    bare = tiny_processor(slime_config(), "chatml")
    bare.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="does not mark answers"):
        HiResLmmCollator(bare)


def test_long_samples_stop_the_run_by_default(processor):
    with pytest.raises(ValueError, match=r"max_length=40.*too_long='lower_budget'"):
        HiResLmmCollator(processor, max_length=40)([conversation(1)])


@pytest.mark.parametrize("images", [1, 3])
def test_the_budget_is_lowered_to_the_largest_that_fits(images):
    config = slime_config(token_ops=[{"part": "router", "on": "all", "score": "saliency"}])
    processor = tiny_processor(config, "chatml")
    full = HiResLmmCollator(processor)([conversation(1, images)])["input_ids"].shape[1]
    collator = HiResLmmCollator(processor, max_length=full - 5, too_long="lower_budget")
    batch = collator([conversation(1, images)])
    assert full - 5 - images < batch["input_ids"].shape[1] <= full - 5
    counts = batch["view_positions"][batch["view_positions"][:, 8] == 1, 5]
    assert len(set(counts.tolist())) == 1
    assert collator.counts() == {"dropped_samples": 0, "lowered_budgets": 1, "broken_samples": 0}


def test_long_samples_are_dropped_and_counted(processor):
    length = HiResLmmCollator(processor)([TEXT_ONLY])["input_ids"].shape[1]
    collator = HiResLmmCollator(processor, max_length=length, too_long="drop")
    batch = collator([conversation(1, images=3), TEXT_ONLY, conversation(2, images=3)])
    assert batch["input_ids"].shape == (1, length) and "pixel_values" not in batch
    assert collator.counts()["dropped_samples"] == 2
    empty = collator([conversation(1, images=3)])
    assert empty["input_ids"].tolist() == [[processor.tokenizer.eos_token_id] * 2]
    assert (empty["labels"] != -100).sum() == 1


def test_drops_are_counted_across_workers(processor):
    from torch.utils.data import DataLoader

    collator = HiResLmmCollator(processor, max_length=45, too_long="drop")
    list(DataLoader([conversation(n) for n in range(4)], batch_size=1, collate_fn=collator, num_workers=2))
    assert collator.counts()["dropped_samples"] == 4


# ---- cached features


def test_cached_features_are_those_of_the_tower(tmp_path):
    model, processor = slime_parts()
    images = [image for number in range(3) for image in conversation(number)["images"]]
    store = cache_vision_features(model, processor, images, tmp_path, views_per_pass=2, shard_bytes=1)
    assert len(store) == 3 and len(set(store.shards.values())) == 3
    pixels = processor.image_processor(images[1], return_tensors="pt")["pixel_values"]
    expected = model.eval().model.encode_pixels(pixels, model.config.vision_feature_layer)
    torch.testing.assert_close(store.get(pixel_key(images[1].convert("RGB"))), expected)
    with pytest.raises(ValueError, match="does not hold the image"):
        store.get("unknown")


def test_the_cache_goes_on_where_it_stopped_and_refuses_another_tower(tmp_path):
    model, processor = slime_parts()
    images = [conversation(number)["images"][0] for number in range(3)]
    cache_vision_features(model, processor, images[:2], tmp_path)
    before = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    store = cache_vision_features(model, processor, [*images, images[0]], tmp_path)
    assert len(store) == 3 and (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == before
    other, _ = slime_parts(seed=1)
    with pytest.raises(ValueError, match="was made with towers="):
        cache_vision_features(other, processor, images, tmp_path)
    processor.image_processor.max_crops = 2
    with pytest.raises(ValueError, match="was made with max_crops=4, now it is 2; write it anew"):
        HiResLmmCollator(processor, features=VisionFeatureStore(tmp_path))
    with pytest.raises(ValueError, match=r"holds no index\.json"):
        VisionFeatureStore(tmp_path / "nothing")


@pytest.mark.parametrize("views", ["all", "global", "crops"])
def test_a_cached_batch_gives_the_same_loss_without_the_tower(tmp_path, views):
    model, processor = slime_parts()
    model.model.connector.adapter.forced_expert = "mlp"  # nothing random
    model.model.connector.training_views = views
    examples = [conversation(0, images=2), TEXT_ONLY, conversation(1)]
    images = [image for example in examples for image in example.get("images", [])]
    store = cache_vision_features(model, processor, images, tmp_path)
    plain = HiResLmmCollator(processor, views=views)(examples)
    cached = HiResLmmCollator(processor, views=views, features=store)(examples)
    assert "pixel_values" not in cached and len(cached["vision_features"]) == len(plain["pixel_values"])
    expected = model(**plain).loss

    def refuse(*args, **kwargs):
        raise AssertionError("the tower ran")

    model.model.vision_tower.forward = refuse
    torch.testing.assert_close(model(**cached).loss, expected)
    text = HiResLmmCollator(processor, views=views, features=store)([TEXT_ONLY])
    assert text["vision_features"].shape[0] == 0
    assert model(**text).loss > 0


def counts_of(batch) -> list[int]:
    return batch["view_positions"][batch["view_positions"][:, 0] == 0, 5].tolist()


def test_a_row_brings_its_own_budgets():
    """One number or one an image, before those of the collator; None, as datasets fill in, is none."""
    config = slime_config(token_ops=[{"part": "router", "on": "all", "score": "saliency"}])
    processor = tiny_processor(config, "chatml")
    collate = HiResLmmCollator(processor, max_image_tokens=12)
    rows = [{**conversation(1, 2), "max_image_tokens": own} for own in ([9, 11], 10, None, [None, 8])]
    batch = collate(rows)
    full = counts_of(HiResLmmCollator(processor)([conversation(1, 2)]))
    assert counts_of(batch) == [9, 11, 10, 10, 12, 12, full[0], 8]
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [20, 20, 24, full[0] + 8]
    with pytest.raises(ValueError, match=r"\[9\] holds 1 budgets for 2 images"):
        collate([{**conversation(1, 2), "max_image_tokens": [9]}])


def test_a_lowered_budget_keeps_smaller_ones():
    config = slime_config(token_ops=[{"part": "router", "on": "all", "score": "saliency"}])
    processor = tiny_processor(config, "chatml")
    row = {**conversation(1, 2), "max_image_tokens": [7, 20]}
    length = HiResLmmCollator(processor)([row])["input_ids"].shape[1]
    collator = HiResLmmCollator(processor, max_length=length - 6, too_long="lower_budget")
    assert counts_of(collator([row])) == [7, 14]

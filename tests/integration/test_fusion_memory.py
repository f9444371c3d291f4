"""What a cache keeps of its conversation: never another conversation's, whatever the order of calls."""

import copy
import pickle

import pytest
import torch

from builders.chat import (
    OTHER,
    QUESTIONS,
    blocks_of,
    chat,
    features_of,
    fusion_setup,
    go_on,
    inputs_of,
    logits_of,
    read_lengths,
    text_only,
)
from builders.tiny import make_batch, random_image
from hires_lmm.modeling.compat_hires_lmm import CACHE
from hires_lmm.processing.messages_hires_lmm import QUERY_TOKEN


CLOSE = {"atol": 2e-5, "rtol": 1e-4}
OPTIONS = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module")
def setup():
    """Model and processor over a tiny tower and language model."""
    return fusion_setup()


def test_conversations_in_turns_on_the_same_features(setup):
    """Each goes on from its own cache, though the features served the other one in between."""
    model, processor = setup
    image = random_image(100, 130)
    features = features_of(model, inputs_of(processor, 1, image))
    caches, begins = [None, None], [0, 0]
    for turns in (1, 2, 3):
        for number, questions in enumerate((QUESTIONS, OTHER)):
            whole = inputs_of(processor, turns, image, questions)
            output = go_on(model, whole, begins[number], caches[number], features)
            expected = logits_of(model, whole)[:, begins[number] :]
            torch.testing.assert_close(output.logits, expected, **CLOSE)
            caches[number], begins[number] = output[CACHE], whole["input_ids"].shape[1]


def test_a_copy_of_the_cache_is_another_conversation(setup):
    """Two second questions, each in its own copy, and the features made anew for each."""
    model, processor = setup
    image = random_image(100, 130)
    first = inputs_of(processor, 1, image)
    begin = first["input_ids"].shape[1]
    cache = go_on(model, first, 0, None, features_of(model, first))[CACHE]
    twin = copy.deepcopy(cache)
    for own, turns, questions in [(cache, 3, QUESTIONS), (twin, 2, (QUESTIONS[0], OTHER[0])), (cache, 2, QUESTIONS)]:
        whole = inputs_of(processor, turns, image, questions)
        if own.get_seq_length() > begin:
            own.crop(begin - own.get_seq_length())
        found = go_on(model, whole, begin, own, features_of(model, whole)).logits
        torch.testing.assert_close(found, logits_of(model, whole)[:, begin:], **CLOSE)


def test_a_cache_that_knows_no_conversation_is_an_error(setup):
    model, processor = setup
    image = random_image(100, 130)
    first, whole = (inputs_of(processor, turns, image) for turns in (1, 2))
    features = features_of(model, first)
    cache = go_on(model, first, 0, None, features)[CACHE]
    del cache.conversation  # as in one that was put together by hand
    with pytest.raises(ValueError, match="does not know what was read of its image"):
        go_on(model, whole, first["input_ids"].shape[1], cache, features)


def test_another_image_in_a_later_turn_is_read_with_all_questions(setup):
    model, processor = setup
    images = random_image(100, 130), random_image(100, 130, 1)
    first, whole = inputs_of(processor, 1, images[0]), inputs_of(processor, 2, images[1])
    begin = first["input_ids"].shape[1]
    cache = go_on(model, first, 0, None, features_of(model, first))[CACHE]
    output = go_on(model, whole, begin, cache, features_of(model, whole))
    with torch.no_grad():
        placed = model(**whole).image_outputs.pooler_output[0]
    torch.testing.assert_close(output.image_outputs.pooler_output[0], placed[-3:], **CLOSE)


@pytest.mark.parametrize("between", [QUESTIONS, OTHER], ids=["same", "other"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_reads_the_conversation_of_its_cache(setup, between, options):
    """The whole conversation with the cache of the turn before, after another conversation on the same features."""
    model, processor = setup
    image = random_image(100, 130)
    first, whole = (inputs_of(processor, turns, image) for turns in (1, 2))
    features = {"image": features_of(model, first)}
    begun = first["input_ids"].shape[1]
    cache = model.generate(**text_only(first), mm_encoder_outputs=features, **OPTIONS)[CACHE]
    cache.crop(begun - 1 - cache.get_seq_length())
    model.generate(**text_only(inputs_of(processor, 3, image, between)), mm_encoder_outputs=features, **OPTIONS)
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(options.get("num_beams", 1))
    found = model.generate(**text_only(whole), **{CACHE: cache}, mm_encoder_outputs=features, **OPTIONS, **options)
    anew = model.generate(**whole, **OPTIONS, **options)
    assert torch.equal(found.sequences, anew.sequences)
    torch.testing.assert_close(found.logits[0], anew.logits[0], **CLOSE)


def test_a_cache_that_ends_within_a_block_is_an_error(setup):
    model, processor = setup
    whole = inputs_of(processor, 2, random_image(100, 130))
    cache = model(**whole, use_cache=True)[CACHE]
    last = (whole["input_ids"][0] == processor.image_token_id).nonzero()[-1, 0]
    cache.crop(int(last) - cache.get_seq_length())
    with pytest.raises(ValueError, match="in the middle of the image tokens of conversation 0"):
        model.generate(**whole, **{CACHE: cache}, **OPTIONS)


def test_a_batch_whose_rows_go_on_differently(setup):
    """A second turn, a first image, a turn without queries and a row of text, all after a cache."""
    model, processor = setup
    images = [random_image(60, 60), random_image(70, 300, 1), random_image(200, 90, 2)]
    plain = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]

    def text_of(messages):
        return processor.apply_chat_template(messages, add_generation_prompt=True)

    second = text_of(chat(2))
    texts = [second, text_of(plain + chat(1, ["x"])), second.replace(QUERY_TOKEN, ""), text_of(plain + plain[:1])]
    batch = make_batch(processor, list(zip(texts, [images[:1], images[1:2], images[2:], []], strict=True)))
    placeholder = batch["input_ids"] == processor.image_token_id
    cached = int(placeholder[1].nonzero()[0, 0])  # the first image of row 1 follows, and so do both later turns
    assert placeholder[0, :cached].any() and placeholder[0, cached:].any()
    assert not (placeholder[:, cached - 1] & placeholder[:, cached]).any()
    features = features_of(model, batch)
    past = {name: batch[name][:, :cached] for name in ("input_ids", "attention_mask")}
    positions = (past["attention_mask"].cumsum(1) - 1).clamp(min=0)
    first = {"image": features.select_images([0, 2])}
    with torch.no_grad():
        cache = model(**past, position_ids=positions, mm_encoder_outputs=first, use_cache=True)[CACHE]
    found = model.generate(**text_only(batch), **{CACHE: cache}, mm_encoder_outputs={"image": features}, **OPTIONS)
    anew = model.generate(**batch, **OPTIONS)
    torch.testing.assert_close(found.logits[0], anew.logits[0], **CLOSE)
    assert torch.equal(found.sequences, anew.sequences)


def test_copies_of_features_start_anew_and_give_the_same(setup):
    model, processor = setup
    batch = inputs_of(processor, 1, random_image(100, 130))
    expected, features = logits_of(model, batch), features_of(model, batch)
    logits_of(model, text_only(batch), mm_encoder_outputs={"image": features})
    for own in (features, copy.deepcopy(features), pickle.loads(pickle.dumps(features))):
        found = logits_of(model, text_only(batch), mm_encoder_outputs={"image": own})
        torch.testing.assert_close(found, expected, **CLOSE)


def test_beams_of_a_conversation_are_read_once(setup):
    model, processor = setup
    samples = [
        (processor.apply_chat_template(chat(2), add_generation_prompt=True), [random_image(100, 130, seed)])
        for seed in (0, 1)
    ]
    shapes, handle = read_lengths(model)
    model.generate(**make_batch(processor, samples), num_beams=4, max_new_tokens=3)
    handle.remove()
    assert [rows for rows, _ in shapes] == [2]


def test_questions_in_another_vocabulary_in_generate(setup):
    """The same words by `question_ids`: the same text; other words: another one."""
    model, processor = setup
    batch = inputs_of(processor, 2, random_image(100, 130))
    own = [list(block.question) for block in blocks_of(model, batch)]
    asked = torch.full((1, 2, max(map(len, own))), -1)
    for turn, ids in enumerate(own):
        asked[0, turn, : len(ids)] = torch.tensor(ids)
    found = model.generate(**batch, question_ids=asked, num_beams=2, **OPTIONS)
    wanted = model.generate(**batch, num_beams=2, **OPTIONS)
    torch.testing.assert_close(found.logits[0], wanted.logits[0], **CLOSE)
    other = model.generate(**batch, question_ids=asked.flip(1), num_beams=2, **OPTIONS)
    assert (other.logits[0] - wanted.logits[0]).abs().max() > 1e-2
    with pytest.raises(ValueError, match="question_ids holds 1 questions of conversation 0, which has 2 turns"):
        model(**batch, question_ids=asked[:, :1])


def test_a_query_without_its_image_is_an_error(setup):
    _, processor = setup
    with pytest.raises(ValueError, match=r"<query>.*image"):
        processor(text=["<|im_start|>user\n" + QUERY_TOKEN + QUESTIONS[1]])
    with pytest.raises(ValueError, match=r"<query>.*image"):
        processor(text=[QUERY_TOKEN + "a<image>b", "<image>c"], images=[random_image(60, 60)] * 2)


def test_the_fusion_transformer_follows_the_attention_setting(setup):
    model, processor = setup
    batch = inputs_of(processor, 2, random_image(100, 130))
    fusion = model.model.connector.token_ops[0]
    before, expected = fusion.model.config._attn_implementation, logits_of(model, batch)
    model.set_attn_implementation("eager")
    try:
        assert before == "sdpa" and fusion.model.config._attn_implementation == "eager"
        torch.testing.assert_close(logits_of(model, batch), expected, **CLOSE)
    finally:
        model.set_attn_implementation("sdpa")

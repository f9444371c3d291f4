"""The preset `fusion`: blocks of queries, several turns, the kept prefix, batches and budgets."""

import copy

import pytest
import torch
from transformers import DynamicCache

from builders import GEOMETRY, make_batch, random_image
from builders.chat import (
    QUESTIONS,
    blocks_of,
    chat,
    features_of,
    fusion_setup,
    go_on,
    inputs_of,
    logits_of,
    read_lengths,
    runs_of,
    text_only,
)
from hires_lmm.modeling.compat_hires_lmm import CACHE
from hires_lmm.processing.messages_hires_lmm import QUERY_TOKEN


@pytest.fixture(scope="module")
def setup():
    """Model and processor over a tiny tower and language model."""
    return fusion_setup()


@pytest.mark.parametrize("size", [(56, 56), (200, 90), (70, 400)])
@pytest.mark.parametrize(("budget", "wanted"), [(None, [12, 3, 3]), (5, [5, 3, 3]), (2, [2, 2, 2]), (400, [12, 3, 3])])
def test_every_turn_has_its_placeholders(setup, size, budget, wanted):
    _, processor = setup
    options = {} if budget is None else {"max_image_tokens": budget}
    batch = inputs_of(processor, 3, random_image(*size), **options)
    assert runs_of(processor, batch["input_ids"][0]) == wanted
    assert processor.image_tokens(*size, **options) == wanted[0]


@pytest.mark.parametrize("name", ["llama3", "vicuna", "chatml", "plain"])
def test_every_template_writes_queries(setup, name):
    """Also where the processor is built from its parts; a saved one reads the text it wrote."""
    processor = type(setup[1])(setup[1].image_processor, setup[1].tokenizer, chat_template=name)
    text = processor.apply_chat_template(chat(3))
    assert text.count("<image>") == 1 and text.count(QUERY_TOKEN) == 2
    assert text.index(QUERY_TOKEN + QUESTIONS[1]) < text.index(QUERY_TOKEN + QUESTIONS[2])
    again = type(processor)(processor.image_processor, processor.tokenizer, chat_template=processor.chat_template)
    assert again.apply_chat_template(chat(3)) == text


def test_a_conversation_without_an_image_has_no_queries(setup):
    _, processor = setup
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "x"},
    ]
    assert QUERY_TOKEN not in processor.apply_chat_template(messages)


def test_the_logits_depend_on_the_question_only_if_it_is_read(setup):
    model, processor = setup
    image = random_image(90, 120)
    own, other = (inputs_of(processor, 1, image, [text]) for text in ("what is red here", "what is blue here"))
    with torch.no_grad():
        states = [torch.cat(model(**batch).image_outputs.pooler_output) for batch in (own, other)]
        assert (states[0] - states[1]).abs().max() > 1e-2
        fusion = model.model.connector.token_ops[0]
        fusion.question = False
        try:
            blind = [torch.cat(model(**batch).image_outputs.pooler_output) for batch in (own, other)]
        finally:
            fusion.question = True
    assert torch.equal(*blind)


def test_two_turns_at_once_equal_turn_by_turn(setup):
    """With the language model's cache and the kept prefix of the fusion transformer."""
    model, processor = setup
    image = random_image(100, 130)
    whole = inputs_of(processor, 3, image)
    expected = logits_of(model, whole)
    features = features_of(model, whole)
    starts = [inputs_of(processor, turns, image)["input_ids"].shape[1] for turns in (1, 2, 3)]
    cache, got, begin = None, [], 0
    for stop in starts:
        ids = whole["input_ids"][:, begin:stop]
        with torch.no_grad():
            output = model(
                input_ids=ids,
                attention_mask=torch.ones(1, stop, dtype=torch.long),
                cache=cache,
                mm_encoder_outputs={"image": features},
                use_cache=True,
            )
        cache, begin = output[CACHE], stop
        got.append(output.logits)
    torch.testing.assert_close(torch.cat(got, dim=1), expected, atol=2e-5, rtol=1e-4)


def test_a_new_question_runs_only_its_own_block(setup):
    """Of a conversation that goes on in its cache, also where its end was cropped and something else is asked."""
    model, processor = setup
    image = random_image(100, 130)
    features = features_of(model, inputs_of(processor, 1, image))
    calls = [(1, QUESTIONS), (2, QUESTIONS), (2, (QUESTIONS[0], QUESTIONS[2])), (3, QUESTIONS[::-1])]
    batches = [inputs_of(processor, turns, image, questions) for turns, questions in calls]
    asked = [[len(block.question) for block in blocks_of(model, batch)] for batch in batches]
    places = (batches[1]["input_ids"][0] == processor.image_token_id).nonzero()[:, 0].tolist()
    begins = [0, batches[0]["input_ids"].shape[1], places[-3], places[0]]
    expected = [logits_of(model, batch)[:, begin:] for batch, begin in zip(batches, begins, strict=True)]
    shapes, handle = read_lengths(model)
    cache = DynamicCache()
    for batch, begin, logits in zip(batches, begins, expected, strict=True):
        if begin < cache.get_seq_length():
            cache.crop(begin - cache.get_seq_length())
        found = go_on(model, batch, begin, cache, features).logits
        torch.testing.assert_close(found, logits, atol=2e-5, rtol=1e-4)
    handle.remove()
    assert [length for _, length in shapes] == [
        features.tokens.lengths[0] + asked[0][0] + 12,
        asked[1][1] + 3,
        asked[2][1] + 3,
        sum(asked[3]) + 12 + 3 + 3,  # another first question: the visual tokens are known
    ]


def test_another_conversation_on_the_same_features_is_read_anew(setup):
    model, processor = setup
    image = random_image(100, 130)
    features = features_of(model, inputs_of(processor, 1, image))
    logits_of(model, text_only(inputs_of(processor, 2, image)), mm_encoder_outputs={"image": features})
    other = inputs_of(processor, 2, image, ("how many are there", "what is red here"))
    got = logits_of(model, text_only(other), mm_encoder_outputs={"image": features})
    torch.testing.assert_close(got, logits_of(model, other), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_single(setup, side):
    model, processor = setup
    images = [random_image(60, 60), random_image(70, 300, 1), random_image(200, 90, 2)]
    singles = [inputs_of(processor, turns, image) for turns, image in zip((1, 3, 2), images, strict=True)]
    texts = [processor.apply_chat_template(chat(turns), add_generation_prompt=True) for turns in (1, 3, 2)]
    samples = [(text, [image]) for text, image in zip(texts, images, strict=True)]
    samples.insert(1, (processor.apply_chat_template([{"role": "user", "content": "only text"}]), []))
    batch = make_batch(processor, samples, padding_side=side)
    logits = logits_of(model, batch)
    for row, single in zip((0, 2, 3), singles, strict=True):
        own = logits[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(own, logits_of(model, single)[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_in_the_second_turn(setup, options):
    model, processor = setup
    batch = inputs_of(processor, 2, random_image(100, 130))
    generated = model.generate(**batch, max_new_tokens=4, do_sample=False, **options)
    features = features_of(model, batch)
    again = model.generate(
        **text_only(batch), mm_encoder_outputs={"image": features}, max_new_tokens=4, do_sample=False, **options
    )
    assert torch.equal(generated, again)
    if not options:
        ids = generated[:, : batch["input_ids"].shape[1] + 3]
        views = {name: batch[name] for name in GEOMETRY}
        forced = logits_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **views})
        assert torch.equal(forced[0, -4:].argmax(-1), generated[0, -4:])


def test_generate_goes_on_from_a_cache(setup):
    """The usual loop of a chat: the whole conversation, the cache of the turn before, the same features."""
    model, processor = setup
    image = random_image(100, 130)
    first = inputs_of(processor, 1, image)
    features = features_of(model, first)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(**text_only(first), mm_encoder_outputs={"image": features}, **options)
    tail = processor.tokenizer(
        "<|im_end|>\n<|im_start|>user\n"
        + processor.image_token * 3
        + QUESTIONS[1]
        + "<|im_end|>\n<|im_start|>assistant\n",
        return_tensors="pt",
        add_special_tokens=False,
    )["input_ids"]
    ids = torch.cat([output.sequences, tail], dim=1)
    with_cache = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE: copy.deepcopy(output[CACHE])},
        mm_encoder_outputs={"image": features},
        **options,
    )
    views = {name: first[name] for name in GEOMETRY}
    anew = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **views, **options)
    assert torch.equal(with_cache.sequences, anew.sequences)


def test_training_leaves_the_states_for_objectives_and_keeps_no_keys(setup):
    model, processor = setup
    model.train()
    seen = []
    fusion = model.model.connector.token_ops[0]
    hook = fusion.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        batch = inputs_of(processor, 2, random_image(100, 130))
        labels = torch.where(batch["input_ids"] == processor.image_token_id, -100, batch["input_ids"])
        output = model(**batch, labels=labels, use_cache=True)
        output.loss.backward()
    finally:
        hook.remove()
        model.eval()
    aux = seen[0].aux
    assert aux["fusion_blocks"].tolist() == [0] * 12 + [1] * 3
    assert aux["fusion_rows"].tolist() == [0] * 15
    torch.testing.assert_close(fusion.output(aux["fusion_slots"]), seen[0].features)
    (known,) = output["cache"].conversation.records["fusion"].rows
    assert len(known.blocks) == 2 and not known.layers and not known.visual.requires_grad
    assert {name for name, p in fusion.named_parameters() if p.grad is None} == set()
    model.zero_grad()


def test_errors_name_the_remedy(setup):
    model, processor = setup
    image = random_image(60, 90)
    text = processor.apply_chat_template(chat(1), add_generation_prompt=True)
    with pytest.raises(ValueError, match="one image a conversation"):
        processor(text=[text.replace("<image>", "<image><image>")], images=[image, image])
    with pytest.raises(ValueError, match="max_image_tokens=0"):
        inputs_of(processor, 1, image, max_image_tokens=0)
    batch = inputs_of(processor, 2, image)
    where = (batch["input_ids"][0] == processor.image_token_id).nonzero()[-1, 0]
    batch["input_ids"][0, where] = 5
    with pytest.raises(ValueError, match=r"runs of \[12, 2\]"):
        logits_of(model, batch)
    batch = inputs_of(processor, 1, image)
    features = features_of(model, batch)
    with torch.no_grad():
        cache = model(**batch, use_cache=True)[CACHE]
        del cache.conversation  # as in one that was put together by hand
        with pytest.raises(ValueError, match="does not know what was read of its image"):
            model(
                input_ids=torch.tensor([[7, *[processor.image_token_id] * 3, 9]]),
                cache=cache,
                mm_encoder_outputs={"image": features},
            )

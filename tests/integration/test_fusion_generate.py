"""`generate` of the preset `fusion` in every mode, against a reference without splice, packing, padding or cache."""

import functools

import pytest
import torch

import reference_generation as reference
from builders.chat import OTHER, QUESTIONS, chat, features_of, fusion_setup
from builders.tiny import make_batch, random_image
from hires_lmm.processing.messages_hires_lmm import QUERY_TOKEN


NEW_TOKENS = 6
ANSWER = "<|im_start|>assistant"
ROWS = [(1, QUESTIONS, (60, 60)), (3, QUESTIONS, (70, 300)), (2, OTHER, (200, 90)), None]
OPTIONS = {"max_new_tokens": NEW_TOKENS, "do_sample": False}


@functools.cache
def sample(row: int) -> tuple[str, list]:
    """Text and images of a row: a conversation of one, three and two turns, and one without an image."""
    processor = fusion_setup()[1]
    if ROWS[row] is None:
        messages = [{"role": "user", "content": "only text here"}]
        return processor.apply_chat_template(messages, add_generation_prompt=True), []
    turns, questions, size = ROWS[row]
    text = processor.apply_chat_template(chat(turns, questions), add_generation_prompt=True)
    return text, [random_image(*size, seed=row)]


@functools.cache
@torch.no_grad()
def prompt_embeds(row: int, budget: int | None) -> torch.Tensor:
    """What must enter the language model for a row, `(1, length, D)`: one run of the fusion transformer over
    [visual tokens, question, queries, question, queries, ...], its questions cut out of the text."""
    model, processor = fusion_setup()
    fusion, words = model.model.connector.token_ops[0], model.model.language_model.embed_tokens

    def ids_of(text: str) -> torch.Tensor:
        return torch.tensor(processor.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)

    text, images = sample(row)
    pieces = text.replace(QUERY_TOKEN, "<image>").split("<image>")
    parts = [words(ids_of(pieces[0]))]
    if images:
        batch = make_batch(processor, [(text, images)])
        sequence = [features_of(model, batch).tokens.features]
        first = min(budget or 12, 12)
        places = []
        for turn, piece in enumerate(pieces[1:]):
            count = min(first, 3) if turn else first
            sequence.append(fusion.model.embed_tokens(ids_of(piece.split(ANSWER)[0])))
            sequence += [fusion.queries[: count - 1], fusion.queries[11:]]
            stop = sum(map(len, sequence))
            places.append(slice(stop - count, stop))
        states = fusion.model(inputs_embeds=torch.cat(sequence)[None], use_cache=False).last_hidden_state[0]
        for piece, place in zip(pieces[1:], places, strict=True):
            parts += [states[place] @ fusion.output.weight.T, words(ids_of(piece))]
    return torch.cat(parts)[None]


def batch_of(rows, budget=None):
    options = {} if budget is None else {"max_image_tokens": budget}
    return make_batch(fusion_setup()[1], [sample(row) for row in rows], padding_side="left", **options)


@pytest.mark.parametrize("budget", [None, 5, 2, 1])
@torch.no_grad()
def test_logits_of_each_row(budget):
    model, _ = fusion_setup()
    for row in range(len(ROWS)):
        found = model(**batch_of([row], budget)).logits[0]
        expected = reference.run_logits(model, prompt_embeds(row, budget))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 7},
        {"return_dict_in_generate": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("budget", [None, 5])
def test_greedy(options, budget):
    model, _ = fusion_setup()
    groups = [[0], [1], [2], [3]] if "prompt_lookup_num_tokens" in options else [[0, 1, 2, 3]]
    found = []
    for rows in groups:
        batch = batch_of(rows, budget)
        output = model.generate(**batch, **OPTIONS, **options)
        sequences = output.sequences if "return_dict_in_generate" in options else output
        found += reference.new_tokens(sequences, batch["input_ids"].shape[1])
    assert found == [reference.greedy(model, prompt_embeds(row, budget), NEW_TOKENS) for row in range(4)]


@pytest.mark.parametrize("num_return_sequences", [1, 2])
def test_beams(num_return_sequences):
    model, _ = fusion_setup()
    batch = batch_of(range(4))
    found = model.generate(**batch, num_beams=3, num_return_sequences=num_return_sequences, **OPTIONS)
    expected = []
    for row in range(4):
        expected += reference.beam_search(model, prompt_embeds(row, None), 3, NEW_TOKENS, num_return_sequences)
    assert reference.new_tokens(found, batch["input_ids"].shape[1]) == expected


def test_sampling():
    model, _ = fusion_setup()
    batch = batch_of([1])
    torch.manual_seed(3)
    found = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.7, top_k=0)
    torch.manual_seed(3)
    expected = reference.sample(model, prompt_embeds(1, None), NEW_TOKENS, 0.7)
    assert reference.new_tokens(found, batch["input_ids"].shape[1]) == [expected]


def test_returned_sequences_of_one_prompt_differ_only_by_chance():
    model, _ = fusion_setup()
    torch.manual_seed(0)
    batch = batch_of([1, 3])
    found = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=True, num_return_sequences=3, top_k=1)
    expected = [reference.greedy(model, prompt_embeds(row, None), NEW_TOKENS) for row in (1, 3) for _ in range(3)]
    assert reference.new_tokens(found, batch["input_ids"].shape[1]) == expected

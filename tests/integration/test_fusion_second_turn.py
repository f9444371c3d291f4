"""A further turn in the cache of the turn before, in every mode of `generate`: the text of the whole conversation."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from builders.chat import OTHER, QUESTIONS, chat, features_of, fusion_setup, read_lengths
from builders.tiny import GEOMETRY, make_batch, random_image, tiny_config, tiny_model
from hires_lmm.modeling.compat_hires_lmm import CACHE
from hires_lmm.processing.chat_templates_hires_lmm import answer_prefix_ids, question_prefix_ids


ROWS = [(1, QUESTIONS, (60, 60)), (2, QUESTIONS, (70, 300)), (1, OTHER, (200, 90)), None]
OPTIONS = {"max_new_tokens": 5, "do_sample": False}
FIRST = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}


class OwnCache(DynamicCache):
    """A cache of the user's own."""


def sample(row: int) -> tuple[str, list]:
    """Text and images of the first turn of a row; the last one has no image."""
    processor = fusion_setup()[1]
    if ROWS[row] is None:
        return processor.apply_chat_template(
            [{"role": "user", "content": "only text"}], add_generation_prompt=True
        ), []
    turns, questions, size = ROWS[row]
    text = processor.apply_chat_template(chat(turns, questions), add_generation_prompt=True)
    return text, [random_image(*size, seed=row)]


def tail(row: int) -> torch.Tensor:
    """Ids of the next question, as many in every row: without an image three words stand for the three queries."""
    processor = fusion_setup()[1]
    text = f"<|im_end|>\n<|im_start|>user\n{processor.image_token * 3}{OTHER[0]}<|im_end|>\n<|im_start|>assistant\n"
    ids = processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return ids if ROWS[row] is not None else ids.masked_fill(ids == processor.image_token_id, ids[0, -1])


def whole_text(row: int, answer: torch.Tensor, **options) -> list[int]:
    """What the model says to the whole conversation of a row, without a cache."""
    model, processor = fusion_setup()
    batch = make_batch(processor, [sample(row)])
    ids = torch.cat([batch["input_ids"], answer[None], tail(row)], dim=1)
    views = {name: batch[name] for name in GEOMETRY if name in batch}
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **views, **{**OPTIONS, **options})
    return found[:, ids.shape[1] :].tolist()


def helper(seed: int = 0):
    """Another model to draft."""
    other = copy.deepcopy(fusion_setup()[0])
    torch.manual_seed(seed)
    for weight in other.model.language_model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    other.generation_config.num_assistant_tokens = 3
    return other


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "returned beams": {"num_beams": 3, "num_return_sequences": 2},
    "returned samples": {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "the model drafts": {"assistant_model": lambda: fusion_setup()[0]},
    "another drafts": {"assistant_model": helper},
}


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_one_conversation(mode, row, deprecations):
    """The image and the earlier questions are not read again, nor once for each beam."""
    model, processor = fusion_setup()
    options = {name: value() if callable(value) else value for name, value in MODES[mode].items()}
    batch = make_batch(processor, [sample(row)])
    features = features_of(model, batch)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output = model.generate(**text, mm_encoder_outputs={"image": features}, **FIRST)
    answer = output.sequences[0, text["input_ids"].shape[1] :]
    ids = torch.cat([output.sequences, tail(row)], dim=1)
    cache = output[CACHE]
    cache.batch_repeat_interleave(max(options.get("num_beams", 1), options.get("num_return_sequences", 1)))
    shapes, handle = read_lengths(model)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_encoder_outputs": {"image": features}}
    found = model.generate(**given, **{CACHE: cache}, **{**OPTIONS, **options})
    handle.remove()
    assert found[:, ids.shape[1] :].tolist() == whole_text(row, answer, **options)
    last = cache.conversation.records["fusion"].rows[0].blocks[-1]
    assert shapes == [(1, len(last.question) + last.num_slots)]
    assert all("Passing `generation_config` together" in line for line in deprecations)  # said by the library's loop
    deprecations.clear()


@pytest.mark.parametrize("kind", ["static", "own"])
def test_a_cache_of_the_caller(kind):
    model, processor = fusion_setup()
    config = model.config.get_text_config()
    cache = StaticCache(config, max_cache_len=200) if kind == "static" else OwnCache(config=config)
    batch = make_batch(processor, [sample(1)])
    first = model.generate(**batch, **{CACHE: cache}, **FIRST)
    assert first[CACHE] is cache
    ids = torch.cat([first.sequences, tail(1)], dim=1)
    views = {name: batch[name] for name in GEOMETRY}
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **views, **{CACHE: cache}, **OPTIONS)
    answer = first.sequences[0, batch["input_ids"].shape[1] :]
    assert found[:, ids.shape[1] :].tolist() == whole_text(1, answer)
    cache.reset()
    again = model.generate(**make_batch(processor, [sample(2)]), **{CACHE: cache}, **OPTIONS)
    assert torch.equal(again, model.generate(**make_batch(processor, [sample(2)]), **OPTIONS))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("copied", [False, True], ids=["cache", "copy"])
def test_a_batch_with_a_row_of_text(side, copied):
    """Only the new ids are passed; after padding at the right the cache holds the rows packed to the left."""
    model, processor = fusion_setup()
    batch = make_batch(processor, [sample(row) for row in range(4)], padding_side=side)
    features = features_of(model, batch)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output = model.generate(**text, mm_encoder_outputs={"image": features}, **FIRST)
    answers = output.sequences[:, text["input_ids"].shape[1] :]
    lengths = batch["attention_mask"].sum(dim=1, keepdim=True)
    past = torch.arange(int(lengths.max()) - 1, -1, -1)[None] < lengths
    cache = copy.deepcopy(output[CACHE]) if copied else output[CACHE]
    real = [ids[mask.bool()] == processor.image_token_id for ids, mask in zip(*text.values(), strict=True)]
    ends = [(own & ~own.roll(-1)).nonzero()[:, 0] + 1 + past.shape[1] - len(own) for own in real]
    assert cache.conversation.records["fusion"].stops == [own.tolist() for own in ends]
    assert cache.get_seq_length() == past.shape[1] + answers.shape[1] - 1
    new = torch.cat([answers[:, -1:], torch.cat([tail(row) for row in range(4)])], dim=1)
    mask = torch.cat([past.long(), torch.ones(4, answers.shape[1] - 1 + new.shape[1], dtype=torch.long)], dim=1)
    given = {"input_ids": new, "attention_mask": mask, "mm_encoder_outputs": {"image": features}}
    found = model.generate(**given, **{CACHE: cache}, **OPTIONS)[:, new.shape[1] :]
    assert found.tolist() == [whole_text(row, answers[row])[0] for row in range(4)]


def test_rows_of_a_cache_are_chosen_with_their_conversations():
    model, processor = fusion_setup()
    batch = make_batch(processor, [sample(0), sample(2)], padding_side="left")
    output = model.generate(**batch, **FIRST)
    cache, length = output[CACHE], batch["input_ids"].shape[1]
    cache.batch_select_indices(torch.tensor([1]))
    ids = torch.cat([output.sequences[1:], tail(2)], dim=1)
    mask = torch.cat([batch["attention_mask"][1:], torch.ones(1, ids.shape[1] - length, dtype=torch.long)], dim=1)
    views = {name: make_batch(processor, [sample(2)])[name] for name in GEOMETRY}
    given = {"input_ids": ids, "attention_mask": mask, **views, CACHE: cache}
    with pytest.raises(ValueError, match=r"conversations of 2 rows, and the call has 1.*select\(rows\)"):
        model.generate(**given, **OPTIONS)
    cache.conversation.select([1])
    found = model.generate(**given, **OPTIONS)
    assert found[:, ids.shape[1] :].tolist() == whole_text(2, output.sequences[1, length:])


def test_only_a_cache_that_comes_back_keeps_what_was_read():
    """`generate` that returns ids alone holds no keys of the fusion transformer."""
    model, processor = fusion_setup()
    batch, kept = make_batch(processor, [sample(0)]), []
    fusion = model.model.connector.token_ops[0].model
    handle = fusion.register_forward_pre_hook(
        lambda module, args, kwargs: kept.append(kwargs["use_cache"]), with_kwargs=True
    )
    model.generate(**batch, **OPTIONS)
    model.generate(**batch, **OPTIONS, **{CACHE: DynamicCache(config=model.config.get_text_config())})
    model.generate(**batch, **FIRST)
    model(**batch, use_cache=False)
    with torch.no_grad():
        model(**batch, use_cache=False)
        model(**batch, use_cache=True)
    handle.remove()
    assert kept == [False, True, True, False, False, True]


def test_fusion_and_a_layer_op_remember_in_one_conversation():
    """New ids, or the whole conversation, behind a cache that holds fewer positions in its later layer."""
    config = tiny_config(
        "fusion", connector_config={"layer_ops": [{"part": "keep_after", "layers": [0], "share": 0.5}]}
    )
    processor = fusion_setup()[1]
    config.answer_prefix_ids, config.question_prefix_ids = answer_prefix_ids(processor), question_prefix_ids(processor)
    model, batch = tiny_model(config), make_batch(processor, [sample(1)])
    image = {"mm_encoder_outputs": {"image": features_of(model, batch)}}
    first = model.generate(input_ids=batch["input_ids"], **image, **FIRST)
    cache, found = first[CACHE], []
    assert set(cache.conversation.records) == {"fusion", "layer_ops"}
    assert cache.get_seq_length(1) < cache.get_seq_length(0) == first.sequences.shape[1] - 1
    whole, new = torch.cat([first.sequences, tail(1)], dim=1), torch.cat([first.sequences[:, -1:], tail(1)], dim=1)
    for ids in (new, whole):
        given = {"input_ids": ids, "attention_mask": torch.ones_like(whole), CACHE: copy.deepcopy(cache)}
        found.append(model.generate(**given, **image, **OPTIONS)[0, ids.shape[1] :].tolist())
        assert [len(stops) for stops in given[CACHE].conversation.records["fusion"].stops] == [3]
    assert found[0] == found[1] and [len(stops) for stops in cache.conversation.records["fusion"].stops] == [2]

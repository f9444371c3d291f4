"""Every mode of `generate`, with every router, is token-equal to a reference without splice, packing or cache."""

import copy
import dataclasses
import functools
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, TextIteratorStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

import reference_generation as reference
import reference_routing as routing
from builders import (
    TEXT_FAMILIES,
    geometry_of,
    make_batch,
    plain_tokenizer,
    random_image,
    randomise,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_text_config,
)
from hires_lmm.modeling.compat_hires_lmm import CACHE


NEW_TOKENS = 8
ANSWER = " ASSISTANT:"


@dataclasses.dataclass(frozen=True)
class Case:
    """One model under one selection."""

    preset: str
    vision: str
    text: str
    budget: int | None = 30
    on: str = "all"  # which kinds compete
    token_ops: str | None = None  # name of the router in `TOKEN_OPS`; None: the one that a budget alone brings
    rule: routing.Rule | None = None  # a router with a reference of its own
    has_answer_prefix: bool = False  # whether the config tells where an answer begins
    has_video: bool = False  # whether the rows are those of `VIDEO_ROWS`

    def __str__(self) -> str:
        router = str(self.rule) if self.rule else self.token_ops or "default"
        video = ["video"] if self.has_video else []
        return "-".join([self.preset, self.vision, self.text, router, str(self.budget), *video])


def routed(preset: str, vision: str, text: str, budget: int | None, has_answer_prefix: bool, *args, **changes) -> Case:
    """A case with a router of its own: the last arguments are those of `routing.Rule`."""
    rule = routing.Rule(*args, **changes)
    return Case(preset, vision, text, budget, rule.on, None, rule, has_answer_prefix)


TOKEN_OPS = {
    "crops": [{"part": "router", "on": "crops", "score": "saliency", "keep": {"rule": "budget"}}],
    "global": [{"part": "router", "on": "global", "score": "saliency", "keep": {"rule": "budget"}}],
}
CASES = [
    Case("llava_next", "clip", "llama"),
    Case("llava_hd", "siglip", "qwen2"),
    Case("llava_hd", "clip", "qwen3"),
    Case("llava_next", "siglip", "mistral"),
    Case("llava_next", "clip", "gemma2"),
    Case("llava_hd", "siglip", "gemma3_text"),
    Case("llava_next", "clip", "llama", 35, "crops", "crops"),
    Case("llava_next", "siglip", "qwen2", None),
]
ROUTED = [
    routed("slime", "clip", "llama", None, True, "cosine"),
    routed("slime", "siglip", "qwen2", None, False, "attention", num_heads=4),
    routed("slime_release", "clip", "mistral", None, True, "cosine", gamma=0.9),
    routed("slime", "siglip", "qwen3", None, False, "saliency", on="all", gamma=0.4),
    routed("slime", "clip", "gemma2", 40, False, "cosine", "budget", reduce="mean"),
    routed("monkey", "siglip", "gemma3_text", 35, True, "attention", "budget", on="all"),
    routed("monkey", "clip", "qwen2", None, True, "cosine", on="all", temperature=0.5),
    routed("llava_next", "siglip", "llama", 40, True, "attention", gamma=0.6),  # a budget goes before the threshold
]
STATIC_EXTRA = [CASES[0], CASES[1], CASES[6]]  # counts that follow from sizes alone, nothing reads the question
VIDEO = Case("llava_next", "clip", "llama", has_video=True)
CASES = [*CASES, Case("monkey", "siglip", "mistral"), Case("vlsa", "clip", "qwen2", None), *ROUTED, VIDEO]
MAIN = CASES[0]
EXTRA = [*STATIC_EXTRA, ROUTED[0], ROUTED[1], VIDEO]  # the rarer modes run on these
ROWS = [
    ("USER: <image>\nHow many cats are on the table? ASSISTANT:", [(100, 180)]),
    ("USER: Describe the image. ASSISTANT:", []),
    ("<image> and <image> How many cats?", [(120, 100), (57, 150)]),
]
VIDEO_ROWS = [  # a list of sizes is a video
    ("USER: <video>\nHow many cats are on the table? ASSISTANT:", [[(60, 90)] * 3]),
    ("USER: Describe the image. ASSISTANT:", []),
    ("<image> and <video> How many cats?", [(120, 100), [(57, 40)] * 2]),
]
VIDEO_LAYOUT = {
    "order": ["global", "crops", "frames"],
    "separators": {
        "newline": {"place": "token_row_end", "on": "crops"},
        "turn": {"place": "between_frames", "value": [7]},
    },
}
all_cases = pytest.mark.parametrize("case", CASES, ids=str)
extra_cases = pytest.mark.parametrize("case", EXTRA, ids=str)
static_cases = pytest.mark.parametrize("case", STATIC_EXTRA, ids=str)
routed_cases = pytest.mark.parametrize("case", ROUTED, ids=str)


@functools.cache
def build(case: Case, seed: int = 0):
    """Model and processor of a case, shared by the tests."""
    config = make_config(case)
    return tiny_model(config, seed), tiny_processor(config)


def make_config(case: Case):
    """The preset's config with few queries and the case's router, if it names one."""
    connector = dict(routing.SMALL_CONNECTORS.get(case.preset, {}))
    if case.has_video:
        connector["layout"] = VIDEO_LAYOUT
    if case.token_ops is not None:
        connector["token_ops"] = TOKEN_OPS[case.token_ops]
    if case.rule is not None:
        connector["token_ops"] = case.rule.token_ops()
    changes = {"answer_prefix_ids": plain_tokenizer()(ANSWER).input_ids} if case.has_answer_prefix else {}
    return tiny_config(case.preset, case.vision, case.text, connector_config=connector, **changes)


@functools.cache
def sample(row: int, has_video: bool = False):
    text, sizes = (VIDEO_ROWS if has_video else ROWS)[row]
    return text, [
        [random_image(*each, seed=100 * row + 10 * index + number) for number, each in enumerate(size)]
        if isinstance(size, list)
        else random_image(*size, seed=10 * row + index)
        for index, size in enumerate(sizes)
    ]


def batch_of(case: Case, rows=(0, 1, 2), **kwargs):
    extra = {} if case.budget is None else {"max_image_tokens": case.budget}
    samples = [sample(row, case.has_video) for row in rows]
    return make_batch(build(case)[1], samples, padding_side="left", **extra, **kwargs)


def selection(case: Case, text: str, before: list[int] | None = None):
    """The selection of a case for the images of a prompt; `before`: ids that stand in front of the text."""
    if case.rule is None:
        return None
    model, processor = build(case)
    if case.has_answer_prefix and ANSWER in text:
        question = text[: text.index(ANSWER)]
        text = text[: text.rindex(ANSWER) + len(ANSWER)] if model.config.question_scope == "prompt" else question
    ids = [id for piece in reference.split_text(processor, text) for id in plain_tokenizer()(piece).input_ids]
    words = model.model.language_model.get_input_embeddings()(torch.tensor([*(before or []), *ids], dtype=torch.long))
    return routing.selection(model, case.rule, words.detach())


def prompt_embeds(case: Case, text: str, images: list, before: list[int] | None = None):
    """What must enter the language model for a prompt."""
    select = selection(case, text, before)
    return reference.prompt_embeds(*build(case), text, images, case.budget, case.on, select)


@functools.cache
def embeds(case: Case, row: int):
    return prompt_embeds(case, *sample(row, case.has_video))


@functools.cache
def greedy(case: Case, row: int, count: int = NEW_TOKENS) -> list[int]:
    return reference.greedy(build(case)[0], embeds(case, row), count)


def generate(case: Case, rows=(0, 1, 2), batch=None, **options) -> list[list[int]]:
    """New ids a row (and a return sequence) of `generate`; the prompt must come back unchanged."""
    batch = batch_of(case, rows) if batch is None else batch
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    sequences = build(case)[0].generate(**batch, **options)
    length = batch["input_ids"].shape[1]
    repeats = len(sequences) // len(rows)
    assert sequences[:, :length].tolist() == batch["input_ids"].repeat_interleave(repeats, 0).tolist()
    return reference.new_tokens(sequences, length)


# --- the reference bites -------------------------------------------------------------------------------------------
@all_cases
def test_the_budget_and_the_selection_decide_the_text(case):
    """Dropping nothing, or the wrong tokens, gives other logits: the comparisons below can fail."""
    model, processor = build(case)
    assert len({*greedy(case, 0), *greedy(case, 2)}) > 3
    if case.budget is None and case.rule is None:
        return
    text, images = sample(0)
    kept = reference.run_logits(model, embeds(case, 0))[-1]
    full = reference.run_logits(
        model, reference.prompt_embeds(model, processor, text, images, select=lambda tokens, *_: range(len(tokens)))
    )[-1]

    def worst(tokens, kinds, budget, on):
        best = (selection(case, text) or reference.select_by_saliency)(tokens, kinds, budget, on)
        free = [index for index in range(len(kinds)) if index not in best]
        droppable = [index for index in best if kinds[index] == kinds[free[0]]]
        return sorted(set(best) - {droppable[-1]} | {free[0]})

    wrong = reference.run_logits(
        model, reference.prompt_embeds(model, processor, text, images, case.budget, case.on, worst)
    )[-1]
    assert (kept - full).abs().max() > 1e-2
    assert (kept - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("text", TEXT_FAMILIES)
@torch.no_grad()
def test_text_alone_gives_the_logits_of_the_causal_lm(text):
    """`lm_head` and what the family does with its logits (scaling, soft caps) are the causal LM's own."""
    model = tiny_model(tiny_config("llava_next", "clip", text), seed=2)
    causal = AutoModelForCausalLM.from_config(tiny_text_config(text)).eval()
    causal.model.load_state_dict(model.model.language_model.state_dict())
    causal.lm_head.load_state_dict(model.lm_head.state_dict())
    ids = torch.randint(10, 360, (2, 17), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(input_ids=ids).logits, causal(input_ids=ids).logits, atol=1e-5, rtol=0)


# --- greedy --------------------------------------------------------------------------------------------------------
@all_cases
def test_greedy(case):
    assert generate(case) == [greedy(case, row) for row in range(3)]


@all_cases
def test_forward_logits_of_forced_steps_with_and_without_cache(case):
    """Twelve steps after the prompt: the same logits (<= 1e-4) from one forward and from one token at a time."""
    model, _ = build(case)
    forced = torch.randint(10, 360, (12,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = reference.run_logits(model, embeds(case, 0), forced)[-13:]
    batch = batch_of(case, (0,))
    length = batch["input_ids"].shape[1]
    ids = torch.cat([batch["input_ids"], torch.tensor([forced])], 1)
    with torch.no_grad():
        inputs = {"attention_mask": torch.ones_like(ids), **geometry_of(batch)}
        if not case.has_answer_prefix:  # nothing else tells where the question ends
            inputs["prompt_mask"] = torch.arange(ids.shape[1])[None] < length
        whole = model(input_ids=ids, **inputs).logits[0, -13:]
        out = model(**batch, use_cache=True)
        steps = [out.logits[0, -1]]
        for token in forced:
            mask = torch.ones(1, out[CACHE].get_seq_length() + 1, dtype=torch.long)
            out = model(
                input_ids=torch.tensor([[token]]),
                attention_mask=mask,
                cache=out[CACHE],
                use_cache=True,
            )
            steps.append(out.logits[0, -1])
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.stack(steps), expected, atol=1e-4, rtol=0)


@extra_cases
def test_greedy_stops_at_an_end_token(case):
    model = build(case)[0]
    eos = tuple({greedy(case, 0)[3], greedy(case, 1)[5]})
    expected = [reference.greedy(model, embeds(case, row), NEW_TOKENS, eos) for row in range(3)]
    pad = plain_tokenizer().pad_token_id
    for ids, wanted in zip(generate(case, eos_token_id=list(eos)), expected, strict=True):
        assert ids[: len(wanted)] == wanted
        assert set(ids[len(wanted) :]) <= {pad}


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("rule", [None, routing.Rule("saliency", on="all", gamma=0.5)], ids=str)
def test_a_small_sliding_window_counts_kept_tokens_only(rule, padding_side):
    """Neither padding nor dropped tokens may stand between a token and its window."""
    text = tiny_text_config("gemma2", sliding_window=9)
    connector = {} if rule is None else {"token_ops": rule.token_ops()}
    config = tiny_config("llava_next", "clip", text, connector_config=connector)
    model, processor = tiny_model(config, 3), tiny_processor(config)
    budget = 30 if rule is None else None
    extra = {} if budget is None else {"max_image_tokens": budget}
    batch = make_batch(processor, [sample(row) for row in range(3)], padding_side=padding_side, **extra)
    sequences = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    select = None if rule is None else routing.selection(model, rule, torch.zeros(0, 32))
    prompts = [
        reference.prompt_embeds(model, processor, *sample(row), budget, "all", select).detach() for row in range(3)
    ]
    expected = [reference.greedy(model, prompt, NEW_TOKENS) for prompt in prompts]
    assert reference.new_tokens(sequences, batch["input_ids"].shape[1]) == expected


# --- beams ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("beams", "returned"), [(2, 1), (2, 2), (3, 3)])
@all_cases
def test_beams(case, beams, returned):
    model = build(case)[0]
    expected = [
        ids for row in range(3) for ids in reference.beam_search(model, embeds(case, row), beams, NEW_TOKENS, returned)
    ]
    assert generate(case, num_beams=beams, num_return_sequences=returned) == expected


@extra_cases
def test_beams_stop_at_end_tokens(case):
    model = build(case)[0]
    eos = (greedy(case, 0)[2], greedy(case, 2)[4])
    expected = [
        ids for row in range(3) for ids in reference.beam_search(model, embeds(case, row), 3, NEW_TOKENS, 2, eos)
    ]
    got = generate(case, num_beams=3, num_return_sequences=2, eos_token_id=list(eos))
    assert reference.new_tokens(torch.tensor(got), 0, [len(ids) for ids in expected]) == expected


@extra_cases
@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["no_cache", "static"]
)
def test_beams_without_and_with_a_static_cache(case, options):
    model = build(case)[0]
    expected = [ids for row in range(3) for ids in reference.beam_search(model, embeds(case, row), 2, NEW_TOKENS, 2)]
    assert generate(case, num_beams=2, num_return_sequences=2, **options) == expected


# --- caches --------------------------------------------------------------------------------------------------------
@all_cases
def test_static_cache(case):
    assert generate(case, cache_implementation="static") == [greedy(case, row) for row in range(3)]


@all_cases
def test_a_prompt_read_in_chunks(case):
    lengths: list[int] = []
    model = build(case)[0].model.language_model
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    found = generate(case, prefill_chunk_size=9)
    handle.remove()
    assert found == [greedy(case, row) for row in range(3)] and max(lengths) == 9
    beams = {"num_beams": 2, "cache_implementation": "static"}
    assert generate(case, prefill_chunk_size=33, **beams) == generate(case, **beams)


@all_cases
def test_without_cache(case):
    assert generate(case, use_cache=False) == [greedy(case, row) for row in range(3)]


@extra_cases
@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
def test_second_turn_from_a_returned_cache_with_the_new_ids(case, with_image):
    """Only the ids that the cache has not seen, with a mask of the whole length."""
    model, processor = build(case)
    batch = batch_of(case, (0,))
    length = batch["input_ids"].shape[1]
    first = model.generate(**batch, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    text = " USER: <image>\nWhat is in it? ASSISTANT:" if with_image else " USER: What is in it? ASSISTANT:"
    images = [random_image(130, 60, seed=77)] if with_image else []
    extra = {} if case.budget is None else {"max_image_tokens": case.budget}
    second = make_batch(processor, [(text, images)], **(extra if images else {}))
    answer = first.sequences[0, length:]
    new_ids = torch.cat([answer[-1:], second["input_ids"][0]])[None]
    past = first[CACHE].get_seq_length()
    inputs = {
        "input_ids": new_ids,
        "attention_mask": torch.ones(1, past + new_ids.shape[1], dtype=torch.long),
        CACHE: first[CACHE],
        **(geometry_of(second) if images else {}),
    }
    got = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, new_ids.shape[1] :].tolist()
    table = model.model.language_model.get_input_embeddings()
    turn_two = prompt_embeds(case, text, images, before=answer[-1:].tolist())
    whole = torch.cat([embeds(case, 0), table(answer)[None], turn_two], 1).detach()
    assert answer.tolist() == greedy(case, 0, 5)
    assert got == reference.greedy(model, whole, NEW_TOKENS)


@extra_cases
def test_second_turn_of_a_padded_batch_with_new_images(case):
    """Rows of different lengths: the mask of the past is the packed one, which `forward` returns."""
    model, processor = build(case)
    rows, text, image = (0, 2), " USER: <image>\nWhat is in it? ASSISTANT:", random_image(130, 60, seed=77)
    batch = batch_of(case, rows)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)  # as `generate` numbers them
    with torch.no_grad():
        first = model(**batch, position_ids=positions, use_cache=True)
    answers = first.logits[:, -1:].argmax(-1)
    extra = {} if case.budget is None else {"max_image_tokens": case.budget}
    second = make_batch(processor, [(text, [image])] * 2, **extra)
    new_ids = torch.cat([answers, second["input_ids"]], 1)
    mask = batch["attention_mask"]
    mask = mask if first.packed_attention_mask is None else first.packed_attention_mask
    assert (mask == 0).any() and mask.shape[1] == first[CACHE].get_seq_length()
    got = model.generate(
        input_ids=new_ids,
        attention_mask=torch.cat([mask, torch.ones_like(new_ids)], 1),
        **{CACHE: first[CACHE]},
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        **geometry_of(second),
    )
    table = model.model.language_model.get_input_embeddings()
    for row, answer, ids in zip(rows, answers, got[:, new_ids.shape[1] :].tolist(), strict=True):
        turn_two = prompt_embeds(case, text, [image], before=answer.tolist())
        whole = torch.cat([embeds(case, row), table(answer)[None], turn_two], 1).detach()
        assert ids == reference.greedy(model, whole, NEW_TOKENS)


@static_cases
def test_second_turn_from_a_returned_cache_with_the_full_history(case):
    """Under a budget nothing is packed, so the usual call (all ids and the cache) works as for any model."""
    model, _ = build(case)
    batch = batch_of(case, (0,))
    length = batch["input_ids"].shape[1]
    first = model.generate(**batch, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    text = " USER: What is in it? ASSISTANT:"
    second = torch.tensor([plain_tokenizer()(text).input_ids])
    ids = torch.cat([first.sequences, second], 1)
    got = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE: first[CACHE]},
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )[0, ids.shape[1] :].tolist()
    table = model.model.language_model.get_input_embeddings()
    whole = torch.cat([embeds(case, 0), table(first.sequences[:, length:]), table(second)], 1).detach()
    assert got == reference.greedy(model, whole, NEW_TOKENS)


# --- drafts and streamers ------------------------------------------------------------------------------------------
def repeating(case: Case):
    """A sample whose prompt repeats its n-grams, so that prompt lookup drafts from the first step on."""
    text = "USER: <image>\nred boat on a lake red boat on a lake red boat ASSISTANT: red boat"
    image = random_image(100, 180, seed=5)
    processor = build(case)[1]
    extra = {} if case.budget is None else {"max_image_tokens": case.budget}
    batch = make_batch(processor, [(text, [image])], **extra)
    return batch, prompt_embeds(case, text, [image])


@all_cases
def test_prompt_lookup(case):
    model = build(case)[0]
    batch, prompt = repeating(case)
    expected = reference.greedy(model, prompt, 12)
    lengths = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        got = generate(case, (0,), batch, max_new_tokens=12, prompt_lookup_num_tokens=3)
    finally:
        handle.remove()
    assert got == [expected]
    assert lengths[0] > prompt.shape[1], "no draft reached the first forward: the test would prove nothing"


@extra_cases
@pytest.mark.parametrize("assistant", ["itself", "another", "text"])
def test_assistant_model(case, assistant, deprecations):
    helpers = {
        "itself": lambda: build(case)[0],
        "another": lambda: build(case, 9)[0],
        "text": lambda: text_assistant(case),
    }
    helper = helpers[assistant]()
    helper.generation_config.num_assistant_tokens = 3
    assert generate(case, (0,), assistant_model=helper) == [greedy(case, 0)]
    assert generate(case, (2,), assistant_model=helper) == [greedy(case, 2)]
    # the library's own loop calls its assistant in a way that it calls deprecated
    assert all("Passing `generation_config` together" in line for line in deprecations)
    deprecations.clear()


@functools.cache
def text_assistant(case: Case):
    model = randomise(AutoModelForCausalLM.from_config(tiny_text_config(case.text)).eval(), 6)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = plain_tokenizer().pad_token_id
    return model


@extra_cases
def test_streamer(case):
    class Collect:
        def __init__(self):
            self.ids, self.ended = [], False

        def put(self, value):
            self.ids.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    streamer = Collect()
    batch = batch_of(case, (0,))
    assert generate(case, (0,), batch, streamer=streamer) == [greedy(case, 0)]
    assert streamer.ended
    assert streamer.ids[0] == batch["input_ids"][0].tolist()
    assert [token for part in streamer.ids[1:] for token in part] == greedy(case, 0)


def test_text_streamer_gives_the_decoded_answer():
    tokenizer = plain_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    generate(MAIN, (0,), streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(greedy(MAIN, 0))


# --- sampling ------------------------------------------------------------------------------------------------------
@extra_cases
def test_sampling_equals_sampling_by_hand(case):
    model = build(case)[0]
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 0.7}
    torch.manual_seed(3)
    got = generate(case, (0,), **options)
    torch.manual_seed(3)
    assert got == [reference.sample(model, embeds(case, 0), NEW_TOKENS, 0.7)]


@extra_cases
def test_sampling_repeats_with_its_seed_and_returns_different_sequences(case):
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 3}
    torch.manual_seed(1)
    first = generate(case, **options)
    torch.manual_seed(1)
    assert generate(case, **options) == first
    assert len(first) == 9
    for row in range(3):
        assert len({tuple(ids) for ids in first[3 * row : 3 * row + 3]}) == 3


@extra_cases
def test_each_return_sequence_sees_its_own_images(case):
    """With `top_k=1` every sampled sequence of a row is the row's greedy text."""
    got = generate(case, do_sample=True, top_k=1, num_return_sequences=2)
    assert got == [greedy(case, row) for row in range(3) for _ in range(2)]


# --- score processors ----------------------------------------------------------------------------------------------
@extra_cases
def test_min_new_tokens_holds_back_the_end_token(case):
    model = build(case)[0]
    eos = greedy(case, 0)[2]

    def process(ids, logits):
        if len(ids) < 6:
            logits[eos] = -float("inf")
        return logits

    expected = reference.greedy(model, embeds(case, 0), NEW_TOKENS, (eos,), process)
    assert len(expected) >= 6
    assert generate(case, (0,), eos_token_id=eos, min_new_tokens=6) == [expected]


@extra_cases
def test_repetition_penalty_reads_the_prompt_and_the_new_ids(case):
    model = build(case)[0]
    for row in range(3):
        batch = batch_of(case, (row,))
        prompt_ids = set(batch["input_ids"][0].tolist())

        def process(ids, logits, prompt_ids=prompt_ids):
            seen = torch.tensor(sorted(prompt_ids | set(ids)))
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 3.0, logits[seen] * 3.0)
            return logits

        expected = reference.greedy(model, embeds(case, row), NEW_TOKENS, (), process)
        assert generate(case, (row,), batch, repetition_penalty=3.0) == [expected]


class Force(LogitsProcessor):
    """Allow one id only at one step."""

    def __init__(self, token: int, length: int):
        self.token, self.length = token, length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.length:
            scores = torch.full_like(scores, -float("inf"))
            scores[:, self.token] = 0.0
        return scores


@extra_cases
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=["greedy", "no_cache", "beams"])
def test_an_image_token_that_the_model_writes_is_text(case, options):
    model = build(case)[0]
    token = model.config.image_token_id
    batch = batch_of(case)
    processors = LogitsProcessorList([Force(token, batch["input_ids"].shape[1] + 2)])

    def process(ids, scores):
        if len(ids) == 2:
            scores[:] = -float("inf")
            scores[token] = 0.0
        return scores

    if "num_beams" in options:
        expected = [reference.beam_search(model, embeds(case, row), 2, 6, process=process)[0] for row in range(3)]
    else:
        expected = [reference.greedy(model, embeds(case, row), 6, (), process) for row in range(3)]
    assert all(ids[2] == token for ids in expected)
    assert generate(case, batch=batch, logits_processor=processors, max_new_tokens=6, **options) == expected


# --- cached features -----------------------------------------------------------------------------------------------
@extra_cases
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}],
    ids=["greedy", "beams", "no_cache"],
)
def test_features_given_back_twice_stay_as_they_were(case, options):
    model = build(case)[0]
    batch = batch_of(case)
    with torch.no_grad():
        features = model.get_image_features(**geometry_of(batch), return_dict=True)
    outer, pooled = {"image": features}, features.pooler_output
    tensors, copies, fields = list(pooled), [tensor.clone() for tensor in pooled], dict(features)
    tokens, kept = features.tokens, features.tokens.kept
    token_fields = {name: copy.deepcopy(value) for name, value in vars(tokens).items()}
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = generate(case, batch=batch, **options)
    for _ in range(2):
        assert generate(case, batch={**text, "mm_encoder_outputs": outer}, **options) == expected
        assert outer == {"image": features}
        assert outer["image"] is features
        assert features.pooler_output is pooled
        assert len(pooled) == len(tensors)
        assert all(a is b for a, b in zip(pooled, tensors, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(pooled, copies, strict=True))
        assert set(features) == set(fields)
        assert features.prompt is None
        assert features.tokens is tokens and tokens.kept is kept
        for name, value in token_fields.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: str(a) == str(b)
            assert same(getattr(tokens, name), value), name
    if not options:
        assert expected == [greedy(case, row) for row in range(3)]


@static_cases
@torch.no_grad()
def test_features_cached_per_image_serve_any_prompt(case):
    """Features of single images, made apart, put together for a batch: the logits of the batch with pixels."""
    model, processor = build(case)
    batch = batch_of(case)
    extra = {} if case.budget is None else {"max_image_tokens": case.budget}
    pooled = []
    for row in range(3):
        for image in sample(row, case.has_video)[1]:
            token = processor.video_token if isinstance(image, list) else processor.image_token
            single = make_batch(processor, [(token, [image])], **extra)
            pooled += model.get_image_features(**geometry_of(single), return_dict=True).pooler_output
    features = BaseModelOutputWithPooling(pooler_output=pooled)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    got = model(**text, mm_encoder_outputs={"image": features}).logits
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(got[mask], model(**batch).logits[mask], atol=1e-4, rtol=0)
    given = {**text, "mm_encoder_outputs": {"image": features}}
    assert generate(case, batch=given, num_beams=2) == generate(case, num_beams=2)
    assert generate(case, batch=given) == [greedy(case, row) for row in range(3)]


@routed_cases
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_selected_features_serve_rows_apart(case, options):
    """Features of a whole batch, cut and reordered with `select_images`, serve single rows and other orders."""
    model = build(case)[0]
    expected = generate(case, **options)
    features = model.get_image_features(**geometry_of(batch_of(case)), return_dict=True)
    for rows, images in [((0,), [0]), ((2,), [1, 2]), ((2, 0), [1, 2, 0]), ((0, 2, 0), [0, 1, 2, 0])]:
        batch = batch_of(case, rows)
        text = {name: batch[name] for name in ("input_ids", "attention_mask")}
        given = {**text, "mm_encoder_outputs": {"image": features.select_images(images)}}
        assert generate(case, rows, given, **options) == [expected[row] for row in rows]


@routed_cases
def test_right_padded_prompts(case):
    expected = [greedy(case, row) for row in range(3)]
    extra = {} if case.budget is None else {"max_image_tokens": case.budget}
    samples = [sample(row, case.has_video) for row in range(3)]
    batch = make_batch(build(case)[1], samples, padding_side="right", **extra)
    assert generate(case, batch=batch) == expected
    assert generate(case, batch=batch, cache_implementation="static") == expected


# --- the full cross product ----------------------------------------------------------------------------------------
PRODUCT = [
    routed(preset, vision, text, 40 if keep == "budget" else None, prefix, score, keep, gamma=0.6)
    for (preset, vision, text, score, keep), prefix in zip(
        itertools.product(
            ("slime", "slime_release"),
            ("clip", "siglip"),
            TEXT_FAMILIES,
            ("cosine", "attention", "saliency"),
            ("threshold", "budget"),
        ),
        itertools.cycle((True, False, False)),
        strict=False,
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCT, ids=str)
def test_the_full_product(case):
    model = build(case)[0]
    expected = [greedy(case, row) for row in range(3)]
    assert generate(case) == expected
    assert generate(case, cache_implementation="static") == expected
    assert generate(case, use_cache=False) == expected
    beams = [ids for row in range(3) for ids in reference.beam_search(model, embeds(case, row), 3, NEW_TOKENS, 2)]
    assert generate(case, num_beams=3, num_return_sequences=2) == beams
    batch, prompt = repeating(case)
    assert generate(case, (0,), batch, prompt_lookup_num_tokens=3) == [reference.greedy(model, prompt, NEW_TOKENS)]

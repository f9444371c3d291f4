"""Tokens that leave the language model behind a layer: in every mode equal to a reference that masks them."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

import reference_generation as reference
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
from reference_layers import keep_share, masked_model


NEW_TOKENS = 6
ROWS = [
    ("USER: <image>\nHow many cats are on the table? ASSISTANT:", [random_image(100, 180, 1)]),
    ("USER: Describe the image. ASSISTANT:", []),
    ("<image> and <image> How many?", [random_image(120, 100, 2), random_image(57, 150, 3)]),
]
DEEP = {"num_hidden_layers": 4}
GEMMA = {**DEEP, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 12}
THRESHOLD = [{"part": "router", "on": "all", "score": "saliency", "keep": {"rule": "threshold", "gamma": 0.6}}]
MODELS = {
    "llama": ("llama", DEEP, [0, 2]),
    "window": ("mistral", {**DEEP, "sliding_window": 16}, [1]),
    "mixed": ("gemma3_text", GEMMA, [0, 2]),
}
all_models = pytest.mark.parametrize("name", MODELS)
families = pytest.mark.parametrize("family", TEXT_FAMILIES)


@functools.cache
def build(name, attention="sdpa", threshold=False, seed=0):
    """Model and processor; `name` is one of `MODELS`, or a family with its two layers and tokens leaving between."""
    family, changes, layers = MODELS.get(name, (name, {}, [0]))
    connector = {"layer_ops": [{"part": "keep_after", "layers": layers, "share": 0.4}]}
    connector |= {"token_ops": THRESHOLD} if threshold else {}
    config = tiny_config("llava_next", "clip", tiny_text_config(family, **changes), connector_config=connector)
    model = tiny_model(config, seed)
    if attention == "eager" or family != "gemma2":
        model.set_attn_implementation({"text_config": attention})
    model.generation_config.suppress_tokens = [config.image_token_id]
    return model, tiny_processor(config)


def prompts_of(parts):
    """Visual and last positions of prompts that follow each other, each a list of (is visual, length)."""
    found, start = [], 0
    for part in parts:
        visual = []
        for is_visual, length in part:
            visual += list(range(start, start + length)) if is_visual else []
            start += length
        found.append((visual, start - 1))
    return found


def spans(processor, text, tokens):
    """`(is visual, length)` of the pieces of a prompt."""
    found = []
    for number, piece in enumerate(text.split(processor.image_token)):
        found += [(True, tokens[number - 1])] if number else []
        found.append((False, len(processor.tokenizer(piece, add_special_tokens=False).input_ids)))
    return found


def select_all(tokens, *_):
    return range(len(tokens))


def expectation(name, row, **options):
    """The stand-in model of a row and the embeddings of its prompt."""
    model, processor = build(name, **options)
    text, images = ROWS[row]
    lengths = [len(tokens) for tokens in reference.full_visual_tokens(model, processor, images)[0]]
    embeds = reference.prompt_embeds(model, processor, text, images, select=select_all)
    layers = MODELS.get(name, (name, {}, [0]))[2]
    return masked_model(model, keep_share(layers, 0.4), prompts_of([spans(processor, text, lengths)])), embeds


@functools.cache
def greedy(name, row, count=NEW_TOKENS):
    return reference.greedy(*expectation(name, row), count, process=hide_image)


def hide_image(ids, logits):
    logits[plain_tokenizer().convert_tokens_to_ids("<image>")] = -torch.inf
    return logits


def generate(name, rows=(0, 1, 2), side="left", attention="sdpa", **options):
    model, processor = build(name, attention)
    batch = make_batch(processor, [ROWS[row] for row in rows], padding_side=side)
    output = model.generate(**batch, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **options})
    return reference.new_tokens(output, batch["input_ids"].shape[1])


# --- modes ---------------------------------------------------------------------------------------------------------
@families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_logits_are_those_of_masking(family, attention):
    """Every text position of every row, under either backend; and the tokens that left matter."""
    model, processor = build(family, attention)
    batch = make_batch(processor, ROWS)
    logits = model(**batch).logits
    for row, mask in enumerate(batch["attention_mask"].bool()):
        stand_in, embeds = expectation(family, row)
        wanted = reference.run_logits(stand_in, embeds)
        text = batch["input_ids"][row][mask] != model.config.image_token_id
        torch.testing.assert_close(logits[row][mask][text], wanted[text], atol=1e-4, rtol=0)
        whole = reference.run_logits(model, embeds)[text]
        assert row == 1 or (whole - wanted[text])[-1].abs().max() > 1e-2


@all_models
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_greedy(name, side, options):
    assert generate(name, side=side, **options) == [greedy(name, row) for row in range(3)]


@families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_of_every_family(family, attention):
    assert generate(family, attention=attention) == [greedy(family, row) for row in range(3)]


@all_models
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_beams_and_returned_sequences(name, options):
    wanted = [
        ids
        for row in range(3)
        for ids in reference.beam_search(*expectation(name, row), 3, NEW_TOKENS, 2, process=hide_image)
    ]
    assert generate(name, num_beams=3, num_return_sequences=2, **options) == wanted


@all_models
@pytest.mark.parametrize("helper", ["itself", "another", "text"])
def test_assistant_model(name, helper, deprecations):
    family, changes, _ = MODELS[name]
    if helper == "text":
        assistant = randomise(AutoModelForCausalLM.from_config(tiny_text_config(family, **changes)).eval(), 6)
        assistant.generation_config.eos_token_id = None
    else:
        assistant = build(name, seed=0 if helper == "itself" else 9)[0]
    assistant.generation_config.num_assistant_tokens = 3
    assert generate(name, (0,), assistant_model=assistant) == [greedy(name, 0)]
    deprecations.clear()


@all_models
def test_prompt_lookup(name):
    assert generate(name, (0,), prompt_lookup_num_tokens=3, max_new_tokens=12) == [greedy(name, 0, 12)]


@all_models
@pytest.mark.parametrize("with_image", [False, True])
def test_a_second_turn_on_the_cache(name, with_image):
    model, processor = build(name)
    text, images = ROWS[0]
    batch = make_batch(processor, [ROWS[0]])
    length = batch["input_ids"].shape[1]
    first = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    later = " USER: <image>\nWhat is in it? ASSISTANT:" if with_image else " USER: What is in it? ASSISTANT:"
    new = [random_image(130, 60, 77)] if with_image else []
    second = make_batch(processor, [(later, new)])
    answer = first.sequences[0, length:]
    ids = torch.cat([answer[-1:], second["input_ids"][0]])[None]
    mask = torch.ones(1, first[CACHE].get_seq_length() + ids.shape[1], dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": mask, CACHE: first[CACHE], **(geometry_of(second) if new else {})}
    got = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()

    sizes = [[len(part) for part in reference.full_visual_tokens(model, processor, some)[0]] for some in (images, new)]
    parts = [spans(processor, text, sizes[0]), [(False, 4), *spans(processor, later, sizes[1])]]
    table = model.model.language_model.get_input_embeddings()
    turns = [reference.prompt_embeds(model, processor, *turn, select=select_all) for turn in (ROWS[0], (later, new))]
    whole = torch.cat([turns[0], table(answer)[None], turns[1]], 1).detach()
    stand_in = masked_model(model, keep_share(MODELS[name][2], 0.4), prompts_of(parts))
    assert got == reference.greedy(stand_in, whole, NEW_TOKENS, process=hide_image)


@pytest.mark.parametrize("side", ["left", "right"])
def test_behind_a_threshold(side):
    """The splice drops tokens first; of the others a share leaves."""
    model, processor = build("llama", threshold=True)
    batch = make_batch(processor, ROWS, padding_side=side)
    kept = model(**batch).kept_mask
    got = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)[
        :, batch["input_ids"].shape[1] :
    ].tolist()
    for row, (text, images) in enumerate(ROWS):
        mask = batch["attention_mask"][row].bool()
        flags = kept[row][mask][batch["input_ids"][row][mask] == model.config.image_token_id]
        tokens = reference.full_visual_tokens(model, processor, images)[0]
        chosen = (
            [part.nonzero()[:, 0].tolist() for part in flags.split([len(part) for part in tokens])] if images else []
        )
        assert all(0 < len(part) < len(whole) for part, whole in zip(chosen, tokens, strict=True))
        order = iter(chosen)
        embeds = reference.prompt_embeds(model, processor, text, images, select=lambda *_, order=order: next(order))
        parts = prompts_of([spans(processor, text, [len(part) for part in chosen])])
        stand_in = masked_model(model, keep_share([0, 2], 0.4), parts)
        assert got[row] == reference.greedy(stand_in, embeds, NEW_TOKENS, process=hide_image)


def test_chunked_prefill_is_refused_by_name():
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        generate("llama", prefill_chunk_size=8)


# --- what the caller sees ------------------------------------------------------------------------------------------
@torch.no_grad()
def test_later_layers_cache_what_stayed():
    model, processor = build("llama")
    out = model(**make_batch(processor, [ROWS[0]]), use_cache=True)
    text, visual = out.logits.shape[1] - 40, 40
    assert (model.get_submodule("model.connector.layer_ops.0").layers) == (0, 2)
    lengths = [layer.get_seq_length() for layer in out[CACHE].layers]
    image_tokens = int((make_batch(processor, [ROWS[0]])["input_ids"] == model.config.image_token_id).sum())
    rest = lengths[0] - image_tokens
    first = int(0.4 * image_tokens + 0.5)
    assert lengths == [rest + image_tokens, rest + first, rest + first, rest + int(0.4 * first + 0.5)]

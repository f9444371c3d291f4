"""Coordinates: how they are written and read, what the language model gets and is taught, where features lie."""

import copy
import logging

import pytest
import torch

from builders import make_batch, plain_tokenizer, random_image, tiny_config, tiny_model, tiny_text_config
from hires_lmm import HiResLmmProcessor
from hires_lmm.modeling.serving_hires_lmm import ENGINE_ATTENTION, check_engine
from hires_lmm.processing.coordinate_text_hires_lmm import coordinate_tokens, read_coordinates, snap_coordinates
from hires_lmm.training import set_options


ROWS, STEPS = 5, 4
LAST = (ROWS - 1) * STEPS
PACK = {"part": "region_pack", "spatial_factor": 2, "temporal_factor": 2, "width": 8, "num_heads": 2}


def build(text="llama", **changes):
    """Model and processor whose tokens of coordinates are the last of the vocabulary."""
    tokenizer = copy.deepcopy(plain_tokenizer())
    first = len(tokenizer)
    tokenizer.add_tokens(coordinate_tokens(ROWS, STEPS))
    part = {"part": "coordinates", "first_token_id": first, "num_rows": ROWS, "steps": STEPS}
    connector = {"map_ops": [part, PACK], "layout": {"order": ["global", "frames", "detail"]}}
    config = tiny_config(
        text=tiny_text_config(text, vocab_size=len(tokenizer)),
        planner={"name": "llava_next", "views": "global", "pinpoints": [[56, 112], [112, 56]]},
        video_planner={"name": "frames"},
        connector_config=connector,
        **changes,
    )
    return tiny_model(config), HiResLmmProcessor.from_config(config, tokenizer), first


def ask(processor, text, frames=4):
    video = [random_image(60, 90, number) for number in range(frames)]
    return dict(processor(text=f"<video>{text}", videos=[video], return_tensors="pt"))


def test_texts_name_the_nearest_coordinate():
    _, processor, first = build()
    names = coordinate_tokens(ROWS, STEPS)
    assert names[:3] == ["<t=0.00>", "<t=0.06>", "<t=0.12>"] and len(set(names)) == 3 * (LAST + 1)
    for text, wanted in (
        ("<t=0.37>", "<t=0.38>"),
        ("<h=1>", "<h=1.00>"),
        ("<w=-0.2>", "<w=0.00>"),
        ("<h=7>", "<h=1.00>"),
    ):
        assert snap_coordinates(text, processor.tokenizer) == wanted
        ids = processor(text=f"a{text}b").input_ids[0]
        assert first + names.index(wanted) in ids
    assert snap_coordinates("<t=0.37>", plain_tokenizer()) == "<t=0.37>"
    assert snap_coordinates("<t=x> <x=1>", processor.tokenizer) == "<t=x> <x=1>"
    assert len(set(coordinate_tokens())) == 3 * 991
    ids = processor(text="From <t=0.25> to <t=1>, at <h=.5>.").input_ids[0]
    assert read_coordinates(processor.decode(ids)) == [("time", 0.25), ("time", 1.0)]
    chat = [{"role": "user", "content": [{"type": "text", "text": "Now <t=0.37>"}]}]
    ids = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0]
    assert first + names.index("<t=0.38>") in ids


@torch.no_grad()
def test_the_language_model_reads_the_mix_of_two_rows():
    model, processor, _ = build()
    batch, calls = ask(processor, "at <t=0.3125><h=0.5>?"), []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**batch)
    rows = model.model.connector.map_ops[0].input_rows.weight
    tokens = processor.tokenizer.convert_tokens_to_ids(["<t=0.31>", "<h=0.50>"])
    found = [calls[0][0][batch["input_ids"][0] == token][0] for token in tokens]
    torch.testing.assert_close(found[0], 0.75 * rows[0, 1] + 0.25 * rows[0, 2])  # 0.3125 of 4 is 1.25
    torch.testing.assert_close(found[1], rows[1, 2])


@torch.no_grad()
def test_features_get_the_mean_of_both_tables_at_their_places():
    model, processor, _ = build()
    part, seen = model.model.connector.map_ops[0], []
    part.register_forward_hook(lambda module, given, output: seen.append((given[0], output)))
    batch = make_batch(processor, [("<image>a", [random_image(60, 90)])])
    clip = ask(processor, "a")
    names = ("pixel_values", "view_positions", "view_spans", "view_boxes")
    model.model.get_image_features(**{name: torch.cat([batch[name], clip[name], clip[name]]) for name in names})
    time, height, width = (part.input_rows.weight + part.output_rows.weight) / 2

    def resized(rows, number):
        line = rows.T[None]
        return torch.nn.functional.interpolate(line, size=number, mode="linear")[0].T

    for name, times in (("global", time[:1]), ("frames", torch.cat([resized(time, 4)] * 2))):
        before, after = (views.group(name).features for views in seen[0])
        wanted = times[:, None, None] + resized(height, 4)[:, None] + resized(width, 4)
        torch.testing.assert_close(after - before, wanted.flatten(1, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("text", ["llama", "gemma2"])
@torch.no_grad()
def test_answers_hold_rows_alone(text):
    """Their logits are products with the output table, scaled and capped as those of the head are."""
    model, processor, first = build(text)
    batch = ask(processor, "What?")
    outputs = model(**batch)
    hidden, rows = model.model(**batch).last_hidden_state, model.model.connector.map_ops[0].output_rows.weight
    scores = hidden @ rows.flatten(0, 1).T
    cap = getattr(model.config.text_config, "final_logit_softcapping", None)
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    offsets = torch.arange(3 * (LAST + 1)) % (LAST + 1)
    own = outputs.logits[..., first:]
    torch.testing.assert_close(own[..., offsets % STEPS == 0], scores, atol=1e-5, rtol=1e-5)
    assert bool((own[..., offsets % STEPS > 0] < -1e3).all())


def soft_reference(logits, labels, first):
    """Cross-entropy against both rows around a target, over all tokens that may be an answer."""
    offset = torch.arange(logits.shape[-1]) - first
    between = (offset >= 0) & (offset % (LAST + 1) % STEPS > 0)
    logs = logits.masked_fill(between, float("-inf")).log_softmax(dim=-1)
    losses = []
    for row, target in zip(logs[0, :-1], labels[0, 1:].tolist(), strict=True):
        if target < 0:
            continue
        step = (target - first) % (LAST + 1) % STEPS if target >= first else 0
        losses.append(-row[target - step] * (1 - step / STEPS))
        if step:
            losses[-1] = losses[-1] - row[target - step + STEPS] * step / STEPS
    return torch.stack(losses)


@pytest.mark.parametrize("number", [None, 40])
def test_between_two_rows_the_target_is_both(number):
    model, processor, first = build()
    batch = ask(processor, "When? From <t=0.3125> to <t=0.5>, at <w=0.8125>.")
    labels = batch["input_ids"].clone()
    labels[:, :-22] = -100
    assert int((labels >= first).sum()) == 3
    options = {} if number is None else {"num_items_in_batch": torch.tensor(number)}
    with torch.no_grad():
        wanted = soft_reference(model(**batch).logits, labels, first)
    wanted = wanted.mean() if number is None else wanted.sum() / number
    for training in (False, True):
        model.train(training)
        loss = model(**batch, labels=labels, **options).loss
        torch.testing.assert_close(loss.detach(), wanted)
    loss.backward()
    part = model.model.connector.map_ops[0]
    assert bool(part.input_rows.weight.grad.abs().sum(dim=-1).all())  # neighbours, too
    assert bool(part.output_rows.weight.grad.abs().sum(dim=-1).all())


def test_generation_goes_on_behind_coordinates_on_a_cache_as_without():
    model, processor, first = build()
    batch = ask(processor, "From <t=0.3125>?")
    others = [*range(10), *range(20, first - 1)]  # so that coordinates are generated
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": others}
    found = model.generate(**batch, **options)[0]
    assert found.tolist() == model.generate(**batch, **options, use_cache=False)[0].tolist()
    beams = model.generate(**batch, **options, num_beams=3)[0]
    assert beams.tolist() == model.generate(**batch, **options, num_beams=3, use_cache=False)[0].tolist()
    answer = found[batch["input_ids"].shape[1] :]
    assert int((answer >= first).sum()) == len(read_coordinates(processor.decode(answer))) > 0


def test_a_tokenizer_without_the_tokens_is_told(caplog):
    config = build()[0].config
    logging.getLogger("transformers").propagate = True
    HiResLmmProcessor.from_config(config, copy.deepcopy(plain_tokenizer()))
    assert "lacks the 51 coordinates" in caplog.text


@torch.no_grad()
def test_other_parts_change_in_a_live_model():
    model, processor, _ = build()
    batch = ask(processor, "at <t=0.3125>?")
    before = model(**batch).logits
    set_options(model, {"layer_ops": [{"part": "keep_after", "layers": 0, "share": 1.0}]})
    torch.testing.assert_close(model(**batch).logits, before)


def test_an_engine_that_embeds_texts_itself_is_refused():
    config = build()[0].config
    config.text_config._attn_implementation = ENGINE_ATTENTION
    with pytest.raises(
        ValueError, match="map_ops has HiResLmmCoordinates, which works inside the language model or on"
    ):
        check_engine(config)


def test_tokens_beyond_the_vocabulary_are_refused():
    part = {"part": "coordinates", "first_token_id": 300}
    with pytest.raises(ValueError, match=r"tokens up to id 3272 .* add the tokens of coordinate_tokens\(\)"):
        tiny_config(connector_config={"map_ops": [part]})

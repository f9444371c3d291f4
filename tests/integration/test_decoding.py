"""Decoding with two contexts against processors that keep nothing and run the model again for each row and token."""

import functools
from types import SimpleNamespace

import pytest
import torch
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor

from builders import make_batch, random_image, tiny_config, tiny_model, tiny_processor, tiny_vision_config
from hires_lmm import PRESETS
from hires_lmm.decoding import DAMRO, M3ID, ContrastiveDecoding, contrast
from hires_lmm.modeling.compat_hires_lmm import CACHE
from hires_lmm.processing.chat_templates_hires_lmm import answer_prefix_ids, question_prefix_ids
from reference_routing import SMALL_CONNECTORS


COUNT = 6
TALKS = [
    (["what is red here ?"], [(90, 130), (60, 60)]),
    (["how are you ?"], []),
    (["how many cats are on the table ?"], [(80, 60)]),
]
"""Questions of the user with sizes of images in the first."""


@functools.cache
def setup(preset: str = "llava_next", layer_op: str | None = None):
    """Model and processor; shared, so do not change them."""
    connector = dict(SMALL_CONNECTORS.get(preset, {}))
    if layer_op is not None:
        connector["layer_ops"] = [{"part": layer_op}]
    config = tiny_config(preset, tiny_vision_config("clip", layers=2), connector_config=connector)
    processor = tiny_processor(config, "chatml")
    config.answer_prefix_ids, config.question_prefix_ids = answer_prefix_ids(processor), question_prefix_ids(processor)
    return tiny_model(config), processor


def inputs_of(processor, talks, answers=(), **kwargs) -> dict:
    """Tensors of prompts; each answer is followed by the next question."""
    samples = []
    for questions, sizes in talks:
        messages = []
        for number, question in enumerate(questions):
            images = [{"type": "image"}] * (len(sizes) if number == 0 else 0)
            messages.append({"role": "user", "content": [*images, {"type": "text", "text": question}]})
            if number < len(answers):
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[number]}]})
        pictures = [random_image(*size, seed=number) for number, size in enumerate(sizes)]
        samples.append((processor.apply_chat_template(messages, add_generation_prompt=True), pictures))
    return dict(make_batch(processor, samples, **kwargs))


def user(question: str) -> list[dict]:
    """A question about one image."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def generate(model, inputs: dict, *processors, **kwargs) -> torch.Tensor:
    """The new tokens; sampling from one seed."""
    torch.manual_seed(0)
    options = {"max_new_tokens": COUNT, "do_sample": False, "logits_processor": list(processors), **kwargs}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


class Slow(LogitsProcessor):
    """The same row by row, without cache and padding.

    Args:
        rows (`list[dict]`): Tensors of each prompt alone.
        negative (`Callable`): Arguments of the model for one prompt's negative context with its new tokens.
        rule (`Callable`): Log-probabilities, negative ones and step -> log-probabilities, not normalised.
    """

    acts_first = True

    def __init__(self, model, rows: list[dict], negative, rule):
        self.model, self.rows, self.negative, self.rule = model, rows, negative, rule

    @torch.no_grad()
    def __call__(self, input_ids, scores):
        length, result = max(row["input_ids"].shape[1] for row in self.rows), scores.clone()
        for number, ids in enumerate(input_ids):
            row, new = self.rows[number // (len(input_ids) // len(self.rows))], ids[length:]
            if self.model.config.image_token_id in row["input_ids"]:
                other = self.model(**self.negative(self.model, row, new), use_cache=False).logits[0, -1]
                own = scores[number].log_softmax(-1)
                result[number] = self.rule(own, other.log_softmax(-1), len(new) + 1).log_softmax(-1)
        return result


def text_alone(model, row, new) -> dict:
    ids = row["input_ids"][0]
    return {"input_ids": torch.cat([ids[ids != model.config.image_token_id], new])[None]}


def m3id_rule(own, other, step, alpha=0.9, rate=0.3):
    return own + (2.718281828459045 ** (rate * step) - 1) * (own - other) if own.exp().max() < alpha else own


def damro_rule(own, other, step, alpha=1.5, beta=0.2):
    combined = (1 + alpha) * own - alpha * other
    combined[own.exp() < beta * own.exp().max()] = -torch.inf
    return combined


def few_patches(model, row, new, k=3) -> dict:
    """Embeddings of the text with the k global tokens of each image that the class token likes best in the first
    layer, whose output is the layer -2 of a tower of two."""
    tower, embed, positions = model.model.vision_tower, model.get_input_embeddings(), row["view_positions"]
    layer = tower.encoder.layers[0]
    tokens = model.model.get_image_features(row["pixel_values"], positions, row["view_spans"]).tokens
    pieces, rest = [], row["input_ids"][0]
    for view in (positions[:, 8] == 1).nonzero()[:, 0].tolist():
        states = tower(row["pixel_values"][view][None], output_hidden_states=True).hidden_states[0]
        normed = layer.layer_norm1(states)[0]
        query, keys = layer.self_attn.q_proj(normed[0]), layer.self_attn.k_proj(normed)
        best = (keys @ query)[1:].argsort(descending=True)[:k].sort().values
        at = rest.tolist().index(model.config.image_token_id)
        pieces += [embed(rest[:at]), tokens.features[tokens.view == view][best]]
        rest = rest[at + int(positions[view, 5]) :]
    return {"inputs_embeds": torch.cat([*pieces, embed(rest), embed(new)])[None]}


def noisy(model, inputs) -> dict:
    """The negative context of VCD: the prompt with noise over its images, the same in a batch as alone."""
    return {**inputs, "pixel_values": 0.3 * inputs["pixel_values"] + torch.cos(1e3 * inputs["pixel_values"])}


STRATEGIES = {
    "m3id": (lambda model, inputs: M3ID(model, inputs, alpha=0.9, rate=0.3), text_alone, m3id_rule),
    "damro": (lambda model, inputs: DAMRO(model, inputs, alpha=1.5, k=3, beta=0.2), few_patches, damro_rule),
}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True, "temperature": 1.3},
    "penalty": {"repetition_penalty": 2.5, "no_repeat_ngram_size": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunks": {"prefill_chunk_size": 16},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_answers_are_those_of_a_processor_that_keeps_nothing(strategy, mode):
    """In a batch with padding, several images, and a row without."""
    model, processor = setup()
    make, negative, rule = STRATEGIES[strategy]
    inputs, rows = inputs_of(processor, TALKS), [inputs_of(processor, [talk]) for talk in TALKS]
    slow = Slow(model, rows, negative, rule)
    found = generate(model, inputs, make(model, inputs), **MODES[mode])
    assert torch.equal(found, generate(model, inputs, slow, **MODES[mode]))
    assert not torch.equal(found, generate(model, inputs, **MODES[mode]))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_batch_answers_as_each_row_alone_with_every_preset(preset, strategy):
    model, processor = setup(preset)
    talks = TALKS if preset != "fusion" else [(["what is red here ?"], [(90, 130)]), *TALKS[1:]]
    inputs, make = inputs_of(processor, talks), STRATEGIES[strategy][0]
    found, plain = (generate(model, inputs, *twice, max_new_tokens=4) for twice in ([make(model, inputs)], []))
    assert (found != plain).any() and torch.equal(found[1], plain[1])
    for talk, answer in zip(talks, found, strict=True):
        alone = inputs_of(processor, [talk])
        assert torch.equal(generate(model, alone, make(model, alone), max_new_tokens=4)[0], answer)


@pytest.mark.parametrize("preset", ["slime", "mg_llava"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_layouts_of_images_are_answered_alike(preset, strategy):
    """An ordinary call with padding is dense where each text has as many images."""
    model, processor = setup(preset)
    texts = [processor.apply_chat_template(user(talk[0][0]), add_generation_prompt=True) for talk in TALKS[::2]]
    images, make = [[random_image(90, 130)], [random_image(60, 60)]], STRATEGIES[strategy][0]
    found = []
    for layout in ({}, {"image_layout": "flat"}):
        inputs = dict(processor(text=texts, images=images, padding=True, return_tensors="pt", **layout))
        assert ("view_positions" in inputs) == bool(layout)
        found.append(generate(model, inputs, make(model, inputs)))
    assert torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_objects_with_boxes_are_in_the_prompt_and_not_in_the_negative_context(strategy):
    """In a batch as alone; the second image has none."""
    (model, processor), make = setup("mg_llava"), STRATEGIES[strategy][0]
    boxes, images = [[[10, 5, 61, 40], [0, 0, 90, 60]], []], [random_image(90, 130), random_image(60, 60)]
    text = processor.apply_chat_template(user("what is red here ?"), add_generation_prompt=True)
    rows = [(text, [image]) for image in images]
    inputs = dict(make_batch(processor, rows, image_boxes=boxes))
    decoding = make(model, inputs)
    found = generate(model, inputs, decoding)
    negative = [decoding.negative(model, each) for each in (inputs, dict(make_batch(processor, rows)))]
    assert all(torch.equal(value, negative[1][name]) for name, value in negative[0].items())
    for number in range(2):
        alone = dict(make_batch(processor, rows[number : number + 1], image_boxes=boxes[number : number + 1]))
        assert torch.equal(generate(model, alone, make(model, alone))[0], found[number])


@pytest.mark.parametrize("preset", ["slime", "fusion", "llava_mini"])
def test_the_text_alone_is_the_same_for_models_that_read_the_question(preset):
    model, processor = setup(preset)
    talks = [TALKS[2], TALKS[1]]
    inputs, rows = inputs_of(processor, talks), [inputs_of(processor, [talk]) for talk in talks]
    found = generate(model, inputs, STRATEGIES["m3id"][0](model, inputs), num_beams=2)
    assert torch.equal(found, generate(model, inputs, Slow(model, rows, text_alone, m3id_rule), num_beams=2))


@pytest.mark.parametrize("layer_op", ["keep_after", "dyvte", "yopo"])
def test_models_whose_layers_drop_tokens_answer_in_a_batch_as_alone(layer_op):
    model, processor = setup("llava_next", layer_op)
    inputs = inputs_of(processor, TALKS)
    for make, _, _ in STRATEGIES.values():
        found = generate(model, inputs, make(model, inputs), num_beams=2)
        alone = inputs_of(processor, TALKS[:1])
        assert torch.equal(generate(model, alone, make(model, alone), num_beams=2)[0], found[0])


@pytest.mark.parametrize("preset", ["llava_next", "slime"])
def test_noised_images_as_a_function_are_vcd(preset):
    """The router of `slime` drops other tokens of the negative context, a different number in each row."""
    model, processor = setup(preset)
    inputs, rows = inputs_of(processor, TALKS), [inputs_of(processor, [talk]) for talk in TALKS]
    rule = functools.partial(damro_rule, alpha=1.0, beta=0.1)

    def negative(model, row, new):
        ids = torch.cat([row["input_ids"], new[None]], dim=1)
        return {**noisy(model, row), "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    vcd = ContrastiveDecoding(model, inputs, noisy, functools.partial(contrast, alpha=1.0, beta=0.1))
    found = generate(model, inputs, vcd, num_beams=2)
    assert torch.equal(found, generate(model, inputs, Slow(model, rows, negative, rule), num_beams=2))
    assert not torch.equal(found, generate(model, inputs, num_beams=2))


def test_the_second_context_rests_while_the_model_is_sure():
    """And reads on when it is needed, in one call."""
    model, processor = setup()
    inputs = inputs_of(processor, TALKS[2:])
    calls = []
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    found = generate(model, inputs, M3ID(model, inputs, alpha=0.0))
    assert len(calls) == COUNT and torch.equal(found, generate(model, inputs))
    calls.clear()
    late = M3ID(model, inputs, rate=0.3)
    wanted = [False, False, True, False, True, True]
    late.is_needed = lambda scores, left=list(wanted): left.pop(0)
    found = generate(model, inputs, late)
    handle.remove()
    lengths = [call["input_ids"].shape[1] for call in calls]
    text = int((inputs["input_ids"] != model.config.image_token_id).sum())
    assert lengths == [inputs["input_ids"].shape[1], 1, 1, text, 2, 1, 1, 2, 1, 1]

    def rule(own, other, step):
        return m3id_rule(own, other, step, alpha=1.0) if wanted[step - 1] else own

    assert torch.equal(found, generate(model, inputs, Slow(model, [inputs], text_alone, rule)))


def test_processors_of_the_user_act_on_the_combined_scores():
    model, processor = setup()
    inputs = inputs_of(processor, TALKS[2:])
    seen = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(scores)
            return scores

    penalty = RepetitionPenaltyLogitsProcessor(1.9)
    first, last = M3ID(model, inputs, rate=0.3), M3ID(model, inputs, rate=0.3)
    found = generate(model, inputs, first, Look(), penalty)
    assert torch.equal(found, generate(model, inputs, penalty, last))  # whatever the order
    alone = M3ID(model, inputs, rate=0.3)(inputs["input_ids"], model(**inputs).logits[:, -1].float())
    torch.testing.assert_close(seen[0], alone)


def test_a_second_turn_goes_on_in_a_cache():
    model, processor = setup()
    first = inputs_of(processor, TALKS[2:])
    options = {"return_dict_in_generate": True, "max_new_tokens": COUNT, "do_sample": False}
    output = model.generate(**first, logits_processor=[M3ID(model, first, rate=0.3)], **options)
    answer = output.sequences
    more = processor.tokenizer("and what is blue ?", return_tensors="pt")["input_ids"]
    whole = {**first, "input_ids": torch.cat([answer, more], dim=1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    wanted = generate(model, whole, M3ID(model, whole, rate=0.3))
    assert torch.equal(generate(model, whole, M3ID(model, whole, rate=0.3), **{CACHE: output[CACHE]}), wanted)
    assert not torch.equal(wanted, generate(model, whole))


def test_a_second_turn_of_new_ids_alone_behind_a_packed_cache():
    model, processor = setup("slime")
    first = inputs_of(processor, TALKS[2:])
    output = model.generate(**first, max_new_tokens=COUNT, do_sample=False, return_dict_in_generate=True)
    more = processor.tokenizer("and what is blue ?", return_tensors="pt")["input_ids"]
    new = torch.cat([output.sequences[:, -1:], more], dim=1)
    whole = {**first, "input_ids": torch.cat([output.sequences, more], dim=1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    length = output[CACHE].get_seq_length() + new.shape[1]
    turn = {"input_ids": new, "attention_mask": torch.ones(1, length, dtype=torch.long)}
    decoding = M3ID(model, whole, rate=0.3)
    found = generate(model, turn, decoding, **{CACHE: output[CACHE]})
    assert torch.equal(found, generate(model, whole, M3ID(model, whole, rate=0.3)))


def test_embeddings_in_place_of_ids():
    model, processor = setup()
    inputs = inputs_of(processor, TALKS[2:])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    options = {"max_new_tokens": COUNT, "do_sample": False}
    decoding = M3ID(model, inputs, rate=0.3)
    found = model.generate(inputs_embeds=embeds, **others, logits_processor=[decoding], **options)
    assert torch.equal(found, generate(model, inputs, M3ID(model, inputs, rate=0.3)))
    assert torch.equal(found, generate(model, inputs, decoding))


def test_one_processor_serves_its_prompt_again_and_no_other():
    model, processor = setup()
    inputs, other = inputs_of(processor, TALKS[2:]), inputs_of(processor, TALKS[:1])
    decoding = DAMRO(model, inputs, k=3)
    found = generate(model, inputs, decoding)
    assert torch.equal(generate(model, inputs, decoding), found)
    assert torch.equal(
        generate(model, inputs, decoding, num_beams=2), generate(model, inputs, DAMRO(model, inputs, k=3), num_beams=2)
    )
    with pytest.raises(ValueError, match="DAMRO was made for a prompt of shape"):
        generate(model, other, decoding)


def test_drafts_are_checked_against_the_right_scores(deprecations):
    """Prompt lookup and an assistant: what was read of a refused draft is read anew."""
    model, processor = setup()
    inputs = inputs_of(processor, [(["cat cat cat cat cat a cat a cat"], [(80, 60)])])
    make = STRATEGIES["m3id"][0]
    wanted = generate(model, inputs, make(model, inputs), max_new_tokens=10)
    assert torch.equal(
        generate(model, inputs, make(model, inputs), max_new_tokens=10, prompt_lookup_num_tokens=3), wanted
    )
    found = generate(model, inputs, make(model, inputs), max_new_tokens=10, assistant_model=model)
    deprecations.clear()  # by the library about its own assistant
    assert torch.equal(found, wanted)


def test_rows_without_images_keep_their_scores():
    model, processor = setup()
    inputs = inputs_of(processor, TALKS)
    logits = model(**inputs).logits[:, -1].detach()
    for make, _, _ in STRATEGIES.values():
        found = make(model, inputs)(inputs["input_ids"], logits)
        assert torch.equal(found[1], logits[1]) and not torch.equal(found[0], logits[0].log_softmax(-1))
    logits[0, 5:9] = -torch.inf  # what others took out stays out
    found = M3ID(model, inputs, rate=0.0)(inputs["input_ids"], logits)
    torch.testing.assert_close(found[0], logits[0].log_softmax(-1))


def test_a_prompt_without_images_is_answered_plainly():
    model, processor = setup()
    inputs = inputs_of(processor, TALKS[1:2])
    assert torch.equal(generate(model, inputs, DAMRO(model, inputs)), generate(model, inputs))


def test_what_cannot_be_is_refused_by_name():
    model, processor = setup()
    inputs = inputs_of(processor, TALKS[2:])
    for options, match in (
        ({"alpha": 1.2}, "alpha=1.2"),
        ({"rate": -1}, "rate=-1"),
        ({"beta": 2}, "beta=2"),
        ({"max_growth": -1}, "max_growth=-1"),
        ({"rate": float("inf")}, "rate=inf"),
    ):
        with pytest.raises(ValueError, match=match):
            M3ID(model, inputs, **options)
    for options, match in (
        ({"k": 0}, "k=0"),
        ({"k": 2.5}, "k=2.5"),
        ({"alpha": float("inf")}, "alpha=inf"),
        ({"scores": "all"}, "scores='all'"),
        ({"compat": "x"}, "compat='x'"),
    ):
        with pytest.raises(ValueError, match=match):
            DAMRO(model, inputs, **options)
    with pytest.raises(ValueError, match="no input_ids"):
        M3ID(model, {"inputs_embeds": torch.zeros(1, 2, 32)})
    with pytest.raises(ValueError, match="needs pixel_values"):
        DAMRO(model, {name: inputs[name] for name in ("input_ids", "attention_mask")})
    with pytest.raises(ValueError, match="'siglip_vision_model' has none"):
        DAMRO(tiny_model(tiny_config("llava_next", "siglip")), inputs)
    two = ContrastiveDecoding(model, inputs, lambda model, own: {"input_ids": own["input_ids"].repeat(2, 1)}, contrast)
    with pytest.raises(ValueError, match="2 rows for 1 prompts"):
        generate(model, inputs, two)
    nothing = ContrastiveDecoding(
        model, inputs, lambda model, own: {"attention_mask": own["attention_mask"]}, contrast
    )
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        generate(model, inputs, nothing)
    with pytest.raises(ValueError, match="model_type='llama'"):
        M3ID(SimpleNamespace(config=model.config.text_config), inputs)

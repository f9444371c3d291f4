"""What users do beside the usual call: nothing crashes without a remedy, and nothing changes in silence."""

import copy
import functools
import pickle

import pytest
import torch
from accelerate.utils import send_to_device
from transformers import CompileConfig

import reference_routing as routing
from builders import geometry_of, make_batch, random_image, tiny_config, tiny_model, tiny_processor


RULES = {
    "cosine": routing.Rule("cosine"),
    "attention": routing.Rule("attention"),
    "saliency": routing.Rule("saliency"),
    "cosine_budget": routing.Rule("cosine", "budget"),
}
READING = ["cosine", "attention", "cosine_budget"]
all_rules = pytest.mark.parametrize("name", RULES)
TEXT = "USER: <image>\nHow many cats are on the table? ASSISTANT:"
OPTIONS = {"max_new_tokens": 5, "do_sample": False}


@functools.cache
def build(name: str, **changes):
    connector = {**routing.SMALL_CONNECTORS["slime"], "token_ops": RULES[name].token_ops()}
    config = tiny_config("slime", connector_config=connector, **changes)
    return tiny_model(config), tiny_processor(config)


@functools.cache
def one(name: str):
    """One row with one image, and its greedy ids."""
    model, processor = build(name)
    batch = make_batch(processor, [(TEXT, [random_image(100, 180)])])
    return batch, model.generate(**batch, **OPTIONS).tolist()


@pytest.fixture
def training_mode():
    """A function that puts a model into training mode until the test is over."""
    changed = []

    def train(model):
        changed.append(model.train())

    yield train
    for model in changed:
        model.eval()
        model.zero_grad()


# --- prompts -------------------------------------------------------------------------------------------------------
@all_rules
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_rows_of_an_image_alone_and_of_nothing_after_it(name, side):
    model, processor = build(name)
    image = random_image(100, 180)
    rows = [("<image>", [image]), ("a boat <image>", [image]), ("a", [])]
    batch = make_batch(processor, rows, padding_side=side)
    logits, length = model(**batch).logits, batch["input_ids"].shape[1]
    texts = model.generate(**batch, **OPTIONS)[:, length:].tolist()
    for row, sample in enumerate(rows):
        single = make_batch(processor, [sample])
        mask = batch["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row][mask], model(**single).logits[0], atol=1e-4, rtol=0)
        assert texts[row] == model.generate(**single, **OPTIONS)[0, single["input_ids"].shape[1] :].tolist()


@all_rules
@torch.no_grad()
def test_ten_images_in_a_row(name):
    model, processor = build(name)
    images = [random_image(60 + 9 * i, 120 - 5 * i, seed=i) for i in range(10)]
    text = " and ".join(["<image>"] * 10) + " How many cats?"
    batch = make_batch(processor, [(text, images), (TEXT, images[:1])], padding_side="left")
    kept = model(**batch, output_token_map=True).token_map
    alone = model(**make_batch(processor, [(text, images)]), output_token_map=True).token_map
    assert torch.equal(kept.kept[kept.image < 10], alone.kept)
    both = model.generate(**batch, **OPTIONS, num_beams=2)
    single = model.generate(**make_batch(processor, [(text, images)]), **OPTIONS, num_beams=2)
    assert both[0].tolist() == single[0].tolist()


@all_rules
@pytest.mark.parametrize("budget", [None, 20], ids=["full", "budget"])
@pytest.mark.parametrize("views", ["global", "crops"])
@torch.no_grad()
def test_one_kind_of_view_under_a_router_for_crops(name, views, budget):
    model, processor = build(name)
    extra = {} if budget is None else {"max_image_tokens": budget}
    batch = make_batch(processor, [(TEXT, [random_image(100, 180)])] * 2, views=views, **extra)
    found = model(**batch, output_token_map=True).token_map
    assert set(found.kind.tolist()) == {0 if views == "global" else 1}
    kept = int(found.kept[found.image == 0].sum())
    if views == "global":
        assert kept == 16
    elif budget is not None:
        assert kept == budget
    else:
        assert (kept == 72) == (RULES[name].keep == "budget")
    assert model.generate(**batch, **OPTIONS).shape[0] == 2


# --- masks and embeddings ------------------------------------------------------------------------------------------
@all_rules
@torch.no_grad()
def test_embeddings_instead_of_ids(name):
    model, (batch, _) = build(name)[0], one(name)
    expected = model.generate(**batch, **OPTIONS).tolist()
    rest = {key: value for key, value in batch.items() if key != "input_ids"}
    embeds = model.get_input_embeddings()(batch["input_ids"])
    torch.testing.assert_close(model(inputs_embeds=embeds, **rest).logits, model(**batch).logits, atol=1e-5, rtol=0)
    length = batch["input_ids"].shape[1]
    for options in ({}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}):
        wanted = model.generate(**batch, **OPTIONS, **options)[:, length:].tolist()
        assert model.generate(inputs_embeds=embeds, **rest, **OPTIONS, **options).tolist() == wanted
    assert model.generate(**batch, inputs_embeds=embeds, **OPTIONS).tolist() == expected


@all_rules
@torch.no_grad()
def test_masks_of_any_type_and_none(name):
    model, (batch, expected) = build(name)[0], one(name)
    logits = model(**batch).logits
    rest = {key: value for key, value in batch.items() if key != "attention_mask"}
    for mask in [None, *(batch["attention_mask"].to(dtype) for dtype in (torch.bool, torch.float32, torch.int32))]:
        torch.testing.assert_close(model(**rest, attention_mask=mask).logits, logits, atol=1e-5, rtol=0)
        assert model.generate(**rest, attention_mask=mask, **OPTIONS).tolist() == expected


@all_rules
@torch.no_grad()
def test_logits_to_keep_and_given_positions(name):
    model, (batch, expected) = build(name)[0], one(name)
    logits = model(**batch).logits
    for wanted, part in ((1, logits[:, -1:]), (5, logits[:, -5:]), (torch.tensor([0, 7]), logits[:, [0, 7]])):
        torch.testing.assert_close(model(**batch, logits_to_keep=wanted).logits, part, atol=1e-5, rtol=0)
    positions = batch["attention_mask"].cumsum(1) - 1
    torch.testing.assert_close(model(**batch, position_ids=positions).logits, logits, atol=1e-5, rtol=0)
    assert model.generate(**batch, position_ids=positions, **OPTIONS).tolist() == expected


@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}],
    ids=["greedy", "no_cache", "beams", "lookup"],
)
@torch.no_grad()
def test_a_prompt_mask_in_generate(name, options):
    """It has the length of the prompt, in every mode."""
    model, processor = build(name)
    extra = {"max_image_tokens": 40} if name == "cosine_budget" else {}
    batch = make_batch(processor, [(TEXT + " red boat red boat red", [random_image(100, 180)])], **extra)
    everything = model.generate(**batch, **OPTIONS, **options).tolist()
    ones = torch.ones_like(batch["input_ids"])
    assert model.generate(**batch, **OPTIONS, **options, prompt_mask=ones).tolist() == everything
    last = ones * 0
    last[:, -2:] = 1
    expected = model.generate(**batch, **OPTIONS, num_beams=options.get("num_beams", 1), prompt_mask=last).tolist()
    assert model.generate(**batch, **OPTIONS, **options, prompt_mask=last).tolist() == expected
    kept = [model(**batch, prompt_mask=mask, output_token_map=True).token_map.kept for mask in (ones, last)]
    assert not torch.equal(*kept)
    with pytest.raises(ValueError, match=r"prompt_mask has the shape \(1, 3\)"):
        model(**batch, prompt_mask=ones[:, :3])


# --- training mode, compilation, copies ----------------------------------------------------------------------------
@all_rules
def test_generate_in_training_mode(name, training_mode):
    """Nothing is known about answers, but in `generate` there are none."""
    model, batch = build(name)[0], one(name)[0]
    training_mode(model)
    sequences = model.generate(**batch, **OPTIONS)
    assert sequences.shape[1] == batch["input_ids"].shape[1] + 5


def test_compiled_decoding_with_a_static_cache():
    model, (batch, expected) = copy.deepcopy(build("cosine")[0]), one("cosine")
    compile_config = CompileConfig(backend="eager", mode=None)
    compile_config._compile_all_devices = True
    got = model.generate(**batch, **OPTIONS, cache_implementation="static", compile_config=compile_config)
    assert hasattr(model, "_compiled_call")
    assert got.tolist() == expected
    torch._dynamo.reset()


@all_rules
def test_copies_of_model_and_features(name):
    model, (batch, expected) = build(name)[0], one(name)
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        features = model.get_image_features(**geometry_of(batch), return_dict=True)
    fresh = build.__wrapped__(name)[0]  # transformers hangs hooks on a model at its first call that no pickle takes
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(fresh))):
        assert twin.generate(**batch, **OPTIONS).tolist() == expected
    pickled = pickle.loads(pickle.dumps(features))
    for twin in (copy.copy(features), copy.deepcopy(features), pickled, send_to_device(features, "cpu")):
        given = {**text, "mm_encoder_outputs": {"image": twin}}
        assert model.generate(**given, **OPTIONS).tolist() == expected
        torch.testing.assert_close(model(**given).logits, model(**batch).logits, atol=1e-5, rtol=0)

"""Every registered part in half precision against float64, and what large, broken and equal numbers do to it.

`UNIT` is one rounding: bfloat16 keeps 8 bits, float16 keeps 11. A part may be `ROUNDINGS` of them away from float64
(relative, root mean square; twice that at its worst value): a handful of products one after another. Norms, softmax
and sums over many tokens that were taken in half precision are further away, and with outlying channels infinite.
"""

import copy
import dataclasses
import functools

import pytest
import torch
from PIL import Image

from builders.registry import CASES, Case, batch_of, built, part_of, register
from builders.tiny import make_batch, random_image, tiny_config, tiny_model, tiny_processor, tiny_text_config
from hires_lmm.modeling.carriers_hires_lmm import Question, ViewFeatures, ViewGroup, VisualTokens
from hires_lmm.modeling.conversation_hires_lmm import Conversation
from hires_lmm.modeling.routers_hires_lmm import keep_budget, keep_threshold


UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ROUNDINGS = {"": 2.5, "router": 3.0, "fusion": 5.0, "prompt_fuser": 5.0}  # some are deeper than others
SINGLE = 1e-6  # scores without parameters are taken in float32, whatever comes in
SCORED_IN_SINGLE = [("router", ""), ("router", "saliency"), ("router", "threshold")]
WIDTH = 32  # of the towers of tiny models
SIZES = ((60, 50), (90, 60), (40, 200))
MANY = ((320, 320), (60, 50))
halves = pytest.mark.parametrize("dtype", UNIT, ids=["fp16", "bf16"])
all_parts = pytest.mark.parametrize(
    "case", [case for case in CASES if case.slot in ("view_ops", "adapter", "map_ops", "token_ops")], ids=str
)
backends = pytest.mark.parametrize("backend", ["sdpa", "eager"])


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    register(monkeypatch)


def change(value, function):
    """Inputs of a part with each tensor of fractions changed, and without what is remembered of the conversation."""
    if isinstance(value, torch.Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, (VisualTokens, ViewFeatures, ViewGroup, Question)):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: change(each, function) for name, each in fields.items()})
    if isinstance(value, dict):
        return {name: change(each, function) for name, each in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(change(each, function) for each in value)
    return None if isinstance(value, Conversation) else value


def tensors(value) -> list[torch.Tensor]:
    """All tensors of fractions in what a part makes."""
    found: list[torch.Tensor] = []
    change(value, lambda tensor: found.append(tensor) or tensor)
    return found


@functools.cache
@torch.no_grad()
def part_and_inputs(case: Case, sizes: tuple, backend: str = "sdpa"):
    """A part of a tiny model, and what each of its calls gets for images of these sizes."""
    model, processor = copy.deepcopy(built(case))
    model.set_attn_implementation(backend)
    calls: list = []
    part = part_of(model, case)
    part.register_forward_pre_hook(lambda module, given: calls.append(change(given, torch.clone)))
    model(**batch_of(processor, *sizes))
    part._forward_pre_hooks.clear()
    return part, calls


def with_outliers(features: torch.Tensor, size: float = 1e3) -> torch.Tensor:
    """Two channels that are large everywhere, as those of CLIP towers; scores have no channels."""
    features = features.clone()
    if features.ndim > 1 and features.shape[-1] == WIDTH:
        features[..., 3], features[..., 20] = size, -0.7 * size
    return features


def errors(got: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """Root mean square error over that of the values, and the worst error over the largest value.

    Scores, which are logits of a softmax, count as 1 at least: they may cancel to zero.
    """
    assert got.shape == wanted.shape and torch.equal(got.isnan(), wanted.isnan())
    got, wanted = got.double().nan_to_num(), wanted.double().nan_to_num()
    if not wanted.any():
        return float(got.abs().sum()), 0.0
    off, least = got - wanted, 1.0 if wanted.ndim == 1 else 0.0
    mean, worst = (max(float(size), least) for size in (wanted.square().mean().sqrt(), wanted.abs().max()))
    return float(off.square().mean().sqrt()) / mean, float(off.abs().max()) / worst


@torch.no_grad()
def compare(case: Case, dtype: torch.dtype, part, calls: list, slack: float = 1.0) -> None:
    """Run a part in half precision and, with the same weights and inputs, in float64."""
    half = copy.deepcopy(part).to(dtype)
    double = copy.deepcopy(half).double()
    allowed = slack * ROUNDINGS.get(case.name, ROUNDINGS[""]) * UNIT[dtype]
    for given in calls:
        found = half(*change(given, lambda tensor: tensor.to(dtype)))
        wanted = double(*change(given, lambda tensor: tensor.to(dtype).double()))
        for number, (got, expected) in enumerate(zip(tensors(found), tensors(wanted), strict=True)):
            is_score = (case.name, case.way) in SCORED_IN_SINGLE and number == 1
            mean, worst = errors(got, expected)
            assert mean <= (SINGLE if is_score else allowed), (number, mean / UNIT[dtype])
            assert worst <= 2 * allowed, (number, worst / UNIT[dtype])


# --- every part ----------------------------------------------------------------------------------------------------
@halves
@all_parts
def test_a_part_in_half_precision_is_near_float64(case, dtype):
    compare(case, dtype, *part_and_inputs(case, SIZES))


@backends
@halves
@all_parts
@torch.no_grad()
def test_outlying_channels_stay_finite_and_near_float64(case, dtype, backend):
    """Channels of magnitude 1000, as CLIP's towers have: their squares and inner products leave float16."""
    part, calls = part_and_inputs(case, SIZES, backend)
    compare(case, dtype, part, [(change(carrier, with_outliers), *others) for carrier, *others in calls])


@halves
@all_parts
def test_many_crops_are_as_precise_as_one(case, dtype):
    """A sum over many crops that was taken in half precision would have lost most of its terms."""
    compare(case, dtype, *part_and_inputs(case, MANY))


@halves
@all_parts
@torch.no_grad()
def test_equal_tokens_give_equal_finite_results(case, dtype):
    """All tokens of all views the same: norms see no variance, softmax no difference, routers no best token."""
    part, calls = part_and_inputs(case, SIZES)
    calls = change(calls, lambda tensor: tensor.flatten(0, -2)[0].expand_as(tensor) if tensor.ndim > 1 else tensor)
    slack = 5.0 if case.name == "sa_perceiver" else 1.0  # the tail of the SiLU: a rounded score moves its exponential
    compare(case, dtype, part, calls, slack)
    half = copy.deepcopy(part).to(dtype)
    for given in change(calls, lambda tensor: tensor.to(dtype)):
        for one, two in zip(tensors(half(*given)), tensors(half(*given)), strict=True):
            assert torch.equal(one.nan_to_num(), two.nan_to_num()) and not torch.isinf(one).any()


# --- zeros that must stay zero -------------------------------------------------------------------------------------
def test_idle_modules_add_zero_in_float16():
    """What keeps unused modules in the graph is zero even where a sum of their outputs leaves float16."""
    config = tiny_config("slime", connector_config={"view_ops": [], "adapter": {"part": "linear"}, "token_ops": []})
    model = tiny_model(config).train()
    with torch.no_grad():
        model.model.connector.adapter.linear.bias.fill_(300.0)  # 16 tokens × 32 channels × 300 > 65504
    model = model.half()
    batch = make_batch(tiny_processor(config), [("USER: hi ASSISTANT: yes", [])])
    output = model(**batch, labels=batch["input_ids"])
    assert torch.isfinite(output.loss)
    assert torch.equal(output.loss, model(**batch, labels=batch["input_ids"]).loss)
    picture = make_batch(tiny_processor(config), [("<image> yes", [random_image(40, 40)])], views="global")
    picture["pixel_values"] = picture["pixel_values"].half()
    features = model.get_image_features(**{k: v for k, v in picture.items() if k.startswith(("pixel", "view"))})
    assert torch.isfinite(features.pooler_output[0]).all()


# --- NaN -----------------------------------------------------------------------------------------------------------
@functools.cache
def parts_of(preset: str):
    """A model with few tokens and its processor."""
    compress = {"view_ops": [{"part": "query_compressor", "on": "crops", "num_queries": 4}]}
    connector = {"slime": compress, "vlsa": {}, "fusion": {}, "llava_next": {}}[preset]
    config = tiny_config(preset, **({"connector_config": connector} if connector else {}))
    return tiny_model(config), tiny_processor(config, "chatml")


PRESETS = ["slime", "vlsa", "fusion", "llava_next"]
TEXT = "<image>\nHow many cats?"


def pictures(preset: str, sizes=((60, 90), (100, 40))) -> dict:
    """A batch of questions on images of the given sizes."""
    return make_batch(parts_of(preset)[1], [(TEXT, [random_image(*size, seed)]) for seed, size in enumerate(sizes)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_views_that_hold_no_number_are_an_error(preset, value):
    """In forward, in generate and alone; the message names the views."""
    model, batch = parts_of(preset)[0], dict(pictures(preset))
    views = {name: value for name, value in batch.items() if name.startswith(("pixel", "view"))}
    views["pixel_values"] = batch["pixel_values"] = batch["pixel_values"].clone()
    batch["pixel_values"][1, 2, 5, 5] = value
    message = (
        rf"pixel_values holds values that are NaN or infinite, in the views \[1\] of {len(batch['pixel_values'])}"
    )
    for call in (
        lambda: model(**batch),
        lambda: model.generate(**batch, max_new_tokens=1),
        lambda: model.get_image_features(**views),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@torch.no_grad()
def test_cached_tower_features_that_hold_no_number_are_an_error():
    model, batch = parts_of("llava_next")[0], dict(pictures("llava_next"))
    features = model.model.encode_pixels(batch.pop("pixel_values"))
    assert torch.isfinite(model(**batch, vision_features=features).logits).all()
    features[2, 7, 3] = float("nan")
    with pytest.raises(ValueError, match=r"vision_features holds values that are NaN or infinite, in the views \[2\]"):
        model(**batch, vision_features=features)


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_image_features_that_hold_no_number_reach_the_logits_of_their_row_alone(preset):
    """Looking at what a caller gives back would wait for the device; but a broken image passes for no whole one."""
    model, batch = parts_of(preset)[0], dict(pictures(preset))
    features = model.get_image_features(**{k: v for k, v in batch.items() if k.startswith(("pixel", "view"))})
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    whole = model(**text, mm_encoder_outputs={"image": features}).logits
    features = copy.deepcopy(features)
    if features.tokens is not None:
        features.tokens.features = features.tokens.features.clone()
        features.tokens.features[-3] = float("nan")  # a token of the last image
    features.pooler_output[-1][-3] = float("nan")
    logits = model(**text, mm_encoder_outputs={"image": features}).logits
    assert logits[1, -1].isnan().all()
    real = batch["attention_mask"][0].bool()
    torch.testing.assert_close(logits[0][real], whole[0][real])


def test_tokens_whose_score_is_no_number_are_kept():
    scores = torch.tensor([0.1, float("nan"), 3.0, 0.2])
    assert keep_threshold(scores, 0.5, 1.0)[1]
    assert keep_budget(scores, 1).tolist() == [False, True, False, False]


# --- sizes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", ["slime", "slime_release", "vlsa", "fusion", "llava_next", "llava_hd", "monkey"])
@torch.no_grad()
def test_images_of_one_pixel_width(preset):
    """1 × 1, 1 × 400 and 400 × 1: the tokens are those that were promised, and alone and together the logits agree."""
    connector = {"view_ops": [{"part": "query_compressor", "on": "crops", "num_queries": 4}]}
    small = {
        "slime": connector,
        "slime_release": {
            **connector,
            "layout": {"separators": {"separator": {"place": "between_views", "value": [19]}}},
        },
    }
    small["monkey"] = {"view_ops": [{"part": "query_compressor", "on": "all", "num_queries": 4}]}
    config = tiny_config(preset, **({"connector_config": small[preset]} if preset in small else {}))
    model, processor = tiny_model(config), tiny_processor(config)
    sizes = [(1, 1), (1, 400), (400, 1)]
    samples = [(TEXT, [random_image(*size, seed=1)]) for size in sizes]
    batch = make_batch(processor, samples)
    assert torch.isfinite(batch["pixel_values"]).all()
    logits = model(**batch).logits
    for row, (sample, size) in enumerate(zip(samples, sizes, strict=True)):
        alone = make_batch(processor, [sample])
        assert int((alone["input_ids"] == config.image_token_id).sum()) == processor.image_tokens(*size)
        expected = model(**alone).logits[0]
        found = logits[row][batch["attention_mask"][row].bool()]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert torch.isfinite(expected).all()
    half = copy.deepcopy(model).to(torch.bfloat16)
    wide = errors(half(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()}).logits[:, -1], logits[:, -1])
    assert wide[0] < 0.15


class Largest(torch.overrides.TorchFunctionMode):
    """Notes the largest tensor that any function returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


LONG = 10_000


@pytest.mark.parametrize("preset", ["slime", "fusion", "llava_next"])
@torch.no_grad()
def test_prompts_of_ten_thousand_tokens(preset):
    """Nothing outside the language model grows with the square of the prompt, and the image is found in its midst."""
    text = tiny_text_config("llama", max_position_embeddings=2 * LONG, num_hidden_layers=1)
    config = tiny_config(preset, text=text)
    model, processor = tiny_model(config), tiny_processor(config)
    image = random_image(60, 90)
    short = make_batch(processor, [(TEXT, [image])])["input_ids"][0]
    batch = dict(make_batch(processor, [(TEXT, [image])]))
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randint(10, 200, (count,), generator=generator) for count in (LONG // 2, LONG // 2))
    batch["input_ids"] = torch.cat([before, short, after])[None]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    entered = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(kwargs["inputs_embeds"]) or stop(), with_kwargs=True
    )

    class Reached(Exception):
        pass

    def stop():
        raise Reached

    with Largest() as largest, pytest.raises(Reached):
        model(**batch)
    assert largest.numel <= 2 * LONG * max(config.text_config.hidden_size, 256)
    handle.remove()
    place = (batch["input_ids"][0] == config.image_token_id).nonzero()[:, 0]
    assert place[0] == LONG // 2 + int((short == config.image_token_id).nonzero()[0, 0])
    output = model(**batch, logits_to_keep=1)
    assert torch.isfinite(output.logits).all()
    assert output.kept_mask[0, : place[0]].all() and output.kept_mask[0, place[-1] + 1 :].all()
    embeds = model.get_input_embeddings()(batch["input_ids"])[0]
    kept = int(output.kept_mask.sum())
    assert entered[0].shape[1] == kept
    torch.testing.assert_close(entered[0][0, : place[0]], embeds[: place[0]])
    torch.testing.assert_close(entered[0][0, -(LONG // 2) :], embeds[-(LONG // 2) :])


# --- training ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_in_bfloat16_are_finite_where_all_tokens_are_equal(preset):
    """A blank image: every patch the same, so norms, softmax and scores see nothing to tell apart."""
    model, processor = (copy.deepcopy(part) for part in parts_of(preset))
    model = model.to(torch.bfloat16).train()
    with torch.no_grad():
        model.model.vision_tower.get_input_embeddings().weight.zero_()
        for name, weight in model.model.vision_tower.named_parameters():
            if "position_embedding" in name:
                weight.zero_()
    blank = Image.new("RGB", (120, 80), (90, 90, 90))
    batch = make_batch(processor, [(TEXT, [blank])] * 2)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    labels = torch.where(batch["input_ids"] == model.config.image_token_id, -100, batch["input_ids"])
    mask = batch["input_ids"] != model.config.image_token_id
    loss = model(**batch, labels=labels, prompt_mask=mask).loss
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert torch.isfinite(loss) and any("connector" in name and grad.any() for name, grad in gradients.items())
    assert [name for name, grad in gradients.items() if not torch.isfinite(grad).all()] == []

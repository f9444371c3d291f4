"""Every registered part in half precision against float64, and what large, broken and equal numbers do to it.

`UNIT` is one rounding: bfloat16 keeps 8 bits, float16 keeps 11. A part may be `ROUNDINGS` of them away from float64
(relative, root mean square; twice that at its worst value): a handful of products one after another. Norms, softmax
and sums over many tokens that were taken in half precision are further away, and with outlying channels infinite.
"""

import copy
import functools

import pytest
import torch
from PIL import Image

from builders.parts import (
    build_part,
    make_inputs,
    part_cases,
    run_part,
    with_outliers,
)
from builders.tiny import make_batch, random_image, tiny_config, tiny_model, tiny_processor, tiny_text_config
from hires_lmm.modeling.parts_hires_lmm import SLOTS
from hires_lmm.modeling.routers_hires_lmm import keep_budget, keep_threshold


UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ROUNDINGS = {"": 2.5, "fusion": 5.0}  # fusion is a transformer of two layers
SINGLE = 1e-6  # scores without parameters are taken in float32, whatever comes in
SCORED_IN_SINGLE = [("router", ""), ("router", "saliency")]
CASES = [case for slot in SLOTS for case in part_cases(slot)]
UNBOUNDED = ("sa_perceiver", "printed")  # without a norm nothing keeps the sum over the keys within float16
halves = pytest.mark.parametrize("dtype", UNIT, ids=["fp16", "bf16"])
all_parts = pytest.mark.parametrize(("name", "way"), CASES, ids=lambda value: value or "default")
backends = pytest.mark.parametrize("backend", ["sdpa", "eager"])


def rounded(inputs: dict, dtype: torch.dtype, result: torch.dtype | None = None) -> dict:
    """Inputs with the numbers of a half dtype, in that dtype or as wide as wanted."""
    return {name: value if name == "counts" else value.to(dtype).to(result or dtype) for name, value in inputs.items()}


def errors(got: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """Root mean square error over that of the values, and the worst error over the largest value."""
    assert got.shape == wanted.shape and torch.equal(got.isnan(), wanted.isnan())
    got, wanted = got.double().nan_to_num(), wanted.double().nan_to_num()
    if not wanted.any():
        return float(got.abs().sum()), 0.0
    off = got - wanted
    return float(off.norm() / wanted.norm()), float(off.abs().max() / wanted.abs().max())


@torch.no_grad()
def compare(name: str, way: str, dtype: torch.dtype, inputs: dict, backend: str = "sdpa", slack: float = 1.0) -> None:
    """Run a part in half precision and, with the same weights and inputs, in float64."""
    part = build_part(name, way, dtype, backend)
    found = run_part(name, part, rounded(inputs, dtype))
    wanted = run_part(name, copy.deepcopy(part).double(), rounded(inputs, dtype, torch.float64))
    assert len(found) == len(wanted)
    allowed = slack * ROUNDINGS.get(name, ROUNDINGS[""]) * UNIT[dtype]
    for number, (got, expected) in enumerate(zip(found, wanted, strict=True)):
        is_score = (name, way) in SCORED_IN_SINGLE and number == 1
        mean, worst = errors(got, expected)
        assert mean <= (SINGLE if is_score else allowed), (name, way, number, mean / UNIT[dtype])
        assert worst <= 2 * allowed, (name, way, number, worst / UNIT[dtype])


# --- every part ----------------------------------------------------------------------------------------------------
@halves
@all_parts
def test_a_part_in_half_precision_is_near_float64(name, way, dtype):
    """Images without crops, with two and with five."""
    compare(name, way, dtype, make_inputs(name, [0, 2, 5]))


@backends
@halves
@all_parts
def test_outlying_channels_stay_finite_and_near_float64(name, way, dtype, backend):
    """Channels of magnitude 1000, as CLIP's towers have: their squares and inner products leave float16."""
    inputs = make_inputs(name, [0, 2, 5])
    inputs["features"] = with_outliers(inputs["features"])
    if (name, way) == UNBOUNDED and dtype == torch.float16:
        part = build_part(name, way, dtype, backend)
        with torch.no_grad():
            found = run_part(name, part, rounded(inputs, dtype))
        assert not all(torch.isfinite(tensor).all() for tensor in found)
        return
    compare(name, way, dtype, inputs, backend)


@halves
@all_parts
def test_64_crops_are_as_precise_as_one(name, way, dtype):
    """A sum over 64 crops that was taken in half precision would have lost most of its terms."""
    compare(name, way, dtype, make_inputs(name, [64, 1]))


@halves
@all_parts
@torch.no_grad()
def test_equal_tokens_give_equal_finite_results(name, way, dtype):
    """All tokens of all views the same: norms see no variance, softmax no difference, routers no best token."""
    inputs = make_inputs(name, [2, 3])
    inputs["features"] = inputs["features"].reshape(-1, inputs["features"].shape[-1])[0].expand_as(inputs["features"])
    slack = 5.0 if name == "sa_perceiver" else 1.0  # the tail of the SiLU: a rounded score moves its exponential
    compare(name, way, dtype, inputs, slack=slack)
    part = build_part(name, way, dtype)
    first, second = (run_part(name, part, rounded(inputs, dtype)) for _ in range(2))
    for one, two in zip(first, second, strict=True):
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

"""Which parts join which: every pair works to the last count and gradient, or is refused by name with the reason."""

import math

import pytest
import torch

from builders import make_batch, random_image, tiny_config, tiny_convnext, tiny_model, tiny_processor
from builders.reload import CHANGES
from hires_lmm import PRESETS
from hires_lmm.processing.planners_hires_lmm import PLANNERS
from hires_lmm.training import set_options


TEXT = "<image>What is it?"
SIZES = ((90, 60), (40, 200))
GLOBALCOM2 = {"token_ops": [{"part": "globalcom2"}]}

REFUSED = {
    "vlsa": "globalcom2 shares a budget among crops, but none reach it",
    "inf_llava": "globalcom2 shares a budget among crops, but none reach it",
    "mqt": "globalcom2 needs tokens with a place in their view, but an operation before it makes queries without one",
}
"""Presets that `globalcom2` cannot join; it joins all others in place of their own token operations."""

COMPRESSORS = {
    "mqt": {"num_queries": 4, "num_heads": 2},
    "uhd_resampler": {"num_queries": 9, "num_heads": 2},
    "self_mining_sampler": {"pool": [2, 3], "num_heads": 2},
    "query_compressor": {"num_queries": 4, "on": "all"},
}
PLANS = {"dual": {"n": 2}, "llava_uhd": {"max_crops": 6}}
ORDER = {"crop_order": "views", "order": ["global", "crops", "strided"]}


def reads_objects(processor) -> bool:
    return "objects" in processor.image_processor.token_layout["grids"]


def ask(processor, rows=(0, 1), **options):
    """The pictures of some rows; the first has two objects, where they are read."""
    boxes = {"image_boxes": [([[0, 5, 30, 40], [9, 9, 20, 30]], [])[row] for row in rows]}
    samples = [(TEXT, [random_image(*SIZES[row])]) for row in rows]
    return make_batch(processor, samples, **(boxes if reads_objects(processor) else {}), **options)


def counts_of(processor, count) -> list[int]:
    """What a method of the image processor counts of each picture."""
    numbers = [2 * reads_objects(processor), 0]
    return [count(*size, num_objects=number) for size, number in zip(SIZES, numbers, strict=True)]


def budgets_of(processor) -> tuple[int, int]:
    """The smallest budget that both pictures allow, and the largest that both use."""
    counter = processor.image_processor
    return max(counts_of(processor, counter.min_image_tokens)), min(counts_of(processor, counter.image_tokens))


def kept_counts(model, batch) -> list[int]:
    """Visual tokens that reach the language model, one number an image."""
    with torch.no_grad():
        token_map = model(**batch, output_token_map=True).token_map
    return [int(token_map.kept[token_map.image == image].sum()) for image in range(len(batch["input_ids"]))]


def assert_exact(model, processor, budgets) -> None:
    """Placeholders and kept tokens are what the budget says."""
    for budget in budgets:
        batch = ask(processor, max_image_tokens=budget)
        placeholders = (batch["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
        assert placeholders == kept_counts(model, batch) == [budget, budget]


@torch.no_grad()
def assert_batch_is_single(model, processor, **options) -> None:
    batch = ask(processor, **options)
    together = model(**batch).logits
    for row in (0, 1):
        mask = batch["attention_mask"][row].bool()
        alone = model(**ask(processor, [row], **options)).logits[0]
        torch.testing.assert_close(together[row][mask], alone, atol=2e-4, rtol=1e-3)


def train_step(model, batch) -> dict[str, torch.Tensor]:
    """Gradients of a step, by parameter; the loss is finite."""
    model.train().zero_grad()
    labels = torch.where(batch["input_ids"] == model.config.image_token_id, -100, batch["input_ids"])
    loss = model(**batch, labels=labels).loss
    assert math.isfinite(loss.item())
    loss.backward()
    model.eval()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# ---- globalcom2 in every preset -----------------------------------------------------------------------------------
def all_views(preset: str) -> dict:
    """The planner of a preset, with crops."""
    return {} if preset == "llava_next" else {"planner": {**PRESETS[preset]["planner"], "views": "all"}}


def with_globalcom2(preset: str, **spec):
    connector = {**CHANGES.get(preset, {}).get("connector_config", {}), "token_ops": [{"part": "globalcom2", **spec}]}
    return tiny_config(preset, **all_views(preset), connector_config=connector)


@pytest.mark.parametrize("preset", sorted(REFUSED))
def test_globalcom2_says_why_it_cannot_join_a_preset(preset):
    with pytest.raises(ValueError, match=REFUSED[preset]):
        with_globalcom2(preset)


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset not in REFUSED])
def test_globalcom2_joins_a_preset_at_every_budget(preset):
    config = with_globalcom2(preset)
    model, processor = tiny_model(config), tiny_processor(config)
    least, full = budgets_of(processor)
    middle = (least + full) // 2
    assert least < middle < full
    assert_exact(model, processor, (least, middle, full))
    assert_batch_is_single(model, processor, max_image_tokens=middle)
    seen = []
    model.model.connector.layout.register_forward_hook(lambda module, given, tokens: seen.append(tokens))
    hook = model.model.connector.token_ops[0].register_forward_pre_hook(
        lambda module, given: given[0].features.retain_grad()
    )
    gradients = train_step(model, ask(processor, max_image_tokens=middle))
    hook.remove()
    moved = seen[-1].features.grad.abs().sum(dim=1) > 0
    assert int(moved.sum()) == 2 * middle, "a token that was dropped teaches nothing, each other one does"
    learned = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and "connector." in name
    ]
    assert learned and all(gradients[name] is not None for name in learned)


@pytest.mark.parametrize("preset", ["llava_next", "llava_uhd", "hires_llava", "mg_llava"])
@pytest.mark.parametrize("spec", [{"score": "probabilities"}, {"ratio": 0.3}], ids=str)
def test_other_scores_and_a_share_join_too(preset, spec):
    config = with_globalcom2(preset, **spec)
    model, processor = tiny_model(config), tiny_processor(config)
    middle = sum(budgets_of(processor)) // 2
    assert_exact(model, processor, (middle,))
    if "ratio" in spec:
        counter = processor.image_processor
        counts, least = (counts_of(processor, count) for count in (counter.image_tokens, counter.min_image_tokens))
        protected = [number - 1 for number in least]
        wanted = [own + int(0.3 * (count - own)) for count, own in zip(counts, protected, strict=True)]
        assert kept_counts(model, ask(processor)) == wanted
    assert_batch_is_single(model, processor, max_image_tokens=middle)


@pytest.mark.parametrize("preset", ["llava_next", "llava_hd", "monkey", "llava_uhd", "hires_llava", "mg_llava"])
def test_a_live_model_takes_globalcom2_and_gives_it_back(preset):
    config = tiny_config(preset, **{**CHANGES.get(preset, {}), **all_views(preset)})
    model, processor = tiny_model(config), tiny_processor(config)
    middle = sum(budgets_of(processor)) // 2
    batch = ask(processor, max_image_tokens=middle)
    with torch.no_grad():
        before = model(**batch).logits
        set_options(model, GLOBALCOM2)
        assert kept_counts(model, batch) == [middle] * 2
        changed = model(**batch).logits
        set_options(model, {"token_ops": None})
        assert torch.equal(model(**batch).logits, before) and not torch.allclose(changed, before, atol=1e-3)


# ---- compressors under every planner ------------------------------------------------------------------------------
@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_compressor_joins_every_planner_and_trains(name, planner):
    options = {} if planner == "llava_next" else {"planner": {"name": planner, **PLANS.get(planner, {})}}
    view_ops = [{"part": name, **COMPRESSORS[name]}]
    config = tiny_config(
        unequal_views=planner == "llava_uhd", connector_config={"view_ops": view_ops, "layout": ORDER}, **options
    )
    model, processor = tiny_model(config), tiny_processor(config)
    plans = [processor.image_processor.plan(*size) for size in SIZES]
    each = {"mqt": 4, "uhd_resampler": 9, "self_mining_sampler": 6, "query_compressor": 4}[name]
    entering = [
        sum(view.span[1] > view.span[0] and view.span[3] > view.span[2] for view in plan.views) for plan in plans
    ]
    counts = [processor.image_tokens(*size) for size in SIZES]
    if name != "self_mining_sampler" or planner not in ("hd", "llava_next"):  # those leave padding out
        assert counts == [each * number for number in entering]
    assert kept_counts(model, ask(processor)) == counts
    least, full = budgets_of(processor)
    assert_exact(model, processor, {max(least, 5), full})
    for budget in (None, max(least, 5)):
        assert_batch_is_single(model, processor, max_image_tokens=budget)
    gradients = train_step(model, ask(processor))
    part = {key: value for key, value in gradients.items() if "connector.view_ops.0" in key}
    assert part and all(value is not None for value in part.values())
    assert all(bool(value.any()) for key, value in part.items() if "bias" not in key and "key_norm" not in key)


# ---- the gate of a second tower under every planner ---------------------------------------------------------------
@pytest.mark.parametrize("planner", [name for name in PLANNERS if name != "llava_uhd"])
@pytest.mark.parametrize("global_view", ["squeeze", "pad"])
def test_the_gate_sees_the_same_place_in_both_towers(planner, global_view):
    """Whatever the planner makes of the global view, the second tower sees the picture at the same place."""
    config = tiny_config(
        "mg_llava", planner={"name": planner, "global_view": global_view, "views": "global", **PLANS.get(planner, {})}
    )
    processor = tiny_processor(config)
    picture = random_image(40, 80)
    batch = processor.image_processor(picture, return_tensors="pt")
    seen = [batch["pixel_values"][0], batch["pixel_values_hires"][0]]
    is_black = [(pixels == pixels[:, :1, :1]).all(dim=0).all(dim=1) for pixels in seen]
    shares = [float(rows.float().mean()) for rows in is_black]
    assert shares == ([0.5, 0.5] if global_view == "pad" else [0.0, 0.0])


def test_the_gate_does_not_join_views_of_unequal_size():
    layout = {"order": ["crops", "global", "objects", "detail"], "crop_order": "views"}
    for part in ("conv_gate", "object_tokens"):
        connector = {"view_ops": [{"part": part}], "adapter": {"part": "mlp"}, "layout": layout}
        with pytest.raises(ValueError, match="reads views of one size; leave out unequal_views"):
            tiny_config("llava_uhd", extra_towers={"hires": tiny_convnext()}, connector_config=connector)

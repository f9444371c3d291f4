"""What every registered part must do, inside a tiny model; the sketches show that a fault would be noticed."""

import copy
from dataclasses import dataclass, replace

import peft
import pytest
import torch
from torch import nn

from builders.registry import CASES, READS, SIZES, SKETCH_CASES, Case, batch_of, built, part_of, register
from builders.tiny import geometry_of, make_batch, random_image
from hires_lmm.modeling.bases_hires_lmm import (
    HiResLmmAdapter,
    HiResLmmHead,
    HiResLmmLayerOp,
    HiResLmmPositionPlan,
    HiResLmmTokenOp,
    HiResLmmViewOp,
    Traits,
)
from hires_lmm.modeling.carriers_hires_lmm import ViewFeatures, ViewGroup, VisualTokens
from hires_lmm.modeling.compat_hires_lmm import CACHE
from hires_lmm.modeling.geometry_hires_lmm import Grid, Kind, kinds_on
from hires_lmm.modeling.parts_hires_lmm import SLOTS
from hires_lmm.modeling.tower_table_hires_lmm import tower_width
from hires_lmm.training.lora import lora_config


ALL = [*CASES, *SKETCH_CASES]
KIND_SETS = [("global",), ("global", "crops"), ("strided",), ("frames", "global"), ("crops", "strided")]
HALF = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
every_part = pytest.mark.parametrize("case", ALL, ids=str)
parts_with_on = pytest.mark.parametrize("case", [case for case in ALL if case.has("on")], ids=str)
token_ops = pytest.mark.parametrize("case", [case for case in ALL if case.slot == "token_ops"], ids=str)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    register(monkeypatch)


@torch.no_grad()
def logits_of(model, batch) -> torch.Tensor:
    return model(**batch).logits


@torch.no_grad()
def tokens_of(model, batch) -> VisualTokens:
    """The visual tokens of a batch behind all parts that need no question."""
    return model.model.get_image_features(**images_of(batch)).tokens


def images_of(batch) -> dict:
    return {**geometry_of(batch), **{name: value for name, value in batch.items() if name.startswith("pixel_values_")}}


def watched(module: nn.Module) -> list:
    """Grows by what goes into a module and what comes out."""
    seen: list = []
    module.register_forward_hook(lambda module, given, output: seen.append((given, output)))
    return seen


def train_mode(model, noise: bool = True):
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not noise:
            module.p = 0.0
    return model


# ---- shapes -------------------------------------------------------------------------------------------------------
@every_part
def test_what_leaves_is_as_described(case):
    model, processor = copy.deepcopy(built(case))
    connector, batch = model.model.connector, batch_of(processor, *SIZES)
    seen = {name: watched(module) for name, module in connector.named_modules() if hasattr(module, "traits")}
    logits_of(model, batch)
    part = part_of(model, case)
    traits = part.traits
    _, output = next(records[0] for name, records in seen.items() if name.startswith(case.slot))
    if isinstance(output, ViewFeatures):
        assert {group.key for group in output.groups} == set(traits.grids)
        for group in output.groups:
            if group.kind != Kind.OBJECT:  # as many as the caller gives
                assert tuple(group.grid) == traits.grids[group.key].size
            of_towers = {name: tower_width(tower.config) for name, tower in model.model.extra_towers.items()}
            width = {**of_towers, **traits.tower_widths}.get(group.tower, traits.width)
            assert group.features.shape[1:] == (group.grid[0] * group.grid[1], width)
    elif isinstance(part, HiResLmmAdapter):
        sizes = {grid.rows * grid.cols for grid in traits.grids.values()}
        assert output.shape[-1] == traits.width and output.shape[1] in sizes
    elif isinstance(part, HiResLmmLayerOp):
        hidden, keep = output
        assert hidden.shape[-1] == traits.width and (keep is None or keep.shape == hidden.shape[:2])
    elif isinstance(part, HiResLmmPositionPlan):
        assert output[0].shape == batch["input_ids"].shape
    elif isinstance(part, HiResLmmHead):
        assert len(output) == int((batch["input_ids"] == part.options.token_id).sum())
    else:
        tokens = output[0]
        assert tokens.features.shape == (sum(tokens.lengths), traits.width)
        assert not isinstance(traits.own_tokens, int) or set(tokens.lengths) == {traits.own_tokens}
        assert isinstance(traits.own_tokens, int) or tokens.lengths == [
            processor.image_tokens(*size) for size in SIZES
        ]


@every_part
def test_counts_of_the_processor_are_those_of_the_model(case):
    model, processor = built(case)
    tokens = tokens_of(model, batch_of(processor, *SIZES))
    counts = [processor.image_tokens(*size) for size in SIZES]
    assert tokens.num_tokens == counts
    if part_of(model, case).traits.count != "own":
        assert tokens.lengths == counts


# ---- training -----------------------------------------------------------------------------------------------------
def gradients(model, batch, **options) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    mask = batch["input_ids"] != model.config.image_token_id
    labels = torch.where(mask, batch["input_ids"], -100)
    model(**batch, labels=labels, **options).loss.backward()
    return {name: parameter.grad for name, parameter in model.model.connector.named_parameters()}


def without_gradient(model, batch) -> list[str]:
    """Parameters that got none, but for those that a part says no loss reaches, which are frozen."""
    parts = [module for module in model.modules() if hasattr(module, "untrained_parameters")]
    frozen = {id(parameter) for part in parts for parameter in part.untrained_parameters()}
    assert not any(parameter.requires_grad for parameter in model.parameters() if id(parameter) in frozen)
    named = dict(model.model.connector.named_parameters())
    return [n for n, gradient in gradients(model, batch).items() if gradient is None and id(named[n]) not in frozen]


@every_part
@pytest.mark.parametrize("sizes", [(), ((60, 50),), SIZES], ids=["text", "one", "batch"])
def test_every_parameter_gets_a_gradient(case, sizes):
    """Of text alone, of an image, and of a batch: what runs never depends on what is in it."""
    model, processor = built(case)
    batch = batch_of(processor, *sizes) if sizes else dict(make_batch(processor, [("a", []), ("b c", [])]))
    assert not without_gradient(train_mode(copy.deepcopy(model)), batch)


@every_part
def test_a_batch_without_crops_trains_every_parameter(case):
    model, processor = built(case)
    model = train_mode(copy.deepcopy(model))
    processor = copy.deepcopy(processor)
    processor.image_processor.planner = {"name": "every_kind", "kinds": ["global"]}
    assert not without_gradient(model, batch_of(processor, *SIZES))


@every_part
def test_without_noise_training_sees_what_evaluation_sees(case):
    model, processor = built(case)
    if getattr(part_of(model, case), "is_soft", False):
        pytest.skip("a layer op that weighs in training what leaves in evaluation")
    batch = batch_of(processor, *SIZES)
    batch["prompt_mask"] = batch["input_ids"] != model.config.image_token_id
    trained = train_mode(copy.deepcopy(model), noise=False)
    with torch.no_grad():
        labels = torch.full_like(batch["input_ids"], -100)  # all of it is the prompt
        found = trained(**batch, labels=labels, return_logits=True).logits
    torch.testing.assert_close(found, logits_of(model, batch), atol=1e-4, rtol=1e-4)


@every_part
def test_checkpointed_gradients_are_the_same(case):
    model, processor = built(case)
    batch = batch_of(processor, *SIZES)
    plain = gradients(train_mode(copy.deepcopy(model), noise=False), batch)
    saving = train_mode(copy.deepcopy(model), noise=False)
    if hasattr(saving, "activation_checkpointing_enable"):  # the name from transformers 5.23 on
        saving.activation_checkpointing_enable()
    else:
        saving.gradient_checkpointing_enable()
    found = gradients(saving, batch)
    for name, wanted in plain.items():
        torch.testing.assert_close(found[name], wanted, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
@every_part
def test_lora_wraps_trains_and_merges(case):
    model, processor = built(case)
    batch = batch_of(processor, *SIZES)
    model = train_mode(copy.deepcopy(model), noise=False)
    wrapped = peft.get_peft_model(model, lora_config(model, r=2, alpha=4))
    before = {name: value.clone() for name, value in wrapped.named_parameters() if value.requires_grad}
    mine = [name for name in before if f"connector.{case.slot}" in name]
    assert len(mine) >= len([own for own in part_of(built(case)[0], case).parameters() if own.requires_grad])
    optimizer = torch.optim.SGD([value for value in wrapped.parameters() if value.requires_grad], lr=1.0)
    wrapped(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    after = dict(wrapped.named_parameters())
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    wanted = logits_of(wrapped.eval(), batch)
    torch.testing.assert_close(logits_of(wrapped.merge_and_unload(), batch), wanted, atol=1e-4, rtol=1e-4)


# ---- budget -------------------------------------------------------------------------------------------------------
@every_part
@pytest.mark.parametrize("share", [0.3, 0.7, 2.0])
def test_a_budget_is_honoured_exactly_or_refused_by_name(case, share):
    model, processor = built(case)
    traits = part_of(model, case).traits
    for size in SIZES:
        full, least = processor.image_tokens(*size), processor.image_processor.min_image_tokens(*size)
        budget = max(1, int(share * full))
        if budget < least:
            with pytest.raises(ValueError, match=rf"max_image_tokens={budget} is too small.* {least}"):
                batch_of(processor, size, max_image_tokens=budget)
            budget = least
        batch = batch_of(processor, size, max_image_tokens=budget)
        assert int((batch["input_ids"] == model.config.image_token_id).sum()) == min(budget, full)
        placed = model(**batch, output_token_map=True)
        assert [len(part) for part in placed.image_outputs.pooler_output] == [min(budget, full)]
        if traits.budget_on is not None and case.slot != "token_ops":
            assert_shared_among_views(model, placed.token_map, min(budget, full))


def assert_shared_among_views(model, token_map, budget: int) -> None:
    """An operation on views that takes the budget makes fewer tokens of each: nothing is dropped behind it."""
    assert token_map.score is None or bool(torch.isnan(token_map.score).all())
    assert bool(token_map.kept.all()) and len(token_map.kept) == budget
    for view in set(token_map.view.tolist()):
        cells = token_map.cell[token_map.view == view].tolist()
        assert cells == sorted(cells) and cells[0] == [0, 0]
    sizes = [int((token_map.view == view).sum()) for view in set(token_map.view.tolist())]
    assert max(sizes) - min(sizes) <= 1 + max(sizes) // 4


# ---- kinds of views -----------------------------------------------------------------------------------------------
def built_or_refused(words: tuple, *case, **options):
    """Model and processor, or None where the configuration is refused in a message with one of the words."""
    try:
        return copy.deepcopy(built(*case, **options))
    except ValueError as error:
        message = str(error)
    assert any(word in message for word in words), message
    return None


@every_part
@pytest.mark.parametrize("kinds", KIND_SETS, ids="+".join)
@pytest.mark.parametrize("crop_order", ["views", "raster"])
def test_every_kind_of_view_passes_or_is_refused_by_name(case, kinds, crop_order):
    """Tokens hold the features of the place that they name, and stand in the order of the picture."""
    on = {"on": list(kinds)} if case.has("on") else {}
    found = built_or_refused((*case.names, "crop_order", *kinds), case, kinds, {"crop_order": crop_order}, **on)
    if found is None:
        return
    model, processor = found
    seen = watched(model.model.connector.layout)
    assert bool(torch.isfinite(logits_of(model, batch_of(processor, *SIZES))).all())
    ((views, _), tokens), *_ = seen
    for group in (each for each in views.groups if each.kind != Kind.OBJECT):
        assert_placed(tokens, group)
        grid = tokens.grids[group.kind]
        if crop_order == "raster" and not grid.whole and grid.num_views is None:
            assert_raster(tokens, group.kind)


def assert_placed(tokens: VisualTokens, group: ViewGroup) -> None:
    """Each token of a kind is what its view, or one of those that a view stands for, has in its cell."""
    mine = tokens.kind == group.kind
    cells = tokens.cell[mine] @ torch.tensor([group.grid[1], 1])
    is_here = torch.zeros(len(cells), dtype=torch.bool)
    for row, own in zip(group.rows, group.features, strict=True):
        is_here |= (tokens.view[mine] == row) & (tokens.features[mine] == own[cells]).all(dim=-1)
    assert mine.any() and is_here.all()


def assert_raster(tokens: VisualTokens, kind: int) -> None:
    """Rows of the source from top to bottom, each from left to right: contiguous views side by side, strided ones
    interleaved."""
    views, cells, kinds = (part.split(tokens.lengths) for part in (tokens.view, tokens.cell, tokens.kind))
    for image, view, cell, own in zip(tokens.images, views, cells, kinds, strict=True):
        places = []
        for number, (row, col), each in zip(view.tolist(), cell.tolist(), own.tolist(), strict=True):
            if each == kind and kind in (Kind.CROP, Kind.STRIDED):
                _, rows, cols, at_row, at_col, *_ = image.views[number - image.first_view]
                high, wide = tokens.grids[kind].size
                place = (row * rows + at_row, col * cols + at_col)
                places.append(place if kind == Kind.STRIDED else (at_row * high + row, at_col * wide + col))
        assert places == sorted(places) and len(set(places)) == len(places)


@every_part
def test_views_of_a_second_tower_pass_or_are_refused_by_name(case):
    kinds = dict.fromkeys([*READS.get(case.name, ("global", "crops")), "detail"])
    found = built_or_refused((case.name, "detail", "fine"), case, tuple(kinds))
    if found is None:
        return
    model, processor = found
    batch = batch_of(processor, *SIZES)
    assert not torch.allclose(
        logits_of(model, batch), logits_of(model, {**batch, "pixel_values_fine": -batch["pixel_values_fine"]})
    )


@parts_with_on
@pytest.mark.parametrize("on", ["global", "crops", ["crops", "strided"]], ids=str)
def test_only_the_views_that_on_names_change(case, on):
    model, processor = copy.deepcopy(built(case, ("global", "crops", "strided"), on=on))
    seen = watched(part_of(model, case))
    batch = batch_of(processor, *SIZES)
    if case.slot == "token_ops":
        budget = processor.image_processor.min_image_tokens(*SIZES[0]) + 3
        kept = model(**batch_of(processor, SIZES[0], max_image_tokens=budget), output_token_map=True).token_map
        others = [kind for kind in set(kept.kind.tolist()) if kind not in kinds_on(on)]
        assert bool(kept.kept[torch.isin(kept.kind, torch.tensor(others))].all()) and not bool(kept.kept.all())
        return
    logits_of(model, batch)
    (given,), output = seen[0]
    for before in given.groups:
        after = next(group for group in output.groups if group.key == before.key)
        if before.kind not in kinds_on(on):
            assert torch.equal(after.features, before.features) and after.grid == before.grid


# ---- the same in every way ----------------------------------------------------------------------------------------
@every_part
@pytest.mark.parametrize("share", [1.0, 0.6], ids=["full", "budget"])
def test_a_row_of_a_batch_is_the_row_alone(case, share):
    model, processor = built(case)
    leasts = [processor.image_processor.min_image_tokens(*size) for size in SIZES]
    counts = [processor.image_tokens(*size) for size in SIZES]
    budgets = [max(least, int(share * count)) for least, count in zip(leasts, counts, strict=True)]
    batch = batch_of(processor, *SIZES, max_image_tokens=budgets)
    together = logits_of(model, batch)
    for row, (size, budget) in enumerate(zip(SIZES, budgets, strict=True)):
        alone = logits_of(model, batch_of(processor, size, max_image_tokens=budget))
        mask = batch["attention_mask"][row].bool()
        torch.testing.assert_close(together[row][mask], alone[0], atol=2e-4, rtol=1e-3)


@every_part
@torch.no_grad()
def test_two_images_in_a_row_and_a_cache_give_what_no_cache_gives(case):
    model, processor = built(case)
    two = [("<image>a<image>b", [random_image(*size) for size in SIZES[:2]])]
    if part_of(model, case).traits.later_tokens is None:
        batch = dict(make_batch(processor, two))
    else:
        with pytest.raises(ValueError, match="one image a conversation"):
            make_batch(processor, two)
        batch = batch_of(processor, SIZES[0])
    found = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert found.tolist() == model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=False).tolist()


@every_part
@torch.no_grad()
def test_a_second_turn_on_a_cache_is_the_whole_conversation(case):
    """Or it is refused with the remedy, where positions left the cache."""
    model, processor = copy.deepcopy(built(case))
    model.generation_config.suppress_tokens = [model.config.image_token_id]  # an answer must not hold image tokens
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    batch = batch_of(processor, SIZES[0])
    model.config.answer_prefix_ids = batch["input_ids"][0, -2:].tolist()  # where the answer begins
    first = model.generate(**batch, **options)
    more = make_batch(processor, [("And now?", [])])["input_ids"]
    batch["input_ids"] = torch.cat([first.sequences[:, :-1], more], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if part_of(model, case).traits.count == "content":
        with pytest.raises(ValueError, match="Pass only the new ids"):
            model.generate(**batch, **{CACHE: first[CACHE]}, **options)
        return
    wanted, found = model.generate(**batch, **options), model.generate(**batch, **{CACHE: first[CACHE]}, **options)
    assert found.sequences.tolist() == wanted.sequences.tolist()
    torch.testing.assert_close(found.logits[0], wanted.logits[0], atol=1e-4, rtol=1e-3)


@token_ops
@torch.no_grad()
def test_what_a_part_writes_into_the_question_reaches_the_language_model(case):
    """And what it does not say it writes stays as the embedding table has it."""
    model, processor = copy.deepcopy(built(case))
    batch = batch_of(processor, *SIZES)
    batch["prompt_mask"] = batch["input_ids"] != model.config.image_token_id
    seen, given = watched(part_of(model, case)), []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    kept = model(**batch).kept_mask
    table = model.get_input_embeddings()(batch["input_ids"])
    question = seen[-1][1][1]
    wanted = question.embeds if part_of(model, case).traits.writes_question else table
    text = (batch["input_ids"] != model.config.image_token_id) & batch["attention_mask"].bool()
    if bool(kept.all()) and given[0].shape == wanted.shape:
        torch.testing.assert_close(given[0][text], wanted[text], atol=0, rtol=0)
    changed = question is not None and not torch.equal(question.embeds[text], table[text])
    assert changed == part_of(model, case).traits.writes_question


@every_part
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_stays_near_single(case, dtype):
    model, processor = built(case)
    batch = batch_of(processor, SIZES[0])
    with torch.no_grad():
        single, half = model(**batch), copy.deepcopy(model).to(dtype)(**batch)
    assert half.logits.dtype == dtype
    if part_of(model, case).traits.count == "content" and not torch.equal(half.kept_mask, single.kept_mask):
        return  # a rounded score lies on the other side of the threshold
    assert float((half.logits.float() - single.logits).norm() / single.logits.norm()) < HALF[dtype]


@every_part
def test_another_default_dtype_changes_nothing(case):
    model, processor = built(case)
    batch = batch_of(processor, *SIZES)
    wanted = logits_of(model, batch)
    torch.set_default_dtype(torch.float16)
    try:
        found = logits_of(model, batch)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)


@every_part
def test_eager_attention_is_sdpa(case):
    model, processor = built(case)
    batch = batch_of(processor, *SIZES)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert eager.model.connector.config._attn_implementation == "eager"
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(logits_of(eager, batch)[mask], logits_of(model, batch)[mask], atol=2e-4, rtol=1e-3)


@every_part
def test_a_saved_part_is_the_same_whole_and_from_the_disk(case, tmp_path):
    model, processor = built(case)
    batch = batch_of(processor, *SIZES)
    wanted = logits_of(model, batch)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(loaded, batch), wanted)
    again = batch_of(type(processor).from_pretrained(tmp_path / "saved"), *SIZES)
    assert all(torch.equal(again[name], value) for name, value in batch.items())
    places = {"model": "disk", "lm_head": "cpu"}
    offloaded = type(model).from_pretrained(
        tmp_path / "saved", device_map=places, offload_folder=str(tmp_path / "offloaded")
    )
    assert next(part_of(offloaded, case).parameters(), torch.empty(0, device="meta")).device.type == "meta"
    assert torch.equal(logits_of(offloaded, batch), wanted)


# ---- and it would notice ------------------------------------------------------------------------------------------
class Forgetful(HiResLmmTokenOp):
    """Its second table is read where there are two views of an image and more."""

    def __init__(self, context, options):
        super().__init__(context, options)
        self.first, self.second = (nn.Parameter(torch.ones(context.width)) for _ in range(2))

    def forward(self, tokens, question):
        scale = self.first * self.second if len(tokens.kind.unique()) > 2 else self.first
        return replace(tokens, features=tokens.features * scale), question


class Greedy(HiResLmmViewOp):
    """Changes all views, whatever `on` says."""

    @dataclass(frozen=True)
    class Options:
        on: str | list = "crops"

    def forward(self, views):
        return views.map("all", lambda group: replace(group, features=group.features + 1))


class Boastful(Greedy):
    """Says that it merges and does not."""

    @classmethod
    def output_grid(cls, options, grid):
        return Grid(1, 1, None)

    def forward_group(self, features, grid):
        return features

    forward = HiResLmmViewOp.forward


class Noisy(HiResLmmTokenOp):
    """Draws noise that nobody can switch off."""

    def forward(self, tokens, question):
        noise = torch.randn_like(tokens.features) if self.training else 0.0
        return replace(tokens, features=tokens.features + noise), question


class Social(HiResLmmTokenOp):
    """Looks at the other images of the batch."""

    def forward(self, tokens, question):
        return replace(tokens, features=tokens.features - tokens.features.mean(dim=0)), question


class Secret(HiResLmmTokenOp):
    """Writes into the question and does not say so."""

    @classmethod
    def describe(cls, options, context):
        return Traits(context.grids, context.width, reads_question=True)

    def forward(self, tokens, question):
        return tokens, replace(question, embeds=question.embeds + 1)


class Wide(HiResLmmTokenOp):
    """Squares what leaves half precision."""

    def forward(self, tokens, question):
        return replace(tokens, features=(tokens.features * 1e4) ** 2 / 1e8), question


@pytest.mark.parametrize(
    ("slot", "part", "check", "arguments"),
    [
        ("token_ops", Forgetful, test_a_batch_without_crops_trains_every_parameter, {}),
        ("view_ops", Greedy, test_only_the_views_that_on_names_change, {"on": "crops"}),
        ("view_ops", Boastful, test_what_leaves_is_as_described, {}),
        ("token_ops", Noisy, test_without_noise_training_sees_what_evaluation_sees, {}),
        ("token_ops", Social, test_a_row_of_a_batch_is_the_row_alone, {"share": 1.0}),
        ("token_ops", Secret, test_what_a_part_writes_into_the_question_reaches_the_language_model, {}),
        ("token_ops", Wide, test_half_precision_stays_near_single, {"dtype": torch.float16}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_faulty_part_is_noticed(monkeypatch, slot, part, check, arguments):
    name = part.__name__.lower()
    monkeypatch.setitem(SLOTS[slot], name, part)
    with pytest.raises(AssertionError):
        check(Case(slot, name), **arguments)

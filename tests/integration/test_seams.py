"""Mechanisms that come next, sketched: each is one class and one registry line, and all else follows."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from builders import geometry_of, make_batch, random_image, tiny_config, tiny_model, tiny_processor, tiny_vision_config
from hires_lmm.modeling.bases_hires_lmm import HiResLmmTokenOp, HiResLmmViewOp, Needs, Traits
from hires_lmm.modeling.geometry_hires_lmm import Kind
from hires_lmm.modeling.parts_hires_lmm import MAP_OPS, TOKEN_OPS


FINE = (int(Kind.DETAIL), "fine")
TEXT = "<image>What is it?"


class Gate(HiResLmmViewOp):
    """A second tower's mean over an image, gated into each token of the global view."""

    def __init__(self, context, options):
        super().__init__(context, options)
        self.gate = nn.Linear(context.text_width, context.text_width)

    @classmethod
    def describe(cls, options, context):
        return Traits({key: grid for key, grid in context.grids.items() if key != FINE}, context.width)

    def forward(self, views):
        fine, main = views.group("detail", "fine"), views.group("global")
        mean = fine.features.mean(dim=1, keepdim=True)
        mixed = replace(main, features=main.features + torch.tanh(self.gate(mean)) * mean)
        return replace(views, groups=[mixed if g is main else g for g in views.groups if g is not fine])


class Rewrite(HiResLmmTokenOp):
    """Writes into the question: each of its tokens learns the mean of the visual tokens."""

    @classmethod
    def describe(cls, options, context):
        return Traits(context.grids, context.width, reads_question=True, writes_question=True)

    def forward(self, tokens, question):
        means = torch.stack([part.mean(dim=0) for part in tokens.per_image(tokens.features)])
        embeds = question.embeds.clone()
        for mean, mask, row in zip(means, question.image_mask(), question.image_row.tolist(), strict=True):
            embeds[row] += mask[:, None] * mean
        return tokens, replace(question, embeds=embeds)


class ByAttention(HiResLmmTokenOp):
    """Keeps what the tower's class token attends to most."""

    @classmethod
    def describe(cls, options, context):
        return Traits(context.grids, context.width, budget_on="all", needs=Needs(scores=("cls_logits",)))

    def forward(self, tokens, question):
        kept = torch.ones(len(tokens.features), dtype=torch.bool)
        scores = tokens.scores["cls_logits"]
        for image, index in enumerate(tokens.rows("all")):
            surplus = tokens.lengths[image] - tokens.num_tokens[image]
            kept[index[scores[index].argsort()[:surplus]]] = False
        return replace(tokens, kept=kept, score="cls_logits"), question


class Ends(HiResLmmTokenOp):
    """Two tokens of its own an image, whatever its size: the least and the greatest of each channel."""

    count: ClassVar[int] = 2

    @classmethod
    def describe(cls, options, context):
        return Traits(context.grids, context.width, count="own", own_tokens=cls.count)

    def forward(self, tokens, question):
        parts = tokens.per_image(tokens.features)
        features = torch.cat([torch.stack([part.amin(dim=0), part.amax(dim=0)]) for part in parts])
        none = torch.full((len(features),), -1)
        lengths = [self.count] * len(parts)
        return (
            replace(
                tokens, features=features, lengths=lengths, view=none, cell=none[:, None].expand(-1, 2), kind=none
            ),
            question,
        )


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for slot, name, part in (
        (MAP_OPS, "gate", Gate), (TOKEN_OPS, "rewrite", Rewrite),
        (TOKEN_OPS, "by_attention", ByAttention), (TOKEN_OPS, "ends", Ends),
    ):  # fmt: skip
        monkeypatch.setitem(slot, name, part)


def parts(preset="llava_next", vision="clip", **changes):
    config = tiny_config(preset, vision, **changes)
    return tiny_model(config), tiny_processor(config)


def ask(processor, *sizes, **options):
    return make_batch(processor, [(TEXT, [random_image(*size)]) for size in sizes], **options)


@torch.no_grad()
def logits_of(model, batch):
    return model(**batch).logits


def generated(model, batch):
    length = batch["input_ids"].shape[1]
    return model.generate(**batch, max_new_tokens=6, do_sample=False)[:, length:].tolist()


def assert_batch_is_single(model, processor, *sizes, **options):
    together = generated(model, ask(processor, *sizes, **options))
    assert together == [generated(model, ask(processor, size, **options))[0] for size in sizes]


def second_tower(**connector):
    fine = tiny_vision_config("siglip", image_size=84, hidden_size=16)
    return parts(extra_towers={"fine": fine.to_dict()}, connector_config=connector)


def test_a_second_tower_is_gated_into_the_first():
    model, processor = second_tower(map_ops=[{"part": "gate"}])
    plain = parts()[1]
    batch = ask(processor, (90, 60), (40, 200))
    assert batch["pixel_values_fine"].shape == (2, 3, 84, 84)
    assert processor.image_tokens(90, 60) == plain.image_tokens(90, 60)
    logits = logits_of(model, batch)
    assert not torch.allclose(logits, logits_of(model, {**batch, "pixel_values_fine": batch["pixel_values_fine"] * 0}))
    assert_batch_is_single(model, processor, (90, 60), (40, 200))
    model.train()
    model(**processor(text=["a", "b"], return_tensors="pt"), labels=torch.tensor([[1], [1]])).loss.backward()
    assert all(
        parameter.grad is not None
        for name, parameter in model.model.extra_towers.named_parameters()
        if "head" not in name and "post_layernorm" not in name
    )


def test_tokens_of_a_second_tower_enter_the_sequence():
    model, processor = second_tower(layout={"order": ["global", "crops", "detail"]})
    plain = parts(connector_config={"layout": {"order": ["global", "crops"]}})[1]
    batch = ask(processor, (90, 60))
    assert processor.image_tokens(90, 60) == plain.image_tokens(90, 60) + 36
    features = model.model.get_image_features(**geometry_of(batch), pixel_values_fine=batch["pixel_values_fine"])
    with torch.no_grad():
        hidden = model.model.extra_towers["fine"](batch["pixel_values_fine"], output_hidden_states=True).hidden_states
        wanted = model.model.connector.tower_adapters["fine"](hidden[-1], int(Kind.DETAIL))
    torch.testing.assert_close(features.pooler_output[0][-36:], wanted[0])
    assert_batch_is_single(model, processor, (90, 60), (40, 200))


def test_what_is_written_into_the_question_reaches_the_language_model():
    model, processor = parts(connector_config={"token_ops": [{"part": "rewrite"}]})
    plain = parts()[0]
    batch = ask(processor, (90, 60))
    batch["prompt_mask"] = batch["input_ids"] != model.config.image_token_id
    with torch.no_grad():
        features = plain.model.get_image_features(**geometry_of(batch)).pooler_output[0]
        embeds = plain.get_input_embeddings()(batch["input_ids"])
        embeds[batch["prompt_mask"]] += features.mean(dim=0)
        rest = {name: value for name, value in batch.items() if name not in ("input_ids", "prompt_mask")}
        wanted = plain(inputs_embeds=embeds, **rest).logits
    torch.testing.assert_close(logits_of(model, batch), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(wanted, logits_of(plain, batch), atol=1e-2)


def test_attention_of_the_class_token_decides():
    model, processor = parts(connector_config={"token_ops": [{"part": "by_attention"}]})
    batch = ask(processor, (90, 60), max_image_tokens=30)
    seen = {}
    layer = next(m for n, m in model.model.vision_tower.named_modules() if n.endswith("layers.2.self_attn"))

    def note(name):
        return lambda module, inputs, output: seen.update({name: seen.get(name, output)})

    hooks = [getattr(layer, f"{name}_proj").register_forward_hook(note(name)) for name in ("q", "k")]
    with torch.no_grad():
        token_map = model(**batch, output_token_map=True).token_map
    for hook in hooks:
        hook.remove()
    query, key = (seen[name].unflatten(-1, (4, -1)) for name in ("q", "k"))
    logits = (query[:, :1] * key[:, 1:]).sum(dim=-1).mean(dim=-1) / key.shape[-1] ** 0.5
    is_patch = ~torch.isnan(token_map.score)
    cells = token_map.cell[is_patch]
    wanted = logits[token_map.view[is_patch], cells[:, 0] * 4 + cells[:, 1]]
    torch.testing.assert_close(token_map.score[is_patch], wanted, atol=1e-4, rtol=1e-4)
    kept = token_map.kept[is_patch]
    assert wanted[kept].min() >= wanted[~kept].max() and int(token_map.kept.sum()) == 30
    assert_batch_is_single(model, processor, (90, 60), (40, 200), max_image_tokens=30)


@torch.no_grad()
def test_a_second_part_with_tokens_of_its_own():
    """Two images in a row, and generation on a cache equal to none."""
    model, processor = parts(connector_config={"token_ops": [{"part": "ends"}]})
    assert {processor.image_tokens(*size) for size in ((90, 60), (40, 200), (900, 900))} == {2}
    batch = make_batch(processor, [("<image>a<image>b", [random_image(90, 60), random_image(40, 200)])])
    found = generated(model, batch)[0]
    ids = batch["input_ids"]
    for number, token in enumerate(found):
        so_far = torch.cat([ids, torch.tensor([found[:number]], dtype=torch.long)], dim=1)
        logits = model(**{**batch, "input_ids": so_far, "attention_mask": torch.ones_like(so_far)}).logits
        assert int(logits[0, -1].argmax()) == token
    assert_batch_is_single(model, processor, (90, 60), (40, 200))

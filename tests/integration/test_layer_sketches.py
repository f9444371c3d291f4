"""Layer ops that come next, sketched: each is one class and one registry line."""

import pytest
import torch
from torch import nn

import reference_generation as reference
from builders import make_batch, random_image, tiny_config, tiny_model, tiny_processor, tiny_text_config
from hires_lmm.modeling.bases_hires_lmm import HiResLmmLayerOp
from hires_lmm.modeling.compat_hires_lmm import layers_of
from hires_lmm.modeling.inputs_hires_lmm import ImageInputs
from hires_lmm.modeling.parts_hires_lmm import LAYER_OPS
from hires_lmm.modeling.towers_hires_lmm import run_towers
from reference_layers import masked_model, prompts_of, select_all


DEEP = {"num_hidden_layers": 4}
ROWS = [
    ("USER: <image>\nHow many cats are on the table? ASSISTANT:", [random_image(100, 180, 1)]),
    ("USER: Describe the image. ASSISTANT:", []),
    ("<image> and <image> How many?", [random_image(120, 100, 2), random_image(57, 150, 3)]),
]


class Soft(HiResLmmLayerOp):
    """In training, visual tokens are weighed by a learned threshold on their attention; else it is hard."""

    reads_attention = True

    def __init__(self, context, options):
        super().__init__(context, options)
        self.threshold = nn.Parameter(torch.full((), 0.02))

    def init_weights(self):
        nn.init.constant_(self.threshold, 0.02)

    def forward(self, layer, hidden, call):
        if not call.is_prefill:
            return hidden, None
        margin = call.attention.weights(call.last[:, None])[:, :, 0].mean(1) - self.threshold
        return hidden, torch.sigmoid(50 * margin) if call.training else margin > 0


def test_a_soft_mask_weighs_keys_in_training_and_its_threshold_learns(monkeypatch):
    monkeypatch.setitem(LAYER_OPS, "soft", Soft)
    text = tiny_text_config("llama", **DEEP)
    config = tiny_config("llava_next", text=text, connector_config={"layer_ops": [{"part": "soft", "layers": 0}]})
    model, processor = tiny_model(config), tiny_processor(config)
    op = model.model.connector.layer_ops[0]
    nn.init.constant_(op.threshold, 0.02)
    batch = make_batch(processor, [ROWS[0]])
    visual = batch["input_ids"][0] == config.image_token_id
    stand_in, embeds = (
        masked_model(model, lambda *_: [], []),
        reference.prompt_embeds(model, processor, *ROWS[0], select=select_all),
    )
    plain, found = stand_in.model.language_model, []

    def leave(layer, candidates, weights, states, last):
        if layer == 0:
            soft = torch.where(visual, torch.sigmoid(50 * (weights[:, last].mean(0) - 0.02)), 1.0)
            found.append(soft.log())
        return []

    def weigh(args, kwargs):
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"] + found[-1]}

    plain.leave, plain.prompts = leave, prompts_of([[(True, len(visual))]])
    for layer in plain.plain.layers[1:]:
        layer.register_forward_pre_hook(lambda module, args, kwargs: weigh(args, kwargs), with_kwargs=True)
    with torch.no_grad():
        wanted = reference.run_logits(stand_in, embeds)[~visual]
    model.train()
    logits = model(**batch).logits[0][~visual]
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
    logits.square().sum().backward()
    assert op.threshold.grad.abs() > 1e-3


class Spread(HiResLmmLayerOp):
    """Adds to every patch of an image the mean over all its views, from the first row of views on."""

    def __init__(self, context, options):
        super().__init__(context, options)
        self.gate = nn.Linear(context.width, context.width)
        self.seen = []

    def forward(self, layer, hidden, call):
        self.seen.append([len(image.views) for image in call.images])
        patches, parts = hidden[:, call.prefix :], []
        for image in call.images:
            own = patches[image.first_view : image.first_view + len(image.views)]
            parts.append(own + self.gate(own.mean(dim=(0, 1))))
        return torch.cat([hidden[:, : call.prefix], torch.cat(parts)], dim=1), None


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@torch.no_grad()
def test_an_op_of_the_tower_sees_whole_images(monkeypatch, vision):
    monkeypatch.setitem(LAYER_OPS, "spread", Spread)
    spec = {"part": "spread", "of": "vision_tower", "layers": [0]}
    config = tiny_config("llava_next", vision, connector_config={"layer_ops": [spec]})
    model, processor = tiny_model(config), tiny_processor(config)
    batch = make_batch(processor, ROWS)
    whole = model(**batch).logits
    op = model.model.connector.layer_ops[0]
    counts = [len(image.views) for image in model.model.read_images(batch["view_positions"], batch["view_spans"])]
    assert op.seen == [counts] and max(counts) > 2
    op.seen.clear()
    model.config.vision_chunk_size = 2
    torch.testing.assert_close(model(**batch).logits, whole)
    assert op.seen == [[count] for count in counts]

    tower, pixels = model.model.vision_tower, batch["pixel_values"]
    layers, start, rows = [], 0, []
    handle = layers_of(tower)[0].register_forward_hook(lambda module, args, output: layers.append(output))
    tower(pixels)
    handle.remove()
    prefix = layers[0].shape[1] - 16
    for count in counts:
        own = layers[0][start : start + count]
        rows.append(torch.cat([own[:, :prefix], own[:, prefix:] + op.gate(own[:, prefix:].mean(dim=(0, 1)))], 1))
        start += count
    handle = layers_of(tower)[0].register_forward_hook(lambda module, args, output: torch.cat(rows))
    wanted = tower(pixels, output_hidden_states=True).hidden_states[-2][:, prefix:]
    handle.remove()
    seen = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, prefix:]
    assert (seen - wanted).abs().max() > 1e-2
    features, _ = run_towers(
        model.model,
        ImageInputs(pixels, model.model.read_images(batch["view_positions"], batch["view_spans"]), {}, False, None),
    )
    got = torch.empty_like(wanted)
    for group in features:
        got[list(group.rows)] = group.features
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="whole images"):
        model.model.encode_pixels(pixels)


class Odd(HiResLmmLayerOp):
    """Returns what a test puts here."""

    answer = staticmethod(lambda hidden: None)

    def forward(self, layer, hidden, call):
        return type(self).answer(hidden)


@pytest.mark.parametrize(
    "answer",
    [
        lambda hidden: None,
        lambda hidden: hidden,
        lambda hidden: (hidden[:, :-1], None),
        lambda hidden: (hidden, torch.ones(hidden.shape[:2], dtype=torch.long)),
        lambda hidden: (hidden, torch.ones(1, 5, dtype=torch.bool)),
        lambda hidden: (hidden, 1),
    ],
)
@pytest.mark.parametrize("of", ["language_model", "vision_tower"])
def test_an_op_that_returns_something_else_is_named(monkeypatch, answer, of):
    monkeypatch.setattr(Odd, "answer", staticmethod(answer))
    monkeypatch.setitem(LAYER_OPS, "odd", Odd)
    config = tiny_config(connector_config={"layer_ops": [{"part": "odd", "of": of, "layers": 0}]})
    model, batch = tiny_model(config), make_batch(tiny_processor(config), ROWS[:1])
    with pytest.raises(ValueError, match="Odd must"):
        model(**batch)


def test_the_tower_offers_no_attention_and_no_layers_that_nobody_reads(monkeypatch):
    monkeypatch.setitem(LAYER_OPS, "odd", Odd)
    monkeypatch.setitem(LAYER_OPS, "soft", Soft)
    of = {"of": "vision_tower"}
    with pytest.raises(ValueError, match="Soft has reads_attention, which layers of the vision tower do not offer"):
        tiny_model(tiny_config(connector_config={"layer_ops": [{"part": "soft", **of}]}))
    config = tiny_config(connector_config={"layer_ops": [{"part": "odd", **of}]}, vision_feature_layer=-2)
    assert tiny_model(config).model.connector.layer_ops[0].layers == tuple(
        range(config.vision_config.num_hidden_layers - 1)
    )
    last = {"part": "odd", **of, "layers": config.vision_config.num_hidden_layers - 1}
    with pytest.raises(ValueError, match="name layers of vision_tower from 0 to"):
        tiny_config(connector_config={"layer_ops": [last]}, vision_feature_layer=-2)

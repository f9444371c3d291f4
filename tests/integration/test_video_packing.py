"""A video, an image and a text in a batch, with dual positions and with region packers, in every mode of generate."""

import numpy as np
import pytest
import torch

from builders import random_image, tiny_config, tiny_model, tiny_processor
from hires_lmm import HiResLmmForConditionalGeneration
from hires_lmm.modeling.compat_hires_lmm import CACHE
from hires_lmm.modeling.geometry_hires_lmm import Kind


PACK = {"part": "region_pack", "spatial_factor": 2, "temporal_factor": 2, "width": 8, "num_heads": 2}
ORDER = {"order": ["global", "frames", "detail"]}
CHAINS = {
    "temporal": {"position_plan": {"part": "temporal", "gamma": 0.5}, "layout": {"order": ["global", "frames"]}},
    "packed": {"map_ops": [PACK], "layout": ORDER},
    "both": {"map_ops": [PACK], "layout": ORDER, "position_plan": {"part": "temporal"}},
}
TEXTS = ("<video>What happens?", "<image>Who is it?", "Is there no picture at all?")
every_chain = pytest.mark.parametrize("chain", CHAINS)


def build(chain, text="llama"):
    config = tiny_config(
        text=text,
        planner={"name": "llava_next", "views": "global", "pinpoints": [[56, 112], [112, 56]]},
        video_planner={"name": "frames"},
        connector_config=CHAINS[chain],
    )
    return tiny_model(config), tiny_processor(config)


def clip(frames=4, height=60, width=90):
    return [random_image(height, width, number) for number in range(frames)]


def ask(processor):
    images = [random_image(60, 90)]
    return dict(processor(text=list(TEXTS), images=images, videos=[clip()], padding=True, return_tensors="pt"))


def generated(model, batch, steps=5, **options):
    options = {"suppress_tokens": [model.config.image_token_id], "do_sample": False, **options}
    return model.generate(**batch, max_new_tokens=steps, **options)[:, -steps:].tolist()


@every_chain
def test_a_row_of_a_batch_is_the_row_alone(chain):
    model, processor = build(chain)
    shown = ({"videos": [clip()]}, {"images": [random_image(60, 90)]}, {})
    alone = [processor(text=text, **own, return_tensors="pt") for text, own in zip(TEXTS, shown, strict=True)]
    assert generated(model, ask(processor)) == [generated(model, own)[0] for own in alone]


@every_chain
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"prefill_chunk_size": 7},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
    ids=["greedy", "static", "beams", "chunks", "sequences"],
)
def test_every_way_to_generate_equals_one_without_a_cache(chain, options):
    model, processor = build(chain)
    batch = ask(processor)
    beams = {name: value for name, value in options.items() if "num_" in name}
    assert generated(model, batch, **options) == generated(model, batch, use_cache=False, **beams)


@every_chain
def test_drafts_and_samples_equal_those_without_a_cache(chain, deprecations):
    model, processor = build(chain)
    one = dict(processor(text=TEXTS[0], videos=[clip()], return_tensors="pt"))
    wanted = generated(model, one, use_cache=False)
    assert generated(model, one, prompt_lookup_num_tokens=2) == wanted
    assert generated(model, one, assistant_model=model) == wanted
    deprecations.clear()  # by the candidates of the library itself
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(generated(model, one, do_sample=True, use_cache=use_cache))
    assert found[0] == found[1]


@every_chain
def test_a_second_turn_with_a_second_video_goes_on_behind_the_first(chain):
    model, processor = build(chain)
    one = dict(processor(text=TEXTS[0], videos=[clip()], return_tensors="pt"))
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    options["suppress_tokens"] = [model.config.image_token_id]
    first = model.generate(**one, **options)
    more = processor(text="<video>And then?", videos=[clip(2)], return_tensors="pt")
    ids = torch.cat([first.sequences, more["input_ids"]], dim=1)
    names = ("pixel_values", "view_positions", "view_spans")
    whole = {**{name: torch.cat([one[name], more[name]]) for name in names}, "input_ids": ids}
    whole["attention_mask"] = torch.ones_like(ids)
    assert generated(model, {**whole, CACHE: first[CACHE]}) == generated(model, whole, use_cache=False)


def test_placeholders_are_counted_from_frames_and_sizes_alone():
    model, processor = build("packed")
    rng = np.random.default_rng(0)
    for _ in range(60):
        frames, height, width = 2 * int(rng.integers(1, 6)), *map(int, rng.integers(20, 300, size=2))
        count = processor.video_tokens(frames, height, width)
        assert count == frames * 1 + frames // 2 * 4
        least = processor.min_video_tokens(frames, height, width)
        budget = int(rng.integers(least, count + 3))
        video = np.zeros((frames, height, width, 3), dtype=np.uint8)
        batch = processor(text="<video>a", videos=[video], max_image_tokens=budget, return_tensors="pt")
        assert int((batch["input_ids"] == model.config.image_token_id).sum()) == min(budget, count)
    assert [len(part) for part in model(**batch).image_outputs.pooler_output] == [min(budget, count)]


def test_slow_tokens_belong_to_the_first_of_their_frames():
    model, processor = build("packed")
    seen: list = []
    model.model.connector.map_ops[0].register_forward_hook(lambda module, given, output: seen.append(output))
    shown = model(**ask(processor), output_token_map=True).token_map
    assert shown.view[shown.kind == Kind.DETAIL].tolist() == [0] * 4 + [2] * 4
    assert shown.view[shown.kind == Kind.FRAME].tolist() == [0, 1, 2, 3]
    assert {group.kind: group.rows for group in seen[0].groups} == {0: (4,), 3: (0, 1, 2, 3), 4: (0, 2)}


@every_chain
def test_a_step_of_training_reaches_every_parameter_and_a_saved_model_answers_alike(chain, tmp_path):
    model, processor = build(chain)
    batch = ask(processor)
    wanted = model(**batch).logits
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    named = model.model.connector.named_parameters()
    assert not [name for name, each in named if each.requires_grad and each.grad is None]
    model.save_pretrained(tmp_path)
    again = HiResLmmForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).logits, wanted)

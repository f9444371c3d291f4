"""The dense layout in whole models: logits and tokens of the flat one, also in rows cut out as trainers do."""

import pytest
import torch

from builders import random_image
from builders.reload import PRESETS
from builders.training import conversations
from builders.trl import trl_parts
from hires_lmm.training import HiResLmmCollator


def both_layouts(preset: str, counts=None):
    """A model, and a batch of two questions about pictures of different sizes in both layouts."""
    model, processor = trl_parts(preset)
    counts = counts or ((1, 1) if preset == "fusion" else (2, 2))
    images = [
        [random_image(50 + 70 * row, 120 - 30 * n, 3 * row + n) for n in range(c)] for row, c in enumerate(counts)
    ]
    content = [[*[{"type": "image"}] * c, {"type": "text", "text": f"what is it {c}"}] for c in counts]
    chats = [[{"role": "user", "content": own}] for own in content]
    text = processor.apply_chat_template(chats, add_generation_prompt=True)
    options = {"text": text, "padding": True, "return_tensors": "pt"}
    flat = processor(images=[image for own in images for image in own], **options)
    return model, dict(flat), dict(processor(images=images, image_layout="dense", **options))


@torch.no_grad()
@pytest.mark.parametrize("preset", PRESETS)
def test_dense_is_flat_in_logits_and_tokens_and_can_be_cut_by_sample(preset):
    model, flat, dense = both_layouts(preset)
    assert torch.equal(dense["input_ids"], flat["input_ids"])
    wanted = model(**flat).logits
    assert torch.equal(model(**dense).logits, wanted)
    kept = flat["attention_mask"].bool()
    rows = torch.cat([model(**{name: value[row : row + 1] for name, value in dense.items()}).logits for row in (0, 1)])
    torch.testing.assert_close(rows[kept], wanted[kept], atol=2e-4, rtol=1e-4)
    turned = {name: value.flip(0) for name, value in dense.items()}
    torch.testing.assert_close(model(**turned).logits.flip(0)[kept], wanted[kept], atol=2e-4, rtol=1e-4)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**dense, **options), model.generate(**flat, **options))


@torch.no_grad()
def test_dense_is_flat_in_other_modes_of_generate_and_in_features():
    model, flat, dense = both_layouts("slime")
    for options in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        torch.manual_seed(0)
        wanted = model.generate(**flat, max_new_tokens=4, **options)
        torch.manual_seed(0)
        assert torch.equal(model.generate(**dense, max_new_tokens=4, **options), wanted)
    views = {name: value for name, value in dense.items() if name.startswith("pixel")}
    given = {name: value for name, value in flat.items() if name.startswith(("pixel", "view"))}
    found, wanted = (model.get_image_features(**each, return_dict=True) for each in (views, given))
    assert all(map(torch.equal, found.pooler_output, wanted.pooler_output))
    maps = [model(**each, output_token_map=True).token_map for each in (dense, flat)]
    assert torch.equal(maps[0].kept, maps[1].kept) and torch.equal(maps[0].box.nan_to_num(), maps[1].box.nan_to_num())


def test_rows_without_an_image_train_in_the_dense_layout():
    model, _, dense = both_layouts("slime", counts=(1, 0))
    model.train()
    for row in (0, 1):
        rows = {name: value[row : row + 1] for name, value in dense.items()}
        model(**rows, labels=rows["input_ids"]).loss.backward()
        missing = [name for name, own in model.model.connector.named_parameters() if own.grad is None]
        assert not missing


def test_half_precision_keeps_the_geometry():
    model, _, dense = both_layouts("llava_next")
    half = {name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in dense.items()}
    assert model.to(torch.bfloat16)(**half).logits.isfinite().all()


def test_the_collator_gives_what_data_parallel_cuts():
    """`nn.DataParallel` cuts every tensor into pieces of rows: they say what the whole batch says."""
    model, processor = trl_parts("slime")
    rows = [*conversations(2, images=2), *conversations(2)]
    flat = HiResLmmCollator(processor)(rows)
    processor.image_processor.image_layout = "dense"
    dense = HiResLmmCollator(processor)(rows)
    assert dense.keys() == (flat.keys() - {"view_positions", "view_boxes", "view_spans"}) | {"pixel_attention_mask"}
    with torch.no_grad():
        wanted = model(**flat).logits
        pieces = [
            model(**{name: value[start : start + 2] for name, value in dense.items()}).logits for start in (0, 2)
        ]
    kept = flat["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(pieces)[kept], wanted[kept], atol=2e-4, rtol=1e-4)

"""Preset `llava_next` with the weights of transformers' own class gives its logits and its text."""

import functools
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from builders import (
    geometry_of,
    make_batch,
    plain_tokenizer,
    random_image,
    randomise,
    scaled_pinpoints,
    tiny_config,
    tiny_processor,
    tiny_text_config,
    tiny_vision_config,
)
from builders.images import assert_same_views

from .base import GoldenSet


NAME = "llava_next"
CASES = GoldenSet(NAME).cases
VIEW, PATCH, SEED = CASES["view_size"], CASES["patch_size"], CASES["seed"]
SIZES = CASES["sizes"]  # height, width: extremes both ways round, then sizes around every canvas and its borders
TOLERANCE = 1e-4
PROMPT = "USER: <image>\nHow many cats are on the table? ASSISTANT:"
# their name -> our name; the first match wins, the rest of the name stays
KEY_MAP = {
    "model.image_newline": "model.connector.layout.separators.newline",
    "model.multi_modal_projector.linear_1.": "model.connector.adapter.mlp.linear_1.",
    "model.multi_modal_projector.linear_2.": "model.connector.adapter.mlp.linear_2.",
    "model.vision_tower.": "model.vision_tower.",
    "model.language_model.": "model.language_model.",
    "lm_head.": "lm_head.",
}


def convert(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename their state dict; both must hold the same parameters of the same shapes."""
    converted = {}
    for name, value in theirs.items():
        prefix = next(prefix for prefix in KEY_MAP if name.startswith(prefix))
        converted[KEY_MAP[prefix] + name[len(prefix) :]] = value
    assert {name: value.shape for name, value in converted.items()} == {name: v.shape for name, v in ours.items()}
    return converted


@functools.cache
def their_processor():
    size = {"height": VIEW, "width": VIEW}
    image_processor = LlavaNextImageProcessorPil(
        size=size, crop_size=size, image_grid_pinpoints=scaled_pinpoints(VIEW), do_center_crop=False
    )
    return LlavaNextProcessor(
        image_processor,
        plain_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@functools.cache
def models():
    """Their model, our model with its weights, our processor."""
    from hires_lmm import HiResLmmForConditionalGeneration

    vision_config, text_config = tiny_vision_config("clip", VIEW, PATCH), tiny_text_config("llama")
    config = tiny_config("llava_next", vision_config, text_config)
    theirs = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=vision_config.to_dict(),
            text_config=text_config.to_dict(),
            image_token_index=config.image_token_id,
            image_grid_pinpoints=scaled_pinpoints(VIEW),
        )
    )
    randomise(theirs, seed=SEED).eval()
    ours = HiResLmmForConditionalGeneration(config).eval()
    ours.load_state_dict(convert(theirs.state_dict(), ours.state_dict()))
    for model in (theirs, ours):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = plain_tokenizer().pad_token_id
    processor = tiny_processor(config)
    processor.image_processor.resize_backend = "pillow"
    return theirs, ours, processor


@functools.cache
def image(index: int):
    return random_image(*SIZES[index], seed=index)


@functools.cache
def their_inputs(index: int):
    return their_processor()(images=image(index), text=PROMPT, return_tensors="pt")


@functools.cache
@torch.no_grad()
def their_logits(index: int) -> torch.Tensor:
    return models()[0](**their_inputs(index)).logits[0]


@pytest.mark.parametrize("index", range(len(SIZES)), ids=[f"{h}x{w}" for h, w in SIZES])
@torch.no_grad()
def test_one_image_gives_their_inputs_and_logits(index):
    theirs, ours, processor = models()
    expected = their_inputs(index)
    batch = make_batch(processor, [(PROMPT, [image(index)])])
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    views = expected["pixel_values"].flatten(0, 1)
    torch.testing.assert_close(batch["pixel_values"], views, atol=2e-5, rtol=0)
    assert_same_views(processor.image_processor(image(index), resize_backend="torch")["pixel_values"], views, "torch")
    features = theirs.model.get_image_features(expected["pixel_values"], expected["image_sizes"]).pooler_output
    torch.testing.assert_close(
        ours.model.get_image_features(**geometry_of(batch)).pooler_output[0], features[0], atol=TOLERANCE, rtol=0
    )
    logits = ours(**batch).logits[0]
    assert logits.std() > 0.5
    torch.testing.assert_close(logits, their_logits(index), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@torch.no_grad()
def test_a_batch_of_all_sizes_gives_their_logits(padding_side):
    _, ours, processor = models()
    extra = ["", " Describe the image.", "\nA small red boat on a lake."]
    rows = list(range(len(SIZES)))
    for start in range(0, len(rows), 6):
        part = rows[start : start + 6]
        samples = [(PROMPT + extra[index % 3], [image(index)]) for index in part]
        batch = make_batch(processor, samples, padding_side=padding_side)
        assert batch["attention_mask"].min() == 0
        logits = ours(**batch).logits
        for row, index in enumerate(part):
            real = logits[row][batch["attention_mask"][row].bool()]
            expected = their_logits(index)
            torch.testing.assert_close(
                real[: len(expected)],
                expected,
                atol=TOLERANCE,
                rtol=0,
                msg=functools.partial("{}: {}".format, SIZES[index]),
            )


@torch.no_grad()
def test_two_images_and_a_text_row_give_their_logits():
    theirs, ours, processor = models()
    text = "USER: <image>\n and <image>\nDescribe the image. ASSISTANT:"
    samples = [(text, [image(9), image(16)]), ("USER: How many cats? ASSISTANT:", []), (PROMPT, [image(5)])]
    batch = make_batch(processor, samples, padding_side="left")
    expected = their_processor()(
        images=[image(9), image(16), image(5)], text=[text for text, _ in samples], padding=True, return_tensors="pt"
    )
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(ours(**batch).logits[mask], theirs(**expected).logits[mask], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("indices", [(0,), (1,), (3,), (5,), (6,), (1, 15, 20), (0, 7, 5, 3)], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
@torch.no_grad()
def test_generation_gives_their_text_whatever_resizes(indices, options):
    theirs, ours, processor = models()
    samples = [(PROMPT, [image(index)]) for index in indices]
    backend = "pillow" if options else "torch"
    batch = make_batch(processor, samples, padding_side="left", resize_backend=backend)
    expected = their_processor()(
        images=[image(index) for index in indices], text=[PROMPT] * len(indices), padding=True, return_tensors="pt"
    )
    options = {"max_new_tokens": 10, "do_sample": False, **options}
    assert ours.generate(**batch, **options).tolist() == theirs.generate(**expected, **options).tolist()


def test_the_images_change_the_logits():
    """The parity above would mean nothing if the head ignored the visual tokens."""
    difference = (their_logits(5)[-1] - their_logits(10)[-1]).abs().max()
    assert difference > 0.1


def remake(folder: Path, seed: int) -> None:
    generator = random.Random(seed)
    sizes = [[1, 1], *([generator.randint(1, 700), generator.randint(1, 700)] for _ in range(len(SIZES) - 1))]
    cases = {"view_size": 48, "patch_size": 12, "seed": seed, "sizes": sizes}
    (folder / "cases.json").write_text(json.dumps(cases))

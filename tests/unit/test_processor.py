"""The processor: expansion, counts, batches with 0, 1 and many images, budgets, padding, building from a config."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from builders.images import picture, random_sizes
from builders.text import tiny_tokenizer
from hires_lmm.processing.chat_templates_hires_lmm import CHAT_TEMPLATES, answer_prefix_ids, question_prefix_ids
from hires_lmm.processing.image_processing_hires_lmm import HiResLmmImageProcessor
from hires_lmm.processing.planners_hires_lmm import PLANNERS
from hires_lmm.processing.processing_hires_lmm import HiResLmmProcessor


LAYOUT = {"patch_grid": [2, 2], "global_grid": [2, 2], "crop_grid": [2, 2], "row_end": True, "budget": {"on": "all"}}
NAMES = ("pixel_values", "view_positions", "view_boxes", "view_spans")


def processor(template="chatml", **changes) -> HiResLmmProcessor:
    options = {"planner": "llava_next", "view_size": 28, "patch_size": 14, "token_layout": LAYOUT, **changes}
    return HiResLmmProcessor(HiResLmmImageProcessor(**options), tiny_tokenizer(template))


def placeholders(expanding, ids) -> list[int]:
    return [list(row).count(expanding.image_token_id) for row in ids]


def test_expansion_equals_counts_in_order():
    expanding = processor()
    sizes = [(30, 60), (100, 20), (28, 28)]
    counts = [expanding.image_tokens(*size) for size in sizes]
    assert len(set(counts)) == 3
    ids = expanding(text="a<image>b<image>c<image>", images=[picture(*size) for size in sizes])["input_ids"][0]
    text = expanding.tokenizer.decode(ids)
    assert text == "a" + "<image>" * counts[0] + "b" + "<image>" * counts[1] + "c" + "<image>" * counts[2]


@pytest.mark.parametrize("nested", [False, True])
def test_mixed_batch_equals_single_samples(nested):
    """0, 1, 3 and 2 images in one batch; every row is its own call, padded."""
    expanding = processor()
    images = [
        [],
        [picture(40, 20)],
        [picture(30, 90), picture(5, 5), picture(70, 71)],
        [picture(9, 99), picture(60, 8)],
    ]
    texts = ["no image", "one <image>", "<image> and <image>, then <image>", "<image><image>"]
    given = images if nested else [image for row in images for image in row]
    batch = expanding(text=texts, images=given, padding=True, return_tensors="pt")
    singles = [
        expanding(text=text, images=row or None, return_tensors="pt") for text, row in zip(texts, images, strict=True)
    ]
    for index, single in enumerate(singles):
        kept = batch["attention_mask"][index].bool()
        assert torch.equal(batch["input_ids"][index][kept], single["input_ids"][0])
        assert batch["attention_mask"][index].tolist() == sorted(batch["attention_mask"][index].tolist())
    for name in NAMES:
        assert torch.equal(batch[name], torch.cat([single[name] for single in singles[1:]]))
    total = batch["view_positions"][batch["view_positions"][:, 0] == 0][:, 5].sum()
    assert sum(placeholders(expanding, batch["input_ids"])) == total


@pytest.mark.parametrize("planner", PLANNERS)
def test_predicted_equals_placeholders(planner):
    changes = {} if planner == "llava_next" else {"max_crops": 4}
    expanding = processor(planner=planner, **changes)
    sizes = [size for size in random_sizes(60, seed=8) if size[0] * size[1] < 2e5]
    predicted = expanding._get_num_multimodal_tokens(image_sizes=sizes)
    for size, tokens, rows in zip(sizes, predicted["num_image_tokens"], predicted["num_image_patches"], strict=True):
        batch = expanding(text="<image>", images=picture(*size))
        assert placeholders(expanding, batch["input_ids"]) == [tokens] == [expanding.image_tokens(*size)]
        assert len(batch["pixel_values"]) == rows


@pytest.mark.parametrize(
    "kwargs", [{"max_image_tokens": 9}, {"max_crops": 2}, {"views": "global"}, {"views": "crops"}]
)
@pytest.mark.parametrize("nested", [False, True])
def test_options_per_call(kwargs, nested):
    expanding, image = processor(), picture(60, 60)
    plain = expanding(text="<image>", images=image)
    passed = {"images_kwargs": kwargs} if nested else kwargs
    batch = expanding(text="<image>", images=image, **passed)
    count = expanding.image_tokens(60, 60, **kwargs)
    assert placeholders(expanding, batch["input_ids"]) == [count]
    assert count < placeholders(expanding, plain["input_ids"])[0]
    merged = expanding._get_num_multimodal_tokens(image_sizes=[(60, 60)], **passed)
    assert merged["num_image_tokens"] == [count] and merged["num_image_patches"] == [len(batch["pixel_values"])]
    assert torch.equal(
        torch.tensor(plain["input_ids"]), torch.tensor(expanding(text="<image>", images=image)["input_ids"])
    )


def test_num_multimodal_tokens_without_images():
    assert processor()._get_num_multimodal_tokens()["num_image_tokens"] is None


def test_padding_sides():
    expanding, texts = processor(), ["a", "a long text"]
    left = expanding(text=texts, padding=True)["attention_mask"][0]
    right = expanding(text=texts, padding=True, padding_side="right")["attention_mask"][0]
    assert left == sorted(left) and right == left[::-1] and 0 in left
    expanding.tokenizer.padding_side = "right"
    assert expanding(text=texts, padding=True)["attention_mask"][0] == right


def test_tokenizers_without_a_side_pad_left(tmp_path):
    from transformers import PreTrainedTokenizerFast

    source = tiny_tokenizer("chatml")
    extra = {"image_token": "<image>"}
    bare = PreTrainedTokenizerFast(
        tokenizer_object=source.backend_tokenizer, pad_token="<pad>", extra_special_tokens=extra
    )
    assert bare.padding_side == "right"
    HiResLmmProcessor(processor().image_processor, bare).save_pretrained(tmp_path)
    assert HiResLmmProcessor.from_pretrained(tmp_path, trust_remote_code=True).tokenizer.padding_side == "left"


def test_text_only_and_images_only():
    expanding = processor()
    assert set(expanding(text="hello")) == {"input_ids", "attention_mask"}
    assert set(expanding(images=picture(9, 9))) == set(NAMES)
    assert set(expanding(text="hello", images=[])) == {"input_ids", "attention_mask"}
    assert set(expanding(text=["a", "b"], images=[[], []])) == {"input_ids", "attention_mask"}
    assert expanding(text="hello", return_tensors="pt")["input_ids"].ndim == 2


def test_grey_arrays_go_through_the_processor():
    grey = np.zeros((20, 30), np.uint8)
    batch = processor()(text="<image><image>", images=[grey, torch.from_numpy(grey)])
    assert (batch["view_positions"][:, 0] == 0).sum() == 2


def test_token_types_mark_placeholders():
    batch = processor()(text="a<image>b", images=picture(9, 9), return_mm_token_type_ids=True)
    assert sum(batch["mm_token_type_ids"][0]) == processor().image_tokens(9, 9)


def test_truncation_of_text_is_allowed():
    expanding = processor()
    needed = expanding.image_tokens(9, 9)
    batch = expanding(text="<image> and a tail", images=picture(9, 9), truncation=True, max_length=needed + 1)
    assert len(batch["input_ids"][0]) == needed + 1


def config(planner=None, model_type="clip_vision_model", image_token_id=3, **vision) -> SimpleNamespace:
    vision = {"image_size": 28, "patch_size": 14, "model_type": model_type, **vision}
    return SimpleNamespace(
        planner=planner or {"name": "slime", "max_crops": 6, "unpad": True},
        vision_config=SimpleNamespace(**vision),
        token_layout=lambda: LAYOUT,
        image_token_id=image_token_id,
        answer_prefix_ids=None,
        question_prefix_ids=None,
    )


def test_from_config_tells_the_model_what_opens_answers_and_questions():
    ours = config()
    built = HiResLmmProcessor.from_config(ours, tiny_tokenizer("chatml"))
    assert ours.answer_prefix_ids == answer_prefix_ids(built) != []
    assert ours.question_prefix_ids == question_prefix_ids(built) != []
    ours.answer_prefix_ids = [7]
    HiResLmmProcessor.from_config(ours, tiny_tokenizer("vicuna"))
    assert ours.answer_prefix_ids == [7]  # what is said is not changed


def test_from_config_reads_everything():
    built = HiResLmmProcessor.from_config(config(), tiny_tokenizer("vicuna"))
    image_processor = built.image_processor
    read = [image_processor.planner, image_processor.max_crops, image_processor.unpad, image_processor.view_size]
    assert read == ["slime", 6, True, 28]
    assert (image_processor.patch_size, image_processor.token_layout) == (14, LAYOUT)
    assert tuple(image_processor.image_mean) == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert image_processor.resample == 3
    assert built.chat_template == CHAT_TEMPLATES["vicuna"] and built.image_token_id == 3
    changed = HiResLmmProcessor.from_config(config(), tiny_tokenizer(), max_crops=2, views="global")
    assert (changed.image_processor.max_crops, changed.image_processor.views) == (2, "global")


@pytest.mark.parametrize(
    "model_type, mean, resample",
    [("clip_vision_model", 0.48145466, 3), ("siglip_vision_model", 0.5, 3)],
)
def test_tower_families(model_type, mean, resample):
    built = HiResLmmProcessor.from_config(config(model_type=model_type), tiny_tokenizer()).image_processor
    assert (built.image_mean[0], built.resample) == (mean, resample)
    own_filters = HiResLmmProcessor.from_config(config({"name": "hd"}, model_type), tiny_tokenizer()).image_processor
    assert own_filters.resample is None


def test_image_stats():
    from transformers import SiglipImageProcessorPil

    tower = SiglipImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 3], resample=2)
    for stats in (tower, {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "resample": 2}):
        built = HiResLmmProcessor.from_config(config(model_type="other"), tiny_tokenizer(), stats).image_processor
        assert list(built.image_mean) == [0.1, 0.2, 0.3] and built.resample == 2


def test_from_config_adds_the_image_token():
    tokenizer = tiny_tokenizer(None, image_token=False)
    built = HiResLmmProcessor.from_config(config(image_token_id=len(tokenizer)), tokenizer)
    assert built.image_token_id == len(tokenizer) - 1
    batch = built(text="a<image>b", images=picture(9, 9))
    assert placeholders(built, batch["input_ids"]) == [built.image_tokens(9, 9)]


@pytest.mark.parametrize("given, expected", [("plain", "plain"), (None, "llama3"), ("{{ 'x' }}", None)])
def test_from_config_template(given, expected):
    tokenizer = tiny_tokenizer("{{ messages[0]['content'] }}")
    built = HiResLmmProcessor.from_config(config(), tokenizer, chat_template=given)
    assert built.chat_template == tokenizer.chat_template == (CHAT_TEMPLATES[expected] if expected else given)


@pytest.mark.parametrize(
    "changed, kwargs, text",
    [
        (config(image_token_id=9), {}, "'<image>' as id 3, the config has image_token_id=9"),
        (config(model_type="dinov2"), {}, "model_type='dinov2'.*image_stats"),
        (config({"name": "slime", "crops": 2}), {}, "config.planner"),
        (config({"max_crops": 2}), {}, "config.planner"),
        (config({"name": "grid"}), {}, "planner='grid' is unknown; choose one of slime, slime_release"),
        (config(image_size=None), {}, "image_size=None.*view_size"),
        (config(image_size=56), {}, "4x4 patches, token_layout has 2x2"),
        (config(), {"max_crop": 3}, "Unknown image options \\['max_crop'\\]"),
        (config(), {"image_stats": {"mean": 1}}, "Unknown image_stats"),
    ],
)
def test_from_config_errors(changed, kwargs, text):
    with pytest.raises(ValueError, match=text):
        HiResLmmProcessor.from_config(changed, tiny_tokenizer(), **kwargs).image_tokens(9, 9)


def test_tokenizer_must_know_the_image_token():
    with pytest.raises(ValueError, match="from_config"):
        HiResLmmProcessor(HiResLmmImageProcessor(), tiny_tokenizer(image_token=False))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        HiResLmmProcessor(HiResLmmImageProcessor())


def test_save_and_reload(tmp_path):
    HiResLmmImageProcessor.register_for_auto_class()
    HiResLmmProcessor.register_for_auto_class()
    first = HiResLmmProcessor(processor(max_crops=3, max_image_tokens=30).image_processor, tiny_tokenizer(), "vicuna")
    first.save_pretrained(tmp_path)
    inputs = {"text": ["<image>x", "y"], "images": picture(50, 40), "padding": True, "return_tensors": "pt"}
    expected = first(**inputs)
    for second in (
        HiResLmmProcessor.from_pretrained(tmp_path, trust_remote_code=True),
        AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        assert second.chat_template == CHAT_TEMPLATES["vicuna"]
        assert second.image_processor.max_crops == 3 and second.image_token == "<image>"
        found = second(**inputs)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    fewer = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True, max_image_tokens=5)
    assert fewer.image_tokens(50, 40) == 5


def test_other_image_tokens_survive_reloading(tmp_path):
    tokenizer = tiny_tokenizer(None, image_token=False)
    first = HiResLmmProcessor(processor().image_processor, tokenizer, "chatml", image_token="<|eot_id|>")
    first.save_pretrained(tmp_path)
    assert HiResLmmProcessor.from_pretrained(tmp_path, trust_remote_code=True).image_token == "<|eot_id|>"


def test_other_numbers_of_images_raise_in_the_words_of_transformers():
    """Callers look for these words."""
    words = "<image> tokens in the prompts should be the same as the number of images"
    with pytest.raises(ValueError, match=words):
        processor()(text="<image> a", images=[picture(30, 40)] * 2)


def test_half_characters_are_named():
    with pytest.raises(ValueError, match=r"Sample 1 holds '\\ud83d', half of a character"):
        processor()(text=["fine", "half \ud83d"])

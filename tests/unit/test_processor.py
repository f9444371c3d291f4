"""The processor: expansion, counts, batches with 0, 1 and many images, budgets, padding, building from a config."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoProcessor

from builders.images import picture, random_sizes
from builders.text import tiny_tokenizer
from hires_lmm.processing.chat_templates_hires_lmm import CHAT_TEMPLATES, answer_prefix_ids, question_prefix_ids
from hires_lmm.processing.image_processing_hires_lmm import HiResLmmImageProcessor
from hires_lmm.processing.planners_hires_lmm import PLANNERS
from hires_lmm.processing.processing_hires_lmm import HiResLmmProcessor


LAYOUT = {
    "patch_grid": [2, 2],
    "grids": {"global": {"rows": 2, "cols": 2}, "crops": {"rows": 2, "cols": 2}},
    "layout": {"separators": {"newline": {"place": "token_row_end", "on": "crops"}}},
    "budget": {"on": "all"},
}
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
    total = batch["view_positions"][batch["view_positions"][:, 8] == 1][:, 5].sum()
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


def test_token_types_mark_placeholders():
    batch = processor()(text="a<image>b", images=picture(9, 9), return_mm_token_type_ids=True)
    assert sum(batch["mm_token_type_ids"][0]) == processor().image_tokens(9, 9)


def config(planner=None, model_type="clip_vision_model", image_token_id=3, **vision) -> SimpleNamespace:
    vision = {"image_size": 28, "patch_size": 14, "model_type": model_type, **vision}
    return SimpleNamespace(
        planner=planner or {"name": "slime", "max_crops": 6, "unpad": True},
        vision_config=SimpleNamespace(**vision),
        text_config=SimpleNamespace(max_position_embeddings=512),
        token_layout=lambda: LAYOUT,
        image_token_id=image_token_id,
        video_planner=None,
        answer_prefix_ids=None,
        question_prefix_ids=None,
        extra_tower_configs=dict,
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
        (config({"name": "slime", "crops": 2}), {}, "planner='slime' takes no crops; its options are"),
        (config({"max_crops": 2}), {}, "planner={'max_crops': 2} is unknown; choose one of"),
        (config({"name": "grid"}), {}, "planner={'name': 'grid'} is unknown; choose one of slime, slime_release"),
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


def test_half_characters_are_named():
    with pytest.raises(ValueError, match=r"Sample 1 holds '\\ud83d', half of a character"):
        processor()(text=["fine", "half \ud83d"])


# ---- options at load


LOADED = [AutoProcessor, AutoImageProcessor]


@pytest.fixture
def folder(tmp_path):
    HiResLmmImageProcessor.register_for_auto_class()
    HiResLmmProcessor.register_for_auto_class()
    processor().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("auto", LOADED)
@pytest.mark.parametrize(
    "options",
    [
        {"max_image_token": 30},
        {"max_crop": 2},
        {"padding_sid": "left"},
        {"images_kwargs": {}},
        {"max_image_tokens": [3]},
    ],
)
def test_unknown_options_are_errors_at_load_as_in_a_call(folder, auto, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        auto.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.mark.parametrize("auto", LOADED)
def test_names_of_loading_itself_pass(folder, auto):
    """Those of the Hub, and those of a model, which pipelines hand on."""
    hub = {"revision": "main", "local_files_only": True, "cache_dir": folder, "token": None, "force_download": False}
    model = {"device_map": "cpu", "dtype": "auto", "attn_implementation": "eager"}
    loaded = auto.from_pretrained(folder, trust_remote_code=True, max_crops=2, **hub, **model)
    assert getattr(loaded, "image_processor", loaded).max_crops == 2
    assert auto.from_pretrained(folder, trust_remote_code=True, foo=1, return_unused_kwargs=True)[1]["foo"] == 1


def test_options_of_the_tokenizer_pass(folder):
    options = {"truncation_side": "left", "model_max_length": 99, "pad_token": "<s>", "max_length": 7, "legacy": False}
    loaded = AutoProcessor.from_pretrained(folder, trust_remote_code=True, chat_template="vicuna", **options)
    tokenizer = loaded.tokenizer
    assert (tokenizer.truncation_side, tokenizer.model_max_length, tokenizer.pad_token) == ("left", 99, "<s>")
    assert loaded.chat_template == CHAT_TEMPLATES["vicuna"]


def test_what_was_given_at_load_may_be_changed_later(folder):
    """It stays with the image processor; the tokenizer neither keeps nor saves it."""
    loaded = AutoProcessor.from_pretrained(folder, trust_remote_code=True, max_image_tokens=20)
    image = picture(60, 60)
    assert placeholders(loaded, loaded(text="<image>", images=image)["input_ids"]) == [20]
    loaded.image_processor.max_image_tokens = 10
    assert placeholders(loaded, loaded(text="<image>", images=image)["input_ids"]) == [10]
    assert "max_image_tokens" not in loaded.tokenizer.init_kwargs


# ---- no image


def test_none_among_images_is_no_image():
    expanding, (one, two) = processor(), (picture(30, 60), picture(100, 20))
    texts = ["<image> x", "z", "<image> y"]
    wanted = expanding(text=texts, images=[[one], [], [two]])
    for images in ([[one], None, [two]], [[one, None], [None], [two]], [one, None, two], [None, one, two]):
        found = expanding(text=texts, images=images)
        assert found["input_ids"] == wanted["input_ids"]
        assert (found["pixel_values"] == wanted["pixel_values"]).all()
    for images in ([None, None], [[None], None], [None]):
        assert set(expanding(text="a", images=images)) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="Sample 1 has 1 <image> placeholders, but 0 images"):
        expanding(text=["<image>", "<image>"], images=[[one], None])
    assert len(expanding.image_processor([one, None])["pixel_values"]) == len(
        expanding.image_processor(one)["pixel_values"]
    )


# ---- budgets


def test_one_budget_an_image():
    """As numbers in the order of the images, or nested as the images are; None means the budget of the processor."""
    expanding = processor(max_image_tokens=13)
    images = [picture(30, 60), picture(100, 20), picture(28, 28)]
    texts = ["<image>a<image>", "none", "<image>"]
    nested = [images[:2], [], images[2:]]
    messages = [[{"role": "user", "content": [{"type": "image", "image": image} for image in row]}] for row in nested]
    for budgets in (
        [9, None, 7],
        [[9, None], [], [7]],
        [[9, None], None, 7],
        (9, None, 7),
        np.array([9, 13, 7]).tolist(),
    ):
        batch = expanding(text=texts, images=nested, max_image_tokens=budgets)
        assert counts_of(batch) == [9, 13, 7] and placeholders(expanding, batch["input_ids"]) == [22, 0, 7]
        options = {"images_kwargs": {"max_image_tokens": budgets}}
        rendered = expanding.apply_chat_template(messages, tokenize=True, return_dict=True, processor_kwargs=options)
        assert placeholders(expanding, rendered["input_ids"]) == [22, 0, 7]
    sizes = [(30, 60), (100, 20), (28, 28)]
    assert expanding._get_num_multimodal_tokens(sizes, max_image_tokens=[9, None, 7])["num_image_tokens"] == [9, 13, 7]
    assert expanding.image_tokens(30, 60, max_image_tokens=[9]) == 9


def counts_of(batch) -> list[int]:
    return batch["view_positions"][batch["view_positions"][:, 8] == 1][:, 5].tolist()


@pytest.mark.parametrize(
    "budgets, text",
    [
        ([9, 9, 9], r"\[9, 9, 9\] holds 3 budgets for 2 images"),
        ([9], r"\[9\] holds 1 budgets for 2 images"),
        ([[9], [9]], "holds 2 budgets for 1 samples"),
        ([[9, 9, 9]], "holds 3 budgets for 2 images"),
        ([], "holds 0 budgets for 2 images"),
        ([9, 0], r"max_image_tokens=\[9, 0\] must be an integer of at least 1"),
        ([9, True], r"max_image_tokens=\[9, True\]"),
        ([9, 2.5], r"max_image_tokens=\[9, 2.5\]"),
        ([9, 1], "Image 1: max_image_tokens=1 is too small .*smallest value for this image is "),
    ],
)
def test_budgets_that_fit_no_images_are_errors(budgets, text):
    expanding = processor()
    with pytest.raises(ValueError, match=text):
        expanding(text="<image><image>", images=[[picture(30, 60), picture(100, 20)]], max_image_tokens=budgets)


@pytest.mark.parametrize("on, protected", [("all", 2), ("crops", 6), ("global", 10)])
@pytest.mark.parametrize("options", [{}, {"views": "global"}, {"max_crops": 1}])
def test_the_smallest_budget_is_told(on, protected, options):
    """It works, and one less is the error that names it."""
    layout = {**LAYOUT, "budget": {"on": on}}
    expanding = processor(planner="slime", max_crops=2, token_layout=layout)
    least = expanding.min_image_tokens(28, 56, **options)
    assert least == expanding.image_processor.min_image_tokens(28, 56, max_image_tokens=3, **options)
    assert expanding.image_tokens(28, 56, max_image_tokens=least, **options) == least
    full = expanding.image_tokens(28, 56, **options)
    if not options:
        assert least == protected + 1
    if least > 1:
        with pytest.raises(ValueError, match=f"smallest value for this image is {least}, .*min_image_tokens"):
            expanding.image_tokens(28, 56, max_image_tokens=least - 1, **options)
    assert processor(token_layout={**LAYOUT, "budget": None}).min_image_tokens(28, 56) == processor().image_tokens(
        28, 56
    )
    assert least <= full


# ---- context length


def test_beyond_the_context_a_call_warns_once(caplog, tmp_path):
    """The length comes from the language model, and stays with what is saved."""
    HiResLmmImageProcessor.register_for_auto_class()
    HiResLmmProcessor.register_for_auto_class()
    HiResLmmProcessor.from_config(config(), tiny_tokenizer()).save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.tokenizer.model_max_length == 512
    text = "zq" * 300 + "<image>"
    length = len(loaded(text=text, images=picture(9, 9), max_crops=1)["input_ids"][0])
    said = [record.getMessage() for record in caplog.records]
    assert length > 512 and len(said) == 1 and f"{length} tokens" in said[0] and "512" in said[0]
    assert "max_image_tokens" in said[0]
    loaded(text=[text, "short"], images=picture(9, 9), padding=True, return_tensors="pt")
    assert len(caplog.records) == 1


def test_what_a_tokenizer_keeps_is_no_image_option():
    built = HiResLmmProcessor.from_config(config(), tiny_tokenizer())
    wanted = built(text="<image>", images=picture(90, 60))["input_ids"]
    built.tokenizer.init_kwargs["max_crops"] = 1
    assert built(text="<image>", images=picture(90, 60))["input_ids"] == wanted

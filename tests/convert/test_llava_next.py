"""LLaVA-NeXT checkpoints of every text family give the logits and the text of transformers' own class."""

import json

import pytest
import torch
from convert_tools import no_output, write_json
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from builders import (
    TEXT_FAMILIES,
    make_batch,
    plain_tokenizer,
    random_image,
    randomise,
    scaled_pinpoints,
    tiny_text_config,
    tiny_vision_config,
)
from hires_lmm.conversion import ConversionError, convert_llava_next


VIEW, PATCH = 56, 14
SIZES = [(56, 56), (100, 250), (300, 90), (37, 400), (640, 480)]
PROMPT = "USER: <image>\nHow many cats are on the table? ASSISTANT:"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def their_processor(vision: str) -> LlavaNextProcessor:
    size = {"height": VIEW, "width": VIEW}
    image_processor = LlavaNextImageProcessorPil(
        size=size, crop_size=size, image_grid_pinpoints=scaled_pinpoints(VIEW), do_center_crop=False
    )
    return LlavaNextProcessor(
        image_processor,
        plain_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
        num_additional_image_tokens=1 if vision == "clip" else 0,
        chat_template=TEMPLATE,
    )


def their_model(family: str, vision: str = "clip", **changes) -> LlavaNextForConditionalGeneration:
    text = tiny_text_config(family, **changes.pop("text", {}))
    config = LlavaNextConfig(
        vision_config=tiny_vision_config(vision, VIEW, PATCH).to_dict(),
        text_config=text.to_dict(),
        image_token_index=plain_tokenizer().convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=scaled_pinpoints(VIEW),
        vision_feature_select_strategy="default" if vision == "clip" else "full",
        **changes,
    )
    model = randomise(LlavaNextForConditionalGeneration(config), seed=7).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = plain_tokenizer().pad_token_id
    return model


def rename_saved(folder, layout: str) -> None:
    """Rewrite saved weights: `"published"` as before transformers 5, `"memory"` as modules are named today."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    assert "language_model.lm_head.weight" in weights or "language_model.model.norm.weight" in weights
    if layout == "published":
        weights = {key.replace("vision_tower.", "vision_tower.vision_model.", 1): v for key, v in weights.items()}
        weights["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if layout == "memory":
        plain = {key.replace("language_model.model.", "language_model.", 1): value for key, value in weights.items()}
        weights = {f"model.{key}".replace("model.language_model.lm_head", "lm_head"): v for key, v in plain.items()}
    save_file(weights, path, {"format": "pt"})


def save_source(folder, model, vision: str = "clip", tokenizer: bool = True, layout: str = "saved"):
    model.save_pretrained(folder)
    processor = their_processor(vision)
    if tokenizer:
        processor.save_pretrained(folder)
    else:
        processor.image_processor.save_pretrained(folder)
    if layout != "saved":
        rename_saved(folder, layout)
    return processor


def load(folder):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def compare(theirs, processor, ours, our_processor) -> None:
    """Logits on five sizes, greedy text on two."""
    for number, size in enumerate(SIZES):
        image = random_image(*size, seed=number)
        expected = processor(images=image, text=PROMPT, return_tensors="pt")
        batch = make_batch(our_processor, [(PROMPT, [image])], resize_backend="pillow")
        assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
        logits = theirs(**expected).logits
        torch.testing.assert_close(ours(**batch).logits[..., : logits.shape[-1]], logits, atol=1e-4, rtol=0)
        if number in (1, 4):
            options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [our_processor.image_token_id]}
            batch = make_batch(our_processor, [(PROMPT, [image])])  # torch resizes: the text stays
            assert ours.generate(**batch, **options).tolist() == theirs.generate(**expected, **options).tolist()


@pytest.mark.parametrize("layout", ["saved", "published", "memory"])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_each_text_family(tmp_path, family, layout):
    theirs = their_model(family)
    processor = save_source(tmp_path / "source", theirs, layout=layout)
    report = convert_llava_next(tmp_path / "source", tmp_path / "out")
    assert report["added_rows"] == 0
    compare(theirs, processor, load(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out"))


def test_a_siglip_tower(tmp_path):
    theirs = their_model("qwen2", "siglip", projector_hidden_act="silu", multimodal_projector_bias=False)
    processor = save_source(tmp_path / "source", theirs, "siglip", layout="published")
    convert_llava_next(tmp_path / "source", tmp_path / "out")
    compare(theirs, processor, load(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize("extra_head", [False, True])
def test_tied_embeddings(tmp_path, extra_head):
    theirs = their_model("qwen2", tie_word_embeddings=True, text={"tie_word_embeddings": True})
    assert theirs.lm_head.weight is theirs.model.language_model.embed_tokens.weight
    processor = save_source(tmp_path / "source", theirs)
    if extra_head:
        path = tmp_path / "source" / "model.safetensors"
        weights = load_file(path)
        save_file({**weights, "lm_head.weight": theirs.lm_head.weight.clone()}, path, {"format": "pt"})
    convert_llava_next(tmp_path / "source", tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    compare(theirs, processor, load(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out"))


@torch.no_grad()
def test_without_a_tokenizer(tmp_path):
    theirs = their_model("mistral")
    processor = save_source(tmp_path / "source", theirs, tokenizer=False)
    convert_llava_next(tmp_path / "source", tmp_path / "out")
    ours, image_processor = load(tmp_path / "out"), AutoImageProcessor.from_pretrained(tmp_path / "out")
    image = random_image(100, 250)
    expected = processor(images=image, text=PROMPT, return_tensors="pt")
    views = image_processor(image, return_tensors="pt", resize_backend="pillow")
    logits = ours(input_ids=expected["input_ids"], **views).logits
    torch.testing.assert_close(logits, theirs(**expected).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_an_image_token_beyond_the_vocabulary(tmp_path):
    theirs = their_model("llama")
    save_source(tmp_path / "source", theirs, tokenizer=False)
    values = json.loads((tmp_path / "source" / "config.json").read_text())
    rows = values["text_config"]["vocab_size"]
    write_json(tmp_path / "source" / "config.json", {**values, "image_token_index": rows})
    report = convert_llava_next(tmp_path / "source", tmp_path / "out")
    assert (report["added_rows"], report["image_token_id"]) == (1, rows)
    assert load(tmp_path / "out").get_input_embeddings().weight.shape[0] == rows + 1


@torch.no_grad()
def test_a_budget_works_without_training(tmp_path):
    save_source(tmp_path / "source", their_model("llama"))
    convert_llava_next(tmp_path / "source", tmp_path / "out")
    model, processor = load(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    image = random_image(300, 300)
    full = make_batch(processor, [(PROMPT, [image])])
    small = make_batch(processor, [(PROMPT, [image])], max_image_tokens=30)
    assert (small["input_ids"] == processor.image_token_id).sum() == 30 < full["view_positions"][0, 5]
    assert torch.isfinite(model(**small).logits).all()
    text = model.generate(**small, max_new_tokens=4, do_sample=False)
    assert processor.image_token_id not in text[0, small["input_ids"].shape[1] :].tolist()


def test_the_chat_template_and_its_openings_come_along(tmp_path):
    save_source(tmp_path / "source", their_model("llama"))
    convert_llava_next(tmp_path / "source", tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.chat_template == TEMPLATE
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert processor.tokenizer.decode(config["answer_prefix_ids"]).strip() == "assistant:"
    assert processor.tokenizer.decode(config["question_prefix_ids"]).strip() == "user:"


def change_config(folder, **changes) -> None:
    values = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**values, **changes})


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full'"),
        ({"vision_feature_layer": [-2, -1]}, "joins several layers"),
        ({"image_grid_pinpoints": [[112, 56]]}, "differ; make them agree"),
        ({"image_token_index": 5}, "image_token_index=5"),
        ({"model_type": "llava"}, "'llava'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_has_no_counterpart_is_refused(tmp_path, changes, match):
    save_source(tmp_path / "source", their_model("llama"))
    change_config(tmp_path / "source", **changes)
    with no_output(tmp_path), pytest.raises(ConversionError, match=match):
        convert_llava_next(tmp_path / "source", tmp_path / "out")

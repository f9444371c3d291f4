"""New models from two halves; checkpoints as self-contained folders; model cards."""

import json
import re
from pathlib import Path

import pytest
import torch
from convert_tools import GOLDEN, convert_slime, no_output, tensors_of, tokenizer_without_image_token
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    SiglipVisionModel,
)

from builders import (
    make_batch,
    random_image,
    randomise,
    tiny_config,
    tiny_convnext,
    tiny_model,
    tiny_processor,
    tiny_text_config,
    tiny_vision_config,
)
from hires_lmm import PRESETS
from hires_lmm.conversion import ConversionError, compose, export, preset_processor
from hires_lmm.conversion.cards import TEMPLATE, token_table
from hires_lmm.conversion.compose import with_own_marks


CARDS = Path(__file__).parents[2] / "model_cards"
PROMPT = "<image>\nHow many cats?"


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A whole CLIP model with its image processor, and a language model with its tokenizer."""
    root = tmp_path_factory.mktemp("halves")
    text_side = CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision_config = tiny_vision_config("clip", hidden_size=128)
    clip = CLIPModel(CLIPConfig(text_config=text_side.to_dict(), vision_config=vision_config.to_dict()))
    randomise(clip).save_pretrained(root / "clip")
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    (root / "clip" / "preprocessor_config.json").write_text(json.dumps(values))
    tokenizer = tokenizer_without_image_token()
    config = tiny_text_config("qwen2", vocab_size=len(tokenizer))
    randomise(AutoModelForCausalLM.from_config(config)).save_pretrained(root / "text")
    tokenizer.save_pretrained(root / "text")
    return root / "clip", root / "text"


@pytest.mark.parametrize("with_tower", [False, True])
def test_separators_are_tokens_of_the_language_model(halves, tmp_path, with_tower):
    """Presets name them by their ids in Llama 2; in another vocabulary these are other words."""
    towers = {"extra_towers": {"fine": halves[0]}} if with_tower else {}
    compose(*halves, "llava_uhd", tmp_path / "uhd", **towers)
    config = AutoConfig.from_pretrained(tmp_path / "uhd")
    vocabulary = AutoProcessor.from_pretrained(tmp_path / "uhd").tokenizer.get_vocab()
    assert config.connector_config.layout["order"] == ["crops", "global", *["detail"] * with_tower]
    assert {name: each["value"] for name, each in config.connector_config.layout["separators"].items()} == {
        "comma": [vocabulary[","]],
        "newline": [vocabulary["Ċ"]],
    }


def test_the_ids_of_presets_are_those_of_llama_2():
    llama_2 = {"<0x0A>": 13, "▁,": 1919, ",": 29892}
    for preset in ("slime_release", "llava_uhd"):
        assert with_own_marks({}, preset, llama_2) == {}
    with pytest.raises(ConversionError, match="no token for the separator 'newline' of the preset 'llava_uhd'"):
        with_own_marks({}, "llava_uhd", {",": 5})
    assert with_own_marks({}, "llava_next", {}) == {}


@pytest.mark.parametrize("preset", sorted(PRESETS))
@torch.no_grad()
def test_each_preset_is_ready_to_train(halves, tmp_path, preset):
    queries = {"part": "query_compressor", "on": "all" if preset == "monkey" else "crops", "num_queries": 4}
    changes = {"connector_config": {"view_ops": [queries]}} if preset in ("slime", "slime_release", "monkey") else {}
    if preset == "mg_llava":
        tower = AutoModel.from_config(AutoConfig.for_model(**tiny_convnext()))
        randomise(tower).save_pretrained(tmp_path / "hires")
        changes["extra_towers"] = {"hires": tmp_path / "hires"}
    compose(*halves, preset, tmp_path / "out", chat_template="chatml", **changes)
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_processor.image_mean == (0.1, 0.2, 0.3)
    assert model.config.answer_prefix_ids
    batch = make_batch(processor, [(PROMPT, [random_image(90, 130)])])
    assert torch.isfinite(model(**batch).logits).all()
    tower, text = CLIPModel.from_pretrained(halves[0]).vision_model, AutoModelForCausalLM.from_pretrained(halves[1])
    ours = model.model.vision_tower.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in tower.state_dict().items())
    rows = text.lm_head.weight.shape[0]
    assert torch.equal(model.lm_head.weight[:rows], text.lm_head.weight)
    assert model.lm_head.weight.shape[0] == max(rows, processor.image_token_id + 1)
    assert model.generation_config.suppress_tokens == [processor.image_token_id]


def test_composing_twice_gives_the_same_model(halves, tmp_path):
    for name in ("one", "two"):
        compose(*halves, "llava_next", tmp_path / name, dtype="bfloat16")
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert {value.dtype for value in one.values()} == {torch.bfloat16}
    weight = one["model.connector.adapter.mlp.linear_1.weight"].float()
    assert 0.01 < weight.std() < 0.03


@pytest.mark.parametrize("has_head", [True, False])
def test_a_siglip_tower_alone(halves, tmp_path, has_head):
    vision = SiglipVisionModel(tiny_vision_config("siglip", vision_use_head=has_head))
    vision.save_pretrained(tmp_path / "siglip")
    compose(tmp_path / "siglip", halves[1], "llava_next", tmp_path / "out")
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_processor.image_mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "arguments, match",
    [
        (("clip", "text", "nonsense"), "Unknown preset"),
        (("text", "text", "slime"), "vision towers can be"),
        (("clip", "clip", "slime"), "no plain language model"),
        (("clip", "nowhere", "slime"), "neither a folder nor a Hub"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_halves_are_refused(halves, tmp_path, arguments, match):
    folders = {"clip": halves[0], "text": halves[1], "nowhere": "nowhere"}
    vision, text, preset = arguments
    with no_output(tmp_path), pytest.raises(ConversionError, match=match):
        compose(folders[vision], folders[text], preset, tmp_path / "out")


# ---- export


@torch.no_grad()
def test_export_of_a_bare_checkpoint(tmp_path):
    config = tiny_config("llava_next")
    model, processor = tiny_model(config), tiny_processor(config, "chatml")
    model.save_pretrained(tmp_path / "source", max_shard_size="50KB")
    processor.save_pretrained(tmp_path / "source")
    for path in (tmp_path / "source").glob("*.py"):
        path.write_text("raise RuntimeError('stale code')")
    export(tmp_path / "source", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "config.json", "processor_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not any("stale" in path.read_text() for path in (tmp_path / "out").glob("*.py"))
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    batch = make_batch(AutoProcessor.from_pretrained(tmp_path / "out"), [(PROMPT, [random_image(90, 130)])])
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_export_without_a_processor_writes_one(tmp_path):
    tiny_model(tiny_config("llava_next")).save_pretrained(tmp_path / "source")
    export(tmp_path / "source", tmp_path / "out")
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_export_refuses_what_is_not_ours(tmp_path):
    with no_output(tmp_path), pytest.raises(ConversionError, match="convert it first"):
        export(GOLDEN, tmp_path / "out")
    model = tiny_model(tiny_config("llava_next"))
    model.model.save_pretrained(tmp_path / "base")
    with no_output(tmp_path), pytest.raises(ConversionError, match=r"missing\s+model\.vision_tower"):
        export(tmp_path / "base", tmp_path / "out")


def test_export_keeps_a_card_and_the_report(tmp_path):
    convert_slime(GOLDEN, tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("mine")
    export(tmp_path / "source", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert (tmp_path / "out" / "conversion_report.json").is_file()


# ---- cards


def test_the_card_counts_tokens_and_leaves_unknown_facts_out(tmp_path):
    convert_slime(GOLDEN, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 640 x 480 | 5 | 1153 | 578 |" in card  # 576 + 1 + 4 * 144; 576 + 1 + 1
    assert "licence" not in card and "None" not in card and "{{" not in card
    assert "openai/clip-vit-large-patch14-336" in card and "has no tokenizer" in card
    assert not re.search(r"\n{3,}", card)


def test_the_cards_of_the_published_models():
    names = {path.name for path in CARDS.glob("*.md")}
    assert {"slime-7b.md", "slime-8b.md", "slime-13b.md", "slime-70b.md", "template.md"} <= names
    assert (CARDS / "template.md").read_text() == TEMPLATE.read_text()
    for name in ("slime-7b.md", "slime-8b.md", "slime-13b.md", "slime-70b.md"):
        text = (CARDS / name).read_text()
        assert "hires-lmm convert slime" in text and "| 640 x 480 | 5 | 1153 | 578 |" in text


@pytest.mark.parametrize("card, preset", [("vlsa", "vlsa"), ("fusion-llama2-7b", "fusion")])
def test_the_numbers_of_a_card_are_those_of_its_preset(card, preset):
    text = (CARDS / f"{card}.md").read_text()
    for row in token_table(preset_processor(preset).image_processor):
        assert f"| {row['width']} x {row['height']} | {row['views']} | {row['tokens']} | {row['smallest']} |" in text
    for path in re.findall(r"examples/[\w/.]+", text):
        assert (CARDS.parent / path).is_file()


@torch.no_grad()
def test_further_towers_are_composed_by_name(halves, tmp_path):
    """A ConvNeXt classifier loses its classes; the tokens of the tower enter behind the others."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    sizes = {"image_size": 64, "patch_size": 4, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 2, 1]}
    fine = randomise(ConvNextForImageClassification(ConvNextConfig(**sizes)))
    fine.save_pretrained(tmp_path / "fine")
    compose(*halves, "llava_next", tmp_path / "out", chat_template="chatml", extra_towers={"fine": tmp_path / "fine"})
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ours = model.model.extra_towers["fine"].state_dict()
    assert all(torch.equal(ours[key], value) for key, value in fine.convnext.state_dict().items())
    assert model.config.connector_config.layout["order"] == ["global", "crops", "detail"]
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    batch = make_batch(processor, [(PROMPT, [random_image(90, 130)])])
    assert batch["pixel_values_fine"].shape == (1, 3, 64, 64)
    assert torch.isfinite(model(**batch).logits).all()
    compose(*halves, "slime", tmp_path / "b", extra_towers={"fine": halves[0]}, chat_template="chatml")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "b").model
    for name, value in again.vision_tower.state_dict().items():
        assert torch.equal(again.extra_towers["fine"].state_dict()[name], value)
    with pytest.raises(ConversionError, match="two towers, 'b' and another"):
        compose(*halves, "llava_next", tmp_path / "c", extra_towers={"a": halves[0], "b": halves[0]})

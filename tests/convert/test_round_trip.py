"""There and back is the identity; and a tokenizer comes along."""

import json

import pytest
import torch
from convert_tools import (
    GOLDEN,
    convert_slime,
    convert_to_slime,
    golden_config,
    tensors_of,
    tokenizer_without_image_token,
    write_json,
    write_released,
)
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from builders.tiny import random_image
from hires_lmm.conversion import ConversionError
from hires_lmm.modeling.bases_hires_lmm import HiResLmmHead, HiResLmmPositionPlan
from hires_lmm.modeling.parts_hires_lmm import HEADS, POSITION_PLANS


def equal(ours: dict, wanted: dict) -> bool:
    same = [ours[k].dtype == v.dtype and torch.equal(ours[k], v) for k, v in wanted.items() if k in ours]
    return set(ours) == set(wanted) and all(same)


@pytest.fixture(scope="module")
def there_and_back(tmp_path_factory):
    root = tmp_path_factory.mktemp("round")
    report = convert_slime(GOLDEN, root / "out", max_shard_bytes=700_000)
    convert_to_slime(root / "out", root / "back")
    return root, report


def test_every_tensor_comes_back(there_and_back):
    root, report = there_and_back
    assert report["added_rows"] == 1
    assert equal(tensors_of(root / "back"), tensors_of(GOLDEN))


def test_the_configuration_comes_back(there_and_back):
    root, _ = there_and_back
    back, wanted = json.loads((root / "back" / "config.json").read_text()), golden_config()
    assert {key: back[key] for key in wanted} == wanted


def test_there_again_gives_the_same_checkpoint(there_and_back, tmp_path):
    root, _ = there_and_back
    convert_slime(root / "back", tmp_path / "out")
    assert equal(tensors_of(tmp_path / "out"), tensors_of(root / "out"))
    names = ("config.json", "preprocessor_config.json")
    assert all((tmp_path / "out" / name).read_text() == (root / "out" / name).read_text() for name in names)


def test_the_report_names_every_source_tensor(there_and_back):
    root, report = there_and_back
    saved = json.loads((root / "out" / "conversion_report.json").read_text())
    assert saved == json.loads(json.dumps(report))
    assert sorted(record["source"] for record in report["tensors"]) == sorted(tensors_of(GOLDEN))
    ours = tensors_of(root / "out")
    for record in report["tensors"]:
        for target in record["targets"]:
            assert list(ours[target["name"]].shape) == target["shape"]
    assert sorted(t["name"] for record in report["tensors"] for t in record["targets"]) == sorted(ours)
    kinds = {record["source"]: record["transformation"] for record in report["tensors"]}
    assert kinds["model.mm_projector.attn.attn.in_proj_weight"] == "split rows"
    assert kinds["lm_head.weight"] == "rename; 1 row(s) added for the image token"


def test_a_trained_checkpoint_without_the_report_goes_back(there_and_back, tmp_path):
    root, _ = there_and_back
    model = AutoModelForImageTextToText.from_pretrained(root / "out")
    model.save_pretrained(tmp_path / "trained")
    convert_to_slime(tmp_path / "trained", tmp_path / "back")
    back, golden = tensors_of(tmp_path / "back"), tensors_of(GOLDEN)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in golden.items()}


@pytest.mark.parametrize("slot", ["token_ops", "layer_ops", "position_plan", "heads"])
def test_a_model_the_released_code_cannot_run_does_not_go_back(there_and_back, tmp_path, slot, monkeypatch):
    monkeypatch.setitem(POSITION_PLANS, "plan", HiResLmmPositionPlan)
    monkeypatch.setitem(HEADS, "head", HiResLmmHead)
    root, _ = there_and_back
    model = AutoModelForImageTextToText.from_pretrained(root / "out")
    connector = model.config.connector_config
    if slot == "token_ops":
        connector.token_ops[0]["keep"] = {"rule": "budget"}
    elif slot == "layer_ops":
        connector.layer_ops = [{"part": "keep_after"}]
    elif slot == "position_plan":
        connector.position_plan = {"part": "plan"}
    else:
        connector.heads = {"score": {"part": "head", "token_id": 5}}
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ConversionError, match=slot):
        convert_to_slime(tmp_path / "other", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_the_added_row_is_the_mean_and_suppressed(there_and_back):
    root, report = there_and_back
    table = tensors_of(root / "out")["model.language_model.embed_tokens.weight"]
    torch.testing.assert_close(table[-1].float(), table[:-1].float().mean(0), atol=1e-3, rtol=0)
    generation = GenerationConfig.from_pretrained(root / "out")
    assert generation.suppress_tokens == [report["image_token_id"]] == [2048]


# ---- with a tokenizer


def source_with_tokenizer(folder, rows: int, vicuna: bool = False):
    """The golden checkpoint with a tiny tokenizer; `rows` of embeddings."""
    tokenizer = tokenizer_without_image_token()
    tensors = tensors_of(GOLDEN)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:rows].clone()
    write_released(folder, tensors, vocab_size=rows, seperator=7, pad_token_id=2)
    tokenizer.save_pretrained(folder)
    if vicuna:
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace("<|start_header_id|>", "<|another_token|>"))
    write_json(folder / "generation_config.json", {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 1})
    return tokenizer


@pytest.mark.parametrize("spare", [0, 5], ids=["full vocabulary", "spare rows"])
def test_the_image_token_takes_a_spare_row_or_a_new_one(tmp_path, spare):
    plain = tokenizer_without_image_token()
    tokenizer = source_with_tokenizer(tmp_path / "source", len(plain) + spare)
    report = convert_slime(tmp_path / "source", tmp_path / "out")
    assert report["added_rows"] == (0 if spare else 1)
    assert report["image_token_id"] == len(tokenizer)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_token_id == len(tokenizer)
    text = "USER: What is in the picture? ASSISTANT:"
    assert processor.tokenizer(text).input_ids == tokenizer(text).input_ids
    convert_to_slime(tmp_path / "out", tmp_path / "back")
    assert equal(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "source"))


@pytest.mark.parametrize("vicuna", [False, True], ids=["llama3", "vicuna"])
def test_prompts_are_those_of_the_release(tmp_path, vicuna):
    tokenizer = tokenizer_without_image_token()
    source_with_tokenizer(tmp_path / "source", len(tokenizer), vicuna)
    convert_slime(tmp_path / "source", tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    content = [{"type": "image"}, {"type": "text", "text": "How many cats?"}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "Two."}]
    text = processor.apply_chat_template(chat)
    if vicuna:
        system = (
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        )
        assert text == f"<s>{system} USER: <image>\nHow many cats? ASSISTANT: Two.</s>"
    else:
        start, end = "<|start_header_id|>", "<|end_header_id|>\n\n"
        turns = f"{start}user{end}<image>\nHow many cats?<|eot_id|>{start}assistant{end}Two.<|eot_id|>"
        assert text == f"<s>{turns}"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    opened = processor.tokenizer.decode(config["answer_prefix_ids"])
    assert opened.strip() == ("ASSISTANT:" if vicuna else "<|start_header_id|>assistant<|end_header_id|>")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    ends = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert generation["eos_token_id"] == (1 if vicuna else [1, ends])
    assert "temperature" not in generation


@torch.no_grad()
def test_a_converted_model_answers_a_chat_and_never_says_image(tmp_path):
    tokenizer = tokenizer_without_image_token()
    source_with_tokenizer(tmp_path / "source", len(tokenizer))
    convert_slime(tmp_path / "source", tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    wish = torch.zeros(model.config.text_config.vocab_size)
    wish[processor.image_token_id] = 1e4
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + wish)
    content = [{"type": "image", "image": random_image(90, 70)}, {"type": "text", "text": "How many cats?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert processor.image_token_id not in output[0, inputs["input_ids"].shape[1] :].tolist()


def test_the_way_back_takes_the_image_token_out_of_the_tokenizer(tmp_path):
    tokenizer = tokenizer_without_image_token()
    source_with_tokenizer(tmp_path / "source", len(tokenizer))
    convert_slime(tmp_path / "source", tmp_path / "out")
    convert_to_slime(tmp_path / "out", tmp_path / "back")
    saved = json.loads((tmp_path / "back" / "tokenizer.json").read_text())
    assert "<image>" not in {token["content"] for token in saved["added_tokens"]}
    convert_slime(tmp_path / "back", tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_text() == (tmp_path / "out" / "tokenizer.json").read_text()

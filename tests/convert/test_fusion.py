"""Released fusion checkpoints: true sizes without weights, golden values after the conversion, and the way back."""

import json
import time

import pytest
import torch
from convert_tools import leftovers, tensors_of, write_json
from fusion_tools import (
    golden_inputs,
    released_config,
    released_weights,
    write_released_fusion,
)
from test_true_sizes import language_shapes, tower_shapes
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from typer.testing import CliRunner

from builders_fusion import golden_cases, golden_encoder, golden_tensors
from hires_lmm.cli import app
from hires_lmm.conversion import ConversionError, convert_fusion
from hires_lmm.conversion.checkpoint import model_config, model_shapes
from hires_lmm.conversion.fusion import add_unused_norm, key_table, settings_of
from hires_lmm.conversion.fusion_source import question_tokens, read_released
from hires_lmm.conversion.mapping import check_complete, map_backward, map_forward
from hires_lmm.conversion.tensors import Entry, entry_of
from hires_lmm.training.objectives import Call, Contrastive, StepValues
from hires_lmm.training.objectives.contrastive import AnswerColumn


IMAGE_TOKEN = 64  # the language model's golden vocabulary ends at 63


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    work = tmp_path_factory.mktemp("fusion")
    convert_fusion(write_released_fusion(work / "released"), work / "ours")
    return work / "ours"


@pytest.fixture
def model(converted):
    loaded = AutoModelForImageTextToText.from_pretrained(converted, attn_implementation="eager").eval()
    loaded.config.answer_prefix_ids, loaded.config.question_prefix_ids = [59, 60], [58, 60]  # golden words, not ours
    return loaded


@pytest.fixture(scope="module")
def inputs(converted) -> dict:
    """The golden batch; its questions are read with the tokenizer that the conversion keeps."""
    conversations = []
    for chat in golden_cases()["c_fusion"]["chats"]:
        roles = ["user", "assistant"] * len(chat)
        parts = [[{"type": "text", "text": text}] for text in chat]
        parts[0].insert(0, {"type": "image"})
        conversations.append([{"role": role, "content": part} for role, part in zip(roles, parts, strict=False)])
    processor = AutoProcessor.from_pretrained(converted)
    tokenizer = AutoTokenizer.from_pretrained(converted / "clip")
    return {**golden_inputs(IMAGE_TOKEN), "question_ids": processor.question_ids(conversations, tokenizer)}


def test_slots_logits_and_loss_are_those_of_the_released_code(model, inputs):
    golden, seen = golden_tensors(), []
    fusion = model.model.connector.token_ops[0]
    fusion.register_forward_hook(lambda module, args, output: seen.append(output[0].features))
    with torch.no_grad():
        output = model(**inputs)
    assert (seen[0] - golden["output.slots_projected"]).abs().max() <= 1e-5
    keep = inputs["attention_mask"].bool()
    logits = output.logits[keep][:, :IMAGE_TOKEN]
    assert (logits[::2] - golden["output.llm_logits_valid"]).abs().max() <= 1e-4
    targets = inputs["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(output.logits[:, :-1, :IMAGE_TOKEN][targets >= 0], targets[targets >= 0])
    assert loss.item() == pytest.approx(golden["output.llm_loss"].item(), abs=1e-4)


def test_contrastive_loss_and_gradients_are_those_of_the_released_code(model, inputs):
    golden, calls = golden_tensors(), []
    contrastive = Contrastive(golden_encoder(golden), 64, end_token=2, max_length=48, block_tokens=[*range(50, 55)])
    contrastive.projection.weight.data.copy_(golden["weight.imgque_projection.weight"])
    contrastive.logit_scale.data.copy_(golden["weight.logit_scale"])
    watched = contrastive.watch(model)["fusion"]
    watched.register_forward_hook(lambda module, args, output: calls.append(Call(args, {}, output)))
    model.train()(**inputs)
    kinds, ids = golden["input.ans_input_tps"], golden["input.ans_input_ids"].long()
    answers = [row[kind == 32] for row, kind in zip(ids, kinds, strict=True)]
    column = AnswerColumn(None).join([answers[:1], answers[1:]])
    loss = contrastive(StepValues({"fusion": calls}, {"answers": column}, inputs, True, model.model))
    assert loss.item() == pytest.approx(golden["output.cl.loss"].item(), abs=1e-4)
    loss.backward()
    connector = model.model.connector
    for found, name in (
        (connector.layout.separators.view_end.grad, "clip_model.vision_model.token_LF"),
        (connector.token_ops[0].model.norm.weight.grad, "imgque_model.norm.weight"),
        (contrastive.projection.weight.grad, "imgque_projection.weight"),
        (contrastive.encoder.text_projection.weight.grad, "clip_model.text_projection.weight"),
        (contrastive.logit_scale.grad, "logit_scale"),
    ):
        assert (found - golden[f"output.cl.grad.{name}"].reshape(found.shape)).abs().max() <= 1e-4, name


def true_size_entries(num_queries: int) -> dict[str, Entry]:
    """A released 7B checkpoint: CLIP-L/14-336, 20 fusion layers, CLIP's words and one for each slot, Llama-2-7B."""
    shapes = language_shapes(4096, 11008, 32, 32, 32, 32000)
    shapes = {f"llm_backbone.{key}": shape for key, shape in shapes.items()}
    tower = {key.replace("model.vision_tower.vision_tower.vision_model.", ""): s for key, s in tower_shapes().items()}
    vision = "imgque_backbone.clip_model.vision_model."
    shapes |= {vision + key.replace("post_layernorm", "pos_layrnorm"): shape for key, shape in tower.items()}
    shapes |= {f"{vision}token_LF": (1, 1, 1024), f"{vision}vision_embed_merge.weight": (1024, 1024, 3, 3)}
    stack = language_shapes(1024, 4096, 20, 16, 16, 49408 + num_queries - 1)
    stack = {key.removeprefix("model."): shape for key, shape in stack.items() if key != "lm_head.weight"}
    shapes |= {f"imgque_backbone.imgque_model.{key}": shape for key, shape in stack.items()}
    shapes["fusion_backbone.imgque_proj.weight"] = (4096, 1024)

    def unread() -> torch.Tensor:
        raise AssertionError("no weight may be read here")

    return {key: Entry(shape, torch.bfloat16, unread, "") for key, shape in shapes.items()}


@pytest.mark.parametrize("num_queries", [1, 256, 768])
def test_every_key_is_used_once_and_fits_at_true_sizes(num_queries, tmp_path):
    start = time.perf_counter()
    entries = true_size_entries(num_queries)
    values = released_config(length_que_end=num_queries, length_que_end_short=min(8, num_queries))
    vision = values["imgque_config"]["vision_config"]
    vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"image_size": 336, "patch_size": 14, "vembed_hidden_size": 1024}
    values["imgque_config"] |= {"num_hidden_layers": 20, "vocab_size": 49408 + num_queries - 1}
    del values["imgque_config"]["imgque_config"]  # then the sizes are those that the released class derives
    values["llm_config"] |= {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008}
    values["llm_config"] |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
    write_json(tmp_path / "config.json", values)
    released = read_released(tmp_path)
    rules = key_table([*range(49408, 49408 + num_queries - 1), 49407])
    config = model_config(
        torch.bfloat16,
        vision_config=released.vision_config,
        text_config=released.text_config,
        image_token_id=31999,
        **settings_of(released),
    )
    mapped = map_forward(rules, entries)
    back = map_backward(rules, dict(mapped.entries))
    add_unused_norm(mapped, config)
    check_complete(mapped, model_shapes(config), rules)
    assert sorted(record["source"] for record in mapped.records if record["source"]) == sorted(entries)
    targets = [target for record in mapped.records for target in record["targets"]]
    assert len(targets) == len(set(targets)) == len(mapped.entries)
    stack = [e for key, e in mapped.entries.items() if key.startswith("model.connector.token_ops.0.model.")]
    assert sum(entry.meta().numel() for entry in stack) == pytest.approx(386e6, rel=0.01)  # 335.5 M and 50.6 M words
    assert back.problems == []
    assert {key: entry.shape for key, entry in back.entries.items()} == {k: e.shape for k, e in entries.items()}
    assert time.perf_counter() - start < 20


def test_the_way_back_is_tensor_for_tensor(converted):
    ours = {key: entry_of(tensor, "") for key, tensor in tensors_of(converted).items()}
    ours = {key: entry for key, entry in ours.items() if not key.startswith("model.vision_tower.post_layernorm.")}
    back = map_backward(key_table([50, 51, 52, 53, 54, 2]), ours)
    assert back.problems == []
    for key, tensor in released_weights().items():
        found = back.entries[key].read()
        assert torch.equal(found[: len(tensor)] if found.ndim else found, tensor), key
    queries = tensors_of(converted)["model.connector.token_ops.0.queries"]
    changed = {**ours, "model.connector.token_ops.0.queries": entry_of(queries + 1.0, "")}
    table = map_backward(key_table([50, 51, 52, 53, 54, 2]), changed)
    table = table.entries["imgque_backbone.imgque_model.embed_tokens.weight"].read()
    assert torch.equal(table[[50, 51, 52, 53, 54, 2]], queries + 1.0)


def test_slots_without_tokens_of_their_own_are_all_the_padding_token(tmp_path):
    folder = write_released_fusion(tmp_path / "released", append_special_padding=False)
    assert question_tokens(folder, read_released(folder))[1] == [3, 3, 3, 3, 3, 2]
    convert_fusion(folder, tmp_path / "ours")
    queries = tensors_of(tmp_path / "ours")["model.connector.token_ops.0.queries"]
    words = released_weights()["imgque_backbone.imgque_model.embed_tokens.weight"]
    assert torch.equal(queries, words[[3, 3, 3, 3, 3, 2]])


def test_report_card_and_command(tmp_path):
    folder = write_released_fusion(tmp_path / "released")
    result = CliRunner().invoke(app, ["convert", "fusion", str(folder), str(tmp_path / "ours")])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "ours" / "conversion_report.json").read_text())
    assert report["slots"] == [50, 51, 52, 53, 54, 2] and report["image_token_id"] == IMAGE_TOKEN
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "6 tokens an image" in card and "'part': 'fusion', 'num_queries': 6" in card
    assert (tmp_path / "ours" / "clip" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llava"}, "describes 'llava' with"),
        ({"fusion_name": "imghd_simple_linear"}, "with 'imghd_simple_linear'"),
        ({"length_que_end": 7}, "The slots need tokens up to id 55, but the fusion transformer has 55"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path, changes, message):
    folder = write_released_fusion(tmp_path / "released", **changes)
    with pytest.raises(ConversionError, match=message):
        convert_fusion(folder, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_switches_of_the_tower_without_a_counterpart_are_refused(tmp_path):
    folder = write_released_fusion(tmp_path / "released")
    for name, value in (("enable_token_crlf", False), ("vembed_merge_stride", 1), ("vembed_hidden_size", 32)):
        values = released_config()
        values["imgque_config"]["vision_config"][name] = value
        write_json(folder / "config.json", values)
        with pytest.raises(ConversionError, match=name):
            convert_fusion(folder, tmp_path / "out")
    (folder / "clip" / "tokenizer.json").unlink()
    write_json(folder / "config.json", released_config())
    with pytest.raises(ConversionError, match="no tokenizer in its folder 'clip'"):
        convert_fusion(folder, tmp_path / "out")

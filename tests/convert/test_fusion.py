"""Released fusion checkpoints: true sizes without weights, and the way back; their numbers are in `tests/golden`."""

import json
import time

import pytest
import torch
from convert_tools import leftovers, tensors_of, write_json
from test_true_sizes import language_shapes, tower_shapes
from transformers import AutoProcessor, AutoTokenizer
from typer.testing import CliRunner

from golden.fusion import MODEL, released_config, released_weights, slots_of, write_released
from hires_lmm import HiResLmmConfig
from hires_lmm.cli import app
from hires_lmm.conversion import ConversionError, convert_fusion
from hires_lmm.conversion.configs import model_shapes
from hires_lmm.conversion.fusion import key_table, settings_of, unused_norm
from hires_lmm.conversion.fusion_source import question_tokens, read_released
from hires_lmm.conversion.mapping import check_complete, map_backward, map_forward
from hires_lmm.conversion.pipeline import add_tensors
from hires_lmm.conversion.tensors import Entry, entry_of


SLOTS = slots_of(MODEL)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    work = tmp_path_factory.mktemp("fusion")
    convert_fusion(write_released(work / "released"), work / "ours")
    return work / "ours"


def test_questions_are_read_with_the_tokenizer_that_is_kept(converted):
    processor = AutoProcessor.from_pretrained(converted)
    tokenizer = AutoTokenizer.from_pretrained(converted / "clip")
    chats = [["w1 w2 w3 w4", "w5"], ["w8 w9", "w10", "w13 w14 w15", "w16"]]
    conversations = []
    for chat in chats:
        parts = [[{"type": "text", "text": text}] for text in chat]
        parts[0].insert(0, {"type": "image"})
        roles = ["user", "assistant"] * len(chat)
        conversations.append([{"role": role, "content": part} for role, part in zip(roles, parts, strict=False)])
    ids = processor.question_ids(conversations, tokenizer)
    assert ids.tolist() == [[[5, 6, 7, 8], [-2] * 4], [[12, 13, -1, -1], [17, 18, 19, -1]]]


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
    config = HiResLmmConfig(
        dtype=torch.bfloat16,
        vision_config=released.vision_config,
        text_config=released.text_config,
        image_token_id=31999,
        **settings_of(released),
    )
    mapped = map_forward(rules, entries)
    back = map_backward(rules, dict(mapped.entries))
    add_tensors(mapped, unused_norm(config))
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
    back = map_backward(key_table(SLOTS), ours)
    assert back.problems == []
    for key, tensor in released_weights().items():
        found = back.entries[key].read()
        assert torch.equal(found[: len(tensor)] if found.ndim else found, tensor), key
    queries = tensors_of(converted)["model.connector.token_ops.0.queries"]
    changed = {**ours, "model.connector.token_ops.0.queries": entry_of(queries + 1.0, "")}
    table = map_backward(key_table(SLOTS), changed)
    table = table.entries["imgque_backbone.imgque_model.embed_tokens.weight"].read()
    assert torch.equal(table[SLOTS], queries + 1.0)


def test_slots_without_tokens_of_their_own_are_all_the_padding_token(tmp_path):
    folder = write_released(tmp_path / "released", append_special_padding=False)
    padding = [MODEL["query_pad"]] * (len(SLOTS) - 1) + [MODEL["query_eos"]]
    assert question_tokens(folder, read_released(folder))[1] == padding
    convert_fusion(folder, tmp_path / "ours")
    queries = tensors_of(tmp_path / "ours")["model.connector.token_ops.0.queries"]
    words = released_weights()["imgque_backbone.imgque_model.embed_tokens.weight"]
    assert torch.equal(queries, words[padding])


def test_report_card_and_command(tmp_path):
    folder = write_released(tmp_path / "released")
    result = CliRunner().invoke(app, ["convert", "fusion", str(folder), str(tmp_path / "ours")])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "ours" / "conversion_report.json").read_text())
    assert report["slots"] == SLOTS and report["image_token_id"] == MODEL["llm_vocab"]
    card = (tmp_path / "ours" / "README.md").read_text()
    assert f"{len(SLOTS)} tokens an image" in card and f"'part': 'fusion', 'num_queries': {len(SLOTS)}" in card
    assert (tmp_path / "ours" / "clip" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llava"}, "has model_type='llava', "),
        ({"fusion_name": "imghd_simple_linear"}, "fusion_name='imghd_simple_linear'; that of a released"),
        (
            {"length_que_end": 1 + len(SLOTS)},
            r"The slots need tokens up to id (\d+), but .* has \1",
        ),
    ],
)
def test_other_checkpoints_are_refused(tmp_path, changes, message):
    folder = write_released(tmp_path / "released", **changes)
    with pytest.raises(ConversionError, match=message):
        convert_fusion(folder, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_switches_of_the_tower_without_a_counterpart_are_refused(tmp_path):
    folder = write_released(tmp_path / "released")
    for name, value in (("enable_token_crlf", False), ("vembed_merge_stride", 1), ("vembed_hidden_size", 33)):
        values = released_config()
        values["imgque_config"]["vision_config"][name] = value
        write_json(folder / "config.json", values)
        with pytest.raises(ConversionError, match=name):
            convert_fusion(folder, tmp_path / "out")
    (folder / "clip" / "tokenizer.json").unlink()
    write_json(folder / "config.json", released_config())
    with pytest.raises(ConversionError, match="no tokenizer in its folder 'clip'"):
        convert_fusion(folder, tmp_path / "out")

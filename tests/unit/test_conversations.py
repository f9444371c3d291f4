"""Conversations in the LLaVA format and `messages` datasets, local and streamed."""

import json

import pytest

from builders.tiny import random_image, tiny_processor
from builders.training import slime_config
from hires_lmm.training import HiResLmmCollator
from hires_lmm.training.data.conversations import (
    LlavaConversations,
    load_conversations,
    read_llava_record,
)


RECORD = {
    "id": 7,
    "image": "one.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A lake."},
        {"from": "human", "value": "How deep?"},
        {"from": "gpt", "value": "Very."},
    ],
}
TEXT = {"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}


@pytest.fixture
def folder(tmp_path):
    random_image(60, 80).save(tmp_path / "one.png")
    (tmp_path / "data.json").write_text(json.dumps([RECORD, TEXT]))
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(record) for record in [RECORD, TEXT]) + "\n")
    messages = [{"id": str(r["id"]), "messages": read_llava_record(r, tmp_path)["messages"]} for r in [RECORD, TEXT]]
    (tmp_path / "messages.jsonl").write_text("\n".join(json.dumps(record) for record in messages) + "\n")
    return tmp_path


def test_a_record_becomes_messages(tmp_path):
    example = read_llava_record(RECORD, tmp_path)
    assert [message["role"] for message in example["messages"]] == ["user", "assistant"] * 2
    assert example["messages"][0]["content"] == [
        {"type": "image", "image": str(tmp_path / "one.png")},
        {"type": "text", "text": "\nWhat is it?"},
    ]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image": None}, "Record 7: .*1 places .* 0 images"),
        ({"image": ["a", "b"]}, "Record 7: .*1 places .* 2 images"),
        ({"conversations": []}, "Record 7 has no conversations"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "Record 7 has the turn"),
    ],
)
def test_malformed_records_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        read_llava_record({**RECORD, **changes})


def test_files_in_the_llava_format_are_read_and_streamed(folder):
    pytest.importorskip("datasets")
    whole = load_conversations(str(folder / "data.json"))
    assert isinstance(whole, LlavaConversations) and len(whole) == 2
    streamed = list(load_conversations(str(folder / "data.jsonl"), streaming=True))
    assert [row["id"] for row in streamed] == ["7", "t"]
    processor = tiny_processor(slime_config(), "chatml")
    collator = HiResLmmCollator(processor)
    first, second = collator([whole[0], whole[1]]), collator(streamed)
    assert (first["input_ids"] == second["input_ids"]).all() and (
        first["pixel_values"] == second["pixel_values"]
    ).all()
    with pytest.raises(ValueError, match="cannot be streamed"):
        load_conversations(str(folder / "data.json"), streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_messages_datasets_are_read_and_streamed(folder, streaming, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = load_conversations(str(folder / "messages.jsonl"), streaming=streaming)
    rows = [row for _, row in zip(range(2), rows, strict=True)]
    processor = tiny_processor(slime_config(), "chatml")
    expected = HiResLmmCollator(processor)(list(LlavaConversations(folder / "data.json")))
    batch = HiResLmmCollator(processor)(rows)
    assert all((batch[name] == expected[name]).all() for name in expected)
    datasets.Dataset.from_list([{"messages": TEXT["conversations"]}]).save_to_disk(tmp_path / "saved")
    assert next(iter(load_conversations(str(tmp_path / "saved"), streaming=streaming)))["messages"]
    datasets.Dataset.from_list([{"text": "x"}]).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="columns text, but no messages"):
        load_conversations(str(tmp_path / "other"))


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no file"):
        LlavaConversations(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        LlavaConversations(tmp_path / "bad.json")
    (tmp_path / "dict.json").write_text("{}")
    with pytest.raises(ValueError, match="list of records"):
        LlavaConversations(tmp_path / "dict.json")

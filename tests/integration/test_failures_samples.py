"""Broken samples in mid-stream: errors name them, and those that are left out are counted."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from builders import random_image
from builders.failures import STAGE, run_trainer
from builders.training import conversation, conversations, slime_parts
from hires_lmm.training import HiResLmmCollator
from hires_lmm.training.data.conversations import LlavaConversations, stream_llava


def write_bomb(file: Path) -> None:
    """A PNG file of a few bytes whose header promises 60000 × 60000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))


def broken_sample(kind: str, folder: Path) -> dict:
    """A sample that cannot be read, with an id."""
    file = folder / "picture.png"
    sample = {**conversation(7), "id": "seven", "images": [str(file)]}
    if kind in ("garbage", "empty"):
        file.write_bytes(b"no picture at all" * (kind == "garbage"))
    elif kind == "truncated":
        random_image(80, 80).save(file)
        os.truncate(file, file.stat().st_size // 2)
    elif kind == "bomb":
        write_bomb(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "number":
        sample["images"] = [12]
    elif kind == "none":
        sample["images"] = [None]
    elif kind == "nan":
        sample["images"] = [np.full((20, 20, 3), np.nan)]
    elif kind == "two images":
        sample["images"] = [str(file)] * 2
    elif kind == "no answer":
        sample["messages"], sample["images"] = [{"role": "user", "content": "Hello?"}], None
    elif kind == "bad messages":
        sample["messages"] = "not a list"
    elif kind == "bad role":
        sample["messages"] = [{"role": "wizard", "content": "x"}, *sample["messages"][1:]]
        sample["images"] = None
    return sample


KINDS = ["garbage", "empty", "truncated", "missing", "bomb", "folder", "number", "none", "nan", "two images"]
KINDS += ["no answer", "bad messages", "bad role"]


@pytest.fixture(scope="module")
def processor():
    return slime_parts()[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_sample_is_named(tmp_path, processor, kind):
    sample = broken_sample(kind, tmp_path)
    names_file = isinstance((sample["images"] or [None])[0], str)
    with pytest.raises(ValueError, match=r"^Sample 'seven'") as caught:
        HiResLmmCollator(processor)([conversation(0), sample])
    assert ("picture.png" in str(caught.value)) == names_file
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("sample", [None, "text", 5, {}, {"messages": [1]}, [conversation(1)]])
def test_a_sample_of_another_type_is_named_by_its_place(processor, sample):
    with pytest.raises(ValueError, match=r"^Sample 1 of its batch"):
        HiResLmmCollator(processor)([conversation(0), sample])
    with pytest.raises(ValueError, match=r"^A sample"):
        HiResLmmCollator(processor).encode(sample)


def test_broken_samples_may_be_left_out_and_are_counted(tmp_path, processor, caplog):
    collator = HiResLmmCollator(processor, broken="drop")
    expected = collator([conversation(0), conversation(2)])
    samples = [conversation(0), broken_sample("truncated", tmp_path), None, conversation(2)]
    with caplog.at_level(logging.WARNING):
        batch = collator(samples)
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
    assert collator.counts() == {"dropped_samples": 0, "lowered_budgets": 0, "broken_samples": 2}
    assert "Sample 'seven'" in caplog.text and "picture.png" in caplog.text and "Sample 2 of its batch" in caplog.text
    alone = collator([None])
    assert alone["input_ids"].shape == (1, 2)
    with pytest.raises(ValueError, match=r"broken='skip' is unknown; use one of error, drop"):
        HiResLmmCollator(processor, broken="skip")


def test_a_worker_names_the_sample_and_a_run_counts_those_left_out(tmp_path, processor, monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # else the end of a loader takes 5 s
    broken = broken_sample("truncated", tmp_path)
    loader = DataLoader([conversation(0), broken], collate_fn=HiResLmmCollator(processor), num_workers=1)
    with pytest.raises(ValueError, match=r"Sample 'seven' \(.*picture\.png\): Image 0 cannot be decoded"):
        list(loader)
    collator = HiResLmmCollator(processor, views=STAGE.views, broken="drop")
    data = [*conversations(2), broken, conversation(5)]
    run = run_trainer(tmp_path / "run", data=data, collator=collator, save_strategy="no", max_steps=2)
    run.train()
    assert run.state.log_history[1]["broken_samples"] == 1


def test_broken_lines_and_records_are_named(tmp_path):
    record = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join([json.dumps(record), "", json.dumps({"id": "b", **record})[:-9]]))
    for read in (LlavaConversations, lambda path: list(stream_llava(path))):
        with pytest.raises(ValueError, match=r"Line 3 of '.*data\.jsonl' is no JSON .*cut off"):
            read(file)
    bad = [5, {"conversations": [7]}, {**record, "image": 3}, {**record, "image": ["a.png", None]}]
    file = tmp_path / "data.json"
    file.write_text(json.dumps([record, *bad]))
    dataset = LlavaConversations(file)
    assert dataset[0]["id"] == "0"
    for number in range(1, 5):
        with pytest.raises(ValueError, match=f"^Record {number} "):
            dataset[number]

"""Full disks, killed processes, broken samples: what was saved stays, and errors name what is broken."""

import errno
import importlib.util
import json
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers.modeling_utils
from safetensors.torch import load_file
from torch import nn

from builders.docs import ROOT
from builders.tiny import random_image
from builders.training import conversation, conversations, make_trainer, slime_parts, training_arguments
from hires_lmm.files import replacing, write_text
from hires_lmm.training import (
    HiResLmmCollator,
    Stage,
    StageCallback,
    VisionFeatureStore,
    cache_vision_features,
    last_checkpoint,
)
from hires_lmm.training.data.cognition import cache_codes
from hires_lmm.training.data.conversations import LlavaConversations, stream_llava
from hires_lmm.training.objectives import OBJECTIVES, Objective
from hires_lmm.training.objectives import files as objective_files


TRAINABLE = {"connector": 1e-3, "language_model": 1e-4, "lm_head": 1e-4}
RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
DISK_FULL = OSError(errno.ENOSPC, "No space left on device")
PICTURES = [random_image(40 + 8 * n, 50, seed=n) for n in range(5)]


def disk_full():
    raise DISK_FULL


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def failing(write, place: int, fail, call: int):
    """A writer that fails at one of its calls when half is written; `place`: the argument that names the file."""
    calls = []

    def writer(*args, **kwargs):
        result = write(*args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            os.truncate(args[place], Path(args[place]).stat().st_size // 2)
            fail()
        return result

    return writer


def in_a_child(work) -> int:
    """Exit code of a forked process that runs a function."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    return process.exitcode


# ---- files and checkpoints


@pytest.mark.parametrize("error", [DISK_FULL, KeyboardInterrupt()])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, error):
    file = tmp_path / "a.json"
    write_text(file, "old")

    def begin(end):
        with replacing(file) as partial:
            partial.write_text("ne")
            end()

    def fail():
        raise error

    with pytest.raises(type(error)):
        begin(fail)
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert in_a_child(lambda: begin(die)) == -signal.SIGKILL
    assert file.read_text() == "old"
    write_text(file, "new – ü")
    assert file.read_text(encoding="utf-8") == "new – ü" and len(list(tmp_path.iterdir())) == 1


def test_a_process_killed_while_saving_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    """How a run goes on from it: test_training_resume."""
    write = transformers.modeling_utils.safe_save_file
    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", failing(write, 1, die, call=2))
    stage = Stage("mine", TRAINABLE)
    trainer = make_trainer(*slime_parts(), stage, conversations(8), tmp_path, **RUN)
    assert in_a_child(trainer.train) == -signal.SIGKILL
    assert (tmp_path / "checkpoint-4").is_dir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_the_last_checkpoint_is_the_newest_whole_one(tmp_path, caplog):
    assert last_checkpoint(tmp_path / "nothing") is None and last_checkpoint(tmp_path) is None
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert "checkpoint-11 is passed over" in caplog.text
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")


class Scale(Objective):
    """A loss with one weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, step):
        return (step.aux["global_tokens"].float().mean() - self.scale).square().mean()


def test_an_objective_is_written_before_the_checkpoint_before_is_deleted(tmp_path, monkeypatch):
    """The Trainer deletes as soon as it has written its own part; the weights of the objective are there by then."""
    from transformers import Trainer

    monkeypatch.setitem(OBJECTIVES, "scale", Scale)
    trainable = {"connector": 1e-3, "objectives.scale": 1e-2}
    stage = Stage("scaled", trainable, loss_weights={"scale": 1.0})
    args = training_arguments(tmp_path, **RUN, save_total_limit=1)
    model, processor = slime_parts()
    trainer = Trainer(
        model,
        args,
        train_dataset=conversations(8),
        data_collator=HiResLmmCollator(processor, views=stage.views),
        callbacks=[StageCallback(stage, show_table=False, objectives={"scale": Scale()})],
        optimizer_cls_and_kwargs=stage.optimizer_cls_and_kwargs(args),
    )
    write = objective_files.save_file
    monkeypatch.setattr(objective_files, "save_file", failing(write, 1, disk_full, call=2))
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    files = {file.name for file in (tmp_path / "checkpoint-2" / "objectives" / "scale").iterdir()}
    assert files == {"config.json", "model.safetensors"}


def test_a_stage_that_fails_while_it_saves_its_result_is_not_finished(tmp_path):
    """`examples/train.py` takes a stage for finished by its folder `final`."""
    spec = importlib.util.spec_from_file_location("train_example", ROOT / "examples" / "train.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    class Saver:
        accelerator = type("Accelerator", (), {"wait_for_everyone": staticmethod(lambda: None)})

        def is_world_process_zero(self):
            return True

        def save_model(self, folder):
            Path(folder).mkdir(parents=True)
            disk_full()

    with pytest.raises(OSError, match="No space left"):
        example.save_whole(Saver(), tmp_path / "final")
    assert not (tmp_path / "final").exists()


# ---- caches


class Codes:
    """A quantiser that hashes colours."""

    num_codes, grid, fingerprint = 7, (2, 2), "colours"

    def __call__(self, images):
        return np.stack([np.full((2, 2), int(np.asarray(image).sum()) % 7) for image in images])


def write_features(folder, images=PICTURES, shard_bytes=1):
    """A shard an image."""
    return cache_vision_features(*slime_parts(), images, folder, shard_bytes=shard_bytes)


def write_codes(folder, images=PICTURES):
    return cache_codes(Codes(), images, folder, batch_size=1, show_progress=False)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("fail", [die, disk_full])
def test_a_cache_whose_writer_failed_goes_on(tmp_path, monkeypatch, fail):
    """At the third shard; then the cache is that of a writer that was not disturbed."""
    write_features(tmp_path / "whole")
    with monkeypatch.context() as patch:
        write = safetensors.torch.serialize_file
        patch.setattr(safetensors.torch, "serialize_file", failing(write, 1, fail, call=3))
        assert in_a_child(lambda: write_features(tmp_path / "cache")) in (-signal.SIGKILL, 1)
    assert len(write_features(tmp_path / "cache", [])) == 2
    assert len(write_features(tmp_path / "cache")) == 5
    assert content(tmp_path / "cache") == content(tmp_path / "whole")


@pytest.mark.parametrize("write", [lambda *args: write_features(*args, shard_bytes=1 << 30), write_codes])
def test_a_broken_image_is_named_and_what_came_before_it_is_kept(tmp_path, write):
    """Though its shard was not full."""
    broken = tmp_path / "broken.jpg"
    PICTURES[3].save(broken)
    os.truncate(broken, broken.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"^Image 3 cannot be decoded"):
        write(tmp_path / "cache", [PICTURES[0], [PICTURES[1], PICTURES[2]], str(broken), PICTURES[4]])
    assert len(write(tmp_path / "cache", [])) == 3


def test_two_writers_of_one_cache_take_turns(tmp_path, monkeypatch):
    """Each with images of its own: all are there, and each under its own name."""
    write = safetensors.torch.serialize_file
    monkeypatch.setattr(safetensors.torch, "serialize_file", lambda *args, **kw: time.sleep(0.1) or write(*args, **kw))
    context = multiprocessing.get_context("fork")
    halves = (PICTURES[:3], PICTURES[2:])
    writers = [context.Process(target=write_features, args=(tmp_path, images)) for images in halves]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    write_features(tmp_path / "whole")
    found = [load_file(file) for file in tmp_path.glob("*.safetensors")]
    assert sum(map(len, found)) == 5 == len(VisionFeatureStore(tmp_path))
    whole = {key: tensor for file in tmp_path.glob("whole/*.safetensors") for key, tensor in load_file(file).items()}
    assert all(torch.equal(tensor, whole[key]) for shard in found for key, tensor in shard.items())


def test_a_damaged_shard_is_named(tmp_path):
    write_features(tmp_path, PICTURES[:1])
    (shard,) = tmp_path.glob("*.safetensors")
    (key,) = load_file(shard)
    os.truncate(shard, 100)
    with pytest.raises(ValueError, match=rf"{shard.name}' is missing or damaged.*delete"):
        VisionFeatureStore(tmp_path).get(key)


# ---- samples


@pytest.fixture(scope="module")
def processor():
    return slime_parts()[1]


@pytest.fixture
def broken(tmp_path) -> dict:
    """A sample with an id whose picture is cut off."""
    random_image(80, 80).save(tmp_path / "picture.png")
    os.truncate(tmp_path / "picture.png", 2000)
    return {**conversation(7), "id": "seven", "images": [str(tmp_path / "picture.png")]}


@pytest.mark.parametrize(
    "changes, text",
    [
        ({}, r"picture\.png.*Image 0 cannot be decoded"),
        ({"images": ["/nowhere.png"]}, "nowhere"),
        ({"images": [None]}, ""),
        ({"images": [np.full((20, 20, 3), np.nan)]}, "NaN"),
        ({"images": [random_image(9, 9)] * 2}, "images"),
        ({"images": None, "messages": [{"role": "user", "content": "Hello?"}]}, ""),
        ({"messages": "not a list"}, ""),
    ],
)
def test_a_broken_sample_is_named(processor, broken, changes, text):
    with pytest.raises(ValueError, match=rf"(?s)^Sample 'seven'.*{text}") as caught:
        HiResLmmCollator(processor)([conversation(0), {**broken, **changes}])
    assert len(str(caught.value)) < 1500


def test_broken_samples_may_be_left_out_and_are_counted(tmp_path, processor, broken, caplog):
    stage = Stage("mine", TRAINABLE)
    collator = HiResLmmCollator(processor, views=stage.views, broken="drop")
    expected = collator([conversation(0), conversation(2)])
    with caplog.at_level(logging.WARNING):
        batch = collator([conversation(0), broken, None, conversation(2)])
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
    assert collator.counts()["broken_samples"] == 2
    assert "Sample 'seven'" in caplog.text and "Sample 2 of its batch" in caplog.text
    collator = HiResLmmCollator(processor, views=stage.views, broken="drop")
    data = [*conversations(2), broken, conversation(5)]
    trainer = make_trainer(*slime_parts(), stage, data, tmp_path / "run", collator, max_steps=2)
    trainer.train()
    assert trainer.state.log_history[1]["broken_samples"] == 1


def test_broken_lines_and_records_are_named(tmp_path):
    record = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join([json.dumps(record), "", json.dumps({"id": "b", **record})[:-9]]))
    for read in (LlavaConversations, lambda path: list(stream_llava(path))):
        with pytest.raises(ValueError, match=r"Line 3 of '.*data\.jsonl' is no JSON .*cut off"):
            read(file)
    file = tmp_path / "data.json"
    file.write_text(json.dumps([record, 5, {"conversations": [7]}, {**record, "image": ["a.png", None]}]))
    dataset = LlavaConversations(file)
    assert dataset[0]["id"] == "0"
    for number in range(1, 4):
        with pytest.raises(ValueError, match=f"^Record {number} "):
            dataset[number]

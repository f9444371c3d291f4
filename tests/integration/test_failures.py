"""Full disks and killed processes: what was saved stays, and a run goes on from it as if nothing had happened."""

import functools
import importlib.util
import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers.modeling_utils
from torch import nn
from torch.utils.data import get_worker_info
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

import hires_lmm.files
from builders import random_image
from builders.failures import (
    DISK_FULL,
    RUN,
    STAGE,
    die,
    digest,
    disk_full,
    half_written,
    in_a_child,
    on_call,
    run_trainer,
)
from builders.training import conversations, losses, slime_parts, training_arguments
from hires_lmm.files import replacing, write_text
from hires_lmm.training import HiResLmmCollator, Stage, StageCallback, cache_vision_features, last_checkpoint
from hires_lmm.training import features as feature_files
from hires_lmm.training.checkpoints import find_damage
from hires_lmm.training.data import cognition_cache
from hires_lmm.training.objectives import OBJECTIVES, Objective
from hires_lmm.training.objectives import files as objective_files


ROOT = Path(__file__).parents[2]


def begin_and_fail(file: Path, error: BaseException) -> None:
    """Write the beginning of a file, then raise."""
    with replacing(file) as partial:
        partial.write_text("ne")
        raise error


# --- files ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [DISK_FULL, KeyboardInterrupt()])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, error):
    file = tmp_path / "a.json"
    write_text(file, "old")
    with pytest.raises(type(error)):
        begin_and_fail(file, error)
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a.json"]
    write_text(file, "new – ü")
    assert file.read_text(encoding="utf-8") == "new – ü" and len(list(tmp_path.iterdir())) == 1


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    write_text(file, "old")

    def work():
        with replacing(file) as partial:
            partial.write_text("ne")
            die()

    assert in_a_child(work) == -signal.SIGKILL
    assert file.read_text() == "old"
    write_text(file, "new")
    assert file.read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["a.json"]


# --- checkpoints ---------------------------------------------------------------------------------------------------
def outcome(trainer) -> dict[str, torch.Tensor]:
    """Weights and losses at the end of a run."""
    state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    return {**state, "losses": torch.tensor(losses(trainer), dtype=torch.float64)}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a run gives that nothing disturbs."""
    trainer = run_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return outcome(trainer)


def assert_goes_on(folder: Path, uninterrupted: dict) -> None:
    """A new run from the last whole checkpoint ends where the undisturbed one does, bit for bit."""
    checkpoint = last_checkpoint(folder)
    resumed = run_trainer(folder)
    resumed.train(resume_from_checkpoint=checkpoint)
    found = outcome(resumed)
    assert found.keys() == uninterrupted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, uninterrupted[name]), name
    assert last_checkpoint(folder) == str(folder / "checkpoint-6")


def break_writer(monkeypatch, what: str, fail) -> None:
    """Let the second checkpoint fail while it writes the model, the optimizer or its last file."""
    if what == "model":
        write = transformers.modeling_utils.safe_save_file
        monkeypatch.setattr(
            transformers.modeling_utils, "safe_save_file", on_call(2, write, half_written(write, 1, fail))
        )
    elif what == "optimizer":
        write = torch.save

        def save(state, target, *args, **kwargs):
            is_second = "checkpoint-4" in str(target) and "optimizer" in str(target)
            return (half_written(write, 1, fail) if is_second else write)(state, target, *args, **kwargs)

        monkeypatch.setattr(torch, "save", save)
    else:
        write = TrainerState.save_to_json
        monkeypatch.setattr(TrainerState, "save_to_json", on_call(2, write, half_written(write, 1, fail)))


@pytest.mark.parametrize("what", ["model", "optimizer", "state"])
def test_a_full_disk_while_saving_leaves_the_checkpoint_before(tmp_path, monkeypatch, caplog, what, uninterrupted):
    break_writer(monkeypatch, what, disk_full)
    trainer = run_trainer(tmp_path)
    before = {}

    class Look(TrainerCallback):
        def on_save(self, *args, **kwargs):
            before.update(digest(tmp_path / "checkpoint-2"))

    trainer.add_callback(Look())
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    monkeypatch.undo()
    assert (tmp_path / "checkpoint-4").is_dir() and digest(tmp_path / "checkpoint-2") == before
    assert find_damage(tmp_path / "checkpoint-4") and find_damage(tmp_path / "checkpoint-2") is None
    with pytest.raises(Exception):  # noqa: B017, PT011  what the Trainer itself takes; it may not go on in silence
        run_trainer(tmp_path).train(resume_from_checkpoint=True)
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
        assert_goes_on(tmp_path, uninterrupted)
    assert "checkpoint-4 is passed over" in caplog.text


def test_a_process_killed_while_saving_leaves_the_checkpoint_before(tmp_path, monkeypatch, uninterrupted):
    break_writer(monkeypatch, "state", die)
    assert in_a_child(lambda: run_trainer(tmp_path).train()) == -signal.SIGKILL
    monkeypatch.undo()
    assert (tmp_path / "checkpoint-4").is_dir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert_goes_on(tmp_path, uninterrupted)


def test_the_last_checkpoint_is_the_newest_whole_one(tmp_path, caplog):
    assert last_checkpoint(tmp_path / "nothing") is None and last_checkpoint(tmp_path) is None
    for step in (2, 10, 9):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        torch.save(torch.zeros(300), folder / "optimizer.pt")
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    os.truncate(tmp_path / "checkpoint-10" / "optimizer.pt", 1000)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "checkpoint-9" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "model-1.safetensors is missing" in caplog.text and "optimizer.pt is cut off" in caplog.text
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({"global_step": 9}))
    assert last_checkpoint(tmp_path) is None


class Scale(Objective):
    """A loss with one weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def watch(self, model):
        return {"layout": model.connector.layout}

    def forward(self, step):
        return (step.calls["layout"][-1].args[0].global_features.float().mean() - self.scale).square().mean()


def scaled_trainer(folder):
    """A run with an objective that keeps one checkpoint only."""
    from transformers import Trainer

    torch.manual_seed(0)
    model, processor = slime_parts()
    trainable = {"connector": 1e-3, "objectives.scale": 1e-2}
    stage = Stage("scaled", trainable, expert="mixture", loss_weights={"scale": 1.0})
    args = training_arguments(folder, **RUN, save_total_limit=1)
    return Trainer(
        model,
        args,
        train_dataset=conversations(8),
        data_collator=HiResLmmCollator(processor, views=stage.views),
        callbacks=[StageCallback(stage, show_table=False, objectives={"scale": Scale()})],
        optimizer_cls_and_kwargs=stage.optimizer_cls_and_kwargs(args),
    )


def test_an_objective_is_written_before_the_checkpoint_before_is_deleted(tmp_path, monkeypatch):
    """The Trainer deletes as soon as it has written its own part; the weights of the objective are there by then."""
    monkeypatch.setitem(OBJECTIVES, "scale", Scale)
    whole = scaled_trainer(tmp_path / "whole")
    whole.train()
    write = objective_files.save_file
    folder = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(objective_files, "save_file", on_call(2, write, half_written(write, 1, disk_full)))
        trainer = scaled_trainer(folder)
        with pytest.raises(OSError, match="No space left"):
            trainer.train()
    assert last_checkpoint(folder) == str(folder / "checkpoint-2")
    resumed = scaled_trainer(folder)
    resumed.train(resume_from_checkpoint=last_checkpoint(folder))
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert "objectives.scale.scale" in found and not torch.equal(found["objectives.scale.scale"], torch.ones(3))
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    names = {"config.json", "model.safetensors"}
    assert {file.name for file in (folder / "checkpoint-6" / "objectives" / "scale").iterdir()} == names


def test_a_stage_that_was_killed_while_it_saved_its_result_is_not_finished(tmp_path):
    """`examples/train.py` takes a stage for finished by its folder `final`."""
    spec = importlib.util.spec_from_file_location("train_example", ROOT / "examples" / "train.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    class Saver:
        accelerator = type("Accelerator", (), {"wait_for_everyone": staticmethod(lambda: None)})
        files, fails = ("config.json", "model.safetensors"), True

        def is_world_process_zero(self):
            return True

        def save_model(self, folder):
            Path(folder).mkdir(parents=True)
            (Path(folder) / self.files[0]).write_text("{}")
            if self.fails:
                raise DISK_FULL
            (Path(folder) / self.files[1]).write_text("weights")

    saver, final = Saver(), tmp_path / "final"
    with pytest.raises(OSError, match="No space left"):
        example.save_whole(saver, final)
    assert not final.exists()
    saver.fails = False
    example.save_whole(saver, final)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert sorted(file.name for file in final.iterdir()) == sorted(saver.files)


def test_a_stage_that_was_copied_in_part_is_not_finished(tmp_path, monkeypatch):
    """`benchmarks/needle.py` takes stages over from other runs; `done.json` marks a whole one."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import needle

    stage = tmp_path / "source" / "0-one"
    (stage / "weights").mkdir(parents=True)
    (stage / needle.DONE).write_text("{}")
    (stage / "weights" / "model.safetensors").write_text("weights")

    def copy(source, target, **options):
        if "safetensors" in str(source):
            raise DISK_FULL
        return shutil.copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil.copytree, "__defaults__", (False, None, copy, False, False))
        with pytest.raises(OSError, match="No space left"):
            needle.take_over(tmp_path / "source", tmp_path / "target", 1)
    assert not (tmp_path / "target" / "0-one" / needle.DONE).exists()
    needle.take_over(tmp_path / "source", tmp_path / "target", 1)
    assert digest(tmp_path / "target") == digest(tmp_path / "source")


# --- caches --------------------------------------------------------------------------------------------------------
class Codes:
    """A quantiser that hashes colours."""

    num_codes, grid, fingerprint = 7, (2, 2), "colours"

    def __call__(self, images):
        return np.stack([np.full((2, 2), int(np.asarray(image).sum()) % 7) for image in images])


PICTURES = [random_image(40 + 8 * n, 50, seed=n) for n in range(5)]


def write_features(folder, images=PICTURES, shard_bytes=1):
    """A shard an image."""
    model, processor = slime_parts()
    return cache_vision_features(model, processor, images, folder, shard_bytes=shard_bytes)


def write_codes(folder, images=PICTURES):
    """A shard an image."""
    return cognition_cache.cache_codes(Codes(), images, folder, batch_size=1, show_progress=False)


CACHES = {
    "features": (write_features, feature_files, "save_file", 1),
    "codes": (write_codes, cognition_cache.np, "save", 0),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_whose_writer_was_killed_goes_on(tmp_path, monkeypatch, name):
    """Three ways to die at the third shard: within it, behind it before the index, within the index."""
    write, module, attribute, place = CACHES[name]
    monkeypatch.setattr(cognition_cache, "SHARD_IMAGES", 1)
    write(tmp_path / "whole")
    expected = digest(tmp_path / "whole")
    original = getattr(module, attribute)
    ways = {
        "shard": (module, attribute, on_call(3, original, half_written(original, place, die))),
        "between": (hires_lmm.files.os, "replace", on_call(5, os.replace, lambda *args: die())),
        "index": (hires_lmm.files.os, "replace", on_call(6, os.replace, lambda *args: die())),
    }
    for way, (where, what, broken) in ways.items():
        folder = tmp_path / way
        with monkeypatch.context() as patch:
            patch.setattr(where, what, broken)
            assert in_a_child(lambda folder=folder: write(folder)) == -signal.SIGKILL, way
        assert len(write(folder, PICTURES[:1])) == 2, way  # what was written is there
        assert len(write(folder)) == 5
        assert digest(folder) == expected, way  # not even a partial file is left


@pytest.mark.parametrize("name", CACHES)
def test_a_full_disk_leaves_a_cache_that_goes_on(tmp_path, monkeypatch, name):
    write, module, attribute, place = CACHES[name]
    monkeypatch.setattr(cognition_cache, "SHARD_IMAGES", 1)
    original = getattr(module, attribute)
    with monkeypatch.context() as patch:
        patch.setattr(module, attribute, on_call(3, original, half_written(original, place, disk_full)))
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    assert len(write(tmp_path, [])) == 2 and len(write(tmp_path)) == 5


@pytest.mark.parametrize("write", [functools.partial(write_features, shard_bytes=1 << 30), write_codes])
def test_a_broken_image_is_named_and_what_came_before_it_is_kept(tmp_path, write):
    """Though its shard was not full."""
    broken = tmp_path / "broken.jpg"
    PICTURES[3].save(broken)
    os.truncate(broken, broken.stat().st_size // 2)
    folder = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"^Image 3 cannot be decoded"):
        write(folder, [PICTURES[0], [PICTURES[1], PICTURES[2]], str(broken), PICTURES[4]])
    assert len(write(folder, [])) == 3


def test_the_tower_gets_its_mode_back_whatever_happens(tmp_path):
    model, processor = slime_parts()
    assert model.model.vision_tower.training
    with pytest.raises(ValueError, match="Image 0"):
        cache_vision_features(model, processor, [str(tmp_path / "missing.png")], tmp_path / "cache")
    assert model.model.vision_tower.training


def test_two_writers_of_one_cache_take_turns(tmp_path, monkeypatch):
    """Each with images of its own: all are there, and each under its own name."""
    write = feature_files.save_file
    monkeypatch.setattr(feature_files, "save_file", lambda *args: time.sleep(0.1) or write(*args))
    halves = [PICTURES[:3], PICTURES[2:]]
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_features, args=(tmp_path, images)) for images in halves]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    store = feature_files.VisionFeatureStore(tmp_path)  # as they left it
    whole = write_features(tmp_path / "whole")
    assert len(store) == 5 and store.index["images"].keys() == whole.index["images"].keys()
    for key in whole.index["images"]:
        assert torch.equal(store.get(key), whole.get(key))


def test_a_damaged_shard_is_named(tmp_path):
    store = write_features(tmp_path, PICTURES[:1])
    (key,) = store.index["images"]
    os.truncate(tmp_path / "features-00000.safetensors", 100)
    with pytest.raises(ValueError, match=r"features-00000\.safetensors' is missing or damaged.*delete"):
        feature_files.VisionFeatureStore(tmp_path).get(key)


# --- workers -------------------------------------------------------------------------------------------------------
class DyingCollator(HiResLmmCollator):
    """Kills the process that it runs in at one of its batches, if that is a worker."""

    at = 4

    def __call__(self, examples):
        if get_worker_info() is not None and int(self._batches[1]) == self.at:
            die()
        self._batches[1] += 1
        return super().__call__(examples)


def test_a_worker_that_dies_ends_the_run_and_the_run_goes_on(tmp_path, uninterrupted):
    collator = DyingCollator(slime_parts()[1], views=STAGE.views)

    def hang(signum, frame):
        raise AssertionError("the run hangs")

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(60)
    try:
        with pytest.raises(RuntimeError, match=r"DataLoader worker .*(killed|exited)"):
            run_trainer(tmp_path, collator=collator, dataloader_num_workers=1, dataloader_prefetch_factor=1).train()
    finally:
        signal.alarm(0)
    assert_goes_on(tmp_path, uninterrupted)

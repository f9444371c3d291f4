"""Ways in which writers and processes fail, and a run that fails the same way each time."""

import errno
import hashlib
import multiprocessing
import os
import signal
from pathlib import Path

import torch

from builders.training import conversations, make_trainer, slime_parts
from hires_lmm.training import Stage


STAGE = Stage("mine", {"connector": 1e-3, "language_model": 1e-4, "lm_head": 1e-4}, expert="mixture")
RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "weight_decay": 0.01}
DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


def half_written(write, place: int, fail):
    """A writer that fails after half of what it should write: `place` is the argument that names the file."""

    def writer(*args, **kwargs):
        result = write(*args, **kwargs)
        target = args[place]
        if hasattr(target, "write"):
            size = target.tell()
            target.truncate(size // 2)
            target.flush()
        else:
            os.truncate(target, Path(target).stat().st_size // 2)
        fail()
        return result

    return writer


def on_call(number: int, write, failing):
    """Call `write`, but at its call of the given number, from 1, `failing`."""
    calls = []

    def writer(*args, **kwargs):
        calls.append(1)
        return (failing if len(calls) == number else write)(*args, **kwargs)

    return writer


def disk_full():
    raise DISK_FULL


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_child(work) -> int:
    """Run a function in a forked process; returns its exit code."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def digest(folder: Path) -> dict[str, str]:
    """Content of all files below a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def run_trainer(folder, callbacks=(), collator=None, data=None, **changes):
    """A Trainer over one stage of a tiny model that starts from the same weights each time."""
    torch.manual_seed(0)
    model, processor = slime_parts()
    data = conversations(8) if data is None else data
    return make_trainer(model, processor, STAGE, data, folder, collator, callbacks, **{**RUN, **changes})

"""Joined models on a handful of needle scenes."""

from functools import lru_cache
from pathlib import Path

from needle.halves.files import load_halves
from needle.runs import RunOptions, SceneSet, join_halves


HALVES = Path(__file__).parents[2] / "checkpoints" / "halves"


@lru_cache(maxsize=1)
def halves():
    """The committed halves."""
    return load_halves(HALVES)


def joined(preset="slime", num_queries=4, seed=0, **changes):
    """A model of the committed halves with few queries, and its processor."""
    return join_halves(halves(), preset, num_queries, seed=seed, **changes)


def scene_set(count=3, split="validation", **options):
    """A few scenes."""
    return SceneSet(split, count, **options)


def run_options(cache, visits, **changes):
    """A short run on four scenes."""
    values = {"scenes": 4, "batch_size": 2, "questions": 3, "log_every": 1, "save_every": 2, **changes}
    return RunOptions(cache=str(cache), visits=visits, **values)

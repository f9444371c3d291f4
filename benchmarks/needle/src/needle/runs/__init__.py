"""Runs on the needle task: join the pretrained halves, train the model through a plan, score it."""

from .evaluate import evaluate_packed
from .join import join_halves, with_token_ops
from .run import Rates, RunOptions, small_rates, train
from .scenes import SceneFeatures, SceneSet, cache_scenes, near_options


__all__ = [
    "Rates",
    "RunOptions",
    "SceneFeatures",
    "SceneSet",
    "cache_scenes",
    "evaluate_packed",
    "join_halves",
    "near_options",
    "small_rates",
    "train",
    "with_token_ops",
]

"""Runs on the needle task: join the pretrained halves, train the model through a plan, score it."""

from .evaluate import Graded, answer_scenes, can_pack, encode_once, evaluate_packed, grade, score_names
from .join import join_halves, with_token_ops
from .run import Rates, RunOptions, small_rates, train
from .scenes import SceneFeatures, SceneSet, cache_scenes, near_options


__all__ = [
    "Graded",
    "Rates",
    "RunOptions",
    "SceneFeatures",
    "SceneSet",
    "answer_scenes",
    "cache_scenes",
    "can_pack",
    "encode_once",
    "evaluate_packed",
    "grade",
    "join_halves",
    "near_options",
    "score_names",
    "small_rates",
    "train",
    "with_token_ops",
]

"""Staged training: stages, callbacks, collators, data and the plan that makes the small pretrained halves."""

from .callbacks import StageCallback, put_first
from .checkpoints import last_checkpoint
from .collator import HiResLmmCollator
from .features import VisionFeatureStore, cache_vision_features
from .optimization import alternating_scheduler
from .plans import PLANS, get_plan
from .stages import Alternation, Stage, set_expert, summarise


__all__ = [
    "PLANS",
    "Alternation",
    "HiResLmmCollator",
    "Stage",
    "StageCallback",
    "VisionFeatureStore",
    "alternating_scheduler",
    "cache_vision_features",
    "get_plan",
    "last_checkpoint",
    "put_first",
    "set_expert",
    "summarise",
]

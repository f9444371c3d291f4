"""Staged training: stages, callbacks, collators and data."""

from .callbacks import StageCallback, put_first
from .checkpoints import last_checkpoint
from .collator import HiResLmmCollator
from .features import VisionFeatureStore, cache_vision_features
from .plans import PLANS, get_plan
from .schedules import alternating_scheduler
from .settings import set_options
from .stages import Alternation, Stage, summarise


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
    "set_options",
    "summarise",
]

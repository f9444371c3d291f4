"""Staged training: stages, callbacks, collators and data.

Importing it lets models and processors of the package write a model card where they are saved.
"""

from ..modeling.modeling_hires_lmm import HiResLmmPreTrainedModel
from ..processing.processing_hires_lmm import HiResLmmProcessor
from .callbacks import StageCallback, put_first
from .cards import describe_folder, describe_model
from .checkpoints import last_checkpoint
from .collator import HiResLmmCollator
from .features import VisionFeatureStore, cache_vision_features
from .plans import PLANS, get_plan
from .schedules import alternating_scheduler
from .settings import set_options
from .stages import Alternation, Stage, summarise


HiResLmmPreTrainedModel.on_saved = describe_model
HiResLmmProcessor.on_saved = describe_folder

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

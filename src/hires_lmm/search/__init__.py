"""Policies around an unchanged model: where it looks and what it says before it answers."""

from .base import Ask, Box, Oracle, Policy, Prompt, SearchResult, Step
from .command import POLICIES, build_policy
from .drawing import draw_walk
from .oracle import CallLimitError, ModelOracle
from .policies import DescribeThenAnswer, ReasonThenSummarise, StepByStep
from .zoom_eye import ZoomEye, ZoomPrompts, read_cues


__all__ = [
    "POLICIES",
    "Ask",
    "Box",
    "CallLimitError",
    "DescribeThenAnswer",
    "ModelOracle",
    "Oracle",
    "Policy",
    "Prompt",
    "ReasonThenSummarise",
    "SearchResult",
    "Step",
    "StepByStep",
    "ZoomEye",
    "ZoomPrompts",
    "build_policy",
    "draw_walk",
    "read_cues",
]

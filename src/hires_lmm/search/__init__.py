"""Policies around an unchanged model: where it looks and what it says before it answers."""

from .base import Ask, Box, Oracle, Policy, Prompt, SearchResult, Step
from .oracle import CallLimitError, ModelOracle
from .policies import DescribeThenAnswer, ReasonThenSummarise, StepByStep
from .zoom_eye import ZoomEye, ZoomPrompts, read_cues


POLICIES: dict[str, type] = {
    "zoom_eye": ZoomEye,
    "describe_then_answer": DescribeThenAnswer,
    "reason_then_summarise": ReasonThenSummarise,
    "step_by_step": StepByStep,
}
"""What `hires-lmm ask --search` knows, by name."""

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
    "read_cues",
]

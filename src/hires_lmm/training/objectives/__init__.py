"""Losses beside the language loss: each is one class and one line here."""

from .base import BatchColumn, Call, Objective, StepValues
from .contrastive import Contrastive
from .files import load_objectives, save_objectives
from .gate_balance import GateBalance, gate_balance
from .reconstruction import Reconstruction


OBJECTIVES: dict[str, type[Objective]] = {
    "contrastive": Contrastive,
    "gate_balance": GateBalance,
    "reconstruction": Reconstruction,
}
"""Name in `Stage.loss_weights` -> class."""

GENERATION = "generation"
"""Name of the language loss in `Stage.loss_weights`; its weight is 1 where it is not given."""


__all__ = [
    "GENERATION",
    "OBJECTIVES",
    "BatchColumn",
    "Call",
    "Contrastive",
    "GateBalance",
    "Objective",
    "Reconstruction",
    "StepValues",
    "gate_balance",
    "load_objectives",
    "save_objectives",
]

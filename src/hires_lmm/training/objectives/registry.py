"""The registry of losses beside the language loss: each is one class and one line here."""

from .base import Objective
from .contrastive import Contrastive
from .exit_gate import ExitGate
from .gate_balance import GateBalance
from .reconstruction import Reconstruction


OBJECTIVES: dict[str, type[Objective]] = {
    "contrastive": Contrastive,
    "exit_gate": ExitGate,
    "gate_balance": GateBalance,
    "reconstruction": Reconstruction,
}
"""Name in `Stage.loss_weights` -> class."""

GENERATION = "generation"
"""Name of the language loss in `Stage.loss_weights`; its weight is 1 where it is not given."""

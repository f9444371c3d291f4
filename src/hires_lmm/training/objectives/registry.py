"""The registry of losses beside the language loss: each is one class and one line here."""

from .base import Objective
from .cg_vlm import CgVlm
from .contrastive import Contrastive
from .exit_gate import ExitGate
from .gate_balance import GateBalance
from .mimic import Mimic
from .reconstruction import Reconstruction
from .token_budget import TokenBudget


OBJECTIVES: dict[str, type[Objective]] = {
    "cg_vlm": CgVlm,
    "contrastive": Contrastive,
    "exit_gate": ExitGate,
    "gate_balance": GateBalance,
    "mimic": Mimic,
    "reconstruction": Reconstruction,
    "token_budget": TokenBudget,
}
"""Name in `Stage.loss_weights` -> class."""

GENERATION = "generation"
"""Name of the language loss in `Stage.loss_weights`; its weight is 1 where it is not given."""

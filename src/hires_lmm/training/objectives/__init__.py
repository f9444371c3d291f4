"""Losses beside the language loss."""

from .base import BatchColumn, Objective, StepValues
from .cg_vlm import CgVlm
from .contrastive import Contrastive
from .exit_gate import ExitGate, exit_labels
from .files import load_objectives, save_objectives
from .gate_balance import GateBalance, gate_balance
from .mimic import Mimic, mimic_losses
from .reconstruction import Reconstruction
from .registry import GENERATION, OBJECTIVES
from .second_model import SecondModel
from .token_budget import TokenBudget, token_budget


__all__ = [
    "GENERATION",
    "OBJECTIVES",
    "BatchColumn",
    "CgVlm",
    "Contrastive",
    "ExitGate",
    "GateBalance",
    "Mimic",
    "Objective",
    "Reconstruction",
    "SecondModel",
    "StepValues",
    "TokenBudget",
    "exit_labels",
    "gate_balance",
    "load_objectives",
    "mimic_losses",
    "save_objectives",
    "token_budget",
]

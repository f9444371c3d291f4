"""What training reads of the fusion transformer and switches in it."""

from typing import Any

import torch
from torch import nn

from .stages import find_base


FUSION = "HiResLmmFusion"
PART = "fusion"
SLOTS, BLOCKS = "fusion_slots", "fusion_blocks"


def find_fusion(model: nn.Module) -> Any:
    """The fusion transformer of a model; by name, as remote code brings classes of its own.

    Args:
        model (`nn.Module`): A `HiResLmmModel` or a model that holds one.

    Raises:
        ValueError: If there is none.
    """
    base = find_base(model)
    for module in base.connector.token_ops:
        if type(module).__name__.removeprefix("FSDP") == FUSION:
            return module
    parts = ", ".join(repr(op["part"]) for op in base.config.connector_config.token_ops) or "none"
    raise ValueError(
        f"This needs the token op {PART!r}, but the token ops of the model are: {parts}. Use the preset 'fusion'."
    )


def read_slots(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The states of the slots that a call of the fusion transformer made.

    Args:
        output: What the call returned: tokens and question.

    Returns:
        States `(N, C)` before the projection, block after block, end slots included; number of the block of each
        slot `(N,)`.
    """
    aux = output[0].aux
    return aux[SLOTS], aux[BLOCKS]


def set_question(model: nn.Module, question: bool) -> None:
    """Let the fusion transformer of a live model read the question or not, and note it in the configuration.

    Args:
        model (`nn.Module`): A `HiResLmmModel` or a model that holds one.
        question (`bool`): Whether it reads the question.

    Raises:
        ValueError: If the model has no fusion transformer.
    """
    base = find_base(model)
    find_fusion(base).question = question
    for config in (base.config.connector_config, base.connector.config):
        config.token_ops = [{**op, "question": question} if op["part"] == PART else op for op in config.token_ops]

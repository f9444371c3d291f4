"""The importance loss of mixtures of experts, for the gate of the mixture adapter."""

from typing import Any, ClassVar

import torch

from .base import Objective, StepValues


def gate_balance(gates: torch.Tensor) -> torch.Tensor:
    """Squared coefficient of variation of the mean weights `(n, E)` of the experts: 0 when they share evenly.

    Source: the importance loss of huggingface.co/papers/1701.06538.
    """
    mean = gates.float().mean(dim=0)
    return mean.var(unbiased=False) / mean.mean().square()


class GateBalance(Objective):
    """`gate_balance` over all tokens that pass a gate in a batch."""

    is_automatic: ClassVar[bool] = True

    def check(self, stage: Any, model: Any) -> None:
        """Refuse models without a gate, and stages that use one expert alone."""
        adapter = model.config.connector_config.adapter
        if adapter["part"] != "mixture" or adapter.get("forced_expert") is not None:
            raise ValueError(
                f"Stage {stage.name!r} weighs 'gate_balance', but no gate runs: the adapter is {adapter!r}. Use the "
                "adapter 'mixture' and settings={'connector.adapter.forced_expert': None}, or take the weight away."
            )

    def forward(self, step: StepValues) -> torch.Tensor:
        """A scalar for the batch."""
        return gate_balance(step.aux["gates"])

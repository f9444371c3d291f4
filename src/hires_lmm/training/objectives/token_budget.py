"""How many visual tokens `atp` keeps: a price a layer, and a number that they should have on average."""

from typing import Any, ClassVar

import torch

from .base import Objective, StepValues


def token_budget(kept: torch.Tensor, totals: torch.Tensor, layers: list[int], target: float) -> list[torch.Tensor]:
    """The two terms, a scalar each.

    Args:
        kept (`torch.Tensor` of shape `(layers, B)`): Sum of the mask of each row behind each layer.
        totals (`torch.Tensor` of shape `(B,)`): Visual tokens of each row.
        layers (`list[int]`): Numbers of the layers, from 1.
        target (`float`): Tokens that a row should keep, in the mean over layers and rows.

    Returns:
        The sum over the layers of the mean kept share times the number of the layer; and the distance to the target.

    Source: ATP-LLaVA, huggingface.co/papers/2412.00447.
    """
    numbers = torch.tensor(layers, dtype=kept.dtype, device=kept.device)
    return [((kept / totals).mean(dim=1) * numbers).sum(), (kept.mean() - target).abs()]


class TokenBudget(Objective):
    """Both terms of `token_budget` with their weights, over the rows of a batch that have images: a scalar.

    Args:
        target (`float`): See `token_budget`; the paper's 144 are of 576.
        share_weight, target_weight (`float`): Weights of the terms, those of a third party's code.
    """

    is_automatic: ClassVar[bool] = True

    def __init__(self, target: float = 144, share_weight: float = 0.05, target_weight: float = 0.2):
        super().__init__()
        self.target, self.weights = target, (share_weight, target_weight)

    def settings(self) -> dict:
        """The arguments that build it anew."""
        return {"target": self.target, "share_weight": self.weights[0], "target_weight": self.weights[1]}

    def check(self, stage: Any, model: Any) -> None:
        """Refuse models without `atp`."""
        if not any(op["part"] == "atp" for op in model.config.connector_config.layer_ops):
            raise ValueError(
                f"Stage {stage.name!r} weighs 'token_budget', but the model has no layer op 'atp'; add one to "
                "connector_config['layer_ops'], or take the weight away."
            )

    def forward(self, step: StepValues) -> torch.Tensor:
        """A scalar for the batch."""
        said = {name: value for name, value in step.aux.items() if name.startswith("token_budget/")}
        if not said:
            return torch.zeros((), device=step.inputs["input_ids"].device)
        counts = torch.stack(list(said.values()))
        counts = counts[:, counts[0, :, 1] > 0]
        layers = [int(name.rpartition("/")[2]) + 1 for name in said]
        terms = token_budget(counts[..., 0], counts[0, :, 1], layers, self.target)
        return sum(weight * term for weight, term in zip(self.weights, terms, strict=True))  # type: ignore[return-value]

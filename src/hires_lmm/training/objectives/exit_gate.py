"""The loss of the gates of `dyvte`: would the answer be the same without visual tokens from a layer on?"""

from typing import Any, ClassVar

import torch
from torch.nn import functional

from ...modeling.dyvte_hires_lmm import EXIT_AFTER
from .base import Objective, StepValues


AGREEMENT, LOSS_RATIO = 0.99, 1.03


def answer_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each row `(B,)`, as the release divides it: the sum over labels by the number of those above 0.

    Args:
        logits (`torch.Tensor` of shape `(B, S, V)`): Those at a position are of the next one.
        labels (`torch.Tensor` of shape `(B, S)`): -100 where there is none.
    """
    targets = labels[:, 1:]
    each = functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), targets, reduction="none")
    return each.sum(dim=1) / (targets > 0).sum(dim=1)


def exit_labels(full: torch.Tensor, exited: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """1 where leaving changes next to nothing, `(B,)`: the same first choice at more than 99 % of the answer tokens
    (those of id 0 not counted), and less than 1.03 times the loss.

    Args:
        full, exited (`torch.Tensor` of shape `(B, S, V)`): Logits with and without visual tokens in later layers.
        labels (`torch.Tensor` of shape `(B, S)`): -100 where there is none.
    """
    answer = labels[:, 1:] > 0
    same = (full[:, :-1].argmax(dim=-1) == exited[:, :-1].argmax(dim=-1)) & answer
    agrees = same.sum(dim=1) / answer.sum(dim=1) > AGREEMENT
    return (agrees & (answer_losses(exited, labels) < LOSS_RATIO * answer_losses(full, labels))).long()


class ExitGate(Objective):
    """Cross-entropy of the gate of one layer, drawn anew for each step, against `exit_labels`; one loss a row.

    The step itself runs with all visual tokens, and once more, without gradient, with none behind that layer. Rows
    without images give 0.

    Source: DyVTE, huggingface.co/papers/2411.19628, and its released code.
    """

    is_automatic: ClassVar[bool] = True
    asks: ClassVar[dict[str, Any]] = {"return_logits": True, "layer_options": {EXIT_AFTER: None}}

    def check(self, stage: Any, model: Any) -> None:
        """Refuse models without exits."""
        if not any(op["part"] == "dyvte" for op in model.config.connector_config.layer_ops):
            raise ValueError(
                f"Stage {stage.name!r} weighs 'exit_gate', but the model has no layer op 'dyvte'; add one to "
                "connector_config['layer_ops'], or take the weight away."
            )

    def forward(self, step: StepValues) -> torch.Tensor:
        """The loss `(B,)`."""
        labels = step.inputs["labels"]
        gates = {name: value for name, value in step.aux.items() if name.startswith("exit_gate/")}
        values = torch.zeros(len(labels), device=labels.device)
        if not gates:
            return values
        name = list(gates)[int(torch.randint(len(gates), ()))]
        exited = step.run_again(layer_options={EXIT_AFTER: int(name.rpartition("/")[2])})
        logits = gates[name].float()
        can_decide = ~logits.isnan().any(dim=1) & (labels[:, 1:] > 0).any(dim=1)
        wanted = exit_labels(step.outputs.logits.detach(), exited, labels)[can_decide]
        losses = functional.cross_entropy(logits[can_decide], wanted, reduction="none")
        return values.masked_scatter(can_decide, losses)

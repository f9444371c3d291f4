"""Mimic distillation: at each token of an answer, the student's distribution resembles a teacher's."""

from inspect import signature
from typing import Any, ClassVar

import torch
from torch.nn import functional

from ...modeling.logits_hires_lmm import IGNORED_LABEL
from .base import BatchColumn, Objective, StepValues
from .second_model import SecondModel


COLUMN = "teacher_inputs"
MULTIMODAL = {"model_class": "AutoModelForImageTextToText", "processor_class": "AutoProcessor"}


def mimic_losses(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0, compat: str | None = None
) -> torch.Tensor:
    """How far a student is from its teacher at each position `(k,)`, in float32.

    Args:
        student, teacher (`torch.Tensor` of shape `(k, V)`): Logits; token ids that one of them lacks are left out.
        temperature (`float`): Divides the logits; its square multiplies the result, so that gradients keep their size.
        compat (`str`, *optional*): `"release"`: the cross-entropy, larger by the teacher's entropy, with the same
            gradient.

    Returns:
        Kullback-Leibler divergences, KL(teacher | student).
    """
    size = min(student.shape[-1], teacher.shape[-1])
    mine, theirs = (functional.log_softmax(own[..., :size].float() / temperature, -1) for own in (student, teacher))
    entropy = 0.0 if compat == "release" else (theirs.exp() * theirs).sum(dim=-1)
    return temperature**2 * (entropy - (theirs.exp() * mine).sum(dim=-1))


def answer_targets(labels: torch.Tensor, compat: str | None = None) -> torch.Tensor:
    """The token `(B, S)` that belongs to the logits at each position, -100 where none counts.

    Args:
        labels (`torch.Tensor` of shape `(B, S)`): Answers; -100 elsewhere.
        compat (`str`, *optional*): `"release"`: not shifted; what predicts the first token of an answer is left out,
            what comes behind its last one is in.
    """
    if compat == "release":
        return labels
    return functional.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:]


class Mimic(Objective):
    """`mimic_losses` at the answers of each row, the mean over its tokens: `(B,)`.

    The teacher is frozen and no part of the run. It reads the same conversations through its own processor, so its
    images may have other views and numbers of tokens; the tokens of the answers must be the student's.

    Args:
        teacher (`str` or `dict`): Folder or Hub id of a multimodal model, or the arguments of `SecondModel`. Its chat
            template must mark answers with `{% generation %}`.
        temperature (`float`): See `mimic_losses`.
        compat (`str`, *optional*): `"release"`: cross-entropy at positions that are not shifted.
        same_inputs (`bool`): The teacher reads the student's own batch, cached tower features too: for two models of
            this package that cut images alike, normalise them by the same numbers, count their tokens alike and have
            one tokenizer.

    Raises:
        ValueError: If an option is unknown; in training, if the teacher reads answers as other tokens.

    Source: LLaVA-MoD, huggingface.co/papers/2408.15881 (shufangxun/LLaVA-MoD at 481ca57). Its paper has this
    divergence, its code the other form, see `compat`.
    """

    needs_images: ClassVar[bool] = False
    asks: ClassVar[dict[str, Any]] = {"return_logits": True}

    def __init__(
        self,
        teacher: str | dict[str, str],
        temperature: float = 1.0,
        compat: str | None = None,
        same_inputs: bool = False,
    ):
        super().__init__()
        if compat not in (None, "release") or not temperature > 0:
            raise ValueError(f"compat={compat!r} must be None or 'release', temperature={temperature} above 0.")
        self.teacher = SecondModel(**{**MULTIMODAL, **({"name": teacher} if isinstance(teacher, str) else teacher)})
        self.temperature, self.compat, self.same_inputs = temperature, compat, same_inputs

    def settings(self) -> dict:
        """The arguments that build it anew."""
        names = ("temperature", "compat", "same_inputs")
        return {"teacher": self.teacher.settings(), **{name: getattr(self, name) for name in names}}

    def columns(self) -> list[BatchColumn]:
        """What the teacher reads, where that is not the student's batch."""
        return [] if self.same_inputs else [self.teacher.column(COLUMN, labels=True)]

    def forward(self, step: StepValues) -> torch.Tensor:
        """The loss `(B,)`; 0 for rows without an answer."""
        labels = step.inputs["labels"]
        inputs = {**step.model_inputs(), "labels": labels} if self.same_inputs else dict(step.columns[COLUMN])
        wanted = inputs.pop("labels")
        if "prompt_mask" in signature(self.teacher.model.forward).parameters:  # of this package: answers stay unread
            inputs.setdefault("prompt_mask", wanted == IGNORED_LABEL)
        mine, theirs = (answer_targets(each, self.compat) for each in (labels, wanted))
        here, there = mine != IGNORED_LABEL, theirs != IGNORED_LABEL
        here = here & there.any(dim=1, keepdim=True)  # a batch that lost its samples asks the teacher nothing
        if mine[here].tolist() != theirs[there].tolist():
            raise ValueError(self._refusal(mine, theirs))
        columns = there.any(dim=0).nonzero()[:, 0]
        logits = self.teacher(inputs, logits_to_keep=columns).logits[there[:, columns]]
        losses = mimic_losses(step.outputs.logits[here], logits, self.temperature, self.compat)
        sums = losses.new_zeros(len(here)).index_add(0, here.nonzero()[:, 0], losses)
        return sums / here.sum(dim=1).clamp(min=1)

    def _refusal(self, mine: torch.Tensor, theirs: torch.Tensor) -> str:
        """What to say of the first row whose answers are other tokens for the teacher."""
        rows = [[[t for t in row if t != IGNORED_LABEL] for row in each.tolist()] for each in (mine, theirs)]
        student, teacher = next(pair for pair in zip(*rows, strict=True) if pair[0] != pair[1])
        shown = self.teacher.processor.decode(teacher)
        return (
            f"The teacher {self.teacher.settings()['name']!r} reads an answer as {len(teacher)} tokens "
            f"{teacher[:12]} ({shown[:80]!r}), the student as {len(student)} tokens {student[:12]}. Distributions are "
            "compared token by token: take a teacher with the student's tokenizer and a chat template that ends "
            "answers alike."
        )

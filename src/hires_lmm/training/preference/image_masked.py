"""DPO on two pairs: a better and a worse answer, and the image and its masked self under the better answer."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...extras import import_extra
from .losses import anchor_losses, mask_pixels, pair_losses
from .weights import COLUMNS, PreferenceColumns


DPOConfig: Any = import_extra("trl", "train").DPOConfig
DPOTrainer: Any = import_extra("trl", "train").DPOTrainer

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass
class ImageMaskedDPOConfig(DPOConfig):
    """Arguments of `ImageMaskedDPOTrainer`, beside those of `trl.DPOConfig`.

    Args:
        level (`str`): `"sequence"`: log ratios are summed over an answer, as in DPO. `"token"`: token t of the better
            answer is compared with token t of the worse one.
        mask_share (`float`): Share of the pixels of each view that are masked.
        image_weight (`float`): Weight of the pair of images.
        anchor_weight (`float`): Weight of the anchor, which holds the reward of the better answer above a number.
        anchor_offset (`float`): That number.
        anchor_revised (`str`): `"up"`, or `"down"`: rows whose column `revised` is true are held below it.
    """

    level: str = field(default="sequence", metadata={"help": "'sequence' or 'token'"})
    mask_share: float = field(default=0.3, metadata={"help": "share of the pixels of a view that are masked"})
    image_weight: float = field(default=0.2, metadata={"help": "weight of the pair of images"})
    anchor_weight: float = field(default=1.0, metadata={"help": "weight of the anchor"})
    anchor_offset: float = field(default=0.0, metadata={"help": "the reward that the anchor holds answers above"})
    anchor_revised: str = field(default="up", metadata={"help": "'up' or 'down', for rows that are `revised`"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("level", ("sequence", "token")), ("anchor_revised", ("up", "down"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}.")
        if not 0 < self.mask_share <= 1:
            raise ValueError(f"mask_share={self.mask_share} must be above 0 and at most 1.")
        for name, low in (("image_weight", 0.0), ("anchor_weight", 0.0), ("anchor_offset", -math.inf)):
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be a finite number{', at least 0' if not low else ''}."
                )
        if self.ld_alpha is not None:
            raise ValueError(f"ld_alpha={self.ld_alpha} is not defined for pairs of images; leave it out.")
        plain = self.loss_type == ["sigmoid"] and self.f_divergence_type == "reverse_kl" and not self.use_weighting
        if self.level == "token" and not plain:
            raise ValueError(
                f"level='token' compares tokens by the plain sigmoid loss; loss_type={self.loss_type}, "
                f"f_divergence_type={self.f_divergence_type!r}, use_weighting={self.use_weighting} need 'sequence'."
            )


class ImageMaskedDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer with a second pair: the same better answer, with the image and with its masked self.

    Args:
        model, args, train_dataset, ...: As for `trl.DPOTrainer`; `args` is an `ImageMaskedDPOConfig`. Rows may have
            the columns `revised` (bool) and, with `level="token"`, `chosen_weights`, `rejected_weights` and
            `image_weights` (see `token_weights`), which multiply the log ratios of pairs.

    Loss of a batch: pair of answers + `image_weight` * pair of images + `anchor_weight` * anchor. With
    `level="sequence"` the first is TRL's loss of `loss_type`. One forward runs three rows a pair.

    Raises:
        ValueError: If the data has no images, or has weights of tokens at the level of sequences.

    Source: OPA-DPO (released code at `level="token"`), mDPO (`level="sequence"`). Here tokens are averaged over the
    positions where a row has an answer; the release averages over padding too, which adds constants. It sums over
    the two pairs of a picture and counts the anchor in both of a row: twice the mean here with `anchor_weight=2`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, ImageMaskedDPOConfig):
            raise ValueError(f"args must be an ImageMaskedDPOConfig, got {type(self.args).__name__}.")
        if not self._is_vision_dataset:
            raise ValueError("The data has no images to mask; give rows a column `images`, or use trl.DPOTrainer.")
        self.data_collator: Any = PreferenceColumns(self.data_collator)
        self.precompute_ref_logps = True  # from here on: the batch brings them, see `_compute_loss`

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in COLUMNS if name not in self._signature_columns]

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        pairs = dict(inputs)
        revised, *weights = (pairs.pop(name, None) for name in ("revised", "answer_weights", "image_weights"))
        if self.args.level == "sequence" and any(weight is not None for weight in weights):
            raise ValueError("Weights of tokens (`chosen_weights`, ...) need level='token'.")
        rows = self._add_masked(pairs)
        outputs = self._forward(model, rows)
        mask = rows["completion_mask"][:, 1:].bool()
        reference = self._reference_log_probs(rows)
        ratios = (outputs.log_probs[:, -mask.shape[1] :] - reference) * mask

        number = len(mask) // 3
        sums = reference[: 2 * number].sum(dim=1)
        pairs |= {"ref_chosen_logps": sums[:number], "ref_rejected_logps": sums[number:]}
        result = super()._compute_loss(_first_rows(model, outputs, 2 * number), pairs, return_outputs)
        loss, *more = result if return_outputs else (result,)
        chosen, rejected, masked = ratios.chunk(3)
        on_answer, on_image = self._weigh(chosen, rejected, masked, *weights)
        if self.args.level == "token":
            answered = mask[:number] | mask[number : 2 * number]
            loss = self._mean(pair_losses(*on_answer, self.beta), answered)
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss if self.aux_loss_enabled else loss
        pair = self._mean(pair_losses(*on_image, self.beta), mask[:number])
        up = torch.ones(number, 1) if revised is None or self.args.anchor_revised == "up" else ~revised[:, None]
        reward = chosen if self.args.level == "token" else chosen.sum(dim=1, keepdim=True)
        anchor = self._mean(anchor_losses(reward, self.beta, up, self.args.anchor_offset), mask[:number])
        self._log_losses(answers=loss, images=pair, anchor=anchor)
        loss = loss + self.args.image_weight * pair + self.args.anchor_weight * anchor
        return (loss, *more) if return_outputs else loss

    def _add_masked(self, pairs: dict[str, Any]) -> dict[str, Any]:
        """Chosen and rejected rows, and behind them the chosen ones with masked images."""
        added = {}
        for name, value in pairs.items():
            half = value[: len(value) // 2]
            if name.startswith("pixel_values"):
                half = mask_pixels(half, self.args.mask_share)
            added[name] = torch.cat([value, half])
        return added

    def _forward(self, model: Any, rows: dict[str, Any]) -> Any:
        """Log-probabilities of answers, as TRL asks its fused head for them."""
        labels = rows["input_ids"].masked_fill(rows["completion_mask"] == 0, -100)
        inputs = {name: value for name, value in rows.items() if name != "completion_mask"}
        inputs |= {"output_router_logits": True} if self.aux_loss_enabled else {}
        return model(**inputs, use_cache=False, labels=labels, fused_lm_head=True)

    def _reference_log_probs(self, rows: dict[str, Any]) -> torch.Tensor:
        """Those of the reference, token by token: TRL's own method sums what the model gives it."""
        model = self.model if self.ref_model is None else self.ref_model
        given = []

        def keep(**inputs: Any) -> Any:
            given.append(model(**inputs))
            return given[0]

        self.compute_ref_log_probs(keep, rows)
        return given[0].log_probs[:, 1 - rows["input_ids"].shape[1] :]

    def _weigh(
        self, chosen: Any, rejected: Any, masked: Any, answer_weights: Any, image_weights: Any
    ) -> tuple[Pair, Pair]:
        """Log ratios of the two pairs: of sequences, or of weighted tokens."""
        if self.args.level == "sequence":
            chosen, rejected, masked = (ratios.sum(dim=1, keepdim=True) for ratios in (chosen, rejected, masked))
            return (chosen, rejected), (chosen, masked)
        by_answer = torch.ones(2, 1, 1) if answer_weights is None else torch.stack(answer_weights[:, 1:].chunk(2))
        by_image = torch.ones(1, 1) if image_weights is None else image_weights[:, 1:]
        by_answer, by_image = by_answer.to(chosen), by_image.to(chosen)
        return (chosen * by_answer[0], rejected * by_answer[1]), (chosen * by_image, masked * by_image)

    def _mean(self, losses: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Over sequences, or over the positions of answers."""
        return losses.mean() if self.args.level == "sequence" else losses[mask].mean()

    def _log_losses(self, **losses: torch.Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in losses.items():
            gathered = self.accelerator.gather_for_metrics(value.detach())
            self._metrics[mode][f"loss/{name}"].append(gathered.mean().item())


def _first_rows(model: Any, outputs: Any, number: int) -> Callable[..., Any]:
    """What TRL calls in place of the model: its outputs for the first rows are known; without labels it runs."""
    known = type(outputs)(**{name: value[:number] if value.ndim > 1 else value for name, value in outputs.items()})

    def call(labels: torch.Tensor | None = None, fused_lm_head: bool = False, **inputs: Any) -> Any:
        return known if fused_lm_head else model(**inputs)

    return call

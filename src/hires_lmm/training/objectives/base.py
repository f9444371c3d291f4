"""What an objective is and what it sees of a training step."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ...modeling.geometry_hires_lmm import Column
from ...modeling.logits_hires_lmm import scale_logits
from ..columns import BatchColumn


@dataclass
class StepValues:
    """What an objective sees of one forward pass of the model in training.

    Args:
        outputs (`HiResLmmTrainingOutput`): What the model returned; with logits and the like as `Objective.asks` says.
        columns (`dict[str, Any]`): The columns of the batch that the objectives of the run own; one is missing where
            no sample of the batch gave a value.
        inputs (`dict[str, Any]`): The other keyword arguments of the model: `input_ids`, `labels` and so on.
        has_images (`bool`): False where the model sent a blank image through the modules of the stage.
        model (`nn.Module`): The `HiResLmmModel`.
        head (`nn.Module`, *optional*): What makes logits of its hidden states.
    """

    outputs: Any
    columns: dict[str, Any]
    inputs: dict[str, Any]
    has_images: bool
    model: Any
    head: Any = None

    def model_inputs(self) -> dict[str, Any]:
        """What the model read, without labels and what shapes its output."""
        mine = ("labels", "return_logits", "logits_to_keep", "return_dict", "num_items_in_batch")
        return {name: value for name, value in self.inputs.items() if name not in mine}

    @torch.no_grad()
    def run_again(self, **options: Any) -> torch.Tensor:
        """Logits `(B, S, V)` of the batch once more, without gradient, with other arguments of the model."""
        outputs = self.model(**{**self.model_inputs(), "question_labels": self.inputs.get("labels"), **options})
        return scale_logits(self.head(outputs.last_hidden_state), self.model.config.text_config)

    @property
    def aux(self) -> dict[str, Any]:
        """What parts say for losses, with gradients: `global_tokens` `(I, L, D)`, the adapted tokens of the global
        views, and what the parts of the model name. Without images in the batch it speaks of a blank one."""
        return self.outputs.aux or {}

    def image_rows(self) -> torch.Tensor:
        """Row of the batch that holds each image `(I,)`; for the blank image of a batch without images, row 0."""
        ids = self.inputs["input_ids"]
        if not self.has_images:
            return torch.zeros(1, dtype=torch.long, device=ids.device)
        mask = self.inputs.get("pixel_attention_mask")  # dense layout
        positions = self.inputs["view_positions"] if mask is None else mask[mask[..., 0] == 1][:, 1 : 1 + len(Column)]
        positions = positions.to(ids.device)
        lengths = positions[positions[:, Column.STARTS_IMAGE] != 0, Column.NUM_TOKENS]
        rows = torch.nonzero(ids == self.model.config.image_token_id)[:, 0]
        return rows[lengths.cumsum(0) - lengths]

    def per_row(self, values: torch.Tensor) -> torch.Tensor:
        """Means of `(I,)` numbers, one an image, over the images of each row: `(B,)`, 0 for rows without images."""
        rows = self.image_rows().to(values.device)
        zeros = values.new_zeros(self.inputs["input_ids"].shape[0])
        counts = zeros.index_add(0, rows, torch.ones_like(values))
        return zeros.index_add(0, rows, values) / counts.clamp(min=1)


class Objective(nn.Module):
    """A loss beside the language loss, with the modules it needs.

    `forward` runs in every training step of every process and must use the same parameters each time. Where
    `has_images` is False it works on a blank item; what it returns is then multiplied by zero, and must be finite.
    A frozen model with a processor of its own, such as a teacher, is a `SecondModel`, held as an attribute.
    """

    needs_images: ClassVar[bool] = True
    """Whether it says nothing of batches without images."""

    asks: ClassVar[dict[str, Any]] = {}
    """Arguments of the model's `forward` that it needs in training, such as `{"return_logits": True}`."""

    is_automatic: ClassVar[bool] = False
    """Whether it is built without arguments as soon as a stage weighs it."""

    frozen: tuple[str, ...] = ()
    """Submodules that no stage may train."""

    no_split_modules: tuple[str, ...] = ()
    """Class names of blocks that FSDP may wrap."""

    def columns(self) -> list[BatchColumn]:
        """Columns of the batch that it reads, for `HiResLmmCollator(..., columns=...)`."""
        return []

    def check(self, stage: Any, model: Any) -> None:
        """Refuse what cannot work."""

    def forward(self, step: StepValues) -> torch.Tensor:
        """The loss.

        Returns:
            `(B,)`, one loss a row of the batch, or a scalar for the whole batch. Either is weighed by answer tokens
            as the language loss is; row by row it does not depend on how an optimizer step is cut into batches.
        """
        raise NotImplementedError

    def settings(self) -> dict:
        """What `from_settings` needs to build it anew, as JSON values."""
        return {}

    @classmethod
    def from_settings(cls, settings: dict) -> "Objective":
        """Build it with random weights."""
        return cls(**settings)

    @classmethod
    def from_recipe(cls, model: nn.Module, **options: Any) -> "Objective":
        """Build it for a model from the plain values of a recipe."""
        return cls(**options)

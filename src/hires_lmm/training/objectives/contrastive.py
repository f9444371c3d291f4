"""The contrastive objective of the fusion paper: what a block of queries says should resemble the answer."""

from typing import Any

import torch
import transformers
from torch import nn

from ..columns import BatchColumn
from ..parameters import find_base
from .base import Objective, StepValues
from .contrastive_math import (
    IDENTITY_SCOPES,
    compose_answers,
    contrast,
    encode_answers,
    identity_term,
    lengthen_positions,
    normalise_texts,
)


LOGIT_SCALE = 2.6592
"""Where CLIP's logit scale starts: the logarithm of 1 / 0.07."""


class AnswerColumn(BatchColumn):
    """The answers of every conversation with an image, one for each user turn from that of the image on."""

    def __init__(self, tokenizer: Any):
        super().__init__("answers")
        self.tokenizer = tokenizer

    def encode(self, messages: list[dict]) -> list[torch.Tensor] | None:
        """Ids of the text behind each user turn, empty where nobody answers; None without an image."""
        texts: list[str] = []
        for message in messages:
            has_image = any(part["type"] == "image" for part in message["content"])
            if message["role"] == "user" and (texts or has_image):
                texts.append("")
            elif message["role"] == "assistant" and texts:
                texts[-1] += "".join(part["text"] for part in message["content"] if part["type"] == "text")
        if not texts:
            return None
        found = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [torch.tensor(ids, dtype=torch.long) for ids in found]

    def join(self, values: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """`ids` of all answers one after another, `lengths` of the answers, `turns` of each conversation."""
        answers = [ids for value in values for ids in value]
        return {
            "ids": torch.cat(answers),
            "lengths": torch.tensor([len(ids) for ids in answers]),
            "turns": torch.tensor([len(value) for value in values]),
        }


class Contrastive(Objective):
    """Pulls the end state of each block of queries towards its answer, and all slots apart from each other.

    Only the batch of one process is contrasted: with many processes the other answers are those of the same process.

    Args:
        encoder (`PreTrainedModel`): A text model of transformers with `text_projection`, such as
            `CLIPTextModelWithProjection`; it is lengthened where its table of positions is too short.
        width (`int`): Width of the fusion transformer.
        tokenizer (*optional*): Its tokenizer; needed for training.
        end_token (`int`, *optional*): Id that ends a text; that of the tokenizer by default.
        outlier_sigma (`float`, *optional*): See `normalise_texts`; None keeps all elements.
        identity_weight (`float`): Weight of the term that pushes slots apart.
        identity_scope (`str`): `"batch"`: all slots of the batch, as released; `"block"`: those of one block.
        max_length (`int`): Most tokens of an answer with what stands behind it.
        block_tokens (`list[int]`, *optional*): See `compose_answers`.
        logit_scale (`float`): Where the learned scale starts.

    Raises:
        ValueError: If an option is unknown, or the encoder has no projection.

    Source: eq. 19 of huggingface.co/papers/2412.18387 as its code computes it.
    """

    def __init__(
        self,
        encoder: Any,
        width: int,
        tokenizer: Any = None,
        end_token: int | None = None,
        outlier_sigma: float | None = 1.0,
        identity_weight: float = 1.0,
        identity_scope: str = "batch",
        max_length: int = 512,
        block_tokens: list[int] | None = None,
        logit_scale: float = LOGIT_SCALE,
    ):
        super().__init__()
        if identity_scope not in IDENTITY_SCOPES:
            raise ValueError(f"identity_scope={identity_scope!r} is unknown; use {' or '.join(IDENTITY_SCOPES)}.")
        if "text_projection" not in encoder._modules:
            raise ValueError(
                f"{type(encoder).__name__} has no text_projection; use a text model with one, such as "
                "CLIPTextModelWithProjection."
            )
        if encoder.config.max_position_embeddings < max_length:
            lengthen_positions(encoder, max_length)
        self.encoder = encoder
        self.tokenizer = tokenizer
        if end_token is None:
            end_token = encoder.config.eos_token_id if tokenizer is None else tokenizer.eos_token_id
        self.end_token = end_token
        self.projection = nn.Linear(width, encoder.config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale)))
        self.outlier_sigma, self.max_length, self.block_tokens = outlier_sigma, max_length, block_tokens
        self.identity_weight, self.identity_scope = identity_weight, identity_scope
        self.no_split_modules = tuple(encoder._no_split_modules or ())

    @classmethod
    def from_recipe(cls, model: nn.Module, **options: Any) -> "Contrastive":
        """Build it around the text half of a pretrained CLIP."""
        name = options.pop("encoder")
        encoder = transformers.CLIPTextModelWithProjection.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        return cls(encoder, find_fusion(model).width, tokenizer, **options)

    def columns(self) -> list[BatchColumn]:
        """The answers."""
        if self.tokenizer is None:
            raise ValueError("The contrastive objective has no tokenizer; set objective.tokenizer to the encoder's.")
        return [AnswerColumn(self.tokenizer)]

    def check(self, stage: Any, model: Any) -> None:
        """Refuse models without a fusion transformer, or with one of another width."""
        width = find_fusion(model).width
        if width != self.projection.in_features:
            raise ValueError(
                f"The contrastive objective was built for states of width {self.projection.in_features}, but the "
                f"fusion transformer has width {width}; pass width={width}."
            )

    def forward(self, step: StepValues) -> torch.Tensor:
        """A scalar for the batch: contrastive loss of the end states and the weighted identity term."""
        slots, blocks = step.aux["fusion_slots"], step.aux["fusion_blocks"]
        sizes = torch.bincount(blocks)
        ends = slots[sizes.cumsum(0) - 1]
        answers = self._answers(step, len(ends))
        used = [number for number, ids in enumerate(answers) if len(ids) or not step.has_images]
        counts = [sizes.tolist()[number] for number in used]
        ids, mask = compose_answers(
            [answers[number] for number in used], counts, self.end_token, self.max_length, self.block_tokens
        )
        texts = normalise_texts(encode_answers(self.encoder, ids, mask), self.outlier_sigma)
        queries = nn.functional.normalize(self.projection(ends[used]).float(), dim=-1)
        identity = identity_term(slots, blocks if self.identity_scope == "block" else None)
        return contrast(queries, texts, self.logit_scale.float()) + self.identity_weight * identity

    def _answers(self, step: StepValues, count: int) -> list[torch.Tensor]:
        """The answer to each block; one empty answer a block where the image is a blank one."""
        device = self.logit_scale.device
        if not step.has_images:
            return [torch.zeros(0, dtype=torch.long, device=device)] * count
        column = step.columns["answers"]
        answers = list(column["ids"].split(column["lengths"].tolist()))
        if len(answers) != count:
            raise ValueError(
                f"The batch has {len(answers)} user turns, but the fusion transformer made {count} blocks; make the "
                "batch with HiResLmmCollator(processor, columns=objective.columns())."
            )
        return answers

    def settings(self) -> dict:
        """Class and configuration of the encoder, and the options."""
        return {
            "encoder_class": type(self.encoder).__name__,
            "encoder": self.encoder.config.to_diff_dict(),
            "width": self.projection.in_features,
            "end_token": self.end_token,
            "outlier_sigma": self.outlier_sigma,
            "identity_weight": self.identity_weight,
            "identity_scope": self.identity_scope,
            "max_length": self.max_length,
            "block_tokens": self.block_tokens,
        }

    @classmethod
    def from_settings(cls, settings: dict) -> "Contrastive":
        """Build it with random weights and without a tokenizer."""
        values = dict(settings)
        encoder_class = getattr(transformers, values.pop("encoder_class"))
        encoder = encoder_class(encoder_class.config_class.from_dict(values.pop("encoder")))
        return cls(encoder, **values)


def find_fusion(model: nn.Module) -> Any:
    """The fusion transformer of a model."""
    base = find_base(model)
    parts = [op["part"] for op in base.config.connector_config.token_ops]
    if "fusion" not in parts:
        named = ", ".join(map(repr, parts)) or "none"
        raise ValueError(
            f"This needs the token op 'fusion', but the token ops of the model are: {named}. Use the preset 'fusion'."
        )
    return base.connector.token_ops[parts.index("fusion")]

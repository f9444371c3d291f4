"""What the model returns: image features that can be cached, hidden states, logits, and the token map."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .carriers_hires_lmm import VisualTokens


@dataclass(frozen=True)
class GeneratePrompt:
    """What `generate` knows of its prompt before the first forward pass; it travels on a copy of the features.

    Args:
        length (`int`): Input positions that belong to the prompt.
        cached (`int`): Positions before them that the cache holds and the caller passed again.
        mask_length (`int`): Positions of the attention mask.
        is_right_padded (`bool`): Rows end in padding, which leaves before new tokens follow.
        keeps_cache (`bool`): The caller gets the cache and may go on from it.
        token_maps (`list`, *optional*): Takes the token map of the prompt.
        chunk_size (`int`, *optional*): Most positions that the language model reads at once.
    """

    length: int
    cached: int
    mask_length: int
    is_right_padded: bool
    keeps_cache: bool
    token_maps: list | None
    chunk_size: int | None = None

    def num_virtual(self, length: int) -> int:
        """Of the positions of a prompt, those that PEFT put in front, and will put before its mask."""
        return max(length - self.mask_length, 0)


@dataclass
class HiResLmmImageFeatures(BaseModelOutputWithPooling):
    """Features of the images of a batch, before anything reads the question; can be cached and given back.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(V, L, C)`): State of the layer of the tower that is read.
        pooler_output (`list[torch.Tensor]`): One `(n_i, D)` tensor an image. Longer than the placeholders of the image
            where an operation that reads the question, or whose count depends on content, is still to come.
        tokens (`VisualTokens`): The same tokens before selection, with their geometry.
        view_boxes (`torch.Tensor` of shape `(V, 4)`, *optional*): Boxes of the views in 1/256 source pixel.
        is_unpadded (`bool`, *optional*): Known to come with an attention mask of ones.
        prompt (`GeneratePrompt`, *optional*): Set by `generate`, on its own copy.
    """

    tokens: VisualTokens | None = None
    view_boxes: torch.Tensor | None = None
    is_unpadded: bool | None = None
    prompt: GeneratePrompt | None = None

    @classmethod
    def of(cls, output: Any) -> "HiResLmmImageFeatures":
        """Features that another object holds as a list `pooler_output`, finished."""
        return cls(pooler_output=list(output.pooler_output))

    def select_images(self, indices: list[int]) -> "HiResLmmImageFeatures":
        """New features of some of the images, by index; for a cache or a batch that repeats images."""
        selected = copy.copy(self)
        selected.pooler_output = [self.pooler_output[index] for index in indices]
        selected.tokens = None if self.tokens is None else self.tokens.select_images(indices)
        return selected


@dataclass
class TokenMap:
    """One record a visual token before selection, image after image.

    Args:
        image (`torch.Tensor` of shape `(N,)`): Index of the image in the batch.
        view (`torch.Tensor` of shape `(N,)`): Row in `pixel_values`; -1 for separators.
        cell (`torch.Tensor` of shape `(N, 2)`): Row and column in the token grid of the view.
        kind (`torch.Tensor` of shape `(N,)`): Kind of the view, see `Kind`; -1 for separators.
        box (`torch.Tensor` of shape `(N, 4)`): Top, left, bottom, right in source pixels; NaN for separators.
        score (`torch.Tensor` of shape `(N,)`): The score that decided; NaN where a token was not scored.
        kept (`torch.Tensor` of shape `(N,)`): True where the token reached the language model.
        left_at (`torch.Tensor` of shape `(N,)`): Layer of the language model behind which it left; -1 for none.
    """

    image: torch.Tensor
    view: torch.Tensor
    cell: torch.Tensor
    kind: torch.Tensor
    box: torch.Tensor
    score: torch.Tensor
    kept: torch.Tensor
    left_at: torch.Tensor

    def merge_images(self, sources: Sequence[int]) -> "TokenMap":
        """The records under the numbers of the caller's images, without those of repeated ones."""
        first = {source: index for index, source in reversed(list(enumerate(sources)))}
        number = torch.tensor([source if first[source] == index else -1 for index, source in enumerate(sources)])
        image = number[self.image]
        fields = {name: value[image >= 0] for name, value in vars(self).items()}
        return TokenMap(**{**fields, "image": image[image >= 0]})


def build_token_map(tokens: VisualTokens, view_boxes: torch.Tensor | None) -> TokenMap:
    """Collect the records of a batch on the CPU, after routing and before dropping."""
    if view_boxes is None:
        raise ValueError("output_token_map=True needs view_boxes; pass the tensor that the processor returns.")
    count = len(tokens.view)
    score = tokens.scores.get(tokens.score or "", torch.full((count,), float("nan"), dtype=torch.float32))
    return TokenMap(
        image=torch.repeat_interleave(torch.arange(tokens.num_images), torch.tensor(tokens.lengths, dtype=torch.long)),
        view=tokens.view,
        cell=tokens.cell,
        kind=tokens.kind,
        box=torch.from_numpy(tokens.boxes(view_boxes)).float(),
        score=score.detach().float().cpu(),
        kept=torch.ones(count, dtype=torch.bool) if tokens.kept is None else tokens.kept.cpu(),
        left_at=torch.full((count,), -1),
    )


@dataclass
class _WithImages(ModelOutput):
    """What outputs of the models say of images, see `HiResLmmModelOutputWithPast`."""

    image_outputs: HiResLmmImageFeatures | None = None
    kept_mask: torch.Tensor | None = None
    packed_attention_mask: torch.Tensor | None = None
    num_drafted: int | None = None
    token_map: TokenMap | None = None
    aux: dict | None = None
    heads: dict | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None

    def to_tuple(self) -> tuple:
        """All values, those of the features of the images as a tuple in it."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in super().to_tuple())


@dataclass
class HiResLmmModelOutputWithPast(_WithImages, BaseModelOutputWithPast):
    """Hidden states of the input length, whatever was dropped inside.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, S, D)`): A dropped position repeats the kept one before.
        cache (`Cache`, *optional*): Cache of the positions that were kept.
        hidden_states (`tuple[torch.Tensor]`, *optional*): Per layer, at packed length.
        attentions (`tuple[torch.Tensor]`, *optional*): Per layer, at packed length.
        image_outputs (`HiResLmmImageFeatures`, *optional*): The features of the images, as `mm_encoder_outputs` takes
            them; `pooler_output` holds what was written over the placeholders of each image.
        kept_mask (`torch.Tensor` of shape `(B, S)`, *optional*): False where a visual token was dropped.
        packed_attention_mask (`torch.Tensor` of shape `(B, past + P)`, *optional*): Mask of the packed rows.
        num_drafted (`int`, *optional*): Positions beyond the prompt in this call.
        token_map (`TokenMap`, *optional*): With `output_token_map=True`.
        aux (`dict[str, torch.Tensor]`, *optional*): What parts say for losses and logs, by name; `loss/<name>` is the
            loss of a head before it is weighed.
        heads (`dict[str, torch.Tensor]`, *optional*): By name, what each head reads at its token: `(N, ...)`, one row
            an occurrence, in reading order.
        router_logits (`tuple[torch.Tensor]`, *optional*): With `output_router_logits=True`, of each layer with experts
            `(B * S, E)`; a dropped position repeats the kept one before.
        aux_loss (`torch.Tensor` of shape `()`, *optional*): The loss that balances experts, over the positions that
            are no padding and were kept; None where the family has none.
    """


@dataclass
class HiResLmmCausalLMOutputWithPast(_WithImages, CausalLMOutputWithPast):
    """Loss and logits beside the fields of `HiResLmmModelOutputWithPast`.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): Next-token loss, with `labels`.
        logits (`torch.Tensor` of shape `(B, S, vocabulary)`): Scores of the input length.
    """


class NoLogitsError(AttributeError, LookupError):
    """Somebody reads the logits of a training step, which has none."""

    def __init__(self) -> None:
        super().__init__(
            "A training step with labels makes the logits of the positions that are learned and returns none. Call "
            "the model with return_logits=True to have them all, or in evaluation mode."
        )


@dataclass
class _LossAndStates(ModelOutput):
    loss: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class HiResLmmTrainingOutput(_WithImages, _LossAndStates):
    """The output of a training step with labels: no logits, and whoever reads them is told so.

    The other fields are those of `HiResLmmModelOutputWithPast`. None is called logits, so that what copies, gathers or
    shards outputs field by field passes them over.

    Args:
        loss (`torch.Tensor` of shape `()`): Next-token loss.
    """

    @property
    def logits(self) -> torch.Tensor:
        """Not made; raises."""
        raise NoLogitsError

    def __getitem__(self, key: Any) -> Any:
        """The value under a name or a number."""
        if key == "logits" or (key == 1 and isinstance(key, int)):  # behind the loss
            raise NoLogitsError
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """The value under a name, or the default."""
        if key == "logits":
            raise NoLogitsError
        return super().get(key, default)

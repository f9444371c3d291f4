"""Running the vision tower: bounded chunks of views, one layer of hidden states."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging


logger = logging.get_logger(__name__)


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether the parameters of a module are spread over processes (FSDP, ZeRO-3), which then call it in step.

    Args:
        module (`nn.Module`): Any module.
    """
    kinds = {type(parameter).__name__ for parameter in module.parameters()}
    return bool(kinds & {"DTensor", "FlatParameter"}) or any(hasattr(p, "ds_id") for p in module.parameters())


def split_views(pixels: torch.Tensor, chunk_size: int | None, tower: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """Cut a batch of views into the pieces that pass the tower one after another.

    Args:
        pixels (`torch.Tensor` of shape `(V, 3, S, S)`): Views.
        chunk_size (`int`, *optional*): Most views of a piece; None = all.
        tower (`nn.Module`): The tower; where its parameters are spread over processes, all views stay together, since
            every process must call it equally often.

    Returns:
        At least one piece.

    Raises:
        ValueError: If `chunk_size` is no integer or below 1.
    """
    if chunk_size is None:
        return (pixels,)
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(
            f"vision_chunk_size={chunk_size!r} must be an integer of at least 1, or None for all views at once."
        )
    if pixels.shape[0] <= chunk_size:
        return (pixels,)
    if is_sharded(tower):
        logger.warning_once("vision_chunk_size is not used: the vision tower is spread over processes.")
        return (pixels,)
    return pixels.split(chunk_size)


def run_tower(
    tower: PreTrainedModel,
    pixels: torch.Tensor,
    layer: int,
    num_patches: int,
    chunk_size: int | None = None,
    output_hidden_states: bool | None = None,
    output_attentions: bool | None = None,
) -> tuple[torch.Tensor, BaseModelOutput]:
    """Encode views.

    Args:
        tower (`PreTrainedModel`): A vision tower of transformers.
        pixels (`torch.Tensor` of shape `(V, 3, S, S)`): Views.
        layer (`int`): Index into the hidden states.
        num_patches (`int`): Patches of a view; tokens before them (a class token) are left out.
        chunk_size (`int`, *optional*): Most views that pass the tower at once; None = all. Bounds the memory of a
            forward pass; with gradients every chunk keeps its activations.
        output_hidden_states, output_attentions (`bool`, *optional*): Keep those of all layers; the tower's
            configuration decides by default.

    Returns:
        Patch features of the layer `(V, num_patches, C)`, and the tower's last hidden state `(V, T, C)` with what is
        to be kept.
    """
    keeps = tower.config.output_hidden_states if output_hidden_states is None else output_hidden_states
    attentions = {} if output_attentions is None else {"output_attentions": output_attentions}
    features, parts = [], []
    for piece in split_views(pixels, chunk_size, tower):
        output = tower(piece.to(tower.dtype), output_hidden_states=True, return_dict=True, **attentions)
        states = output.hidden_states[layer]
        features.append(states[:, states.shape[1] - num_patches :])
        hidden = output.hidden_states if keeps else None
        parts.append(BaseModelOutput(output.last_hidden_state, hidden, output.attentions))
    return _join(features), parts[0] if len(parts) == 1 else _join_outputs(parts)


def _join(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces))


def _join_outputs(parts: list[BaseModelOutput]) -> BaseModelOutput:
    """One output of the outputs of chunks."""
    joined: dict[str, Any] = {"last_hidden_state": _join([part.last_hidden_state for part in parts])}
    for name in ("hidden_states", "attentions"):
        if getattr(parts[0], name) is not None:
            layers = zip(*(getattr(part, name) for part in parts), strict=True)
            joined[name] = tuple(_join(layer) for layer in layers)
    return BaseModelOutput(**joined)

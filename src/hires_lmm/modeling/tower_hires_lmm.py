"""Running the vision tower: bounded chunks of views, one layer of hidden states."""

import torch
from transformers import PreTrainedModel
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
        ValueError: If `chunk_size` is below 1.
    """
    if chunk_size is None:
        return (pixels,)
    if chunk_size < 1:
        raise ValueError(f"vision_chunk_size={chunk_size} must be at least 1, or None for all views at once.")
    if pixels.shape[0] <= chunk_size:
        return (pixels,)
    if is_sharded(tower):
        logger.warning_once("vision_chunk_size is not used: the vision tower is spread over processes.")
        return (pixels,)
    return pixels.split(chunk_size)


def run_tower(
    tower: PreTrainedModel, pixels: torch.Tensor, layer: int, num_patches: int, chunk_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode views.

    Args:
        tower (`PreTrainedModel`): A vision tower of transformers.
        pixels (`torch.Tensor` of shape `(V, 3, S, S)`): Views.
        layer (`int`): Index into the hidden states.
        num_patches (`int`): Patches of a view; tokens before them (a class token) are left out.
        chunk_size (`int`, *optional*): Most views that pass the tower at once; None = all. Bounds the memory of a
            forward pass; with gradients every chunk keeps its activations.

    Returns:
        Patch features of the layer `(V, num_patches, C)`, and the last hidden state `(V, T, C)`.
    """
    features, last = [], []
    for piece in split_views(pixels, chunk_size, tower):
        output = tower(piece.to(tower.dtype), output_hidden_states=True, return_dict=True)
        states = output.hidden_states[layer]
        features.append(states[:, states.shape[1] - num_patches :])
        last.append(output.last_hidden_state)
    return (features[0], last[0]) if len(features) == 1 else (torch.cat(features), torch.cat(last))

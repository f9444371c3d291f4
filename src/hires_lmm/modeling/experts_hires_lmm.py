"""Experts: what a language model with a mixture of experts says of its routers, and the loss that balances them."""

from typing import Any

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from .compat_hires_lmm import router_layers
from .packing_hires_lmm import expand


ROUTER_LOGITS, ROUTER_COEFFICIENT = "output_router_logits", "router_aux_loss_coef"


def wants_routers(text_config: Any, options: dict[str, Any]) -> bool:
    """Whether a call asks for router logits; by default as the configuration of the language model says."""
    wanted = options.get(ROUTER_LOGITS)
    return bool(getattr(text_config, ROUTER_LOGITS, False) if wanted is None else wanted)


def read_routers(model: Any, prompt: Any, attention_mask: Any, router_logits: Any) -> dict[str, Any]:
    """`router_logits` at the caller's positions and, where the family has one, `aux_loss` over what is still there.

    Args:
        prompt (`Prompt`): What the language model has read.
        attention_mask (`torch.Tensor` of shape `(B, past + S)`, *optional*): The caller's.
        router_logits (`tuple[torch.Tensor]`): Of each layer with experts `(B * P, E)`, P the positions it has read.
    """
    if not router_logits:
        return {}
    rows, count = prompt.embeds.shape[:2]
    real = torch.ones(rows, count, dtype=torch.bool, device=prompt.embeds.device)
    if prompt.packing is not None:
        real = prompt.packing.mask
    elif getattr(attention_mask, "ndim", None) == 2:
        real = attention_mask[:, -count:].bool()
    shown, counted = [], []
    for layer, logits in zip(router_layers(model.language_model), router_logits, strict=True):
        level = None if prompt.layers is None else prompt.layers.level(layer)
        here = real if level is None else level.real
        counted.append(logits[here.flatten().to(logits.device)])
        logits = logits.view(rows, -1, logits.shape[-1])
        if level is not None and level.is_packed:
            logits = expand(logits, level.plan)
        shown.append((logits if prompt.packing is None else expand(logits, prompt.packing)).flatten(0, 1))
    found: dict[str, Any] = {"router_logits": tuple(shown)}
    text_config = model.config.text_config
    if getattr(text_config, ROUTER_COEFFICIENT, None) is not None:
        number = getattr(text_config, "num_local_experts", None) or text_config.num_experts
        found["aux_loss"] = load_balancing_loss_func(tuple(counted), number, text_config.num_experts_per_tok)
    return found


def add_aux_loss(text_config: Any, loss: torch.Tensor | None, outputs: Any) -> Any:
    """The language loss with the weighed loss of the routers, as in transformers; None stays None."""
    found = outputs.aux_loss
    if loss is None or found is None:
        return loss
    return loss + getattr(text_config, ROUTER_COEFFICIENT) * found.to(loss)

"""Inside an engine such as vLLM: what can be right there, and the question that its processor sends with the views."""

from typing import Any

import torch
from transformers.utils import logging

from .carriers_hires_lmm import Question
from .geometry_hires_lmm import Column


logger = logging.get_logger(__name__)

ENGINE_ATTENTION = "vllm"
"""The attention function by which a language model knows that vLLM runs it."""

PLUGIN_FLAG = "_reads_routing_ids"
"""Set on the configuration by the plugin of this package, which sends `routing_ids`."""


def check_engine(config: Any) -> None:
    """Refuse at load what an engine would answer wrongly: it runs the language model itself, from own embeddings.

    Raises:
        ValueError: If the model has a part that the engine leaves out.
    """
    if config.text_config._attn_implementation != ENGINE_ATTENTION:
        return
    chain = config.fitted_chain()
    has_plugin = PLUGIN_FLAG in vars(config)
    never = {
        "layer_ops": [step for step in chain.of("layer_ops") if step.options.of == "language_model"],
        "position_plan": chain.of("position_plan"),
        "map_ops": [step for step in chain.of("map_ops") if step.part.has_vocabulary],
        "token_ops": [step for step in chain.of("token_ops") if step.traits.writes_question],
    }
    for slot, steps in never.items():
        for step in steps:
            raise ValueError(
                f"{slot} has {step.part.__name__}, which works inside the language model or on the text, and vLLM "
                "runs that without it. Serve this checkpoint with transformers, or take the part out."
            )
    own = [step for step in chain.of("token_ops") if step.traits.later_tokens is not None]
    if own and not has_plugin:
        raise ValueError(
            f"{own[0].part.__name__} reads the question, which reaches the image branch by the plugin of hires_lmm "
            "alone: pip install 'hires-lmm[vllm]' and leave model_impl at 'auto'."
        )
    if config.extra_towers and config.planner.get("views") != "global" and not has_plugin:
        raise ValueError(
            "The views of extra towers reach vLLM by the plugin of hires_lmm alone where images are cut: pip install "
            "'hires-lmm[vllm]' and leave model_impl at 'auto'."
        )
    if any(step.traits.count == "content" for step in chain.of("token_ops")):
        logger.warning(
            "vLLM fixes the number of visual tokens before the model runs, so a threshold keeps all of them; set "
            'max_image_tokens, or keep={"rule": "budget"}, to keep fewer.'
        )


def asked_question(model: Any, routing_ids: torch.Tensor, view_positions: torch.Tensor, counts: list[int]) -> Question:
    """The question of each image as a row of its own: its placeholders, then the text that it is asked about.

    Args:
        model (`HiResLmmModel`): Looks up the embeddings.
        routing_ids (`torch.Tensor` of shape `(V, L)`): Ids + 1 of the text, 0 behind it; one row a view, as engines
            split and pad tensors by view. The first view of an image counts.
        view_positions (`torch.Tensor` of shape `(V, 9)`): Says which views open an image.
        counts (`list[int]`): Placeholders of each image.
    """
    shifted = routing_ids[view_positions[:, Column.STARTS_IMAGE].bool().to(routing_ids.device)].long()
    rows, longest = len(counts), max(counts)
    ids = shifted.new_full((rows, longest + shifted.shape[1]), model.config.image_token_id)
    turn, placeholder = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, count in enumerate(counts):
        placeholder[row, :count] = True
        stop = count + shifted.shape[1]
        ids[row, count:stop] = (shifted[row] - 1).clamp(min=0)
        turn[row, count:stop] = (shifted[row] > 0).long()
    one = torch.ones(rows, dtype=torch.long, device=ids.device)
    image_row = torch.arange(rows, device=ids.device)
    return Question(model.embed_token(ids), ids, turn, image_row, one, placeholder, torch.ones_like(ids))

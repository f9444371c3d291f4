"""Heads: what is read off the last hidden states at a token, beside the logits."""

from typing import Any, NamedTuple

import torch

from .conversation_hires_lmm import cached_length
from .logits_hires_lmm import IGNORED_LABEL
from .question_hires_lmm import PromptText
from .splice_hires_lmm import find_placeholders


class HeadCall(NamedTuple):
    """What a call wants of heads: their labels by name; and where `generate` takes what they read, with its rows."""

    labels: dict[str, torch.Tensor]
    taken: list | None


def take_heads(model: Any, options: dict[str, Any], cache: Any) -> HeadCall | None:
    """Take what concerns heads out of the keyword arguments of a call; None if none run."""
    wanted = options.pop("output_heads", None)
    heads = [f"labels_{name}" for name in model.connector.heads]
    unknown = next((name for name in options if name.startswith("labels_") and name not in heads), None)
    if unknown is not None:
        raise ValueError(f"{unknown} belongs to no head of this model; its heads read {', '.join(heads) or 'none'}.")
    if not heads:
        return None
    found = {name: options.pop(f"labels_{name}", None) for name in model.connector.heads}
    labels = {name: given for name, given in found.items() if given is not None}
    if wanted is None:
        wanted = bool(labels) or cache is None or not cached_length(cache)
    taken = wanted if isinstance(wanted, list) else None
    return HeadCall(labels, taken) if wanted or taken is not None else None


def run_heads(model: Any, text: PromptText, hidden: torch.Tensor, call: HeadCall, outputs: dict[str, Any]) -> None:
    """Run all heads on `(B, S, D)` hidden states; `outputs` gets `heads` and, where there are labels, `aux`."""
    read, losses = {}, {}
    for name, head in model.connector.heads.items():
        token_id, wanted = head.options.token_id, call.labels.get(name)
        found = find_placeholders(text.ids, text.embeds, token_id, model.embed_token).to(hidden.device)
        states = hidden[found]
        count = len(states)
        if wanted is not None and len(wanted) != count:
            raise ValueError(
                f"labels_{name} has {len(wanted)} rows, but the token {token_id} occurs {count} times in the batch; "
                "pass one row an occurrence, in reading order."
            )
        read[name] = head(states)
        if call.taken is not None:
            call.taken.append((name, found.nonzero()[:, 0].tolist(), read[name]))
        if model.training:  # without the token too, every parameter gets a gradient on every process
            losses[f"loss/{name}"] = 0.0 * read[name].sum()
        if wanted is not None and count:
            loss = head.loss(read[name], wanted.to(hidden.device))
            losses[f"loss/{name}"] = loss + losses.get(f"loss/{name}", 0.0)
    outputs["heads"] = read
    if losses:
        outputs["aux"] = {**(outputs.get("aux") or {}), **losses}


def join_heads(taken: list, num_rows: int) -> dict[str, list[torch.Tensor]]:
    """What heads read while a text was generated: by name, for each of its rows `(n, ...)`, in reading order."""
    found: dict[str, list[list]] = {}
    for name, rows, values in taken:
        own = found.setdefault(name, [[values[:0]] for _ in range(num_rows)])
        for row, value in zip(rows, values, strict=True):
            own[row].append(value[None])
    return {name: [torch.cat(values) for values in rows] for name, rows in found.items()}


def add_head_losses(model: Any, loss: torch.Tensor | None, aux: dict, labels: Any, options: dict) -> Any:
    """The language loss with the weighed losses of heads; None where the call has no labels.

    Where the trainer counts the answer tokens of an optimizer step, `num_items_in_batch`, each head has the share of
    this batch in them, as the language loss does.
    """
    heads = model.connector.heads
    if labels is None and all(options.get(f"labels_{name}") is None for name in heads):
        return None
    total, share = options.get("num_items_in_batch"), 1.0
    if total is not None and labels is not None:
        share = (labels[:, 1:] != IGNORED_LABEL).sum() / total
    for name, head in heads.items():
        part = aux.get(f"loss/{name}")
        if part is not None:
            part = head.options.weight * share * part
            loss = part if loss is None else loss + part.to(loss)
    return loss

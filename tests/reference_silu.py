"""SiLU attention and the spatially aware perceiver in float64, loop by loop, from the formulas alone."""

import math

import numpy as np
import torch


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def attention_with_gradients(query, key, value, offsets, scale, mean, grad):
    """Output and gradients of query, key and value: one query, one key and one head at a time.

    Args:
        query, grad (`np.ndarray` of shape `(I, Q, H, E)`), key, value (`(T, H, E)`): float64.
        offsets (`list[int]`): First key of each image, and the end of the last.
    """
    output, grad_query = np.zeros_like(query), np.zeros_like(query)
    grad_key, grad_value = np.zeros_like(key), np.zeros_like(value)
    for image in range(query.shape[0]):
        keys = range(offsets[image], offsets[image + 1])
        share = 1 / len(keys) if mean and len(keys) else 1.0
        for q in range(query.shape[1]):
            for h in range(query.shape[2]):
                incoming = grad[image, q, h] * share
                for k in keys:
                    score = scale * float(query[image, q, h] @ key[k, h])
                    gate = sigmoid(score)
                    output[image, q, h] += share * score * gate * value[k, h]
                    slope = scale * (gate + score * gate * (1 - gate)) * float(incoming @ value[k, h])
                    grad_query[image, q, h] += slope * key[k, h]
                    grad_key[k, h] += slope * query[image, q, h]
                    grad_value[k, h] += score * gate * incoming
    return output, grad_query, grad_key, grad_value


def normalise(rows: np.ndarray, weight: np.ndarray | None, name: str) -> np.ndarray:
    if name == "none":
        return rows
    centred = rows - rows.mean(-1, keepdims=True) if name == "layer" else rows
    return weight * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1.0)


def attend(queries, keys, values, options, activation):
    """`(Q, C)` queries over `(K, C)` keys, head by head."""
    width = queries.shape[1] // options["num_heads"]
    output = np.zeros_like(queries)
    if not len(keys):
        return output
    for head in range(options["num_heads"]):
        part = slice(head * width, (head + 1) * width)
        scores = queries[:, part] @ keys[:, part].T
        if options["score_scale"] == "1/sqrt(d)":
            scores = scores / math.sqrt(width)
        if activation == "silu":
            weights = scores * (1 + np.tanh(scores / 2)) / 2
            if options["score_scale"] == "1/num_keys" or options["norm"] != "none":  # the norm sees the mean
                weights = weights / len(keys)
        else:
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights = weights / weights.sum(-1, keepdims=True)
        output[:, part] = weights @ values[:, part]
    return output


def perceive(low: np.ndarray, crops: np.ndarray, weights: dict, options: dict) -> tuple[np.ndarray, np.ndarray]:
    """The perceiver on one image.

    Args:
        low (`np.ndarray` of shape `(L, C)`): The low-resolution view.
        crops (`np.ndarray` of shape `(m, L, C)`): Its crops.
        weights (`dict`): Matrices and norms by the names of the module.
        options (`dict`): All options, defaults filled in.

    Returns:
        The image tokens `(L, C)` and the global embedding `(C,)`.
    """
    tokens = np.concatenate([low, weights["global_query"][None]])
    keys = crops.reshape(-1, low.shape[1]) @ weights["kv_proj.weight"].T
    queries = tokens @ weights["q_proj.weight"].T
    read = attend(queries, keys, keys, options, options["activation"])
    read = normalise(read, weights.get("cross_norm.weight"), options["norm"])
    tokens = tokens + read @ weights["cross_out.weight"].T
    if options["self_attention"] != "none":
        keys = tokens @ weights["k_proj.weight"].T
        read = attend(tokens, keys, tokens, options, options["self_attention"])
        read = normalise(read, weights.get("self_norm.weight"), options["norm"])
        tokens = tokens + read @ weights["self_out.weight"].T
    return tokens[:-1], tokens[-1]


def relative_error(found: torch.Tensor, wanted: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(found.detach().double().cpu().numpy() - wanted).max() / np.abs(wanted).max())

"""Which visual tokens a router must keep, written again with plain loops in double precision."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn


MIN_SCORE_GAP = 1e-5  # between the last kept and the first dropped token
MIN_MASS_GAP = 1e-5  # between a cumulative mass and gamma
SCORED_KINDS = {"all": {"global", "crop"}, "crops": {"crop"}, "global": {"global"}}

# few queries, and marks inside the tiny vocabulary
SMALL_CONNECTORS = {
    "slime": {"view_ops": [{"part": "query_compressor", "on": "crops", "num_queries": 9}]},
    "slime_release": {
        "view_ops": [{"part": "query_compressor", "on": "crops", "num_queries": 4}],
        "layout": {"separators": {"separator": {"place": "between_views", "value": [19]}}},
    },
    "pllava": {"map_ops": [{"part": "pool3d", "shape": [4, 3, 2]}]},
    "slime_video": {"layout": {"separators": {"separator": {"place": "between_views", "value": [19]}}}},
    "monkey": {"view_ops": [{"part": "query_compressor", "on": "all", "num_queries": 9}]},
    "llava_uhd": {
        "view_ops": [{"part": "uhd_resampler", "num_queries": 9, "num_heads": 2}],
        "layout": {
            "order": ["crops", "global"],
            "crop_order": "views",
            "separators": {
                "comma": {"place": "crop_column", "value": [18], "on": "crops"},
                "newline": {"place": "crop_row_end", "value": [19], "on": "crops"},
            },
        },
    },
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One configuration of the router."""

    score: str
    keep: str = "threshold"
    on: str = "crops"
    gamma: float = 0.75
    temperature: float = 1.0
    reduce: str = "sum"
    double_softmax: bool = False
    num_heads: int | None = None

    def __str__(self) -> str:
        extra = [self.reduce] if self.score == "cosine" else []
        return "_".join([self.score, self.keep, self.on, *extra])

    def token_ops(self) -> list[dict]:
        """`token_ops` of the connector."""
        keep = {"rule": self.keep, "gamma": self.gamma, "temperature": self.temperature}
        names = ("score", "on", "reduce", "double_softmax", "num_heads")
        return [{"part": "router", "keep": keep, **{name: getattr(self, name) for name in names}}]


def saliency(vectors: torch.Tensor) -> list[float]:
    """1 - cosine to the mean vector."""
    mean = vectors.mean(0)
    return [1 - float(v @ mean) / float(v.norm() * mean.norm()) for v in vectors]


def cosine(vectors: torch.Tensor, text: torch.Tensor, reduce: str) -> list[float]:
    """Sum or mean over the text tokens of the cosines, one pair after the other."""
    scores = []
    for vector in vectors:
        total = sum(float(vector @ word) / float(vector.norm() * word.norm()) for word in text)
        scores.append(total if reduce == "sum" or not len(text) else total / len(text))
    return scores


def attention(part: nn.Module, vectors: torch.Tensor, text: torch.Tensor) -> list[float]:
    """Norms, torch's own multi-head attention with the part's weights, a norm and a perceptron."""
    if not len(text):
        return [0.0] * len(vectors)
    inner, width = part.attention, vectors.shape[1]
    attend = nn.MultiheadAttention(width, inner.num_heads, batch_first=True).double()
    projections = [inner.q_proj, inner.k_proj, inner.v_proj]
    with torch.no_grad():
        attend.in_proj_weight.copy_(torch.cat([layer.weight for layer in projections]))
        attend.in_proj_bias.copy_(torch.cat([layer.bias for layer in projections]))
        attend.out_proj.weight.copy_(inner.o_proj.weight)
        attend.out_proj.bias.copy_(inner.o_proj.bias)

        def norm(layer: nn.LayerNorm, states: torch.Tensor) -> torch.Tensor:
            centred = states - states.mean(-1, keepdim=True)
            scale = (centred.pow(2).mean(-1, keepdim=True) + layer.eps).sqrt()
            return centred / scale * layer.weight.double() + layer.bias.double()

        queries, keys = norm(part.image_norm, vectors), norm(part.text_norm, text)
        states = norm(part.output_norm, attend(queries[None], keys[None], keys[None], need_weights=False)[0][0])
        hidden = (states @ part.linear_1.weight.double().T + part.linear_1.bias.double()).clamp(min=0)
        return (hidden @ part.linear_2.weight.double().T + part.linear_2.bias.double())[:, 0].tolist()


def softmax(values: list[float]) -> list[float]:
    """Softmax of a list."""
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / math.fsum(powers) for power in powers]


def scores_of(model, rule: Rule, vectors: torch.Tensor, text: torch.Tensor) -> list[float]:
    """Scores of the routed tokens of one image under the text it may be routed by."""
    vectors, text = vectors.double(), text.double()
    if rule.score == "saliency":
        return saliency(vectors)
    if rule.score == "cosine":
        return cosine(vectors, text, rule.reduce)
    scores = attention(model.model.connector.token_ops[0].attention_score, vectors, text)
    return softmax([score / rule.temperature for score in scores]) if rule.double_softmax else scores


def best(scores: list[float], count: int) -> list[int]:
    """The `count` best; fails where a float comparison would be no fair test."""
    ranked = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    if 0 < count < len(scores):
        gap = scores[ranked[count - 1]] - scores[ranked[count]]
        assert gap > MIN_SCORE_GAP, f"a gap of {gap} between kept and dropped: take another seed"
    return ranked[:count]


def smallest_set(scores: list[float], gamma: float, temperature: float) -> list[int]:
    """The smallest set whose softmax mass exceeds gamma."""
    if not scores:
        return []
    masses = softmax([score / temperature for score in scores])
    count, total = 0, 0.0
    for mass in sorted(masses, reverse=True):
        total, count = total + mass, count + 1
        assert abs(total - gamma) > MIN_MASS_GAP, f"the mass {total} is too close to gamma: take another seed"
        if total > gamma:
            break
    return best(scores, count)


def selection(
    model, rule: Rule, text: torch.Tensor
) -> Callable[[torch.Tensor, list[str], int | None, str], list[int]]:
    """A `select` for `reference_generation.prompt_embeds`.

    Args:
        model: The model, for the weights of the `attention` score.
        rule (`Rule`): The router.
        text (`torch.Tensor` of shape `(t, D)`): Embeddings of the text that the image may be routed by.
    """

    def select(tokens: torch.Tensor, kinds: list[str], budget: int | None, on: str) -> list[int]:
        assert on == rule.on
        assert tokens.shape[0] == len(kinds)
        scored = [index for index, kind in enumerate(kinds) if kind in SCORED_KINDS[rule.on]]
        others = [index for index in range(len(kinds)) if index not in set(scored)]
        over = budget is not None and budget < len(kinds)
        if not scored or (rule.keep == "budget" and not over):
            return list(range(len(kinds)))
        scores = scores_of(model, rule, tokens[scored], text)
        if over:
            chosen = best(scores, budget - len(others))
        else:
            chosen = smallest_set(scores, rule.gamma, rule.temperature)
        return sorted(others + [scored[index] for index in chosen])

    return select

"""The router: scores visual tokens and decides which of them reach the language model."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from .attention_hires_lmm import HiResLmmCrossAttention, default_num_heads
from .bases_hires_lmm import HiResLmmTokenOp, PartContext, Traits
from .carriers_hires_lmm import Question, VisualTokens
from .geometry_hires_lmm import kinds_on
from .noise_hires_lmm import HiResLmmNoise


def _cosines(features: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Products with a direction, over the lengths of `(n, D)` features: no normalised copy of them is written."""
    return features @ direction / torch.linalg.vector_norm(features, dim=-1).clamp(min=1e-8)


def saliency_scores(features: torch.Tensor) -> torch.Tensor:
    """How much each token `(n, D)` differs from the mean of its image: `(n,)` float32, one minus the cosine, 0 to 2.

    Source: ours; needs no question, no parameters and no particular tower.
    """
    features = features.float()
    return 1 - _cosines(features, nn.functional.normalize(features.mean(dim=0), dim=0, eps=1e-8))


def cosine_scores(features: torch.Tensor, text: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of the cosines of each visual token to all text tokens.

    The text is summed first, so the cost is linear in both lengths.

    Args:
        features (`torch.Tensor` of shape `(n, D)`): Scored tokens of one image.
        text (`torch.Tensor` of shape `(S, D)`): Token embeddings of the row.
        weights (`torch.Tensor` of shape `(S,)`): Weight of each text token; 0 for those that must not be read.

    Returns:
        `(n,)` float32, unbounded with weights of 1, in [-1, 1] with weights that sum to one.

    Source: SliME, huggingface.co/papers/2406.08487, section 3.3; the released code sums (weights of 1).
    """
    direction = weights.float() @ nn.functional.normalize(text.float(), dim=-1, eps=1e-8)
    return _cosines(features.float(), direction)


def keep_budget(scores: torch.Tensor, budget: int) -> torch.Tensor:
    """Keep the `budget` highest scores.

    Args:
        scores (`torch.Tensor` of shape `(n,)`): Relevance; only the order is used.
        budget (`int`): Tokens to keep, from 0 to n.

    Returns:
        `(n,)` bool with exactly `budget` True; among equal scores the earlier token wins, NaN counts as the highest.

    Raises:
        ValueError: If `budget` is outside [0, n].
    """
    if not 0 <= budget <= scores.shape[0]:
        raise ValueError(f"Cannot keep {budget} of {scores.shape[0]} tokens; the budget must lie between 0 and that.")
    order = torch.argsort(scores, descending=True, stable=True)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.index_fill(0, order[:budget], True)


def keep_threshold(scores: torch.Tensor, gamma: float, temperature: float) -> torch.Tensor:
    """Keep the smallest set of tokens whose softmax mass exceeds gamma.

    Args:
        scores (`torch.Tensor` of shape `(n,)`): Logits.
        gamma (`float`): Mass to exceed, in (0, 1].
        temperature (`float`): Divides the scores.

    Returns:
        `(n,)` bool; among equal scores the earlier token wins. At least one token is kept, and every token whose score
        is NaN, so that a broken image cannot pass for a whole one.

    Source: SliME, huggingface.co/papers/2406.08487, section 3.3.
    """
    if not scores.shape[0]:
        return torch.zeros_like(scores, dtype=torch.bool)
    mass, order = torch.sort((scores / temperature).softmax(dim=0), descending=True, stable=True)
    within = mass.cumsum(dim=0) <= gamma
    chosen = torch.cat([torch.ones_like(within[:1]), within[:-1]])
    return torch.zeros_like(chosen).scatter(0, order, chosen) | scores.isnan()


@strict
@dataclass
class KeepOptions:
    """Which scores survive.

    Args:
        rule (`str`): `"budget"`: exactly as many tokens as the image has placeholders. `"threshold"`: the smallest set
            whose softmax mass exceeds gamma, except where a budget was asked for.
        gamma (`float`): Mass of the threshold rule; the paper compares 0.9, 0.75 and 0.5 (Table 3).
        temperature (`float`): Temperature of the threshold rule.
    """

    rule: Literal["budget", "threshold"] = "budget"
    gamma: float | int = 0.75
    temperature: float | int = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"keep.gamma is {self.gamma}; it must lie in (0, 1].")
        if self.temperature <= 0:
            raise ValueError(f"keep.temperature is {self.temperature}; it must be positive.")


class HiResLmmAttentionScore(nn.Module):
    """Scores tokens by cross-attention to the question.

    Source: SliME's released code (its "qformer" router): norms, one attention from image to text, a norm and a narrow
    perceptron. Its query vector, self-attention and key projection take no part in the result and are left out.
    """

    def __init__(self, context: PartContext, num_heads: int | None = None):
        super().__init__()
        width = context.text_width
        self.image_norm, self.text_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = HiResLmmCrossAttention(context.config, width, num_heads or default_num_heads(width))
        self.output_norm = nn.LayerNorm(width)
        self.linear_1, self.linear_2 = nn.Linear(width, width // 4), nn.Linear(width // 4, 1)

    def forward(self, features: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Score `(n, D)` tokens against `(t, D)` text without padding -> `(n,)` logits."""
        text = self.text_norm(text)[None]
        states = self.output_norm(self.attention(self.image_norm(features)[None], text, text))
        return self.linear_2(torch.relu(self.linear_1(states)))[0, :, 0]


class HiResLmmRouter(HiResLmmTokenOp):
    """Keeps the visual tokens that matter; the others never reach the language model.

    Source: SliME, huggingface.co/papers/2406.08487, section 3.3. Ours: the exact budget, `saliency`, the mean over the
    text and deterministic ties.
    """

    @strict
    @dataclass
    class Options:
        """Options of `router`.

        Args:
            on (`str` or `list[str]`): Kinds of views whose tokens are scored; the paper's are crops. The rest is kept.
            score (`str`): `"cosine"` and `"attention"` read the question, `"saliency"` does not.
            reduce (`str`): `"sum"` (released) or `"mean"` over the text tokens, for `cosine`. With the sum the kept
                share under a threshold falls as the prompt grows.
            double_softmax (`bool`): For `attention`: pass probabilities instead of logits to the keep rule, as the
                released code does; the result is nearly flat.
            keep (`dict`): Fields of `KeepOptions`.
            noise (`float`): Standard deviation of the noise on the scores while training; the paper uses 0.1.
            num_heads (`int`, *optional*): Heads of the `attention` score.
        """

        on: str | list = "crops"
        score: Literal["cosine", "attention", "saliency"] = "cosine"
        reduce: Literal["sum", "mean"] = "sum"
        double_softmax: bool = False
        keep: dict = field(default_factory=dict)
        noise: float | int = 0.1
        num_heads: int | None = None

        def __post_init__(self) -> None:
            kinds_on(self.on)
            KeepOptions(**self.keep)

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        self.keep = KeepOptions(**options.keep)
        self.noise = HiResLmmNoise()
        if options.score == "attention":
            self.attention_score = HiResLmmAttentionScore(context, options.num_heads)

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """It takes the budget; under a threshold the count depends on the content."""
        return Traits(
            context.grids,
            context.width,
            reads_question=options.score != "saliency",
            count="static" if KeepOptions(**options.keep).rule == "budget" else "content",
            budget_on=options.on,
            untrained=("attention_score",) if options.score == "attention" else (),
        )

    def _score(
        self, features: torch.Tensor, image: int, question: Question | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Scores `(n,)` of the routed tokens of one image, float32."""
        if not features.shape[0]:
            return features.new_zeros(0, dtype=torch.float32)
        if self.options.score == "saliency":
            return saliency_scores(features)
        if question is None or mask is None:
            raise ValueError(f"The score {self.options.score!r} reads the question, but none was passed.")
        row = question.embeds.index_select(0, question.image_row[image : image + 1])[0]  # an index would wait
        if self.options.score == "attention":
            text = row[mask[image]]
            if not text.shape[0]:
                return features.new_zeros(features.shape[0], dtype=torch.float32)
            scores = self.attention_score(features, text.to(features.dtype)).float()
            return (scores / self.keep.temperature).softmax(dim=0) if self.options.double_softmax else scores
        weights = mask[image].float()
        if self.options.reduce == "mean":
            weights = weights / weights.sum().clamp(min=1)
        return cosine_scores(features, row, weights)

    def forward(self, tokens: VisualTokens, question: Question | None) -> tuple[VisualTokens, Question | None]:
        """Fill `kept` and `scores["router"]`; the question is needed by `cosine` and `attention`, and unchanged."""
        mask = question.image_mask() if question is not None and self.options.score != "saliency" else None
        features = tokens.features
        scores = torch.full(features.shape[:1], float("nan"), dtype=torch.float32, device=features.device)
        kept = torch.ones_like(scores, dtype=torch.bool)
        for image, index in enumerate(tokens.rows(self.options.on)):
            image_scores = self._score(features[index], image, question, mask)
            if self.options.noise:
                image_scores = self.noise(image_scores, self.options.noise)
            scores = scores.index_copy(0, index, image_scores.detach())
            surplus = tokens.num_tokens[image] - tokens.lengths[image]
            kept = kept.index_copy(0, index, self._keep(image_scores, surplus))
        return replace(tokens, kept=kept, scores={**tokens.scores, "router": scores}, score="router"), question

    def _keep(self, scores: torch.Tensor, surplus: int) -> torch.Tensor:
        """Apply the keep rule; `surplus` is placeholders minus tokens, negative under a budget."""
        if surplus == 0 and self.keep.rule == "budget":
            return torch.ones_like(scores, dtype=torch.bool)
        if surplus == 0:
            return keep_threshold(scores, float(self.keep.gamma), float(self.keep.temperature))
        return keep_budget(scores, scores.shape[0] + surplus)

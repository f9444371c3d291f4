"""Decoding that looks twice: scores of a prompt against those of a negative context, which sees less of its images.

model.generate(**inputs, logits_processor=[M3ID(model, inputs)])
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from transformers import GenerationConfig, LogitsProcessor

from .modeling.carriers_hires_lmm import VisualTokens
from .modeling.compat_hires_lmm import CACHE
from .modeling.geometry_hires_lmm import Kind, ViewShape
from .modeling.inputs_hires_lmm import unpack_samples
from .modeling.outputs_hires_lmm import HiResLmmImageFeatures
from .modeling.packing_hires_lmm import plan_packing
from .modeling.tower_table_hires_lmm import patch_side, prefix_tokens, tower_family
from .modeling.towers_hires_lmm import class_products, run_tower


IMAGE_NAMES = ("pixel_", "view_", "image_boxes")
"""What the arguments of images begin with."""

NegativeContext = Callable[[Any, dict[str, Any]], dict[str, Any]]
"""`(model, inputs)` -> arguments of the model's `forward` for as many prompts: `input_ids` or `inputs_embeds`,
`attention_mask`, and images as `inputs` has them, or none."""

Combination = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""`(scores, negative scores, step)` -> scores, all `(rows, vocabulary)`: log-probabilities come in, what comes out is
normalised. `step` is 1 for the first new token."""


@dataclass
class _Reading:
    """What the negative context has read: new tokens `(R, n)`, its cache, mask `(R, P + n)`, and the scores behind."""

    tokens: torch.Tensor
    cache: Any
    mask: torch.Tensor
    scores: torch.Tensor


class ContrastiveDecoding(LogitsProcessor):
    """Combines the scores of each new token with those of a negative context.

    The second context has a cache of its own, which grows by each new token and follows beams. All other processors of
    `generate` and its temperature act on what comes out: log-probabilities. Rows without images keep their scores.

    Args:
        model (`HiResLmmForConditionalGeneration`): The model that generates.
        inputs (`Mapping`): What the processor returned for the prompt, of a conversation from its first turn on, as
            `generate` gets it; on the device of the model.
        negative (`Callable`): See `NegativeContext`.
        combine (`Callable`): See `Combination`.

    Raises:
        ValueError: If the inputs have no `input_ids`, or the model is none of this package. In `generate`, if it is
            called with another prompt.
    """

    acts_first = True

    def __init__(self, model: Any, inputs: Mapping[str, Any], negative: NegativeContext, combine: Combination):
        if model.config.model_type != "hires_lmm":
            raise ValueError(f"model_type={model.config.model_type!r}: decoding with two contexts needs 'hires_lmm'.")
        if inputs.get("input_ids") is None:
            raise ValueError("The inputs have no input_ids; pass all that the processor returned for the prompt.")
        self.model, self.inputs, self.negative, self.combine = model, dict(inputs), negative, combine
        self.has_image = (self.inputs["input_ids"] == model.config.image_token_id).any(dim=1)
        self.is_idle = not bool(self.has_image.any())
        self._shown: int | None = None
        self._reading: _Reading | None = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Combine scores `(rows, vocabulary)` of the token behind `input_ids`; `generate` calls it."""
        new = self._new_tokens(input_ids)
        own = scores.log_softmax(dim=-1)
        has_image = self.has_image.repeat_interleave(len(new) // len(self.has_image))
        if self.is_idle or not self.is_needed(own[has_image]):
            return torch.where(has_image[:, None], own, scores)
        negative = self._read(new).to(own).log_softmax(dim=-1)
        combined = self.combine(own, negative, new.shape[1] + 1).masked_fill(own.isneginf(), -math.inf)
        return torch.where(has_image[:, None], combined.log_softmax(dim=-1), scores)

    def is_needed(self, scores: torch.Tensor) -> bool:
        """Whether the negative context matters to these log-probabilities; it reads later what it did not now."""
        return True

    def _new_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """The tokens `(rows, n)` behind the prompt, of which a caller's cache may hide the beginning."""
        prompt = self.inputs["input_ids"]
        times, rest = divmod(len(ids), len(prompt))
        if self._shown is None:
            self._shown = min(ids.shape[1], prompt.shape[1])
        for length in (prompt.shape[1], self._shown):
            end = prompt[:, prompt.shape[1] - length :].repeat_interleave(times, dim=0)
            if not rest and torch.equal(ids[:, :length], end):
                return ids[:, length:]
        raise ValueError(
            f"{type(self).__name__} was made for a prompt of shape {tuple(prompt.shape)}, and generate() has ids of "
            f"shape {tuple(ids.shape)} that do not begin with it. Make a new one of the inputs of each generate()."
        )

    def _read(self, new: torch.Tensor) -> torch.Tensor:
        """Scores of the negative context behind the new tokens; reads those that it has not read."""
        read = self._follow(new) or self._start(len(new) // len(self.has_image))
        pending = new[:, read.tokens.shape[1] :]
        if pending.shape[1]:
            read.mask = torch.cat([read.mask, torch.ones_like(pending)], dim=1)
            self._run(read, input_ids=pending)
            read.tokens = new
        self._reading = read
        return read.scores

    def _follow(self, new: torch.Tensor) -> _Reading | None:
        """What was read, its rows in the order of beams; None if some row went another way and all begins anew."""
        read, prompts = self._reading, len(self.has_image)
        if read is None or len(read.tokens) != len(new) or read.tokens.shape[1] > new.shape[1]:
            return None
        times, count = len(new) // prompts, read.tokens.shape[1]
        before = read.tokens.reshape(prompts, 1, times, count)
        now = new[:, :count].reshape(prompts, times, 1, count)
        same = (before == now).all(dim=-1)  # (prompts, rows now, rows before)
        if not same.any(dim=-1).all():
            return None
        if times > 1:  # beams of a prompt stand together and never leave it
            rows = (same.int().argmax(dim=-1) + times * torch.arange(prompts, device=new.device)[:, None]).flatten()
            read.cache.reorder_cache(rows)
            read.mask, read.scores, read.tokens = read.mask[rows], read.scores[rows], read.tokens[rows]
        return read

    def _start(self, times: int) -> _Reading:
        """Read the prompt of the negative context, and repeat it for beams and returned sequences."""
        inputs = self.negative(self.model, dict(self.inputs))
        name = "input_ids" if inputs.get("inputs_embeds") is None else "inputs_embeds"
        if inputs.get(name) is None:
            raise ValueError("The negative context has neither input_ids nor inputs_embeds; return one of them.")
        prompt = inputs.pop(name)
        if len(prompt) != len(self.has_image):
            raise ValueError(f"The negative context has {len(prompt)} rows for {len(self.has_image)} prompts.")
        mask = inputs.pop("attention_mask", None)
        mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device) if mask is None else mask
        inputs = self.model._maybe_prepare_encoder_kwargs_for_generation(
            prompt, {**inputs, "attention_mask": mask}, name, GenerationConfig(return_dict_in_generate=True)
        )
        nothing = torch.zeros(times * len(prompt), 0, dtype=torch.long, device=prompt.device)
        read = _Reading(nothing, None, inputs.pop("attention_mask"), prompt)
        self._run(read, **{name: prompt}, **inputs)
        if times > 1:
            read.cache.batch_repeat_interleave(times)
            read.mask, read.scores = (each.repeat_interleave(times, dim=0) for each in (read.mask, read.scores))
        return read

    def _run(self, read: _Reading, **inputs: Any) -> None:
        """One forward pass behind what was read."""
        length = next(iter(inputs.values())).shape[1]
        positions = (read.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
        output = self.model(
            **inputs,
            attention_mask=read.mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: read.cache},
        )
        packed = output.packed_attention_mask
        read.cache, read.scores = output[CACHE], output.logits[:, -1].float()
        read.mask = read.mask if packed is None else packed


class M3ID(ContrastiveDecoding):
    """Against the prompt without its images, the more so the longer the answer: text drowns the image.

    Args:
        model, inputs: See `ContrastiveDecoding`.
        alpha (`float`): Where the likeliest token has at least this probability, nothing is corrected and the second
            context is not run; 1 corrects everywhere.
        rate (`float`): Lambda: how fast the image is forgotten, a token.
        max_growth (`float`, *optional*): Bound of the weight e^(rate * step) - 1, which is 54 at token 200.
        beta (`float`, *optional*): Tokens less likely than this share of the likeliest are out; None: all stay.
        first_step (`int`): Step of the first new token.

    Source: M3ID, huggingface.co/papers/2403.14003, which names no alpha. Ours: the bound; `beta`, 0.1 in
    re-implementations, which have no alpha.
    """

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        alpha: float = 1.0,
        rate: float = 0.02,
        max_growth: float | None = None,
        beta: float | None = None,
        first_step: int = 1,
    ):
        _check_range(alpha=(alpha, 0, 1), rate=(rate, 0, math.inf), max_growth=(max_growth, 0, math.inf))
        _check_range(beta=(beta, 0, 1), first_step=(first_step, 0, math.inf))
        self.alpha = alpha
        super().__init__(
            model,
            inputs,
            without_images,
            partial(raise_images, alpha=alpha, rate=rate, max_growth=max_growth, beta=beta, first_step=first_step),
        )

    def is_needed(self, scores: torch.Tensor) -> bool:
        """Whether a row is unsure."""
        return bool((scores.exp().amax(dim=-1) < self.alpha).any())


class DAMRO(ContrastiveDecoding):
    """Against the prompt with the few patches of each image that the class token attends to most.

    Args:
        model, inputs: See `ContrastiveDecoding`; the tower needs a class token.
        alpha (`float`): Weight of the negative scores; the release has 2 for LLaVA, 0.5 and 1.5 for InstructBLIP.
        k (`int`): Tokens of each image in the negative context; the release has 10 and 4.
        beta (`float`): Tokens less likely than this share of the likeliest are out.
        scores (`str`): `"merged"`: of all heads as one, as released for LLaVA; `"heads"`: mean of the heads.
        compat (`str`, *optional*): `"release"`: tokens stand by falling score, not in raster order.

    Source: DAMRO, huggingface.co/papers/2410.04514, and its released code (coder-gx/DAMRO).
    """

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        alpha: float = 2.0,
        k: int = 10,
        beta: float = 0.1,
        scores: Literal["merged", "heads"] = "merged",
        compat: Literal["release"] | None = None,
    ):
        _check_range(alpha=(alpha, 0, math.inf), k=(k, 1, math.inf), beta=(beta, 0, 1))
        if int(k) != k:
            raise ValueError(f"k={k} must be a whole number.")
        if scores not in ("merged", "heads") or compat not in (None, "release"):
            raise ValueError(f"scores={scores!r}, compat={compat!r}: use 'merged' or 'heads', and None or 'release'.")
        super().__init__(
            model,
            inputs,
            partial(most_attended, k=int(k), merged=scores == "merged", by_score=compat == "release"),
            partial(contrast, alpha=alpha, beta=beta),
        )
        tower = model.config.vision_config
        if tower_family(tower).attention is None:
            raise ValueError(
                f"DAMRO needs a class token, and a tower of type {tower.model_type!r} has none; use M3ID."
            )
        if not self.is_idle and self.inputs.get("pixel_values") is None:
            raise ValueError("DAMRO looks at the vision tower and needs pixel_values; encoded images are not enough.")


DECODINGS: dict[str, Callable[[Any, Mapping[str, Any]], ContrastiveDecoding]] = {"m3id": M3ID, "damro": DAMRO}
"""Name in `hires-lmm ask --decoding` -> class, at its published settings."""


def _check_range(**values: tuple[float | None, float, float]) -> None:
    for name, (value, low, high) in values.items():
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            raise ValueError(f"{name}={value} must be a finite number between {low} and {high}.")


# ---- how scores are combined


def raise_images(
    scores: torch.Tensor,
    negative: torch.Tensor,
    step: int,
    alpha: float = 1.0,
    rate: float = 0.02,
    max_growth: float | None = None,
    beta: float | None = None,
    first_step: int = 1,
) -> torch.Tensor:
    """The rule of `M3ID`: log-probabilities plus growth times what the image adds to them, where a row is unsure."""
    growth = math.expm1(min(rate * (step + first_step - 1), 80.0))  # beyond, float32 overflows
    growth = growth if max_growth is None else min(growth, max_growth)
    is_unsure = scores.exp().amax(dim=-1, keepdim=True) < alpha
    combined = torch.where(is_unsure, scores + growth * (scores - negative), scores)
    return combined if beta is None else _plausible(combined, scores, beta)


def contrast(
    scores: torch.Tensor, negative: torch.Tensor, step: int, alpha: float = 1.0, beta: float = 0.1
) -> torch.Tensor:
    """The rule of `DAMRO` and of VCD: (1 + alpha) times the scores less alpha times the negative, if likely."""
    return _plausible((1 + alpha) * scores - alpha * negative, scores, beta)


def _plausible(combined: torch.Tensor, scores: torch.Tensor, beta: float) -> torch.Tensor:
    """Take out tokens that the prompt itself finds less likely than a share of the likeliest."""
    if beta == 0:
        return combined
    return combined.masked_fill(scores < scores.amax(dim=-1, keepdim=True) + math.log(beta), -math.inf)


# ---- negative contexts


def without_images(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The text alone: no placeholders, positions one after the other."""
    ids = inputs["input_ids"]
    packing = plan_packing(_real(inputs) & (ids != model.config.image_token_id), "left")
    return {"input_ids": ids.gather(1, packing.index), "attention_mask": packing.mask.long()}


def most_attended(
    model: Any, inputs: dict[str, Any], k: int = 10, merged: bool = True, by_score: bool = False
) -> dict[str, Any]:
    """The k tokens of each image, of its global view or else its first, that the class token attends to most.

    They stand as the adapter made them in the place of the image. Where a part makes tokens of its own turn by turn
    (fusion), it reads them.
    """
    base = next(module for module in model.modules() if hasattr(module, "encode_images"))
    views = {name: value for name, value in inputs.items() if name.startswith(IMAGE_NAMES)}
    text = {name: value for name, value in inputs.items() if name not in views}
    views = _flat(base, views)
    features = base.get_image_features(**views, return_dict=True)
    tokens: VisualTokens = features.tokens
    chosen = []
    for image in tokens.images:
        row = next(iter(image.rows(Kind.GLOBAL)), image.first_view)
        view = ViewShape(*image.views[row - image.first_view])
        own = ((tokens.view == row) & (tokens.kind == view.kind)).nonzero()[:, 0]
        found = _attention(base, views["pixel_values"][row], view, tokens, own, merged)
        best = found.topk(min(k, len(own))).indices.cpu()
        chosen.append(own[best if by_score else best.sort().values])
    index, counts = torch.cat(chosen), [len(own) for own in chosen]
    if base.connector.has_turns:
        return {**text, "mm_encoder_outputs": {"image": _take(features, index, counts)}}
    return _in_place(base, inputs, tokens, tokens.features[index.to(tokens.features.device)], counts)


def _flat(base: Any, views: dict[str, Any]) -> dict[str, Any]:
    """Arguments of images in the flat layout, whichever the processor gave."""
    mask = views.pop("pixel_attention_mask", None)
    if mask is None:
        return views
    extra: dict[str, Any] = {}
    found = {"view_positions": None, **views}
    unpack_samples(base.config, mask, found, extra)
    return {**found, **extra}


def _attention(
    base: Any, pixels: torch.Tensor, view: ViewShape, tokens: VisualTokens, own: torch.Tensor, merged: bool
) -> torch.Tensor:
    """How much the class token attends to the patches of each token of a view, in the layer whose output is read."""
    tower, side = base.vision_tower, patch_side(base.config.vision_config)
    pixels = pixels[None, :, : view.patch_rows * side, : view.patch_cols * side]
    states = run_tower(tower, pixels, -1, output_hidden_states=True).output.hidden_states
    layer = base.config.vision_feature_layer % len(states) - 1
    products = class_products(tower, states, max(layer, 0), merged)
    patches = products.softmax(dim=-1).mean(dim=1)[:, prefix_tokens(tower.config) :]
    patches = patches.unflatten(1, (view.patch_rows, view.patch_cols))
    grid = tokens.grids[view.kind].of((view.patch_rows, view.patch_cols))
    means = torch.nn.functional.adaptive_avg_pool2d(patches, grid)[0]
    rows, cols = tokens.cell[own].to(means.device).unbind(dim=1)
    return means[rows, cols]


def _take(features: HiResLmmImageFeatures, index: torch.Tensor, counts: list[int]) -> HiResLmmImageFeatures:
    """Some of the tokens, for a part that makes as many of its own as there are placeholders."""
    tokens: Any = features.tokens
    found = tokens.features[index.to(tokens.features.device)]
    own = {name: getattr(tokens, name)[index] for name in ("view", "cell", "kind")}
    tokens = replace(tokens, features=found, lengths=counts, scores={}, plan=None, **own)
    return HiResLmmImageFeatures(pooler_output=list(found.split(counts)), tokens=tokens)


def _in_place(
    base: Any, inputs: dict[str, Any], tokens: VisualTokens, found: torch.Tensor, counts: list[int]
) -> dict[str, Any]:
    """Embeddings of the prompt, padded on the left, with other visual tokens where those of each image began."""
    ids, parts = inputs["input_ids"], iter(zip(found.split(counts), tokens.num_tokens, strict=True))
    is_image, rows = ids == base.config.image_token_id, []
    for embeds, image, text in zip(base.embed_token(ids), is_image, _real(inputs) & ~is_image, strict=True):
        places, pieces, start = image.nonzero()[:, 0].tolist(), [], 0
        while places:
            part, count = next(parts)
            pieces += [embeds[start : places[0]][text[start : places[0]]], part.to(embeds)]
            start, places = places[0], places[count:]
        rows.append(torch.cat([*pieces, embeds[start:][text[start:]]]))
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    mask = torch.arange(padded.shape[1], device=ids.device) >= padded.shape[1] - lengths[:, None]
    return {"inputs_embeds": padded, "attention_mask": mask.long()}


def _real(inputs: dict[str, Any]) -> torch.Tensor:
    """Positions of the prompt that are no padding."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()

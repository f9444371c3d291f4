"""Selection without training: the whole image says how much of each crop is kept, and which tokens (GlobalCom²)."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from .bases_hires_lmm import HiResLmmTokenOp, Needs, PartContext, Traits
from .carriers_hires_lmm import Question, VisualTokens, index_tensor, map_edges
from .geometry_hires_lmm import KINDS, MAIN_TOWER, Kind, ViewShape
from .routers_hires_lmm import keep_budget


RELEASED_RATIO = 0.25


class Crops(NamedTuple):
    """Where the crop tokens of an image lie, in sequence order: their crop, and their place on the map of all crops.

    Args:
        crop, place (`torch.Tensor` of shape `(n,)`): Number of the crop; row-major place on the map.
        sizes (`list[int]`): Tokens of each crop.
        cells (`list[tuple[int, int]]`): Grid row and column of each crop.
        tops, lefts (`list[int]`): Edges of the grid rows and columns on the map, one more than there are.
    """

    crop: torch.Tensor
    place: torch.Tensor
    sizes: list[int]
    cells: list[tuple[int, int]]
    tops: list[int]
    lefts: list[int]


def find_crops(tokens: VisualTokens, image: int, kind: int = Kind.CROP) -> Crops:
    """Where the tokens of the crops, or frames, of an image lie on the map of them, padding left out."""
    geometry = tokens.images[image]
    views, tops, lefts = map_edges(geometry, tokens.grids[int(kind)], kind)
    table = np.zeros((len(geometry.views), 3), dtype=int)  # crop, and what to add to a cell's row and column
    for crop, (number, (view, cells)) in enumerate(views.items()):
        table[number] = crop, tops[view.row] - cells[0], lefts[view.col] - cells[2]
    start = sum(tokens.lengths[:image])
    mine = slice(start, start + tokens.lengths[image])
    is_crop = tokens.kind[mine].numpy() == kind
    crop, down, right = table[tokens.view[mine].numpy()[is_crop] - geometry.first_view].T
    row, col = tokens.cell[mine].numpy()[is_crop].T
    device = str(tokens.features.device)
    return Crops(
        index_tensor(crop, device),
        index_tensor((row + down) * lefts[-1] + col + right, device),
        np.bincount(crop, minlength=len(views)).tolist(),
        [(view.row, view.col) for view, _ in views.values()],
        tops,
        lefts,
    )


def strip_edges(edges: list[int], side: int, release: bool) -> torch.Tensor:
    """Edges of grid rows (or columns) on a side of the global view: in proportion, or as released in equal whole
    strips, of which the last takes the rest."""
    if release:
        strips = len(edges) - 1
        return torch.tensor([*(number * (side // strips) for number in range(strips)), side], dtype=torch.float32)
    return torch.tensor(edges, dtype=torch.float32) * side / max(edges[-1], 1)


def crop_sums(scores: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """Sums of the scores `(h, w)` of the global view under each cell of a grid with these edges: `(R, C)`."""

    def overlap(edges: torch.Tensor, side: int) -> torch.Tensor:
        cell = torch.arange(side)
        return (torch.minimum(edges[1:, None], cell + 1) - torch.maximum(edges[:-1, None], cell)).clamp(min=0)

    along, across = overlap(rows, scores.shape[0]), overlap(cols, scores.shape[1])
    return along.to(scores) @ scores @ across.to(scores).T


def crop_weights(sums: torch.Tensor, temperature: float | None) -> torch.Tensor:
    """Retention of each crop, of mean 1, from the sums `(n,)` of its scores; without a temperature they are shares."""
    if temperature is None:
        return 1 + sums / sums.sum().clamp(min=1e-12) - 1 / len(sums)
    mass = ((sums - sums.max()) / temperature).exp()
    mass = mass / (mass.sum() + 1e-8)
    return 1 + mass - mass.mean()


def share_exactly(total: int, weights: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Share a total among crops by weights `(n,)` times sizes, none above its size; largest remainders round up."""
    most = torch.tensor(sizes, device=weights.device)
    if total >= sum(sizes):
        return most
    weights = (weights * most).clamp(min=1e-6)
    full_at, order = (most / weights).sort()
    before = most[order].cumsum(0) - most[order]
    level = (total - before) / weights[order].flip(0).cumsum(0).flip(0)
    first = (level <= full_at).long().argmax()  # up to here crops are kept whole
    exact = torch.minimum(level.index_select(0, first[None]) * weights, most)
    shares = exact.floor().long()
    by_remainder = torch.where(shares < most, exact - shares, -1).argsort(descending=True, stable=True)
    is_up = torch.zeros_like(shares).index_copy(0, by_remainder, torch.arange(len(sizes), device=shares.device))
    return shares + (is_up < total - shares.sum())


def stretch(whole: torch.Tensor, crops: Crops) -> torch.Tensor:
    """The scores `(h, w)` of the global view at the places of the crop tokens, `(n,)`."""
    size = (crops.tops[-1], crops.lefts[-1])
    stretched = nn.functional.interpolate(whole[None, None], size=size, mode="bilinear", align_corners=False)
    return stretched.flatten()[crops.place]


def combined_scores(scores: torch.Tensor, whole: torch.Tensor | None, crops: Crops) -> torch.Tensor:
    """Scores `(n,)` of crop tokens, over their length in each crop, plus those of the global view at their places."""

    def normalised(values: torch.Tensor) -> torch.Tensor:
        squares = values.new_zeros(len(crops.sizes)).index_add(0, crops.crop, values.square())
        return values / squares.sqrt().clamp(min=1e-12)[crops.crop]

    return normalised(scores) + (0 if whole is None else normalised(stretch(whole, crops)))


def keep_in_crops(scores: torch.Tensor, crop: torch.Tensor, counts: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """True at the `counts` highest scores of each crop; among equal scores the earlier token wins."""
    order = scores.argsort(descending=True, stable=True)
    order = order[crop[order].argsort(stable=True)]
    rank = torch.zeros_like(order).index_copy(0, order, torch.arange(len(order), device=order.device))
    starts = torch.tensor([sum(sizes[:number]) for number in range(len(sizes))], device=order.device)
    return rank - starts[crop] < counts[crop]


class HiResLmmGlobalCom2(HiResLmmTokenOp):
    """Keeps the tokens of global view and crops that the tower's class token attends to, most where the whole image
    asks for it.

    Source: GlobalCom², huggingface.co/papers/2501.05179, and its released code (xuyang-liu16/GlobalCom2). Ours: any
    number of images, the exact budget, raster order, the global view cut where the crops are, shares of probabilities.
    Frames of a video share a budget evenly, by scores of their own.
    """

    @strict
    @dataclass
    class Options:
        """Options of `globalcom2`.

        Args:
            score (`str`): What of the class token's attention in the last layer: `"logits"` (released; the mean of
                heads before the softmax) or `"probabilities"`, whose sums over crops are taken as their shares.
            temperature (`float`): Of the softmax over the sums of logits.
            ratio (`float`, *optional*): Share of the tokens that is kept where no budget is asked for; None = all, or
                a quarter under `compat`.
            compat (`str`, *optional*): `"release"`: tokens of the global view in the order of their scores; it is cut
                into whole strips, wherever padding is; each crop rounds down by itself, so that the number depends on
                the image; crops with padding put their tokens into the wrong rows; probabilities pass the softmax.
        """

        score: Literal["logits", "probabilities"] = "logits"
        temperature: float | int = 10.0
        ratio: float | int | None = None
        compat: Literal["release"] | None = None

        def __post_init__(self) -> None:
            if self.temperature <= 0:
                raise ValueError(f"temperature={self.temperature} must be positive.")
            if self.ratio is not None and not 0 < self.ratio <= 1:
                raise ValueError(f"ratio={self.ratio} must lie in (0, 1].")

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        self.score, self.release = f"cls_{options.score}", options.compat is not None
        self.ratio = float(options.ratio or (RELEASED_RATIO if self.release else 1.0))
        is_share = options.score == "probabilities" and not self.release
        self.temperature = None if is_share else float(options.temperature)

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """It takes the budget of global view, crops and frames."""
        grids = {kind: grid for (kind, tower), grid in context.grids.items() if tower == MAIN_TOWER}
        wanted = {kind: grids[kind] for kind in (Kind.GLOBAL, Kind.CROP, Kind.FRAME) if kind in grids}
        if Kind.CROP not in wanted and Kind.FRAME not in wanted:
            raise ValueError("globalcom2 shares a budget among crops, but none reach it; use the token op router.")
        if any(grid.whole or (grid.source and kind != Kind.GLOBAL) for kind, grid in wanted.items()):
            raise ValueError(
                "globalcom2 needs tokens with a place in their view, but an operation before it makes queries without "
                "one; leave that out, or use the token op router."
            )
        count = "content" if options.ratio is not None or options.compat else "static"
        needs = Needs(scores=(f"cls_{options.score}",))
        names = [name for name in ("global", "crops", "frames") if KINDS[name] in wanted]
        return Traits(context.grids, context.width, count=count, budget_on=names, needs=needs)

    def forward(self, tokens: VisualTokens, question: Question | None) -> tuple[VisualTokens, Question | None]:
        """Fill `kept` and `scores["globalcom2"]`; under `compat="release"` the order of tokens changes too."""
        given = tokens.scores[self.score].nan_to_num()
        scores, kept = torch.full_like(given, float("nan")), torch.ones_like(given, dtype=torch.bool)
        order = [torch.arange(0)]
        kinds = ("global", "crops", "frames")
        for image, (first, others, frames) in enumerate(zip(*map(tokens.rows, kinds), strict=True)):
            surplus = tokens.lengths[image] - tokens.num_tokens[image]
            is_video = len(frames) > 0
            others = frames if is_video else others
            crops = find_crops(tokens, image, Kind.FRAME if is_video else Kind.CROP) if len(others) else None
            whole = self._map(tokens, image, given[first]) if len(first) and not is_video else None
            total, weights = len(first) + len(others) - surplus, None
            if crops is not None:
                scores = scores.index_copy(0, others, combined_scores(given[others], whole, crops))
                weights = self._weights(whole, crops)
            scores = scores.index_copy(0, first, given[first])
            if surplus or self.ratio < 1:
                num_first, counts = self._counts(surplus, total, len(first), weights, crops)
                kept = kept.index_copy(0, first, keep_budget(given[first], num_first))
                if crops is not None:
                    own = keep_in_crops(scores[others], crops.crop, counts, crops.sizes)
                    kept = kept.index_copy(0, others, own)
            if self.release:
                order.append(released_order(tokens, image, None if is_video else crops, scores))
        tokens = replace(tokens, kept=kept, scores={**tokens.scores, "globalcom2": scores}, score="globalcom2")
        return (reorder(tokens, torch.cat(order)) if self.release else tokens), question

    def _map(self, tokens: VisualTokens, image: int, scores: torch.Tensor) -> torch.Tensor:
        """The scores of the global view as a map, padding left out."""
        view = next(view for view in tokens.images[image].views if view[0] == Kind.GLOBAL)
        top, bottom, left, right = tokens.grids[int(Kind.GLOBAL)].cells(ViewShape(*view))
        return scores.view(bottom - top, right - left)

    def _weights(self, whole: torch.Tensor | None, crops: Crops) -> torch.Tensor:
        """How much of each crop is kept in terms of the mean; alike without a global view."""
        if whole is None:
            return torch.ones(len(crops.sizes), dtype=torch.float32, device=crops.crop.device)
        rows = strip_edges(crops.tops, whole.shape[0], self.release)
        sums = crop_sums(whole, rows, strip_edges(crops.lefts, whole.shape[1], self.release))
        return crop_weights(torch.stack([sums[cell] for cell in crops.cells]), self.temperature)

    def _counts(
        self, surplus: int, total: int, num_first: int, weights: torch.Tensor | None, crops: Crops | None
    ) -> tuple[int, torch.Tensor]:
        """Tokens to keep of the global view and of each crop; `total` is what a budget leaves of both."""
        sizes = [] if crops is None else crops.sizes
        every = num_first + sum(sizes)
        if not surplus and self.release and weights is not None:
            shares = [
                int(size * min(1.0, self.ratio * weight)) for size, weight in zip(sizes, weights.tolist(), strict=True)
            ]
            return int(self.ratio * num_first), torch.tensor(shares, device=weights.device)
        total = total if surplus else max(int(self.ratio * every), 1)
        first = total if weights is None else num_first * total // every
        return first, share_exactly(total - first, weights, sizes) if weights is not None else torch.zeros(
            0, dtype=torch.long
        )


def released_order(tokens: VisualTokens, image: int, crops: Crops | None, scores: torch.Tensor) -> torch.Tensor:
    """Where the tokens of an image come from in the released order, for crops in raster order with line breaks.

    Tokens of the global view are sorted by their scores. Those of a crop are counted without padding, but take the
    rows of a crop that has none.
    """
    start = sum(tokens.lengths[:image])
    kinds = tokens.kind[start : start + tokens.lengths[image]].numpy()
    order = np.arange(start, start + tokens.lengths[image])
    first = np.flatnonzero(kinds == Kind.GLOBAL)
    own = scores[start : start + len(order)].cpu()[first]
    order[first] = order[first[own.argsort(descending=True, stable=True).numpy()]]
    if crops is not None:
        crop, sizes = crops.crop.cpu().numpy(), np.array(crops.sizes)
        number, by_crop = np.empty_like(crop), np.argsort(crop, kind="stable")
        number[by_crop] = np.arange(len(crop)) - (sizes.cumsum() - sizes)[crop[by_crop]]
        bands, cols = np.array(crops.cells)[crop].T
        keys = np.stack([bands, number // tokens.grids[int(Kind.CROP)].cols, cols, number])
        at = np.flatnonzero(kinds == Kind.CROP)
        lines = [(band, line) for band, rows in enumerate(np.diff(crops.tops)) for line in range(rows)]
        breaks = np.flatnonzero((kinds == Kind.SEPARATOR) & (np.arange(len(kinds)) > at[0]))[: len(lines)]
        ends = np.full((2, len(breaks)), len(kinds))
        keys = np.concatenate([keys, np.vstack([np.array(lines[: len(breaks)]).reshape(-1, 2).T, ends])], axis=1)
        places = np.concatenate([at, breaks])
        order[np.sort(places)] = order[places[np.lexsort(keys[::-1])]]
    return torch.from_numpy(order)


def reorder(tokens: VisualTokens, order: torch.Tensor) -> VisualTokens:
    """Gather the tokens of a batch in another order, within each image."""
    on_device = order.to(tokens.features.device)
    return replace(
        tokens,
        features=tokens.features[on_device],
        kept=None if tokens.kept is None else tokens.kept[on_device],
        scores={name: score[on_device] for name, score in tokens.scores.items()},
        view=tokens.view[order],
        cell=tokens.cell[order],
        kind=tokens.kind[order],
    )

"""Several towers that saw the same views become one: weights for each image or video mix their tokens (MERV)."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init

from .bases_hires_lmm import HiResLmmViewOp, PartContext, Traits
from .carriers_hires_lmm import ViewFeatures, ViewGroup, constant_index
from .geometry_hires_lmm import KINDS, MAIN_TOWER, WHOLE_KINDS, Kind
from .video_hires_lmm import check_shape, pool_frames, pooled_rows


class HiResLmmTowerMixer(HiResLmmViewOp):
    """Pools the adapted tokens of the main and of all extra towers to one shape and takes their weighted sum.

    Source: MERV, huggingface.co/papers/2501.01426, and its released code (princetonvisualai/merv at d5eb1d2), which
    pools before its linear projections, with the same result. Ours: pictures. The output and value projections of the
    released attention, which change nothing and get no gradient, are left out.
    """

    needs_equal_views = True

    @strict
    @dataclass
    class Options:
        """Options of `tower_mixer`.

        Args:
            shape (`list[int]`): Frames, rows and columns of a video afterwards; a picture gets the rows and columns.
            weights (`str`): `"query"`: a learned query reads the mean token of each tower, so that every picture or
                video has weights of its own; `"scalar"`: the same learned weights for all.
            query_width (`int`): Width in which query and means meet.
        """

        shape: list = field(default_factory=lambda: [16, 8, 8])
        weights: Literal["query", "scalar"] = "query"
        query_width: int = 3072

        def __post_init__(self) -> None:
            check_shape(self.shape)
            if self.query_width < 1:
                raise ValueError(f"query_width={self.query_width} must be at least 1.")

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        self.towers = _extra_towers(context)
        if options.weights == "scalar":
            self.logits = nn.Parameter(torch.empty(len(self.towers) + 1))
        else:
            self.query = nn.Parameter(torch.empty(options.query_width))
            self.q_proj = nn.Linear(options.query_width, options.query_width)
            self.k_proj = nn.Linear(context.width, options.query_width)

    def init_weights(self) -> None:
        """Start with even scalar weights, and with a query of unit expected norm."""
        if self.options.weights == "scalar":
            init.zeros_(self.logits)
        else:
            init.normal_(self.query, mean=0.0, std=self.options.query_width**-0.5)

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """The views of extra towers leave; those of the main one are pooled."""
        strange = [kind for kind, tower in context.grids if tower == MAIN_TOWER and kind not in WHOLE_KINDS]
        if strange or not _extra_towers(context) or not context.keys("all"):
            raise ValueError(
                f"tower_mixer joins towers that see the same views, global ones and frames, but there are "
                f"{list(context.grids)} (kind and tower); add extra_towers, and leave other kinds than global and "
                "frames out of layout.order and of the parts before it."
            )
        frames, rows, cols = options.shape
        grids = {}
        for key in context.keys("all"):
            number = frames if key[0] == Kind.FRAME else None
            grids[key] = replace(
                context.grids[key], rows=rows, cols=cols, stride=None, num_views=number, view_stride=1
            )
        return Traits(grids, context.width)

    def forward(self, views: ViewFeatures) -> ViewFeatures:
        """Mix each kind of views of the main tower with what the extra towers made of the same."""
        main = [group for group in views.groups if group.tower == MAIN_TOWER]
        others = [group for name in self.towers for group in views.groups if group.tower == name]
        if len(others) != len(self.towers):
            raise ValueError("tower_mixer needs the views of every tower; make the batch with views='all'.")
        return replace(views, groups=[self._mix_kind(views, group, others) for group in main])

    def _mix_kind(self, views: ViewFeatures, group: ViewGroup, others: list[ViewGroup]) -> ViewGroup:
        """Mix the views of one kind: frames of a video together, pictures one by one."""
        is_video = group.kind == Kind.FRAME
        counts = views.counts(group) if is_video else [1] * len(group.features)
        shape = self.options.shape if is_video else (1, *self.options.shape[1:])
        units = [image.rows(Kind.FRAME) for image in views.images] if is_video else [[row] for row in group.rows]
        units += [[]] * (len(counts) - len(units))
        units = [rows for rows, count in zip(units, counts, strict=True) if count]  # idle ones have no rows
        pooled = [pool_frames(group.features, group.grid, counts, shape)]
        for other in others:
            places = tuple(other.rows.index(row) if row in other.rows else 0 for rows in units for row in rows or (0,))
            features = other.features[constant_index(places, str(other.features.device))]
            pooled.append(pool_frames(features, other.grid, [len(rows) or 1 for rows in units], shape))
        tokens = torch.stack([own.reshape(len(units), -1, own.shape[2]) for own in pooled], dim=1)
        features = self.mix(tokens, self.weigh(tokens)).unflatten(1, (shape[0], -1)).flatten(0, 1)
        rows = pooled_rows(group.rows, counts[: len(views.images)], shape[0]) if is_video else group.rows
        return replace(group, features=features, grid=tuple(shape[1:]), rows=rows, scores={}, hidden={})

    def weigh(self, tokens: torch.Tensor) -> torch.Tensor:
        """Weights `(U, E)` of the towers, summing to one, from tokens `(U, E, M, D)` of pictures and videos."""
        if self.options.weights == "scalar":
            return self.logits.softmax(dim=0).expand(len(tokens), -1).to(tokens.dtype)
        keys = self.k_proj(tokens.mean(dim=2))
        products = (keys * self.q_proj(self.query.expand(len(tokens), -1))[:, None]).sum(dim=-1)
        return (products * self.options.query_width**-0.5).softmax(dim=-1)

    @staticmethod
    def mix(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum over towers: `(U, E, M, D)`, `(U, E)` -> `(U, M, D)`."""
        return torch.einsum("uemd,ue->umd", tokens, weights)


def _extra_towers(context: PartContext) -> list[str]:
    """The extra towers whose views reach the mixer."""
    return [tower for kind, tower in context.grids if kind == KINDS["detail"] and tower != MAIN_TOWER]

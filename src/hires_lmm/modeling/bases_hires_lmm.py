"""The base class of each slot: what a part says of itself before it is built, and what it does."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .carriers_hires_lmm import Question, ViewFeatures, ViewGroup, VisualTokens
from .geometry_hires_lmm import MAIN_TOWER, Grid, kinds_on


@dataclass(frozen=True)
class Needs:
    """What a part asks of the tower beside the features of its layer.

    Args:
        scores (`tuple[str, ...]`): Names of scores of patches, `(V, L)` each: see `SCORES` of the towers.
        layers (`tuple[int, ...]`): Further layers whose hidden states are wanted.
    """

    scores: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            tuple(dict.fromkeys(self.scores + other.scores)), tuple(dict.fromkeys(self.layers + other.layers))
        )


@dataclass(frozen=True)
class PartContext:
    """What surrounds a part: read by `describe`, and when the part is built.

    Args:
        config (`PreTrainedConfig`): Connector configuration; carries the attention implementation.
        width (`int`): Width of the features that enter.
        text_width (`int`): Width of the language model.
        grids (`dict[tuple[int, str], Grid]`): Token grid that enters, by kind and tower.
        patch_grid (`tuple[int, int]`): Patch rows and columns of a view of the tower's own size.
        vocab_size (`int`): Token ids of the language model.
        tower_widths (`dict[str, int]`): Widths of the extra towers by name.
    """

    config: Any
    width: int
    text_width: int
    grids: dict[tuple[int, str], Grid]
    patch_grid: tuple[int, int]
    vocab_size: int = 0
    tower_widths: dict[str, int] = field(default_factory=dict)

    def keys(self, on: Any) -> list[tuple[int, str]]:
        """The groups of the main tower that an option `on` names."""
        return [key for key in self.grids if key[0] in kinds_on(on) and key[1] == MAIN_TOWER]

    def grid(self, on: Any, tower: str = MAIN_TOWER) -> Grid:
        """The one token grid of the views that `on` names.

        Raises:
            ValueError: If there is none, or if they differ.
        """
        found = {
            (grid.rows, grid.cols) for key, grid in self.grids.items() if key[0] in kinds_on(on) and key[1] == tower
        }
        if len(found) != 1:
            raise ValueError(
                f"on={on!r} needs views of one token grid, but these have {sorted(found) or 'none'}; give each kind "
                "of views a part of its own, or move the part."
            )
        return next(grid for key, grid in self.grids.items() if key[0] in kinds_on(on) and key[1] == tower)


@dataclass(frozen=True)
class Traits:
    """What a part makes of what enters, and what it asks for; everything has a default.

    Args:
        grids (`dict[tuple[int, str], Grid]`): Token grids that leave, by kind and tower.
        width (`int`): Width of the features that leave.
        reads_question, writes_question (`bool`): Whether the result depends on the question; whether its embeddings
            are changed on the way to the language model.
        count (`str`): `"static"`: known from sizes alone; `"content"`: known once the part has run, the model packs;
            `"own"`: `own_tokens`, whatever the image.
        own_tokens (`int`, *optional*): Tokens of an image where the part makes its own.
        later_tokens (`int`, *optional*): Tokens of later turns of the conversation, where the part has a protocol of
            turns.
        budget_on (`str` or `list[str]`, *optional*): Views whose tokens the part drops or saves under a budget, or
            `"own"`; None = it does not consume the budget.
        needs (`Needs`): What the tower computes for it.
    """

    grids: dict[tuple[int, str], Grid]
    width: int
    reads_question: bool = False
    writes_question: bool = False
    count: str = "static"
    own_tokens: int | None = None
    later_tokens: int | None = None
    budget_on: Any = None
    needs: Needs = field(default_factory=Needs)


def follow_grid(group: ViewGroup, grid: Grid) -> dict[str, torch.Tensor]:
    """The scores of a group on another grid: means over the patches under each token; none where it has no place."""
    if grid.size == group.grid:
        return group.scores
    if grid.whole:
        return {}
    maps = {name: score.unflatten(1, group.grid)[:, None] for name, score in group.scores.items()}
    return {name: nn.functional.adaptive_avg_pool2d(own, grid.size).flatten(1) for name, own in maps.items()}


class HiResLmmPart(nn.Module):
    """Base of all parts. A subclass has strict `Options`, and overrides `describe` where it changes anything.

    Args:
        context (`PartContext`): What surrounds the part.
        options (`Options`): Its checked options.
    """

    traits: Traits

    @dataclass(frozen=True)
    class Options:
        """No options."""

    def __init__(self, context: PartContext, options: Any):
        super().__init__()
        self.options = options

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """What the part makes of what enters; by default what enters leaves."""
        return Traits(context.grids, context.width)


class HiResLmmViewOp(HiResLmmPart):
    """Base of view operations, before or behind the adapter, that treat each view alone.

    Subclasses implement `output_grid` and `forward_group`, and have an option `on`. An operation across views
    overrides `describe` and `forward` instead.
    """

    @classmethod
    def output_grid(cls, options: Any, grid: Grid) -> Grid:
        """Token grid of a view afterwards."""
        return grid

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """The groups that `on` names get another grid.

        Raises:
            ValueError: If there are no such views, as behind an operation that leaves none.
        """
        keys = context.keys(options.on)
        if not keys:
            raise ValueError(
                f"A view operation has on={options.on!r}, but no such views are there: an operation before it leaves "
                "none, or layout.order does not name them. Move it before that one, or change on."
            )
        return Traits(
            {**context.grids, **{key: cls.output_grid(options, context.grids[key]) for key in keys}}, context.width
        )

    def forward_group(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Map the features `(n, L, C)` of views that share a grid."""
        raise NotImplementedError

    def forward(self, views: ViewFeatures) -> ViewFeatures:
        """Apply the operation to the views that `on` names."""
        return views.map(self.options.on, self.forward_views)

    def forward_views(self, group: ViewGroup) -> ViewGroup:
        """Apply the operation to one group."""
        grid = self.output_grid(self.options, Grid(*group.grid))
        features, scores = self.forward_group(group.features, group.grid), follow_grid(group, grid)
        return replace(group, features=features, grid=grid.size, scores=scores)


class HiResLmmAdapter(HiResLmmPart):
    """Base of adapters: `(n, L, C)` features of the views of one kind -> `(n, L, D)`."""

    @classmethod
    def output_grid(cls, options: Any, grid: Grid) -> Grid:
        """Token grid of a view afterwards."""
        return grid

    @classmethod
    def output_width(cls, options: Any, width: int, text_width: int) -> int:
        """Width of the adapted features."""
        return text_width

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """All groups get the width of the language model."""
        grids = {key: cls.output_grid(options, grid) for key, grid in context.grids.items()}
        return Traits(grids, cls.output_width(options, context.width, context.text_width))

    def adapt(self, group: ViewGroup) -> ViewGroup:
        """Adapt one group."""
        grid = self.output_grid(self.options, Grid(*group.grid))
        features, scores = self(group.features, group.kind), follow_grid(group, grid)
        return replace(group, features=features, grid=grid.size, scores=scores)


class HiResLmmTokenOp(HiResLmmPart):
    """Base of token operations, which see all visual tokens of an image in sequence order, and maybe the question."""

    def forward(self, tokens: VisualTokens, question: Question | None) -> tuple[VisualTokens, Question | None]:
        """Apply the operation; it returns new carriers and leaves those that came as they are.

        Args:
            tokens (`VisualTokens`): Tokens of the batch.
            question (`Question`, *optional*): The readable text; there where `reads_question` is declared.
        """
        raise NotImplementedError


def entering(grids: Mapping[tuple[int, str], Grid]) -> dict[int, Grid]:
    """The token grids by kind.

    Raises:
        ValueError: If views of one kind come from two towers.
    """
    found: dict[int, Grid] = {}
    for (kind, tower), grid in grids.items():
        if kind in found:
            raise ValueError(f"Views of kind {kind} come from two towers ({tower} is one); let a part join them.")
        found[kind] = grid
    return found

"""The base class of each slot: what a part says of itself before it is built, and what it does."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from .carriers_hires_lmm import Question, ViewFeatures, ViewGroup, VisualTokens
from .geometry_hires_lmm import KINDS, MAIN_TOWER, Grid, Kind, kinds_on


@dataclass(frozen=True)
class Needs:
    """What a part asks of the tower beside the features of its layer.

    Args:
        scores (`tuple[str, ...]`): Names of scores of patches, `(V, L)` each: see `SCORES` of the towers.
        layers (`tuple[int, ...]`): Further layers whose hidden states are wanted.
        levels (`tuple[str, ...]`): Extra towers of which the maps of all stages are wanted.
    """

    scores: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    levels: tuple[str, ...] = ()

    def __or__(self, other: "Needs") -> "Needs":
        pairs = ((self.scores, other.scores), (self.layers, other.layers), (self.levels, other.levels))
        return Needs(*(tuple(dict.fromkeys((*own, *more))) for own, more in pairs))


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
        tower_widths (`dict[str, int]`): Widths of the extra towers by name, and of what parts make beside them.
        tower_levels (`dict[str, tuple[int, ...]]`): Widths of the stages of convolutional extra towers, first to last.
        depths (`dict[str, int]`): Layers of `language_model` and `vision_tower`.
        layers (`tuple[int, ...]`): Layers that a layer op runs behind.
    """

    config: Any
    width: int
    text_width: int
    grids: dict[tuple[int, str], Grid]
    patch_grid: tuple[int, int]
    vocab_size: int = 0
    tower_widths: dict[str, int] = field(default_factory=dict)
    tower_levels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)
    layers: tuple[int, ...] = ()

    def keys(self, on: Any) -> list[tuple[int, str]]:
        """The groups of the main tower that an option `on` names."""
        return [key for key in self.grids if key[0] in kinds_on(on) and key[1] == MAIN_TOWER]

    def grid(self, on: Any) -> Grid:
        """The one token grid of the views that `on` names, of the main tower; of an extra one where that is alone."""
        towers = dict.fromkeys(tower for _, tower in self.grids)
        tower = MAIN_TOWER if MAIN_TOWER in towers or not towers else next(iter(towers))
        grids = {key: grid for key, grid in self.grids.items() if key[0] in kinds_on(on) and key[1] == tower}
        sizes = {grid.size for grid in grids.values()}
        if len(sizes) != 1:
            here = ", ".join(f"{Kind(kind).name.lower()} of {own}" for kind, own in self.grids)
            raise ValueError(
                f"on={on!r} needs views of one token grid, but there are {sorted(sizes) or 'none'} (here: "
                f"{here or 'no views'}); give each kind of views a part of its own, or move the part."
            )
        return next(iter(grids.values()))


@dataclass(frozen=True)
class Traits:
    """What a part makes of what enters, and what it asks for; everything has a default.

    Args:
        grids (`dict[tuple[int, str], Grid]`): Token grids that leave, by kind and tower.
        width (`int`): Width of the features that leave.
        reads_question, writes_question (`bool`): Whether the result depends on the question; whether its embeddings
            are changed on the way to the language model.
        count (`str`): `"static"`: known from sizes alone; `"content"`: known once the part has run, the model packs;
            `"own"`: `own_tokens`, whatever the others are.
        own_tokens (`int` or `str`, *optional*): Tokens of an image where the part makes its own, or the kind of views
            whose tokens are left.
        later_tokens (`int`, *optional*): Tokens of later turns of the conversation, where the part has a protocol of
            turns.
        budget_on (`str` or `list[str]`, *optional*): Views whose tokens the part drops or saves under a budget, or
            `"own"`; None = it does not consume the budget.
        needs (`Needs`): What the tower computes for it.
        untrained (`tuple[str, ...]`): Its parameters, or modules of it, that no loss reaches: they are frozen.
        tower_widths (`dict[str, int]`): Widths of groups that it makes beside those of towers, by name.
    """

    grids: dict[tuple[int, str], Grid]
    width: int
    reads_question: bool = False
    writes_question: bool = False
    count: str = "static"
    own_tokens: int | str | None = None
    later_tokens: int | None = None
    budget_on: Any = None
    needs: Needs = field(default_factory=Needs)
    untrained: tuple[str, ...] = ()
    tower_widths: dict[str, int] = field(default_factory=dict)


def follow_grid(
    group: ViewGroup, grid: Grid, sizes: Sequence[tuple[int, int]] | None = None
) -> dict[str, torch.Tensor]:
    """The scores of a group on another grid: means over the patches under each token; none where it has no place.

    Where views have `sizes` of their own, each by itself.
    """
    is_padded = sizes is not None and set(sizes) != {tuple(group.grid)}
    if grid.size == group.grid and not is_padded:
        return group.scores
    if grid.whole:
        return {}
    maps = {name: score.unflatten(1, group.grid)[:, None] for name, score in group.scores.items()}
    if not is_padded:
        return {name: nn.functional.adaptive_avg_pool2d(own, grid.size).flatten(1) for name, own in maps.items()}
    return {
        name: torch.stack(
            [
                nn.functional.adaptive_avg_pool2d(plane[:, :high, :wide], grid.size).flatten()
                for plane, (high, wide) in zip(own, sizes or (), strict=True)
            ]
        )
        for name, own in maps.items()
    }


class HiResLmmPart(nn.Module):
    """Base of all parts. A subclass has strict `Options`, and overrides `describe` where it changes anything.

    Args:
        context (`PartContext`): What surrounds the part.
        options (`Options`): Its checked options.
    """

    traits: Traits
    needs_equal_views = False
    """Whether it would read what pads views of unequal size."""

    def untrained_parameters(self) -> list[nn.Parameter]:
        """The parameters that no loss reaches."""
        heads = tuple(f"{name}." for name in self.traits.untrained)
        return [parameter for name, parameter in self.named_parameters() if f"{name}.".startswith(heads)]

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

    def __init__(self, context: PartContext, options: Any):
        super().__init__(context, options)
        self.entering = context.grids

    @classmethod
    def output_grid(cls, options: Any, grid: Grid) -> Grid:
        """Token grid of a view afterwards."""
        return grid

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """The groups that `on` names get another grid."""
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
        return views.map(self.options.on, lambda group: self.forward_views(group, self.sizes(views, group)))

    def sizes(self, views: ViewFeatures, group: ViewGroup) -> list[tuple[int, int]]:
        """Token rows and columns of each view of a group that enters; unequal ones are padded to its grid."""
        entering = self.entering[group.key]
        own = [entering.of(patches) for patches in views.patches(group)[: len(group.rows)]]
        return own + [group.grid] * (len(group.features) - len(group.rows))

    def forward_views(self, group: ViewGroup, sizes: list[tuple[int, int]]) -> ViewGroup:
        """Apply the operation to one group, one size of views after another."""
        grid = self.output_grid(self.options, Grid(*group.grid))
        if set(sizes) <= {tuple(group.grid)}:
            features, scores = self.forward_group(group.features, group.grid), follow_grid(group, grid)
            return replace(group, features=features, grid=grid.size, scores=scores)
        states = {"": group.features, **{name: score[..., None] for name, score in group.scores.items()}}
        planes = {name: state.unflatten(1, group.grid).unbind() for name, state in states.items()}
        found: dict[str, list] = {}
        for size in dict.fromkeys(sizes):
            places = [place for place, own in enumerate(sizes) if own == size]
            cut = {
                name: torch.stack([plane[place][: size[0], : size[1]] for place in places]).flatten(1, 2)
                for name, plane in planes.items()
            }
            scores = {name: score[..., 0] for name, score in cut.items() if name}
            part = replace(group, features=cut[""], grid=size, scores=scores)
            made = self.forward_views(part, [size] * len(places))
            for name, state in {"": made.features, **{n: s[..., None] for n, s in made.scores.items()}}.items():
                plane = state.unflatten(1, made.grid)
                room = (0, 0, 0, grid.cols - made.grid[1], 0, grid.rows - made.grid[0])
                rows = found.setdefault(name, [None] * len(sizes))
                for place, own in zip(places, nn.functional.pad(plane, room).flatten(1, 2), strict=True):
                    rows[place] = own
        joined = {name: torch.stack(rows) for name, rows in found.items()}
        scores = {name: score[..., 0] for name, score in joined.items() if name}
        return replace(group, features=joined[""], grid=grid.size, scores=scores)


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
        """Apply the operation and return new carriers; a question comes where `reads_question` is declared."""
        raise NotImplementedError


@dataclass
class LayerCall:
    """What a layer op of the language model sees beside the hidden states `(B, m, D)`: the tokens still there.

    Args:
        slots (`torch.Tensor` of shape `(B, m)`): Place of each in the conversation, rising along a row.
        real (`torch.Tensor` of shape `(B, m)`): False at padding.
        visual (`torch.Tensor` of shape `(B, m)`): True at visual tokens.
        last (`torch.Tensor` of shape `(B,)`): Position of the last token of the prompt; drafts and answers follow it.
        token (`torch.Tensor` of shape `(B, m)`): Row of each visual token in `tokens`; -1 elsewhere, and where image
            features came without their geometry.
        tokens (`VisualTokens`, *optional*): View, cell and scores of each, on the CPU.
        attention (`LayerAttention`, *optional*): The attention of the layer, where the op sets `reads_attention`; None
            in conversations without images.
        is_prefill (`bool`): Whether the call holds images; elsewhere nothing may leave.
        aux (`dict[str, torch.Tensor]`): Takes tensors for losses and logs; they come out as `outputs.aux`.
        options (`dict[str, Any]`): What the caller gave as `layer_options`; each op knows its own keys.
    """

    slots: torch.Tensor
    real: torch.Tensor
    visual: torch.Tensor
    last: torch.Tensor
    token: torch.Tensor
    tokens: VisualTokens | None
    attention: Any
    is_prefill: bool
    training: bool
    aux: dict
    options: dict = field(default_factory=dict)

    @property
    def text(self) -> torch.Tensor:
        """True at tokens that are neither visual nor padding."""
        return self.real & ~self.visual

    @property
    def prompt(self) -> torch.Tensor:
        """True at tokens up to the last one of the prompt: not at answers and drafts, which nobody may read."""
        places = torch.arange(self.real.shape[1], device=self.real.device)
        return self.real & (places <= self.last[:, None])


@dataclass
class TowerCall:
    """What a layer op of the vision tower sees beside the hidden states `(V, prefix + L, C)` of whole images.

    Args:
        images (`list[ImageGeometry]`): The images; `first_view` is the row of an image's first view in the states.
        grid (`tuple[int, int]`): Patch rows and columns of a view.
        prefix (`int`): Tokens before the patches.
    """

    images: list
    grid: tuple[int, int]
    prefix: int
    training: bool


ATTENTION_TRAITS = ("reads_attention", "masks_attention", "changes_attention", "splits_feed")


class HiResLmmLayerOp(HiResLmmPart):
    """Base of layer operations, which run behind chosen layers of the language model or of the vision tower.

    `Options` of a subclass extend these. `reads_attention` asks for the attention of the layer; `masks_attention` has
    `see` called before it; with `reads_attention`, `changes_attention` has `attend` called behind it and `splits_feed`
    has `feed` called in its feed-forward. `reads_options` names keys of `layer_options`; `is_soft` says that in
    training it weighs tokens that elsewhere leave.
    """

    reads_attention = False
    masks_attention = False
    reads_options: tuple[str, ...] = ()
    is_soft = False
    changes_attention = False
    splits_feed = False

    @strict
    @dataclass
    class Options:
        """Options of every layer op.

        Args:
            of (`str`): `"language_model"` or `"vision_tower"`.
            layers (`int`, `list[int]` or `"all"`): Layers that it runs behind, from 0.
        """

        of: Literal["language_model", "vision_tower"] = "language_model"
        layers: int | list | str = "all"

    def __init__(self, context: PartContext, options: Any):
        super().__init__(context, options)
        self.layers = context.layers
        inside = [name for name in ATTENTION_TRAITS if getattr(self, name)]
        if options.of == "vision_tower" and inside:
            raise ValueError(f"{type(self).__name__} has {inside[0]}, which layers of the vision tower do not offer.")

    def forward(self, layer: int, hidden: torch.Tensor, call: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run behind a layer.

        Returns:
            Hidden states of the same shape, and None or, in the language model, `(B, m)`: bool, False where a visual
            token leaves; or in training floats, by which later layers weigh the token as a key.
        """
        raise NotImplementedError

    def see(self, layer: int, seen: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Change which tokens see which in the coming layer: `(B, 1, m, m)`, query by key, or `(B, heads, m, m)`."""
        raise NotImplementedError

    def attend(self, layer: int, call: LayerCall) -> torch.Tensor | None:
        """Put something in place of the attention of a layer, in calls without images too.

        Args:
            layer (`int`): The layer.
            call (`LayerCall`): What belongs to it; `call.attention` has scores, keys and values.

        Returns:
            What its heads give `(B, heads, m, d)`, before the projection; None leaves it as it is.
        """
        raise NotImplementedError

    def feed(self, layer: int, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the feed-forward of a layer gives for visual tokens `(N, D)`, in its place."""
        raise NotImplementedError


@dataclass
class RowTokens:
    """The tokens of each row as the language model has them, from its beginning: cached ones, then those of the call.

    Args:
        real (`torch.Tensor` of shape `(B, n)`): False at padding.
        image (`torch.Tensor` of shape `(B, n)`): Number of its image in the row, from 0; -1 at text and padding.
        view (`torch.Tensor` of shape `(B, n)`): Number of its view in the image, from 0; -1 at text and separators.
        kind (`torch.Tensor` of shape `(B, n)`): See `Kind`; -1 at text and separators.
        num_cached (`int`): Tokens before the call.
        has_images (`bool`): Whether the call holds visual tokens.
    """

    real: torch.Tensor
    image: torch.Tensor
    view: torch.Tensor
    kind: torch.Tensor
    num_cached: int = 0
    has_images: bool = False

    @property
    def number(self) -> torch.Tensor:
        """Number of each token in its row, padding not counted: `(B, n)`."""
        return (self.real.long().cumsum(dim=1) - 1).clamp(min=0)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "RowTokens":
        """Change each tensor."""
        real, image, view, kind = map(function, (self.real, self.image, self.view, self.kind))
        return replace(self, real=real, image=image, view=view, kind=kind)


class HiResLmmPositionPlan(HiResLmmPart):
    """Base of position plans, which say where tokens stand for the language model and what they see."""

    def forward(self, tokens: RowTokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Place tokens; asked in every call, while decoding too, always from the beginning of the rows.

        Returns:
            Positions `(B, n)`, which may have fractions; and, where a token does not see just itself and all before
            it, `(B, n - num_cached, n)`: True where a token of the call (row) sees a token (column), else None.
        """
        raise NotImplementedError


class HiResLmmHead(HiResLmmPart):
    """Base of heads, which read the last hidden states at a token and have a loss of their own.

    `Options` of a subclass extend these.
    """

    @strict
    @dataclass
    class Options:
        """Options of every head.

        Args:
            token_id (`int`): Token whose hidden states it reads.
            weight (`float`): Of its loss beside the language loss.
        """

        token_id: int
        weight: float | int = 1.0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Read hidden states `(N, D)`, one an occurrence of the token; N may be 0. Gives `(N, ...)`."""
        raise NotImplementedError

    def loss(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of an output `(N, ...)` against the caller's labels `(N, ...)`: one number; N is at least 1."""
        raise NotImplementedError


def layers_behind(options: Any, depth: int) -> tuple[int, ...]:
    """The layers that a layer op names."""
    named = options.layers
    layers = range(depth) if named == "all" else [named] if isinstance(named, int) else named
    if not layers or any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < depth for n in layers):
        raise ValueError(
            f'layers={named!r} of a layer op: name layers of {options.of} from 0 to {depth - 1}, or "all".'
        )
    return tuple(layers)


def entering(grids: Mapping[tuple[int, str], Grid]) -> dict[int, Grid]:
    """The token grids by kind; refused where views of one kind come from two towers."""
    found: dict[int, Grid] = {}
    for (kind, tower), grid in grids.items():
        if kind in found:
            name = next(name for name, number in KINDS.items() if number == kind)
            raise ValueError(
                f"Tokens of the views {name!r} come from two towers, {tower!r} and another; the sequence takes those "
                "of one. Let a map op join them, or leave one of the towers to a map op that reads it."
            )
        found[kind] = grid
    return found

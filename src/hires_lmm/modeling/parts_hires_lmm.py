"""The registry: from the name of a part in the configuration to its class and its checked options."""

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from .adapters_hires_lmm import (
    HiResLmmIdentityAdapter,
    HiResLmmLinearAdapter,
    HiResLmmMixtureAdapter,
    HiResLmmMlpAdapter,
    HiResLmmQueryFormerAdapter,
)
from .atp_hires_lmm import HiResLmmAtp
from .bases_hires_lmm import PartContext, Traits, entering, layers_behind
from .compressors_hires_lmm import HiResLmmConvMerge, HiResLmmQueryCompressor
from .dual_hires_lmm import HiResLmmDualEnhancement
from .dyvte_hires_lmm import HiResLmmDyvte
from .fusion_hires_lmm import HiResLmmFusion
from .gate_hires_lmm import HiResLmmConvGate
from .geometry_hires_lmm import KINDS, MAIN_TOWER, Grid, check_stride, kinds_on
from .globalcom2_hires_lmm import HiResLmmGlobalCom2
from .hires_llava_hires_lmm import HiResLmmSelfMiningSampler, HiResLmmSliceRestore
from .keep_after_hires_lmm import HiResLmmKeepAfter
from .mini_hires_lmm import HiResLmmMiniCompressor, HiResLmmPromptFuser
from .mixer_hires_lmm import HiResLmmTowerMixer
from .mqt_hires_lmm import HiResLmmMqt
from .objects_hires_lmm import OBJECT_KEY, HiResLmmObjectTokens
from .own_parts_hires_lmm import is_own, own_class, refusal
from .routers_hires_lmm import HiResLmmRouter
from .sa_perceiver_hires_lmm import HiResLmmSaPerceiver
from .sequence_hires_lmm import LayoutOptions
from .uhd_hires_lmm import HiResLmmUhdResampler
from .video_hires_lmm import HiResLmmMeanGlobal, HiResLmmPool3d, HiResLmmSampleTokens
from .yopo_hires_lmm import HiResLmmYopo


VIEW_OPS = {
    "query_compressor": HiResLmmQueryCompressor,
    "conv_merge": HiResLmmConvMerge,
    "sa_perceiver": HiResLmmSaPerceiver,
    "mqt": HiResLmmMqt,
    "mini_compressor": HiResLmmMiniCompressor,
    "conv_gate": HiResLmmConvGate,
    "object_tokens": HiResLmmObjectTokens,
    "dual_enhancement": HiResLmmDualEnhancement,
    "uhd_resampler": HiResLmmUhdResampler,
    "self_mining_sampler": HiResLmmSelfMiningSampler,
    "mean_global": HiResLmmMeanGlobal,
    "sample_tokens": HiResLmmSampleTokens,
}
ADAPTERS = {
    "identity": HiResLmmIdentityAdapter,
    "linear": HiResLmmLinearAdapter,
    "mlp": HiResLmmMlpAdapter,
    "query_former": HiResLmmQueryFormerAdapter,
    "mixture": HiResLmmMixtureAdapter,
}
MAP_OPS = {
    "pool3d": HiResLmmPool3d,
    "tower_mixer": HiResLmmTowerMixer,
}
TOKEN_OPS = {
    "router": HiResLmmRouter,
    "fusion": HiResLmmFusion,
    "globalcom2": HiResLmmGlobalCom2,
    "prompt_fuser": HiResLmmPromptFuser,
}
LAYER_OPS = {
    "keep_after": HiResLmmKeepAfter,
    "dyvte": HiResLmmDyvte,
    "atp": HiResLmmAtp,
    "yopo": HiResLmmYopo,
    "slice_restore": HiResLmmSliceRestore,
}
POSITION_PLANS: dict[str, Any] = {}
HEADS: dict[str, Any] = {}
SLOTS: dict[str, dict[str, Any]] = {
    "view_ops": VIEW_OPS,
    "adapter": ADAPTERS,
    "map_ops": MAP_OPS,
    "token_ops": TOKEN_OPS,
    "layer_ops": LAYER_OPS,
    "position_plan": POSITION_PLANS,
    "heads": HEADS,
}
BASES = {
    "view_ops": "HiResLmmViewOp",
    "adapter": "HiResLmmAdapter",
    "map_ops": "HiResLmmViewOp",
    "token_ops": "HiResLmmTokenOp",
    "layer_ops": "HiResLmmLayerOp",
    "position_plan": "HiResLmmPositionPlan",
    "heads": "HiResLmmHead",
}
"""What a user's own part of a slot derives from."""

OWN = "own"
"""Budget of a part that makes a number of tokens of its own."""

BUDGET_ROUTER = {"part": "router", "score": "saliency", "on": "all", "keep": {"rule": "budget"}}


@dataclass(frozen=True)
class Step:
    """One part of a chain: its class, its checked options, what surrounds it and what it makes of that."""

    slot: str
    part: Any
    options: Any
    context: PartContext
    traits: Traits

    def build(self) -> Any:
        """The module, which says what it is by `traits`."""
        module = self.part(self.context, self.options)
        module.traits = self.traits
        for parameter in module.untrained_parameters():
            parameter.requires_grad_(False)
        return module

    @property
    def waits(self) -> bool:
        """Whether it needs the question, or its count what the tokens hold."""
        return self.traits.reads_question or self.traits.count == "content" or self.traits.later_tokens is not None


@dataclass(frozen=True)
class ResolvedPart:
    """A part class with its checked options."""

    part: Any
    options: Any


@dataclass(frozen=True)
class ResolvedChain:
    """All parts of a connector by slot, before the sizes of tower and language model are known."""

    view_ops: list[ResolvedPart]
    adapter: ResolvedPart
    tower_adapters: dict[str, ResolvedPart]
    map_ops: list[ResolvedPart]
    token_ops: list[ResolvedPart]
    layer_ops: list[ResolvedPart]
    position_plan: ResolvedPart | None
    heads: dict[str, ResolvedPart]
    layout: LayoutOptions

    @property
    def kinds(self) -> list[str]:
        """Kinds of views that parts name, in their order in the sequence."""
        named = [name for op in (*self.view_ops, *self.map_ops) for name in _names(vars(op.options).get("on"))]
        return list(dict.fromkeys([*self.layout.order, *named]))

    def fit(self, context: PartContext) -> "FittedChain":
        """Follow grids and widths from the towers to the language model; refused where parts do not fit together."""
        if not context.grids:
            whole = Grid(*context.patch_grid)
            context = replace(context, grids={(int(KINDS[name]), MAIN_TOWER): whole for name in self.kinds})
        first, steps = context, []

        def add(slot: str, op: ResolvedPart) -> Traits:
            nonlocal context
            traits = op.part.describe(op.options, context)
            for grid in traits.grids.values():
                check_stride(grid, context.patch_grid, op.part.__name__)
            steps.append(Step(slot, op.part, op.options, context, traits))
            widths = {**context.tower_widths, **traits.tower_widths}
            context = replace(context, grids=traits.grids, width=traits.width, tower_widths=widths)
            return traits

        def add_beside(slot: str, op: ResolvedPart, own: PartContext) -> None:
            steps.append(Step(slot, op.part, op.options, own, op.part.describe(op.options, own)))

        for op in self.view_ops:
            add("view_ops", op)
        before = context
        others = {key: grid for key, grid in before.grids.items() if key[1] != MAIN_TOWER}
        context = replace(before, grids={key: grid for key, grid in before.grids.items() if key not in others})
        adapted = dict(add("adapter", self.adapter).grids)
        after = context
        for tower in dict.fromkeys(key[1] for key in others):
            own = {key: grid for key, grid in others.items() if key[1] == tower}
            context = replace(before, grids=own, width=before.tower_widths[tower])
            adapted |= add(f"tower_adapters.{tower}", self.tower_adapters.get(tower, self.adapter)).grids
            if context.width != after.width:
                raise ValueError(f"The adapter of {tower!r} gives width {context.width}, the main one {after.width}.")
            if own.get(OBJECT_KEY) != adapted.get(OBJECT_KEY):
                raise ValueError(
                    "The adapter of object tokens makes another number of them; give them one of their own, such as "
                    'tower_adapters={"objects": {"part": "mlp"}}.'
                )
        context = replace(after, grids=adapted)
        for op in self.map_ops:
            add("map_ops", op)
        behind = context
        for op in self.token_ops:
            add("token_ops", op)
        for op in self.layer_ops:
            width = first.width if op.options.of == "vision_tower" else first.text_width
            layers = layers_behind(op.options, first.depths[op.options.of])
            add_beside("layer_ops", op, replace(first, width=width, layers=layers))
        inner = replace(first, width=first.text_width)
        if self.position_plan is not None:
            add_beside("position_plan", self.position_plan, inner)
        for name, op in self.heads.items():
            check_head(name, op.options.token_id, first.vocab_size)
            add_beside(f"heads.{name}", op, inner)
        return FittedChain(steps, self.layout, first, behind, context.width)


@dataclass(frozen=True)
class FittedChain:
    """The parts of a connector with what surrounds each.

    Args:
        first, adapted (`PartContext`): What the towers give, and what the layout gets.
        width (`int`): Width of the tokens at the end.
    """

    steps: list[Step]
    layout: LayoutOptions
    first: PartContext
    adapted: PartContext
    width: int

    def __post_init__(self) -> None:
        consumers = [step for step in self.steps if step.traits.budget_on is not None]
        if len(consumers) > 1:
            names = ", ".join(step.part.__name__ for step in consumers)
            raise ValueError(f"Two parts would consume max_image_tokens: {names}; keep one of them.")
        makers = [step for step in self.steps if step.traits.count == OWN and step.traits.budget_on is None]
        if consumers and makers:
            raise ValueError(
                f"{consumers[0].part.__name__} would consume max_image_tokens, but {makers[0].part.__name__} makes a "
                "number of tokens of its own; keep one of them."
            )
        later = self.adapted.grids
        changed = [key for key, grid in (consumers[0].traits.grids.items() if self.elastic else ()) if key in later]
        changed = [key for key in changed if key[0] in self.elastic and later[key] != consumers[0].traits.grids[key]]
        if changed:
            raise ValueError(
                f"{consumers[0].part.__name__} makes fewer tokens of a view under a budget, but a part behind it "
                "makes others of them; put that part before it, or leave it out."
            )
        entering(self.adapted.grids)  # refuses two towers for one kind
        kind_names = {int(kind): name for name, kind in KINDS.items()}
        for (kind, tower), grid in self.adapted.grids.items():
            is_read = kind in kinds_on(self.layout.order)
            if kind == KINDS["detail"] and tower != MAIN_TOWER and not is_read:
                raise ValueError(
                    f"Nothing reads the extra tower {tower!r}: add 'detail' to layout.order={self.layout.order!r}, so "
                    "that its tokens enter the sequence, or a part that reads it."
                )
            if (grid.source is not None or grid.num_views is not None) and not is_read:
                raise ValueError(
                    f"Nothing reads the views {kind_names[kind]!r} that an operation makes: add them to "
                    f"layout.order={self.layout.order!r}."
                )
        if (
            self.elastic
            and self.layout.crop_order == "raster"
            and set(self.elastic) & {KINDS["crops"], KINDS["strided"], KINDS["frames"]}
        ):
            raise ValueError(
                'A part that makes fewer tokens of each crop or frame under a budget needs layout.crop_order="views".'
            )
        if any(grid.sample for (kind, _), grid in self.adapted.grids.items() if kind in self.elastic):
            raise ValueError(
                f"{consumers[0].part.__name__} makes fewer tokens of a view under a budget, and sample_tokens takes "
                "some of them; leave one of the two out."
            )

    def of(self, slot: str) -> list[Step]:
        """The parts of a slot, in order."""
        return [step for step in self.steps if step.slot == slot]

    @property
    def consumer(self) -> Step | None:
        """The part that consumes `max_image_tokens`, if one does."""
        return next((step for step in self.steps if step.traits.budget_on is not None), None)

    @property
    def elastic(self) -> tuple[int, ...]:
        """Kinds of views whose part makes fewer tokens under a budget."""
        is_elastic = self.consumer is not None and self.consumer.slot != "token_ops"
        return kinds_on(self.consumer.traits.budget_on) if is_elastic else ()  # type: ignore[union-attr]

    @property
    def own(self) -> Traits | None:
        """Traits of the part that makes a number of tokens of its own, if one does."""
        return next((step.traits for step in self.steps if step.traits.count == OWN), None)

    @property
    def grids(self) -> dict[int, Grid]:
        """Token grid of the views of each kind that reach the layout."""
        return entering(self.adapted.grids)

    def token_layout(self) -> dict[str, Any]:
        """What the processor counts by, as JSON values."""
        names = {int(kind): name for name, kind in KINDS.items()}
        own, consumer = self.own, self.consumer
        budget: dict[str, Any] | None = {"on": BUDGET_ROUTER["on"]} if own is None else None
        if consumer is not None:
            said = {"elastic": bool(self.elastic), "reads_question": consumer.traits.reads_question}
            budget = {"on": consumer.traits.budget_on, **{name: True for name, holds in said.items() if holds}}
        return {
            "patch_grid": list(self.first.patch_grid),
            "grids": {names[kind]: grid.to_dict() for kind, grid in self.grids.items()},
            "layout": {
                "order": list(self.layout.order),
                "crop_order": self.layout.crop_order,
                "separators": self.layout.separators,
            },
            "own_tokens": None if own is None else own.own_tokens,
            "later_tokens": None if own is None else own.later_tokens,
            "budget": budget,
        }


def check_head(name: str, token_id: int, vocab_size: int) -> None:
    """Refuse a head whose labels could have no name, or whose token does not exist."""
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"heads.{name} is no name for a head; labels_<name> is an argument, so use a plain word.")
    if not 0 <= token_id < vocab_size:
        raise ValueError(
            f"heads.{name}.token_id={token_id} is no token of the language model, which has {vocab_size}; make "
            "text_config.vocab_size larger first."
        )


def _names(on: Any) -> list[str]:
    return [] if on in (None, "all") else [on] if isinstance(on, str) else list(on)


def build_options(cls: type, values: dict, where: str) -> Any:
    """Build an options dataclass from a plain dict; `where` names its place in messages."""
    known = [f.name for f in fields(cls)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"Unknown option {unknown[0]!r} in {where}; known options: {', '.join(known) or 'none'}.")
    try:
        return cls(**values)
    except Exception as error:  # the strict dataclasses raise their own type
        raise ValueError(f"Bad option in {where}: {' '.join(str(error).split())}") from error


def resolve_part(slot: str, spec: dict, where: str) -> ResolvedPart:
    """The class and the checked options of `{"part": name, **options}`; `slot` is a key of `SLOTS`."""
    known = SLOTS[slot]
    name: Any = spec.get("part") if isinstance(spec, dict) else spec
    part = known.get(name) if isinstance(name, str) else None
    part = part if part is not None else own_class(name, BASES[slot])
    if part is None and is_own(name):
        raise ValueError(refusal(name))
    if part is None or not isinstance(spec, dict):
        parts = (
            f"known parts of this slot: {', '.join(known)}, or"
            if known
            else "no part is built in for this slot, so give"
        )
        raise ValueError(f"{where} names the unknown part {name!r}; {parts} a class of your own.")
    options = {key: value for key, value in spec.items() if key != "part"}
    return ResolvedPart(part, build_options(part.Options, options, f"{where} ({spec['part']})"))


def resolve_chain(config: Any) -> ResolvedChain:
    """Look up all parts of a connector by its configuration."""

    def listed(slot: str) -> list[ResolvedPart]:
        return [resolve_part(slot, spec, f"{slot}[{i}]") for i, spec in enumerate(getattr(config, slot))]

    def named(slot: str, specs: dict[str, dict], where: str) -> dict[str, ResolvedPart]:
        return {name: resolve_part(slot, spec, f"{where}.{name}") for name, spec in specs.items()}

    plan = config.position_plan
    return ResolvedChain(
        view_ops=listed("view_ops"),
        adapter=resolve_part("adapter", config.adapter, "adapter"),
        tower_adapters=named("adapter", config.tower_adapters, "tower_adapters"),
        map_ops=listed("map_ops"),
        token_ops=listed("token_ops"),
        layer_ops=listed("layer_ops"),
        position_plan=None if plan is None else resolve_part("position_plan", plan, "position_plan"),
        heads=named("heads", config.heads, "heads"),
        layout=build_options(LayoutOptions, config.layout, "layout"),
    )

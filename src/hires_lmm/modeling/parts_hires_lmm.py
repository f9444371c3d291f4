"""The registry: from the name of a part in the configuration to its class and its checked options."""

from dataclasses import dataclass, fields
from typing import Any

from .adapters_hires_lmm import (
    HiResLmmIdentityAdapter,
    HiResLmmLinearAdapter,
    HiResLmmMixtureAdapter,
    HiResLmmMlpAdapter,
    HiResLmmQueryFormerAdapter,
)
from .compressors_hires_lmm import HiResLmmConvMerge, HiResLmmQueryCompressor
from .fusion_hires_lmm import HiResLmmFusion
from .layout_hires_lmm import LayoutOptions
from .routers_hires_lmm import HiResLmmRouter
from .sa_perceiver_hires_lmm import HiResLmmSaPerceiver


VIEW_OPS = {
    "query_compressor": HiResLmmQueryCompressor,
    "conv_merge": HiResLmmConvMerge,
    "sa_perceiver": HiResLmmSaPerceiver,
}
ADAPTERS = {
    "identity": HiResLmmIdentityAdapter,
    "linear": HiResLmmLinearAdapter,
    "mlp": HiResLmmMlpAdapter,
    "query_former": HiResLmmQueryFormerAdapter,
    "mixture": HiResLmmMixtureAdapter,
}
TOKEN_OPS = {"router": HiResLmmRouter, "fusion": HiResLmmFusion}
SLOTS: dict[str, dict[str, Any]] = {"view_ops": VIEW_OPS, "adapter": ADAPTERS, "token_ops": TOKEN_OPS}

BUDGET_ROUTER = {"part": "router", "score": "saliency", "on": "all", "keep": {"rule": "budget"}}


@dataclass(frozen=True)
class ResolvedPart:
    """A part class with its checked options."""

    part: Any
    options: Any


@dataclass(frozen=True)
class ResolvedChain:
    """All parts of a connector and the grids and widths between them.

    Args:
        view_ops (`list[ResolvedPart]`): View operations in order.
        adapter (`ResolvedPart`): The adapter.
        token_ops (`list[ResolvedPart]`): Token operations in order.
        layout (`LayoutOptions`): Order and marks.
    """

    view_ops: list
    adapter: ResolvedPart
    token_ops: list
    layout: LayoutOptions

    def grids_before(self, patch_grid: tuple[int, int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Token grids (global view, crop) before each view operation, before the adapter and after it."""
        grids: list = [(tuple(patch_grid), tuple(patch_grid))]
        for op in self.view_ops:
            grids.append(op.part.output_grids(op.options, *grids[-1]))
        return [*grids, tuple(self._adapted_grid(grid) for grid in grids[-1])]

    def _adapted_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Token grid of a view after the adapter; views without tokens stay without."""
        return (0, 0) if 0 in grid else self.adapter.part.output_grid(self.adapter.options, grid)

    def fixed_counts(self) -> tuple[int, int | None] | None:
        """Tokens of an image's turn and of later turns where a token operation makes its own; else None."""
        said = [op.part.fixed_counts(op.options) for op in self.token_ops]
        return next((counts for counts in said if counts is not None), None)

    def widths(self, width: int, text_width: int) -> list[int]:
        """Width of the tokens behind the adapter and behind each token operation."""
        widths = [self.adapter.part.output_width(self.adapter.options, width, text_width)]
        for op in self.token_ops:
            widths.append(op.part.output_width(op.options, widths[-1], text_width))
        return widths

    def count_rules(self, patch_grid: tuple[int, int]) -> dict:
        """What the parts say about the number of tokens: `fixed_tokens`, `later_tokens`, `budget` of the layout."""
        consumers = budget_consumers(self)
        counts = self.fixed_counts()
        if counts is not None:
            return {"fixed_tokens": counts[0], "later_tokens": counts[1], "budget": {"on": "fixed"}}
        budget: dict | None = (consumers or [{"on": BUDGET_ROUTER["on"]}])[0]
        fixed_tokens = None
        if any(op.part.is_count_fixed(op.options) for op in self.view_ops):
            rows, cols = self.grids_before(patch_grid)[-1][0]
            fixed_tokens = rows * cols + ("view_end" in self.layout.active_marks())
            budget = {"on": "fixed"} if consumers and consumers[0]["on"] != "crops" else None
        return {"fixed_tokens": fixed_tokens, "later_tokens": None, "budget": budget}


def build_options(cls: type, values: dict, where: str) -> Any:
    """Build an options dataclass from a plain dict.

    Args:
        cls (`type`): The dataclass.
        values (`dict`): Its fields.
        where (`str`): Place in the configuration, for messages.

    Returns:
        An instance of `cls`.

    Raises:
        ValueError: For unknown keys (the known ones are named) and for values of wrong type or range.
    """
    known = [f.name for f in fields(cls)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"Unknown option {unknown[0]!r} in {where}; known options: {', '.join(known) or 'none'}.")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Bad option in {where}: {error}") from error
    except Exception as error:  # the strict dataclasses raise their own type
        raise ValueError(f"Bad option in {where}: {' '.join(str(error).split())}") from error


def resolve_part(slot: str, spec: dict, where: str) -> ResolvedPart:
    """Look up one part by name and check its options.

    Args:
        slot (`str`): `"view_ops"`, `"adapter"` or `"token_ops"`.
        spec (`dict`): `{"part": name, **options}`.
        where (`str`): Place in the configuration, for messages.

    Returns:
        The class and its options.

    Raises:
        ValueError: If the name or an option is unknown or malformed.
    """
    known = SLOTS[slot]
    if not isinstance(spec, dict) or spec.get("part") not in known:
        name = spec.get("part") if isinstance(spec, dict) else spec
        raise ValueError(f"{where} names the unknown part {name!r}; known parts of this slot: {', '.join(known)}.")
    part = known[spec["part"]]
    options = {key: value for key, value in spec.items() if key != "part"}
    return ResolvedPart(part, build_options(part.Options, options, f"{where} ({spec['part']})"))


def resolve_chain(view_ops: list, adapter: dict, token_ops: list, layout: dict) -> ResolvedChain:
    """Look up all parts of a connector.

    Args:
        view_ops (`list[dict]`): View operations in order.
        adapter (`dict`): The adapter.
        token_ops (`list[dict]`): Token operations in order.
        layout (`dict`): Fields of `LayoutOptions`.

    Returns:
        The chain.

    Raises:
        ValueError: For unknown parts and options, and for two parts that would both consume the budget.
    """
    chain = ResolvedChain(
        view_ops=[resolve_part("view_ops", spec, f"view_ops[{i}]") for i, spec in enumerate(view_ops)],
        adapter=resolve_part("adapter", adapter, "adapter"),
        token_ops=[resolve_part("token_ops", spec, f"token_ops[{i}]") for i, spec in enumerate(token_ops)],
        layout=build_options(LayoutOptions, layout, "layout"),
    )
    if len(budget_consumers(chain)) > 1:
        raise ValueError(
            "Two token operations would consume max_image_tokens; keep one of them: "
            + ", ".join(str(spec.get("part")) for spec in token_ops)
        )
    return chain


def budget_consumers(chain: ResolvedChain) -> list[dict]:
    """What the token operations say about the budget; those that do not consume it are left out.

    Args:
        chain (`ResolvedChain`): The parts of a connector.
    """
    said = [op.part.budget(op.options) for op in chain.token_ops]
    return [budget for budget in said if budget is not None]

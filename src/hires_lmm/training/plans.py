"""Published plans of training as lists of stages."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .plans_fusion import fusion, fusion_nested
from .plans_published import SYSTEMS, llava_mod, moe_llava, two_stages
from .plans_vlsa import ROWS, vlsa
from .stages import Stage, tower_rates


CONNECTOR = "connector"
LANGUAGE = ("language_model", "lm_head")
FORCED_EXPERT = "connector.adapter.forced_expert"
"""What the mixture uses: `"mlp"`, `"query_former"`, or None: its gate decides."""


@dataclass(frozen=True)
class Column:
    """One column of SliME's Table 7: batch size, learning rate and ZeRO stage of stages I and II (align) and of stage
    III (tune), and its LoRA preset.

    All columns share AdamW, bf16, one epoch, a cosine schedule with a linear warm-up of 0.03, and no weight decay; the
    tuning of the 70B run also offloads.

    Source: SliME, huggingface.co/papers/2406.08487, Table 7.
    """

    align_batch: int = 256
    align_rate: float = 1e-3
    align_zero: int = 2
    tune_batch: int = 128
    tune_rate: float = 2e-5
    tune_zero: int = 3
    lora: str | None = None


COLUMNS: dict[str, Column] = {
    "vicuna_7b": Column(),
    "vicuna_13b": Column(),
    "llama3_8b": Column(tune_rate=1e-5),
    "llama3_70b_lora": Column(tune_rate=1e-4, align_zero=3, lora="language_only"),
}
"""Columns of Table 7. For Vicuna-13B the paper says "similar to 7B"; the same numbers are used."""


def slime(column: str = "vicuna_7b", tower_rate: Any = None) -> list[Stage]:
    """SliME's alternating training: the global branch expert by expert, then the local branch, then all together.

    Args:
        column (`str`): Column of Table 7, a key of `COLUMNS`.
        tower_rate (`float` or `dict`, *optional*): See `tower_rates`, in stage III; None as the released scripts do
            (the paper says "all parameters").

    Returns:
        Four stages: I-a the perceptron and I-b the query former of the mixture, both on the global view; II the
        compressor, on crops; III everything.

    Source: SliME, huggingface.co/papers/2406.08487, section 3.3 and Table 7. The released code also trains the gate
    and the shared perceptron in I-b; here I-b moves only what I-a left out.
    """
    numbers = find_column(column)
    return [
        _align("slime/I-a", "connector.adapter.mlp", numbers, "global", {FORCED_EXPERT: "mlp"}),
        _align("slime/I-b", "connector.adapter.query_former", numbers, "global", {FORCED_EXPERT: "query_former"}),
        _align("slime/II", "connector.view_ops", numbers, "crops"),
        replace(_tune("slime/III", numbers, tower_rate), settings={FORCED_EXPERT: None}),
    ]


def query_former(column: str = "vicuna_7b", tower_rate: Any = None) -> list[Stage]:
    """Alternating training of the adapter `query_former` alone: projection, then queries and attention, then all.

    Args:
        column, tower_rate: As in `slime`.

    Source: SliME, huggingface.co/papers/2406.08487, Fig. 1 and footnote 3.
    """
    numbers = find_column(column)
    return [
        _align("query_former/projection", "connector.adapter.mlp", numbers),
        _align("query_former/queries", "connector.adapter.query_former", numbers),
        _tune("query_former/all", numbers, tower_rate),
    ]


def end_to_end(column: str = "vicuna_7b", tower_rate: Any = None) -> list[Stage]:
    """Training without alternation, of any model: the whole connector on all views, then everything.

    Args:
        column, tower_rate: As in `slime`.

    Source: the "end-to-end" row of SliME's Table 4, huggingface.co/papers/2406.08487.
    """
    numbers = find_column(column)
    return [
        _align("end_to_end/connector", CONNECTOR, numbers),
        _tune("end_to_end/all", numbers, tower_rate),
    ]


def dyvte(column: str = "released", tower_rate: Any = None) -> list[Stage]:
    """The gates of the layer op `dyvte` alone, for a trained model.

    Args:
        column, tower_rate: Nothing else learns; both are left as they are.

    Source: DyVTE, huggingface.co/papers/2411.19628: 1 % of the 665K data of LLaVA-1.5, single turns.
    """
    weights = {"generation": 0.0, "exit_gate": 1.0}
    return [Stage("dyvte/exit_gate", {"connector.layer_ops": 6e-5}, loss_weights=weights, noise=False)]


def _align(name: str, part: str, numbers: Column, views: str = "all", settings: dict | None = None) -> Stage:
    """A stage that trains one part of the connector."""
    return Stage(
        name,
        {part: numbers.align_rate},
        views=views,
        settings=settings or {},
        batch_size=numbers.align_batch,
        zero_stage=numbers.align_zero,
    )


def _tune(name: str, numbers: Column, tower_rate: Any) -> Stage:
    """The last stage of every plan: connector and language model, and the tower where a rate is given."""
    parts = (CONNECTOR, *LANGUAGE) if numbers.lora is None else (CONNECTOR, "language_model")
    rates = {**tower_rates(tower_rate), **dict.fromkeys(parts, numbers.tune_rate)}
    return Stage(name, rates, batch_size=numbers.tune_batch, zero_stage=numbers.tune_zero, lora=numbers.lora)


PLANS: dict[str, Callable[..., list[Stage]]] = {
    "slime": slime,
    "query_former": query_former,
    "end_to_end": end_to_end,
    "dyvte": dyvte,
    "fusion": fusion,
    "fusion_nested": fusion_nested,
    "moe_llava": moe_llava,
    "llava_mod": llava_mod,
    **{row: partial(vlsa, row=row) for row in ROWS},
    **{system: partial(two_stages, system=system) for system in SYSTEMS},
}
"""Name -> function that returns the stages, from a column of its paper's table and the rates of towers."""


def find_column(name: str) -> Column:
    """A column of Table 7 by name."""
    if name not in COLUMNS:
        raise ValueError(f"Unknown column {name!r} of Table 7; known columns: {', '.join(COLUMNS)}.")
    return COLUMNS[name]


def get_plan(name: str, column: str | None = None, tower_rate: Any = None) -> list[Stage]:
    """The stages of a plan by name.

    Args:
        column (`str`, *optional*): Column of the table that the plan follows; its first by default.
        tower_rate (`float` or `dict`, *optional*): See `tower_rates`, in the last stage or in all; see the plan.

    Raises:
        ValueError: If plan or column is unknown.
    """
    if name not in PLANS:
        raise ValueError(f"Unknown plan {name!r}; known plans: {', '.join(PLANS)}.")
    chosen = {} if column is None else {"column": column}
    return PLANS[name](**chosen, tower_rate=tower_rate)

"""Stages of training: which parts learn, at which rate, on which views, and the parameters that this means."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import nn

from .objectives.registry import GENERATION, OBJECTIVES
from .optimization import build_optimizer, parameter_groups
from .parameters import VIEWS, find_base, learnable_parameters, list_parts, matches, part_name, part_of, place_of
from .settings import set_noise, set_options


@dataclass(frozen=True)
class Alternation:
    """Turns of groups of parts inside one run: while one group learns, the others have a learning rate of zero.

    Args:
        turns (`list[list[str]]`): For each turn the patterns of `Stage.trainable` that learn.
        steps (`int`): Optimizer steps of a turn.
    """

    turns: list
    steps: int = 1

    def __post_init__(self) -> None:
        if len(self.turns) < 2 or self.steps < 1:
            raise ValueError(
                f"Alternation(turns={self.turns!r}, steps={self.steps}) needs two turns and one step at least."
            )

    def is_on(self, pattern: str, step: int) -> bool:
        """Whether the parts of a pattern learn at an optimizer step (from 0); those in no turn always do."""
        if not any(pattern in turn for turn in self.turns):
            return True
        return pattern in self.turns[step // self.steps % len(self.turns)]


@dataclass(frozen=True)
class Stage:
    """One run of the Trainer.

    Args:
        name (`str`): Unique among the stages of a project, such as `"slime/II"`; written into checkpoints.
        trainable (`dict[str, float]`): Pattern of parts -> learning rate; the first pattern that matches a parameter
            decides. A pattern is a dotted path below the model, such as `"connector.adapter.mlp"`, and may hold `*`.
            All other parameters are frozen. In a PEFT model only what PEFT trains can match.
        views (`str`): Views that are used: `"all"` that the checkpoint makes, `"global"` or `"crops"`. Modules of the
            others run nowhere.
        settings (`dict[str, Any]`): Options of parts that the stage sets, see `set_options`, such as
            `{"connector.adapter.forced_expert": "mlp"}`. Others stay as they are.
        loss_weights (`dict[str, float]`): Weights of the losses: names of `OBJECTIVES`, such as `gate_balance`, and
            `generation`, the language loss, whose weight is 1 where it is not given.
        batch_size (`int`, *optional*): Samples of one optimizer step over all processes, for recipes.
        zero_stage (`int`, *optional*): DeepSpeed ZeRO stage of the published run, for recipes.
        lora (`str`, *optional*): Preset of `lora_config` to apply before the stage, for recipes.
        alternation (`Alternation`, *optional*): Turns inside the run.
        max_image_tokens (`int` or `list[int]`, *optional*): Budget of every image, for the collator; from a list, one
            is drawn for each optimizer step.
        after (`str`, *optional*): Stage whose weights this one starts from, for recipes; the one before by default.
        cognition (`dict[str, float]`, *optional*): Rates of the cognition tasks by name, for the data of recipes.
        noise (`bool`, *optional*): Whether gates and routers add their noise while training. None leaves it as it is:
            on in a new model.

    Raises:
        ValueError: If a value is unknown or nothing is trainable.
    """

    name: str
    trainable: dict
    views: str = "all"
    settings: dict = field(default_factory=dict)
    loss_weights: dict = field(default_factory=dict)
    batch_size: int | None = None
    zero_stage: int | None = None
    lora: str | None = None
    alternation: Alternation | None = None
    max_image_tokens: int | list | None = None
    after: str | None = None
    cognition: dict | None = None
    noise: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.alternation, dict):
            object.__setattr__(self, "alternation", Alternation(**self.alternation))
        if not self.trainable:
            raise ValueError(f"Stage {self.name!r} trains nothing; name parts and learning rates in trainable.")
        for name, value in [*self.trainable.items(), *self.loss_weights.items()]:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(
                    f"Stage {self.name!r} has {value!r} for {name!r}; a learning rate or weight is a number of at "
                    "least 0 (in YAML with a point: 1.0e-4, as 1e-4 is a text there)."
                )
        given = self.max_image_tokens
        budgets = given if isinstance(given, (list, tuple)) else [given]
        if given is not None and not (budgets and all(type(each) is int and each > 0 for each in budgets)):
            raise ValueError(
                f"Stage {self.name!r} has max_image_tokens={given!r}; use an integer of at least 1, a "
                "list of these, or None."
            )
        if self.views not in VIEWS:
            raise ValueError(f"Stage {self.name!r} has views={self.views!r}; use one of {', '.join(VIEWS)}.")
        unknown = [loss for loss in self.loss_weights if loss not in (GENERATION, *OBJECTIVES)]
        if unknown:
            known = ", ".join((GENERATION, *OBJECTIVES))
            raise ValueError(f"Stage {self.name!r} weighs the unknown loss {unknown[0]!r}; known losses: {known}.")
        bad = [p for turn in (self.alternation.turns if self.alternation else []) for p in turn]
        bad = [pattern for pattern in bad if pattern not in self.trainable]
        if bad:
            raise ValueError(f"Stage {self.name!r} alternates {bad[0]!r}, which is no pattern of trainable.")

    @classmethod
    def from_dict(cls, values: dict) -> "Stage":
        """Read a stage from plain values, as recipes and checkpoints hold it."""
        known = [entry.name for entry in fields(cls)]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"A stage has no field {unknown[0]!r}; its fields are {', '.join(known)}.")
        return cls(**values)

    def to_dict(self) -> dict:
        """The stage as plain JSON values."""
        return asdict(self)

    def pattern_of(self, name: str) -> str | None:
        """The pattern that decides over a parameter (a name in `named_parameters()`), or None: frozen."""
        part = part_name(name)
        return next((pattern for pattern in self.trainable if matches(part, pattern)), None)

    def parameters(self, model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Parameters of each pattern."""
        found: dict[str, list] = {pattern: [] for pattern in self.trainable}
        named: set[str] = set()
        seen: set[int] = set()
        for name, parameter in learnable_parameters(model):
            pattern = self.pattern_of(name)
            named.update(p for p in self.trainable if matches(part_name(name), p))
            if pattern is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found[pattern].append((name, parameter))
        missing = [pattern for pattern in self.trainable if pattern not in named]
        if missing:
            raise ValueError(
                f"Stage {self.name!r} trains {missing[0]!r}, but no parameter that can be trained has such a name. "
                f"Parts of this model: {', '.join(list_parts(model))}."
            )
        return found

    def apply(self, model: nn.Module) -> None:
        """Make a model ready: freeze, choose views, set options.

        Raises:
            ValueError: If a pattern matches nothing, or an option cannot be set in this model.
        """
        chosen = {id(parameter) for pairs in self.parameters(model).values() for _, parameter in pairs}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        base = find_base(model)
        base.connector.training_views = self.views
        base.config.training_stage = self.name
        set_options(model, self.settings)
        if self.noise is not None:
            set_noise(base, self.noise)

    def optimizer(self, model: nn.Module, args: Any) -> torch.optim.Optimizer:
        """The optimizer for `Trainer(..., optimizers=(stage.optimizer(model, args), None))`, one named group a part.

        Args:
            args (`TrainingArguments`): `optim`, its arguments and `weight_decay` are read; the learning rates are
                those of the stage.
        """
        groups = parameter_groups(self.parameters(model), self.trainable, self.name, args.weight_decay)
        return build_optimizer(groups, self.name, model, args)

    def optimizer_cls_and_kwargs(self, args: Any) -> tuple[Callable, dict]:
        """The same as an argument of the Trainer of that name: built once the model is in place, as FSDP and DeepSpeed
        need it; a factory of factories is the form that the Trainer knows for it."""
        return lambda: lambda model: self.optimizer(model, args), {}


def tower_rates(rate: float | dict[str, float] | None) -> dict[str, float]:
    """Learning rates of towers in `Stage.trainable`.

    Args:
        rate (`float` or `dict[str, float]`, *optional*): Of the main tower; or of towers by name, such as
            `{"vision_tower": 2e-6, "extra_towers.fine": 1e-5}`. None: all are frozen.
    """
    rates = {} if rate is None else dict(rate) if isinstance(rate, dict) else {"vision_tower": rate}
    for name in rates:
        if name.split(".")[0] not in ("vision_tower", "extra_towers"):
            raise ValueError(f"tower_rate names {name!r}; towers are 'vision_tower' and 'extra_towers.<name>'.")
    return rates


@dataclass(frozen=True)
class PartRow:
    """One row of the table that a run opens with."""

    part: str
    parameters: int
    trainable: int
    learning_rates: tuple


def summarise(model: nn.Module, stage: Stage) -> list[PartRow]:
    """What a stage trains in a model: one row a part, in the order of the data."""
    chosen = {
        id(parameter): stage.trainable[pattern]
        for pattern, pairs in stage.parameters(model).items()
        for _, parameter in pairs
    }
    rows: dict[str, list] = {}
    for name, parameter in model.named_parameters():
        rows.setdefault(part_of(name), []).append(parameter)
    return [
        PartRow(
            part,
            sum(p.numel() for p in rows[part]),
            sum(p.numel() for p in rows[part] if id(p) in chosen),
            tuple(dict.fromkeys(chosen[id(p)] for p in rows[part] if id(p) in chosen)),
        )
        for part in sorted(rows, key=place_of)
    ]

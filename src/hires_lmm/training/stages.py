"""Stages of training: which parts learn, at which rate, on which views, and the parameters that this means."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn

from ..modeling.adapters_hires_lmm import HiResLmmMixtureAdapter
from ..modeling.noise_hires_lmm import HiResLmmNoise


VIEWS = ("all", "global", "crops")
EXPERTS = ("mlp", "query_former", "mixture")
PARTS = ("vision_tower", "connector.view_ops", "connector.adapter", "connector.layout", "connector.token_ops")
LANGUAGE_PARTS = ("language_model", "lm_head")

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "modules_to_save.default.")
_PEFT_PREFIX = "base_model.model."


def part_name(name: str) -> str:
    """Name of a parameter without what wrappers add: `connector.adapter.mlp.linear_1.weight`, `lm_head.weight`.

    Args:
        name (`str`): Name in `named_parameters()` of the model, wrapped by DDP, FSDP, PEFT or not.
    """
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.").removeprefix(_PEFT_PREFIX).removeprefix("model.")


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a parameter or a module that holds it.

    Args:
        name (`str`): Name as `part_name` gives it.
        pattern (`str`): A dotted path; `*` stands for any characters.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


@dataclass(frozen=True)
class Alternation:
    """Turns of groups of parts inside one run: while one group learns, the others have a learning rate of zero.

    Args:
        turns (`list[list[str]]`): For each turn the patterns of `Stage.trainable` that learn.
        steps (`int`): Optimizer steps of a turn.

    Raises:
        ValueError: If there is nothing to alternate.
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
        views (`str`): Views that are used: `"all"`, `"global"` or `"crops"`. Modules of the others run nowhere.
        expert (`str`, *optional*): What the mixture adapter uses: `"mlp"`, `"query_former"` or `"mixture"` (its gate
            decides). None leaves the model as it is.
        loss_weights (`dict[str, float]`): Weights of the losses: names of `OBJECTIVES`, such as `gate_balance`, and
            `generation`, the language loss, whose weight is 1 where it is not given.
        batch_size (`int`, *optional*): Samples of one optimizer step over all processes, for recipes.
        zero_stage (`int`, *optional*): DeepSpeed ZeRO stage of the published run, for recipes.
        lora (`str`, *optional*): Preset of `lora_config` to apply before the stage, for recipes.
        alternation (`Alternation`, *optional*): Turns inside the run.
        max_image_tokens (`int` or `list[int]`, *optional*): Budget of every image, for the collator; from a list, one
            is drawn for each optimizer step.
        question (`bool`, *optional*): Whether the fusion transformer reads the question. None leaves it as it is.
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
    expert: str | None = None
    loss_weights: dict = field(default_factory=dict)
    batch_size: int | None = None
    zero_stage: int | None = None
    lora: str | None = None
    alternation: Alternation | None = None
    max_image_tokens: int | list | None = None
    question: bool | None = None
    after: str | None = None
    cognition: dict | None = None
    noise: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.alternation, dict):
            object.__setattr__(self, "alternation", Alternation(**self.alternation))
        if not self.trainable:
            raise ValueError(f"Stage {self.name!r} trains nothing; name parts and learning rates in trainable.")
        if self.views not in VIEWS:
            raise ValueError(f"Stage {self.name!r} has views={self.views!r}; use one of {', '.join(VIEWS)}.")
        if self.expert is not None and self.expert not in EXPERTS:
            raise ValueError(f"Stage {self.name!r} has expert={self.expert!r}; use one of {', '.join(EXPERTS)}.")
        self._check_losses()
        bad = [p for turn in (self.alternation.turns if self.alternation else []) for p in turn]
        bad = [pattern for pattern in bad if pattern not in self.trainable]
        if bad:
            raise ValueError(f"Stage {self.name!r} alternates {bad[0]!r}, which is no pattern of trainable.")

    def _check_losses(self) -> None:
        """Refuse weights of losses that do not exist."""
        from .objectives import GENERATION, OBJECTIVES

        for loss in self.loss_weights:
            if loss not in (GENERATION, *OBJECTIVES):
                known = ", ".join((GENERATION, *OBJECTIVES))
                raise ValueError(f"Stage {self.name!r} weighs the unknown loss {loss!r}; known losses: {known}.")

    @classmethod
    def from_dict(cls, values: dict) -> "Stage":
        """Read a stage from plain values, as recipes and checkpoints hold it.

        Args:
            values (`dict`): Fields of the class.

        Raises:
            ValueError: If a field is unknown.
        """
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
        """Parameters of each pattern.

        Args:
            model (`nn.Module`): The model, bare or wrapped.

        Returns:
            Pattern -> `(name, parameter)` pairs, in the order of the model.

        Raises:
            ValueError: If a pattern matches nothing.
        """
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
        """Make a model ready: freeze, choose views and expert, in the live modules and in the configuration alike.

        Args:
            model (`nn.Module`): The model, not yet wrapped by DDP or FSDP.

        Raises:
            ValueError: If a pattern matches nothing, or an expert is asked of a model without a mixture.
        """
        chosen = {id(parameter) for pairs in self.parameters(model).values() for _, parameter in pairs}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        base = find_base(model)
        base.connector.training_views = self.views
        base.config.training_stage = self.name
        if self.noise is not None:
            set_noise(base, self.noise)
        if self.expert is not None:
            self._check_saved_expert(base, model)
            set_expert(base, self.expert)
        if self.question is not None:
            from .fusion_states import find_fusion, set_question

            if hasattr(model, "peft_config") and find_fusion(base).question != self.question:
                raise ValueError(
                    f"Stage {self.name!r} uses question={self.question}, which an adapter folder cannot hold. Call "
                    f"set_question(model, {self.question}) and save the base model before get_peft_model."
                )
            set_question(base, self.question)

    def _check_saved_expert(self, base: Any, model: nn.Module) -> None:
        """Refuse to change under PEFT what only the configuration of the base checkpoint holds."""
        forced = None if self.expert == "mixture" else self.expert
        if hasattr(model, "peft_config") and base.config.connector_config.adapter.get("forced_expert") != forced:
            raise ValueError(
                f"Stage {self.name!r} uses expert={self.expert!r}, which an adapter folder cannot hold. Call "
                f"set_expert(model, {self.expert!r}) and save the base model before get_peft_model."
            )

    def optimizer(self, model: nn.Module, args: Any) -> torch.optim.Optimizer:
        """The optimizer for `Trainer(..., optimizers=(stage.optimizer(model, args), None))`; see `build_optimizer`."""
        from .optimization import build_optimizer

        return build_optimizer(self, model, args)

    def optimizer_cls_and_kwargs(self, args: Any) -> tuple:
        """The same as an argument of the Trainer of that name; works under FSDP and DeepSpeed too."""
        from .optimization import optimizer_factory

        return optimizer_factory(self, args)


def find_base(model: nn.Module) -> Any:
    """The `HiResLmmModel` inside a model, whatever wraps it.

    Args:
        model (`nn.Module`): Any model that holds one.

    Raises:
        ValueError: If there is none.
    """
    for module in model.modules():
        if type(module).__name__ in ("HiResLmmModel", "FSDPHiResLmmModel"):
            return module
    raise ValueError(f"{type(model).__name__} holds no HiResLmmModel; stages train models of this package only.")


def learnable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that a stage may choose from, with all names of tied ones.

    Args:
        model (`nn.Module`): The model, bare or wrapped.

    Returns:
        All floating-point parameters but those that no gradient reaches (`unread_parameters`); in a PEFT model only
        adapters, the copies in `modules_to_save` and objectives.
    """
    unread = unread_parameters(find_base(model))
    pairs = [pair for pair in model.named_parameters(remove_duplicate=False) if id(pair[1]) not in unread]
    has_peft = any(_is_peft_parameter(name) for name, _ in pairs)
    for name, parameter in pairs:
        chosen = not has_peft or _is_peft_parameter(name) or part_name(name).startswith("objectives.")
        if parameter.is_floating_point() and chosen:
            yield name, parameter


def unread_parameters(base: Any) -> set[int]:
    """What the tower computes after the layer that is read: it gets no gradients and would have no optimizer state.

    Args:
        base (`nn.Module`): A `HiResLmmModel`.

    Returns:
        `id` of each parameter.
    """
    tower, layer = base.vision_tower, base.config.vision_feature_layer
    depth = tower.config.num_hidden_layers
    read = layer + depth + 1 if layer < 0 else layer  # 0 are the embeddings
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    norms = [module for name, module in tower.named_modules() if name.rpartition(".")[2] == "post_layernorm"]
    return {id(parameter) for module in (*lists[0][read:], *norms) for parameter in module.parameters()}


def _is_peft_parameter(name: str) -> bool:
    """Whether PEFT added a parameter."""
    return ".lora_" in name or ".modules_to_save." in name


def list_parts(model: nn.Module) -> list[str]:
    """Parts of a model that hold parameters, in the order of the data.

    Args:
        model (`nn.Module`): The model, bare or wrapped.
    """
    heads = dict.fromkeys(_head(part_name(name)) for name, _ in learnable_parameters(model))
    return sorted(heads, key=_rank)


def _head(part: str) -> str:
    """The part that a parameter belongs to."""
    depth = 3 if part.startswith(("connector.", "objectives.")) else 1
    return ".".join(part.split(".")[:depth])


def set_expert(model: nn.Module, expert: str) -> None:
    """Choose what the mixture adapter of a live model uses, and note it in the configuration.

    Args:
        model (`nn.Module`): A `HiResLmmModel` or a model that holds one.
        expert (`str`): `"mlp"`, `"query_former"`, or `"mixture"`: the gate decides.

    Raises:
        ValueError: If the adapter is no mixture.
    """
    base = find_base(model)
    adapters = [module for module in base.connector.modules() if _is_mixture(module)]
    if not adapters:
        part = base.config.connector_config.adapter["part"]
        raise ValueError(f"expert={expert!r} needs the adapter 'mixture', but this model has {part!r}.")
    forced = None if expert == "mixture" else expert
    for adapter in adapters:
        adapter.forced_expert = forced
    for config in (base.config.connector_config, base.connector.config):
        options = {key: value for key, value in config.adapter.items() if key != "forced_expert"}
        config.adapter = options if forced is None else {**options, "forced_expert": forced}


def set_noise(model: nn.Module, noise: bool) -> None:
    """Switch the noise that gates and routers add while training; dropout stays as it is.

    Args:
        model (`nn.Module`): Any model; one without noise is left as it is.
        noise (`bool`): Whether noise is added.
    """
    for module in cast("list[HiResLmmNoise]", list(model.modules())):
        if type(module).__name__ == HiResLmmNoise.__name__:  # by name, as below
            module.p = 1.0 if noise else 0.0


def _is_mixture(module: nn.Module) -> bool:
    """By name: a checkpoint loaded with remote code brings classes of its own."""
    return type(module).__name__ == HiResLmmMixtureAdapter.__name__


@dataclass(frozen=True)
class PartRow:
    """One row of the table that a run opens with.

    Args:
        part (`str`): Path of the part.
        parameters (`int`): All its parameters.
        trainable (`int`): Those that learn.
        learning_rates (`tuple[float, ...]`): Their rates, without repetition.
    """

    part: str
    parameters: int
    trainable: int
    learning_rates: tuple


def summarise(model: nn.Module, stage: Stage) -> list[PartRow]:
    """What a stage trains in a model, part by part.

    Args:
        model (`nn.Module`): The model, bare or wrapped.
        stage (`Stage`): The stage.

    Returns:
        One row a part, in the order of the data.
    """
    chosen = {
        id(parameter): stage.trainable[pattern]
        for pattern, pairs in stage.parameters(model).items()
        for _, parameter in pairs
    }
    rows: dict[str, list] = {}
    for name, parameter in model.named_parameters():
        rows.setdefault(_head(part_name(name)), []).append(parameter)
    return [
        PartRow(
            part,
            sum(p.numel() for p in rows[part]),
            sum(p.numel() for p in rows[part] if id(p) in chosen),
            tuple(dict.fromkeys(chosen[id(p)] for p in rows[part] if id(p) in chosen)),
        )
        for part in sorted(rows, key=_rank)
    ]


def _rank(part: str) -> int:
    """Place of a part in the order of the data."""
    order = (*PARTS, *LANGUAGE_PARTS)
    return next((place for place, head in enumerate(order) if part.startswith(head)), len(order))

"""How a run carries objectives: as submodules of the model, with hooks that feed them and add what they return."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..columns import BatchColumn
from ..sums import Sums
from .base import Objective, StepValues
from .registry import GENERATION, OBJECTIVES


ATTRIBUTE = "objectives"


class CarriedObjectives(nn.ModuleDict):
    """The objectives of a run, as the model holds them."""

    def __init__(self, objectives: dict[str, Objective]):
        super().__init__(objectives)
        self.handle: Any = None
        self.blocks: set[str] = set()
        self.taken: dict[str, Any] = {}
        self._columns = frozenset(column.name for objective in objectives.values() for column in objective.columns())
        self._asks = {name: value for each in objectives.values() for name, value in each.asks.items()}

    def take_columns(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A pre-hook of the model: keep the columns of the objectives away from it, and pass what they ask for."""
        self.taken = {name: value for name, value in kwargs.items() if name in self._columns}
        rest = {name: value for name, value in kwargs.items() if name not in self._columns}
        return args, {**rest, **(self._asks if module.training else {})}


def choose_objectives(stage: Any, given: dict[str, Objective]) -> dict[str, Objective]:
    """The objectives that a stage weighs, by name: those given for the run, and those that build themselves."""
    idle = [name for name in given if name not in stage.loss_weights]
    if idle:
        raise ValueError(
            f"The run carries the objective {idle[0]!r}, which stage {stage.name!r} does not weigh; add "
            f"loss_weights={{{idle[0]!r}: 1.0}} to the stage, or leave the objective out."
        )
    chosen: dict[str, Objective] = {}
    for name in stage.loss_weights:
        if name in given:
            chosen[name] = given[name]
        elif name in OBJECTIVES and OBJECTIVES[name].is_automatic:
            chosen[name] = OBJECTIVES[name]()
        elif name != GENERATION:
            raise ValueError(
                f"Stage {stage.name!r} weighs {name!r}, but the run carries no such objective; pass "
                f"StageCallback(stage, objectives={{{name!r}: ...}})."
            )
    return chosen


def find_entry(model: nn.Module) -> Any:
    """The module that is called with a batch and returns a loss: the model with its head, or PEFT around it."""
    for module in model.modules():
        if hasattr(module, "lm_head"):
            return module
    raise ValueError(
        f"{type(model).__name__} has no head and returns no loss; train HiResLmmForConditionalGeneration."
    )


def find_top(model: nn.Module, base: nn.Module) -> Any:
    """The module that holds the `HiResLmmModel`, whatever wraps it; None where there is no head."""
    return next((module for module in model.modules() if module._modules.get("model") is base), None)


def attach(model: nn.Module, base: nn.Module, objectives: dict[str, Objective]) -> CarriedObjectives | None:
    """Make objectives submodules of the model, in place of those of an earlier run; `save_pretrained` leaves them
    out."""
    top = find_top(model, base)
    if top is not None:
        detach(top)
    if not objectives:
        return None
    if top is None:
        raise ValueError(
            f"{type(model).__name__} has no head and returns no loss; train HiResLmmForConditionalGeneration."
        )
    carried = CarriedObjectives(objectives).to(next(top.parameters()).device)
    setattr(top, ATTRIBUTE, carried)
    ignored = {f"{ATTRIBUTE}.{key}" for key in carried.state_dict()}
    top._keys_to_ignore_on_save = set(top._keys_to_ignore_on_save or ()) | ignored
    named = {name for objective in objectives.values() for name in objective.no_split_modules}
    carried.blocks = named & {type(module).__name__ for module in carried.modules()}
    top._no_split_modules = set(top._no_split_modules or ()) | carried.blocks
    carried.handle = find_entry(model).register_forward_pre_hook(carried.take_columns, with_kwargs=True)
    return carried


def detach(top: Any) -> None:
    """Take the objectives of an earlier run from a model, if it holds some."""
    before = top._modules.pop(ATTRIBUTE, None)
    if before is None:
        return
    before.handle.remove()
    top._keys_to_ignore_on_save = {key for key in top._keys_to_ignore_on_save if not key.startswith(f"{ATTRIBUTE}.")}
    top._no_split_modules = set(top._no_split_modules) - before.blocks


def check_objectives(carried: CarriedObjectives, stage: Any, base: nn.Module) -> None:
    """Let every objective look at stage and model, and refuse stages that train what must stay frozen."""
    for name, objective in carried.items():
        objective.check(stage, base)  # type: ignore[operator]
        for part in objective.frozen:  # type: ignore[union-attr]
            if any(parameter.requires_grad for parameter in objective.get_submodule(part).parameters()):
                raise ValueError(
                    f"Stage {stage.name!r} would train {ATTRIBUTE}.{name}.{part}, which must stay frozen; name the "
                    f"other parts of {ATTRIBUTE}.{name} in trainable."
                )


def needed_columns(carried: CarriedObjectives | None) -> list[BatchColumn]:
    """The columns that the objectives of a run read."""
    objectives = carried.values() if carried is not None else ()
    return [column for objective in objectives for column in objective.columns()]  # type: ignore[operator]


class StepHooks:
    """Reads every training step of a model: logs, and adds what objectives return to the loss.

    Args:
        carried (`CarriedObjectives`): The objectives, as the model holds them.
        weights (`dict[str, float]`): Weights of the losses; that of the language loss is 1 where it is not given. With
            none the loss is left as it is.
        sums (`Sums`): Gets the numbers for the log: losses, and what `aux` says of gates and kept tokens.
    """

    def __init__(self, carried: CarriedObjectives, weights: dict[str, float], sums: Sums):
        self.carried, self.weights, self.sums = carried, weights, sums
        self._precision: AbstractContextManager = nullcontext()
        self.head: Any = None

    def install(self, model: nn.Module, base: nn.Module) -> list:
        """Hook the model inside, for the log, and the one that is called with a batch, where there are losses."""

        def add_losses(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if module.training:
                with self._precision:
                    output.loss = self._total(base, kwargs, output)
                self.carried.taken = {}
            return output

        handles = [
            base.register_forward_pre_hook(self._note_precision),
            base.register_forward_hook(self._log, with_kwargs=True),
        ]
        if self.weights:
            self.head = find_entry(model).lm_head
            handles.append(find_entry(model).register_forward_hook(add_losses, with_kwargs=True))
        return handles

    def _note_precision(self, module: nn.Module, args: tuple) -> None:
        """Note the autocast of the forward pass, which has ended when the losses are computed."""
        device = next(module.parameters()).device.type
        self._precision = nullcontext()
        if torch.is_autocast_enabled(device):
            self._precision = torch.autocast(device, dtype=torch.get_autocast_dtype(device))

    def _log(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Count kept tokens and weights of gates, where there are images."""
        aux = output.aux if module.training and holds_images(kwargs) and output.aux else {}
        if "kept" in aux:
            self.sums.add("tokens", aux["kept"].numel())
            self.sums.add("kept", aux["kept"].sum())
        if "gates" in aux:
            self.sums.add("gate", aux["gates"][:, 0].detach().float().sum())
            self.sums.add("gated", len(aux["gates"]))

    def _total(self, base: nn.Module, inputs: dict, output: Any) -> torch.Tensor:
        """The weighted sum of all losses of a batch, each a share of the optimizer step."""
        loss = output.loss
        if loss is None:
            raise ValueError(
                "The stage weighs auxiliary losses, but the model returned no loss: this trainer computes its own, as "
                "TRL's SFTTrainer does. Use transformers.Trainer for this stage."
            )
        shares = token_shares(inputs["labels"], inputs.get("num_items_in_batch"))
        has_images = holds_images(inputs)
        total = self.weights.get(GENERATION, 1.0) * loss
        self.sums.add("share", shares.sum())
        self.sums.add(f"loss/{GENERATION}", loss.detach())
        for name, objective in self.carried.items():
            step = StepValues(output, self.carried.taken, inputs, has_images, base, self.head)
            values = objective(step).float()
            part = (shares * values).sum() * (1.0 if has_images or not objective.needs_images else 0.0)
            self.sums.add(f"loss/{name}", part.detach())
            total = total + self.weights[name] * part
        return total


def token_shares(labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """Share of each row in the answer tokens of the optimizer step; of the batch where that is unknown."""
    tokens = (labels[:, 1:] != -100).sum(dim=1)
    return tokens / (tokens.sum() if num_items_in_batch is None else num_items_in_batch)


def holds_images(inputs: dict) -> bool:
    """Whether a batch has images, as pixels or as cached features."""
    views = inputs.get("pixel_values")
    views = inputs.get("vision_features") if views is None else views
    return views is not None and views.shape[0] > 0

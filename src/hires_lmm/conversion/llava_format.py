"""One family of released checkpoints built on the LLaVA code, described: what `convert` and the way back read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .keys import Rule
from .llava_options import ReleasedOptions
from .prompts import released_template


@dataclass(frozen=True)
class LlavaFormat:
    """One format.

    Args:
        name (`str`): Its name on the command line.
        title (`str`): The name of its models.
        origin (`str`): Repository, commit and file that the keys come from.
        model_types (`tuple[str, ...]`): What its `config.json` may name as `model_type`, the usual one first.
        architecture (`str`): Class that its `config.json` names.
        options (`ReleasedOptions`): Its multimodal options.
        settings (`Callable`): From options and the language model's configuration to fields of `HiResLmmConfig`.
        rules (`Callable`): From options to the key table.
        way_back (`Callable`): From a configuration of ours to options.
        preset (`str`, *optional*): The preset that `settings` change.
        template (`Callable`): From the tokenizer to the chat template that the models were trained with.
        stage_files (`tuple[str, ...]`): Files of a stage of training, which hold what it trained.
        positions (`dict[str, bool]`): Ends of keys of queries whose table of positions (`pos_embed`) partial files may
            leave out, and whether the table is rounded to float16.
        planner (`dict`): What options of the planner that are not given mean, for the way back.
        marker (`str`): Option without which a configuration is of another family.
    """

    name: str
    title: str
    origin: str
    model_types: tuple[str, ...]
    architecture: str
    options: ReleasedOptions
    settings: Callable[[dict, Any], dict]
    rules: Callable[[dict], list[Rule]]
    way_back: Callable[[Any], dict]
    preset: str | None = None
    template: Callable[[Any], str] = released_template
    stage_files: tuple[str, ...] = ("mm_projector.bin",)
    positions: dict[str, bool] = field(default_factory=dict)
    planner: dict = field(default_factory=dict)
    marker: str = "mm_vision_tower"

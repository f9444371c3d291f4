"""What the multimodal options of a released `config.json` of the LLaVA code mean; nothing is guessed."""

from dataclasses import dataclass, field, replace
from typing import Any

from .errors import ConversionError


COMMON: dict[str, Any] = {
    "mm_projector_type": "linear",
    "mm_patch_merge_type": "flat",
    "mm_vision_select_layer": -1,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "use_mm_proj": True,
    "image_aspect_ratio": "square",
}
"""What the LLaVA code takes for an option that the configuration leaves out."""

FIXED: dict[str, tuple[Any, str]] = {
    "mm_vision_select_feature": ("patch", "views are grids of patches here, without the class token"),
    "mm_use_im_start_end": (False, "no published model was trained with tokens around the image"),
    "use_mm_proj": (True, "a model without an adapter sees no images"),
}
"""Options of which the parts here can express one value, and why."""

ELSEWHERE = {
    "mm_vision_tower": "names the vision tower",
    "mm_hidden_size": "compared with the width of the vision tower",
}
"""Options that the converter reads in other places."""

IRRELEVANT = {
    "image_grid_pinpoints": "written, but not read by the released slicing rule",
    "freeze_mm_mlp_adapter": "training only",
    "tune_mm_mlp_adapter": "training only",
    "unfreeze_mm_vision_tower": "training only",
    "mm_projector_lr": "training only",
    "mm_use_im_patch_token": "only adds a token to the tokenizer that no prompt contains",
    "tokenizer_model_max_length": "the released code cuts longer sequences silently; here they are an error or run",
    "tokenizer_padding_side": "the processor pads on the left",
}
"""Options without influence on what a converted model computes, with the reason."""


@dataclass(frozen=True)
class ReleasedOptions:
    """The options of one family of released checkpoints.

    Args:
        defaults (`dict`): Options that are read, and what the released code takes for an absent one.
        fixed (`dict`): Options of which the parts here can express one value, and why.
        irrelevant (`dict`): Options without influence on what a converted model computes, and why.
        kinds (`dict`): Types of options where they are not that of the default.
        choices (`dict`): Options of which the parts here can express some values, and why no other.
    """

    defaults: dict[str, Any]
    fixed: dict[str, tuple[Any, str]] = field(default_factory=dict)
    irrelevant: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, tuple[type, ...]] = field(default_factory=dict)
    choices: dict[str, tuple[tuple, str]] = field(default_factory=dict)

    def only(self, name: str, value: Any, reason: str) -> "ReleasedOptions":
        """The same options, of which one has a single value with a counterpart."""
        return replace(self, fixed={**self.fixed, name: (value, reason)})

    def read(self, config: dict) -> dict:
        """The options of a configuration, defaults filled in.

        Raises:
            ConversionError: If one is unknown, of another type, or has no counterpart here.
        """
        known = {*self.defaults, *ELSEWHERE, *IRRELEVANT, *self.irrelevant}
        unknown = sorted(key for key in config if key.startswith("mm_") and key not in known)
        if unknown:
            raise ConversionError(
                f"The released configuration has the unknown option {unknown[0]!r} (value {config[unknown[0]]!r}); "
                "the converter does not guess what it means."
            )
        options = {key: config.get(key, default) for key, default in self.defaults.items()}
        for name, value in options.items():
            kinds = self.kinds.get(name, (type(self.defaults[name]),))
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise refuse(name, value, f"a value such as {self.defaults[name]!r} is expected")
        for name, (value, reason) in {**FIXED, **self.fixed}.items():
            if options.get(name, value) != value:
                raise refuse(name, options[name], reason)
        for name, (values, reason) in self.choices.items():
            if options[name] not in values:
                raise refuse(name, options[name], reason)
        return options

    def notes(self, config: dict) -> dict[str, str]:
        """How each option was taken, for the report: `read`, `absent; …` or why it does not matter."""
        absent = {key: f"absent; taken as {value!r}" for key, value in self.defaults.items()}
        notes = {key: "read" if key in config else text for key, text in absent.items()}
        others = {**ELSEWHERE, **IRRELEVANT, **self.irrelevant}
        return {**notes, **{key: text for key, text in others.items() if key in config}}


def refuse(option: str, value: Any, reason: str) -> ConversionError:
    """The error for a value that has no counterpart here."""
    return ConversionError(f"{option}={value!r} of the released configuration cannot be converted: {reason}.")

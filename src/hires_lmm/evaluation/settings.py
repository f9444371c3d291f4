"""What a sweep varies: one setting is one way of asking all questions."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any


VIEWS = ("all", "global", "crops", "none")
FORMATS = ("plain", "word", "letter")


@dataclass(frozen=True)
class SweepSetting:
    """One way of asking. `None` leaves a choice to the checkpoint.

    Args:
        tokens (`int`, *optional*): Budget: visual tokens kept of one image, the processor's `max_image_tokens`.
        gamma (`float`, *optional*): Softmax mass that the router's threshold rule keeps, in (0, 1].
        max_crops (`int`, *optional*): Most crops of one image.
        image_size (`int`, *optional*): Longest side that images are resized to before they are cut, pixels.
        views (`str`): `"all"`, `"global"` or `"crops"`, the image processor's own option and the one training stages
            use; `"none"`: the prompt holds no image.
        format (`str`): `"plain"`: the question as it stands; `"word"`, `"letter"`: with the response formats of the
            SliME paper, see `prompts`.

    Raises:
        ValueError: If a value is out of range, or two values exclude each other.
    """

    tokens: int | None = None
    gamma: float | None = None
    max_crops: int | None = None
    image_size: int | None = None
    views: str = "all"
    format: str = "plain"

    def __post_init__(self) -> None:
        for name in ("tokens", "max_crops", "image_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be an integer of at least 1, or None.")
        if self.gamma is not None and not 0 < self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma!r} must lie in (0, 1].")
        for name, known in (("views", VIEWS), ("format", FORMATS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(known)}.")
        if self.tokens is not None and self.gamma is not None:
            raise ValueError(
                f"tokens={self.tokens} and gamma={self.gamma} exclude each other: under a budget the router keeps an "
                "exact number and reads no gamma. Sweep them one after the other."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    def changes(self) -> dict[str, Any]:
        """The fields that differ from the default setting."""
        return {name: value for name, value in asdict(self).items() if value != getattr(SweepSetting, name)}

    @property
    def label(self) -> str:
        """A short name: what differs from the default setting."""
        return ", ".join(f"{name}={value}" for name, value in self.changes().items()) or "default"


AXES = tuple(entry.name for entry in fields(SweepSetting))


def expand_grid(**axes: Sequence[Any]) -> list[SweepSetting]:
    """All combinations of values.

    Args:
        axes: Field of `SweepSetting` -> its values; a field that is left out keeps its default.

    Returns:
        The settings without repetition, the last axis running fastest. Without an image no other option but the format
        means anything, so `views="none"` appears once a format, at the end.

    Raises:
        ValueError: If a field is unknown or has no values, or a combination is not allowed.
    """
    unknown = [name for name in axes if name not in AXES]
    if unknown:
        raise ValueError(f"A sweep has no axis {unknown[0]!r}; its axes are {', '.join(AXES)}.")
    empty = [name for name, values in axes.items() if not values]
    if empty:
        raise ValueError(f"The axis {empty[0]!r} has no values; leave it out or give one.")
    settings = [SweepSetting(**dict(zip(axes, values, strict=True))) for values in product(*axes.values())]
    settings = [SweepSetting(views="none", format=each.format) if each.views == "none" else each for each in settings]
    return sorted(dict.fromkeys(settings), key=lambda each: each.views == "none")


def swept_axes(settings: Sequence[SweepSetting]) -> list[str]:
    """The axes along which settings differ, in the order of `AXES`; those without an image count for `views` alone."""
    shown = [each for each in settings if each.views != "none"]
    varied = {name for name in AXES if len({getattr(each, name) for each in shown}) > 1}
    varied |= {"views"} if len({each.views for each in settings}) > 1 else set()
    return [name for name in AXES if name in varied]

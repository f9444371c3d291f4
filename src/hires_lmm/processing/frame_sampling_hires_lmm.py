"""Which frames of a video are taken. Counting from sizes reads this as well, without torch."""

from collections.abc import Callable
from dataclasses import dataclass

from .geometry_hires_lmm import spread_evenly


def sample_uniform(total: int, number: int) -> list[int]:
    """Steps of (total - 1) / number from half a step on.

    Source: PLLaVA's scripts for captions and questions (magic-research/PLLaVA at 6f49fd2).
    """
    step = (total - 1) / number
    return [int(step / 2) + round(step * place) for place in range(number)]


def sample_segments(total: int, number: int, first: int = 0, last: int | None = None) -> list[int]:
    """The middle of each of so many segments between two frames, by default of all.

    Source: the reader of MVBench in magic-research/PLLaVA at 6f49fd2.
    """
    step = ((total - 1 if last is None else min(last, total - 1)) - first) / number
    return [int(first + step / 2 + round(step * place)) for place in range(number)]


FRAME_SAMPLERS: dict[str, Callable[[int, int], list[int]]] = {
    "uniform": sample_uniform,
    "segments": sample_segments,
    "linspace": spread_evenly,  # as TS-LLaVA
}


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are taken: `num_frames` by the rule `sampler`, or as many as `fps` asks for."""

    num_frames: int | None = None
    fps: float | None = None
    sampler: str = "uniform"

    def __post_init__(self) -> None:
        for name, value, kinds in (("num_frames", self.num_frames, int), ("fps", self.fps, (int, float))):
            if value is not None and (isinstance(value, bool) or not isinstance(value, kinds) or not value > 0):
                raise ValueError(f"{name}={value!r} must be a number above 0, or None.")
        if self.num_frames is not None and self.fps is not None:
            raise ValueError(f"num_frames={self.num_frames} and fps={self.fps} exclude each other; pass one of them.")
        if self.sampler not in FRAME_SAMPLERS:
            raise ValueError(f"frame_sampling={self.sampler!r} is unknown; choose one of {', '.join(FRAME_SAMPLERS)}.")

    def count(self, total: int, rate: float | None = None) -> int:
        """How many frames are taken of a video of `total` frames, at `rate` frames a second."""
        if self.fps is not None and not rate:
            raise ValueError(
                f"fps={self.fps} needs the rate of the video itself, which only a file tells; pass num_frames."
            )
        number = max(1, int(total / rate * self.fps)) if self.fps is not None and rate else self.num_frames
        return total if number is None else min(number, total)

    def choose(self, total: int, rate: float | None = None) -> list[int]:
        """The frames that are taken, in order; all where there are no more than wanted."""
        number = self.count(total, rate)
        return list(range(total)) if number == total else FRAME_SAMPLERS[self.sampler](total, number)

"""Accuracies with intervals: Wilson's, and a bootstrap over scenes where questions share one."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..extras import import_extra


stats = import_extra("scipy.stats", "evaluation")
RESAMPLES = 2000
Interval = tuple[float, float]


@dataclass(frozen=True)
class Score:
    """How many of some questions were answered right, with 95 % intervals.

    `wilson` holds if questions were independent, `bootstrap` resamples scenes (None where no two questions share one);
    `chance` is what guessing gets, `constant` what the best constant answer to each kind gets.
    """

    questions: int
    right: int
    accuracy: float
    wilson: Interval
    bootstrap: Interval | None
    chance: float | None = None
    constant: float | None = None

    @property
    def interval(self) -> Interval:
        """The interval to show: the lower and the higher end of both, since the bootstrap sees no doubt where all
        answers are right or all wrong, and Wilson's knows nothing of shared scenes."""
        ends = (*self.wilson, *(self.bootstrap or ()))
        return min(ends), max(ends)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def wilson_interval(right: int, questions: int) -> Interval:
    """Wilson's 95 % score interval of a share."""
    interval = stats.binomtest(right, questions).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def cluster_bootstrap(right: Sequence[bool], groups: Sequence[str], seed: int = 0) -> Interval | None:
    """95 % interval of a share over 2000 resamples of its groups; None where every group has one question."""
    names, members = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) == len(members):
        return None
    asked = np.bincount(members, minlength=len(names))
    correct = np.bincount(members, weights=np.asarray(right, dtype=np.float64), minlength=len(names))
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    low, high = np.percentile((draws @ correct) / (draws @ asked), [2.5, 97.5])
    return float(low), float(high)


def score(
    right: Sequence[bool],
    groups: Sequence[str],
    chances: Sequence[float | None] = (),
    constants: Sequence[float | None] = (),
    seed: int = 0,
) -> Score:
    """Counts, accuracy and intervals; `groups` are scenes, `chances` and `constants` what guessing gets."""
    total, count = sum(right), len(right)
    return Score(
        questions=count,
        right=total,
        accuracy=total / count,
        wilson=wilson_interval(total, count),
        bootstrap=cluster_bootstrap(right, groups, seed),
        chance=_mean(chances),
        constant=_mean(constants),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None

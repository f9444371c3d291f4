"""Pictures of laws and curves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import import_pyplot
from .divergence import BranchDivergence
from .law import ScalingFit


def plot_laws(fits: Mapping[str, ScalingFit], file: str | Path) -> Path:
    """Draw points and laws, by the name of their score, on logarithmic axes to a PNG, SVG or PDF."""
    figure, place = _figure()
    for name, fit in fits.items():
        dots = place.plot(fit.tokens, fit.scores, "o", markersize=5)
        low, high = fit.alpha_interval
        along = np.geomspace(min(fit.tokens), max(fit.tokens), 50)
        label = f"{name}: alpha = {fit.alpha:.3f} ({low:.3f} to {high:.3f})"
        place.plot(along, fit.predict(along), color=dots[0].get_color(), label=label)
    place.set_xscale("log")
    place.set_yscale("log")
    place.set_xlabel("visual tokens n")
    place.set_ylabel("score")
    for axis in (place.xaxis, place.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    return _save(figure, place, file)


def plot_divergence(curve: BranchDivergence, file: str | Path) -> Path:
    """Draw distance and bound on logarithmic axes, and the dependency beside them, to a PNG, SVG or PDF."""
    figure, place = _figure()
    place.plot(curve.lengths, curve.distance, label="distance")
    place.plot(curve.lengths, curve.bound, "--", label="bound")
    place.set_xscale("log")
    place.set_yscale("log")
    place.set_xlabel("length n")
    place.set_ylabel("distance between branches")
    other = place.twinx()
    other.plot(curve.lengths, curve.dependency, ":", color="grey")
    other.set_ylabel("dependency g(n), dotted")
    return _save(figure, place, file)


def _figure() -> tuple[Any, Any]:
    return import_pyplot().subplots(figsize=(6.4, 4.4), layout="constrained")


def _save(figure: Any, place: Any, file: str | Path) -> Path:
    place.grid(alpha=0.3, which="both")
    place.legend(fontsize=8)
    figure.savefig(file, dpi=150)
    import_pyplot().close(figure)
    return Path(file)

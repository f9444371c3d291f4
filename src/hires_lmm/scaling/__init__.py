"""The scaling of scores with visual tokens, and the divergence of branches that is said to stand behind it."""

from .divergence import BranchDivergence, branch_divergence, divergence_of_deltas
from .law import DistanceFit, ScalingFit, fit_distance_law, fit_scaling_law
from .plots import plot_divergence, plot_laws


__all__ = [
    "BranchDivergence",
    "DistanceFit",
    "ScalingFit",
    "branch_divergence",
    "divergence_of_deltas",
    "fit_distance_law",
    "fit_scaling_law",
    "plot_divergence",
    "plot_laws",
]

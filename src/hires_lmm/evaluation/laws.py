"""From a sweep over budgets to the scaling law of each group of questions."""

from dataclasses import replace

from rich.table import Table

from ..scaling import ScalingFit, fit_scaling_law
from .evaluator import SweepResult
from .settings import SweepSetting


LAW_GROUPS = ("all", "fine", "scene")
LEAST_POINTS = 3


def fit_budgets(result: SweepResult, method: str = "least_squares") -> dict[str, ScalingFit]:
    """Laws by name: of `all`, `fine` and `scene` questions in percent, for each combination of the other axes with
    three budgets or more; without groups that got nothing right under some budget."""
    families: dict[SweepSetting, list[SweepSetting]] = {}
    for setting in result.settings:
        if setting.tokens is not None:
            families.setdefault(replace(setting, tokens=None), []).append(setting)
    fits = {}
    for family, settings in families.items():
        tokens = [result.mean_tokens(setting) for setting in settings]
        if len(set(tokens)) < LEAST_POINTS:
            continue
        scores = [result.scores(setting) for setting in settings]
        for name in (group for group in LAW_GROUPS if group in scores[0]):
            percent = [100 * each[name].accuracy for each in scores]
            if all(percent):
                label = name if family == SweepSetting() else f"{name}, {family.label}"
                fits[label] = fit_scaling_law(tokens, percent, method)
    return fits


def build_law_table(fits: dict[str, ScalingFit]) -> Table:
    """The fits as a table."""
    table = Table(title="S(n) = (c / n)^alpha, S in percent", title_justify="left")
    for name in ("questions", "alpha", "95 % interval", "ln c", "R²", "points"):
        table.add_column(name, justify="left" if name == "questions" else "right", no_wrap=True)
    for name, fit in fits.items():
        low, high = fit.alpha_interval
        interval, quality = f"{low:.4f} to {high:.4f}", f"{fit.r_squared:.3f}"
        table.add_row(name, f"{fit.alpha:.4f}", interval, f"{fit.log_c:.2f}", quality, str(len(fit.tokens)))
    return table

"""The picture of a sweep: accuracy along the swept axis, with 95 % intervals."""

from pathlib import Path
from typing import Any

from ..extras import import_pyplot
from .evaluator import SweepResult
from .settings import SweepSetting, swept_axes


NUMBER_AXES = ("tokens", "gamma", "max_crops", "image_size")
AXIS_TITLES = {
    "tokens": "kept tokens, mean",
    "gamma": "gamma, the softmax mass that the router keeps",
    "max_crops": "most crops",
    "image_size": "longest side of the image, pixels",
    "views": "views",
    "format": "response format",
}
GROUPS = ("fine", "fine_whole", "fine_cut", "scene")


def plot_sweep(result: SweepResult, file: str | Path) -> Path:
    """Draw a sweep to a PNG, SVG or PDF.

    One panel for each combination of the axes that are not drawn along x, one line a group of questions (the kinds,
    where questions belong to no group); dotted lines show answers without the image.
    """
    pyplot = import_pyplot()
    axis = _main_axis(result)
    blind = {setting.format: setting for setting in result.settings if setting.views == "none" and axis != "views"}
    panels = _panels([setting for setting in result.settings if setting not in blind.values()], axis)
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 4.0 * rows), squeeze=False, sharey=True)
    for place, (title, settings) in zip(axes.flat, panels.items(), strict=False):
        _draw_panel(place, result, axis, settings, blind.get(settings[0].format))
        place.set_title(title, fontsize=9)
    for place in list(axes.flat)[len(panels) :]:
        place.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return Path(file)


def _main_axis(result: SweepResult) -> str:
    """The swept axis with most values; numbers before names."""
    swept = swept_axes(result.settings) or ["views"]
    values = {name: len({getattr(setting, name) for setting in result.settings}) for name in swept}
    return max(swept, key=lambda name: (name in NUMBER_AXES, values[name]))


def _panels(chosen: list[SweepSetting], axis: str) -> dict[str, list[SweepSetting]]:
    """Settings by everything but the main axis."""
    panels: dict[str, list[SweepSetting]] = {}
    for setting in chosen:
        rest = {name: value for name, value in setting.changes().items() if name != axis}
        title = ", ".join(f"{name}={value}" for name, value in rest.items())
        panels.setdefault(title, []).append(setting)
    return panels


def _draw_panel(
    place: Any, result: SweepResult, axis: str, settings: list[SweepSetting], blind: SweepSetting | None
) -> None:
    xs, ticks = _positions(result, axis, settings)
    order = sorted(range(len(xs)), key=lambda index: xs[index])
    scores = [result.scores(settings[index]) for index in order]
    floor = {} if blind is None else result.scores(blind)
    names = [name for name in GROUPS if name in scores[0]] or list(scores[0])
    for name in names:
        values = [score[name] for score in scores]
        below = [100 * max(0.0, value.accuracy - value.interval[0]) for value in values]
        above = [100 * max(0.0, value.interval[1] - value.accuracy) for value in values]
        heights = [100 * value.accuracy for value in values]
        places = [xs[index] for index in order]
        line = place.errorbar(places, heights, (below, above), label=name, marker="o", markersize=4, capsize=3)
        if name in floor:
            place.axhline(100 * floor[name].accuracy, linestyle=":", color=line[0].get_color())
    if axis == "tokens":
        place.set_xscale("log")
        place.minorticks_off()
    place.set_xticks(xs, ticks)
    place.set_xlabel(AXIS_TITLES[axis])
    place.set_ylabel("right answers, % (95 % interval)")
    place.set_ylim(-2, 102)
    place.grid(alpha=0.3)


def _positions(result: SweepResult, axis: str, settings: list[SweepSetting]) -> tuple[list[float], list[str]]:
    """Where settings lie along x, and what is written there."""
    if axis == "tokens":
        means = [result.mean_tokens(setting) for setting in settings]
        return means, [f"{mean:.0f}" for mean in means]
    values = [getattr(setting, axis) for setting in settings]
    if axis in NUMBER_AXES and None not in values:
        return [float(value) for value in values], [f"{value:g}" for value in values]
    names = ["default" if value is None else str(value) for value in values]
    return [float(index) for index in range(len(values))], names

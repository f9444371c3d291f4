"""Tables and plots of docs/evidence.md from the JSON results of benchmarks/needle_evidence.py."""

import json
import re
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from hires_lmm.evaluation.statistics import wilson_interval
from hires_lmm.extras import import_pyplot


GROUPS = ("fine", "fine_whole", "fine_cut", "scene", "all")
NAMES = {
    "fine": "fine questions",
    "fine_whole": "… whole objects",
    "fine_cut": "… objects cut by a crop border",
    "scene": "scene questions",
    "all": "all questions",
}
TRAINED_WITH = ("seeds", "scenes with captions", "scenes with questions", "processor minutes a run")
NOT_RUN = "*not run yet*"


def read_results(folder: Path, split: str) -> dict[str, list[dict[str, Any]]]:
    """Results of a split by run.

    Args:
        folder (`Path`): Holds one JSON a run and seed.
        split (`str`): `validation` or `test`.

    Returns:
        Run -> results, by seed.

    Raises:
        ValueError: If runs had different budgets or scenes.
    """
    results: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob(f"*-{split}.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        results.setdefault(result["name"], []).append(result)
    kinds = {(result["share"], result["scenes"]) for runs in results.values() for result in runs}
    if len(kinds) > 1:
        raise ValueError(f"{folder} mixes budgets and scenes {sorted(kinds)}; compare runs of one --share only.")
    return results


def mean_and_half(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half of its 95 % t interval; None for one value.

    Args:
        values (sequence of `float`): One number a seed.
    """
    mean, count = sum(values) / len(values), len(values)
    if count < 2:
        return mean, None
    deviation = sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, float(student.ppf(0.975, count - 1)) * deviation / sqrt(count)


def cell(results: Sequence[dict[str, Any]], views: str, name: str) -> str:
    """An accuracy with its interval: t over seeds, Wilson over questions for one seed.

    Args:
        results (sequence of `dict`): Results of one run.
        views (`str`): Views of scoring.
        name (`str`): Group or kind.
    """
    scores = [result["scores"][views][name] for result in results if name in result["scores"].get(views, {})]
    if not scores:
        return ""
    mean, half = mean_and_half([score["accuracy"] for score in scores])
    if half is None:
        low, high = wilson_interval(scores[0]["right"], scores[0]["questions"])
        return f"{100 * mean:.1f} ({100 * low:.1f}–{100 * high:.1f})"
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


def run_table(results: dict[str, list[dict[str, Any]]], runs: Sequence[str]) -> str:
    """One row a run, scored on the views it was trained on, with what it was trained with.

    Args:
        results (`dict`): From `read_results`.
        runs (sequence of `str`): Rows; those without results are left out.
    """
    found = [results[name] for name in runs if name in results]
    if not found:
        return NOT_RUN
    lines = []
    for seeds in found:
        first = seeds[0]
        visits = [stage["visits"] for stage in first["stages"]]
        seconds = [sum(stage["processor"] for stage in result["stages"]) for result in seeds]
        scores = [cell(seeds, first["run"]["views"] or "all", group) for group in GROUPS]
        counts = [len(seeds), sum(visits[:-1]), visits[-1], round(sum(seconds) / len(seconds) / 60)]
        lines.append([first["run"]["text"], *scores, *map(str, counts)])
    head = f"% of {found[0][0]['scenes']} {found[0][0]['split']} scenes"
    return markdown([head, *(NAMES[group] for group in GROUPS), *TRAINED_WITH], lines)


def views_table(results: dict[str, list[dict[str, Any]]], run: str) -> str:
    """A run with views switched off at test time, one row a choice of views.

    Args:
        results (`dict`): From `read_results`.
        run (`str`): Name of the run.
    """
    if run not in results:
        return NOT_RUN
    views = list(results[run][0]["scores"])
    lines = [[f"`{view}`", *(cell(results[run], view, group) for group in GROUPS)] for view in views]
    return markdown(["views, %", *(NAMES[group] for group in GROUPS)], lines)


def read_sweeps(folder: Path, split: str) -> dict[str, list[dict[str, Any]]]:
    """Settings of the sweeps of the shipped checkpoint by name of the sweep and placement.

    Args:
        folder (`Path`): Holds `sweeps/`.
        split (`str`): `validation` or `test`.
    """
    files = sorted((folder / "sweeps").glob(f"*-{split}.json"))
    return {
        file.stem.removesuffix(f"-{split}"): json.loads(file.read_text(encoding="utf-8"))["settings"] for file in files
    }


def sweep_table(sweeps: dict[str, list[dict[str, Any]]], name: str, axis: str) -> str:
    """One row a setting of a sweep.

    Args:
        sweeps (`dict`): From `read_sweeps`.
        name (`str`): Sweep and placement, such as `"gamma-free"`.
        axis (`str`): What was swept.
    """
    if name not in sweeps:
        return NOT_RUN
    lines = []
    for entry in sweeps[name]:
        value, scores = entry["setting"][axis], entry["scores"]
        groups = [group for group in GROUPS if group in scores]
        lines.append(
            [
                "default" if value is None else f"`{value}`",
                f"{entry['tokens']:.0f}",
                *(swept(scores[g]) for g in groups),
            ]
        )
    groups = [group for group in GROUPS if group in sweeps[name][0]["scores"]]
    return markdown([axis, "kept tokens", *(NAMES[group] for group in groups)], lines)


def swept(score: dict[str, Any]) -> str:
    """An accuracy of a sweep with the outer ends of its intervals."""
    ends = [*score["wilson"], *(score["bootstrap"] or ())]
    return f"{100 * score['accuracy']:.1f} ({100 * min(ends):.1f}–{100 * max(ends):.1f})"


def kinds_table(sweeps: dict[str, list[dict[str, Any]]]) -> str:
    """The shipped checkpoint by kind: free and aligned placement, and views switched off.

    Args:
        sweeps (`dict`): From `read_sweeps`.
    """
    if "views-free" not in sweeps:
        return NOT_RUN
    columns = {f"free, `{e['setting']['views']}`": e["scores"] for e in sweeps["views-free"]}
    if "views-aligned" in sweeps:
        columns["aligned, `all`"] = sweeps["views-aligned"][0]["scores"]
    first = next(iter(columns.values()))
    names = [*(name for name in GROUPS if name in first), *(name for name in first if name not in GROUPS)]
    lines = [
        [
            NAMES.get(name, f"`{name}`"),
            percent(first[name]["chance"]),
            *(swept(s[name]) if name in s else "" for s in columns.values()),
        ]
        for name in names
    ]
    return markdown(["%", "chance", *columns], lines)


def percent(share: float | None) -> str:
    """A share in percent."""
    return "" if share is None else f"{100 * share:.1f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(head) - 1), *lines[1:]])


def plot_runs(results: dict[str, list[dict[str, Any]]], runs: Sequence[str], file: Path) -> None:
    """Fine and scene accuracy of runs: one dot a seed, bars for means.

    Args:
        results (`dict`): From `read_results`.
        runs (sequence of `str`): Bars.
        file (`Path`): PNG.
    """
    found = [name for name in runs if name in results]
    if not found:
        return
    pyplot = import_pyplot()
    figure, axis = pyplot.subplots(figsize=(1.6 + 1.2 * len(found), 3.4), layout="constrained")
    for offset, group in ((-0.2, "fine"), (0.2, "scene")):
        heights = []
        for place, name in enumerate(found):
            views = results[name][0]["run"]["views"] or "all"
            values = [100 * result["scores"][views][group]["accuracy"] for result in results[name]]
            heights.append(sum(values) / len(values))
            axis.plot([place + offset] * len(values), values, "k.", markersize=5, zorder=3)
        axis.bar([place + offset for place in range(len(found))], heights, 0.38, label=NAMES[group], alpha=0.7)
    axis.set_xticks(range(len(found)), [name.replace("_", " ") for name in found], rotation=20)
    axis.set(ylabel="right, %", ylim=(0, 100))
    axis.legend(fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def plot_sweep(sweeps: dict[str, list[dict[str, Any]]], names: Sequence[str], file: Path) -> None:
    """Accuracy over the kept tokens.

    Args:
        sweeps (`dict`): From `read_sweeps`.
        names (sequence of `str`): Sweeps to draw, one panel each.
        file (`Path`): PNG.
    """
    found = [name for name in names if name in sweeps]
    if not found:
        return
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(
        1, len(found), figsize=(4.2 * len(found), 3.4), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, name in zip(axes[0], found, strict=True):
        entries = sorted(sweeps[name], key=lambda entry: entry["tokens"])
        for group in ("fine", "scene"):
            scores = [entry["scores"][group] for entry in entries]
            middle = [100 * score["accuracy"] for score in scores]
            below = [value - 100 * score["wilson"][0] for value, score in zip(middle, scores, strict=True)]
            above = [100 * score["wilson"][1] - value for value, score in zip(middle, scores, strict=True)]
            tokens = [entry["tokens"] for entry in entries]
            axis.errorbar(tokens, middle, (below, above), marker="o", markersize=4, capsize=3, label=NAMES[group])
        axis.set(xlabel="kept tokens, mean", title=name.split("-")[0].replace("_", " "), ylim=(0, 100))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("right, %")
    axes[0][0].legend(fontsize=8)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def write_evidence(folder: Path, docs: Path, split: str) -> None:
    """Fill docs/evidence.md and draw its plots.

    Args:
        folder (`Path`): benchmarks/results/needle.
        docs (`Path`): The docs folder.
        split (`str`): Of the sweeps, `validation` or `test`. Runs are shown on test scenes where they have been scored
            on them, else on validation scenes.

    Raises:
        ValueError: If the page lacks a marker.
    """
    results = read_results(folder, "test") or read_results(folder, "validation")
    sweeps = read_sweeps(folder, split)
    plans, views = ("alternating", "end_to_end"), ("global", "crops", "alternating")
    single = ("alternating", "queries_9", "queries_16", "queries_25", "query_former")
    routers = ("router_off", "router_noise", "router_quiet")
    tables = {
        "shipped": kinds_table(sweeps),
        "runs": run_table(results, (*plans, *views[:2], *single[1:], *routers, "twin")),
        "views off": views_table(results, "alternating"),
        "gamma": sweep_table(sweeps, "gamma-free", "gamma"),
        "tokens": sweep_table(sweeps, "tokens-free", "tokens"),
        "image size": sweep_table(sweeps, "image_size-free", "image_size"),
    }
    page = docs / "evidence.md"
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        text = put(text, name, table)
    page.write_text(text, encoding="utf-8")
    plot_runs(results, (*plans, *views[:2], *single[1:], *routers), docs / "images" / "needle_runs.png")
    plot_sweep(sweeps, ("gamma-free", "tokens-free", "image_size-free"), docs / "images" / "needle_sweeps.png")


def put(text: str, name: str, table: str, script: str = "needle_evidence.py") -> str:
    """A text with the table between `<!-- name: ... -->` and `<!-- end of name -->`.

    Args:
        text (`str`): Of a page.
        name (`str`): Name in the markers.
        table (`str`): The table.
        script (`str`): The benchmark that writes it.

    Raises:
        ValueError: If the markers are missing.
    """
    start, end = f"<!-- {name}: benchmarks/{script} report -->", f"<!-- end of {name} -->"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"The page has no lines {start} and {end}.")
    return pattern.sub(lambda _: f"{start}\n{table}\n{end}", text)

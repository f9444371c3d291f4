"""How far a prefill of a large image can be lowered inside the language model, at which accuracy.

    python benchmarks/frontier.py            counted without computing; about a minute

Accuracy is that of needle-slime with tokens that leave behind its layers (`needle_exits.py`, test scenes), in parts of
its own without any; operations are counted at true sizes (CLIP ViT-L/14-336, Llama-3-8B) for an image of 2048 x 2048
with four crops of `slime`, where the same shares of the visual tokens leave at the same shares of the depth, and given
in parts of llava_next's prefill of the same image. What the ops themselves need is not in it. The best row is the
cheapest that keeps 97 % of the accuracy on all questions and on fine ones.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from measure import print_table, report_path, say
from needle_exits import operations
from prefill import build_cases, picture
from record import RESULTS, write_result
from shapes import SHAPES, TEXT_LENGTH


EXITS = Path(__file__).parent / "results" / "needle" / "exits.json"
SIDE, KEPT_ACCURACY = 2048, 0.97
MODELS = ("llava_next", "slime, 4 crops")
GROUPS = ("all", "fine")
COLUMNS = {
    "method": "method",
    "ratio": "operations, of llava_next",
    "of_unpruned": "of its own, unpruned",
    "accuracy_all": "accuracy, of unpruned",
    "accuracy_fine": "fine questions",
    "is_best": "best",
}


def stretch(visual: list[float], depth: int, tokens: int) -> list[float]:
    """Visual tokens that enter each of so many layers, where some were measured in fewer with fewer."""
    return [visual[layer * len(visual) // depth] / visual[0] * tokens for layer in range(depth)]


def count(models: tuple[str, ...], shapes: str, side: int) -> dict[str, dict[str, Any]]:
    """Operations of a prefill and of its language model, and visual tokens, by model.

    Args:
        models (`tuple[str]`): Names in `cases.OURS`.
        shapes (`str`): Key of `SHAPES`.
        side (`int`): Pixels of a side of the image.
    """
    config, found = SHAPES[shapes].llama(), {}
    for case in build_cases("meta", shapes, list(models)):
        taken = case.take([picture(side, side)])
        tokens = sum(taken.tokens)
        layers = operations(config, [tokens] * config.num_hidden_layers, TEXT_LENGTH)
        found[case.name] = {"total": taken.survey().operations, "layers": layers, "tokens": tokens}
        say(f"{case.name} counted")
    return found


def frontier(measured: list[dict[str, Any]], counted: dict[str, dict[str, Any]], shapes: str) -> list[dict[str, Any]]:
    """One row a method: counted operations and accuracy, both in parts.

    Args:
        measured (`list[dict]`): Rows of `needle_exits.py`.
        counted (`dict`): What `count` gave, llava_next first.
        shapes (`str`): Key of `SHAPES`.
    """
    config = SHAPES[shapes].llama()
    base, ours = (counted[name] for name in MODELS)
    full = {group: measured[0]["scores"][group]["accuracy"] for group in GROUPS}
    rows: list[dict[str, Any]] = []
    for row in measured:
        if "scores" not in row or row["method"].startswith("yopo"):
            continue
        visual = stretch(row["visual"], config.num_hidden_layers, ours["tokens"])
        total = ours["total"] - ours["layers"] + operations(config, visual, TEXT_LENGTH)
        kept = {f"accuracy_{group}": row["scores"][group]["accuracy"] / full[group] for group in GROUPS}
        ratios = {"ratio": total / base["total"], "of_unpruned": total / ours["total"]}
        rows.append({"method": row["method"], "bias": row.get("bias"), **ratios, **kept, "is_best": False})
    good = [row for row in rows if min(row[f"accuracy_{group}"] for group in GROUPS) >= KEPT_ACCURACY]
    min(good, key=lambda row: row["ratio"])["is_best"] = True
    return sorted(rows, key=lambda row: row["ratio"])


def draw(rows: list[dict[str, Any]]) -> None:
    """The curve of each family of methods."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axis, group in zip(figure.subplots(1, len(GROUPS), sharey=True), GROUPS, strict=True):
        for family in ("keep_after 0", "keep_after 1", "keep_after 2", "exit", "dyvte 0", "dyvte 1", "atp"):
            own = [row for row in rows if row["method"].startswith(family)]
            points = [[100 * row[key] for row in own] for key in ("ratio", f"accuracy_{group}")]
            axis.plot(*points, marker="o", markersize=3, label=family)
        axis.axhline(100 * KEPT_ACCURACY, color="k", linewidth=0.5)
        axis.set(xlabel="operations, % of llava_next's prefill", title=f"{group} questions")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("right, % of unpruned")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(RESULTS / "frontier.png", dpi=130)


def main() -> None:
    """Count, join, print, write JSON and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=tuple(SHAPES), default="cuda")
    parser.add_argument("--side", type=int, default=SIDE, help="pixels of the square image")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    counted = count(MODELS, arguments.shapes, arguments.side)
    rows = frontier(json.loads(EXITS.read_text())["rows"], counted, arguments.shapes)
    shown = [row for row in rows if row["bias"] is None]
    print_table(shown, COLUMNS, f"prefill of {arguments.side} x {arguments.side} with four crops, {arguments.shapes}")
    report_path(write_result("frontier", rows, [0]))
    draw(rows)


if __name__ == "__main__":
    main()

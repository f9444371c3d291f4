"""Which tokens to keep: accuracy on the needle task against the budget, by what selects them.

    python benchmarks/needle_selectors.py train      the model: minutes of one core
    python benchmarks/needle_selectors.py score      every selector, share and seed that is not scored, on test scenes
    python benchmarks/needle_selectors.py report     JSON, picture and the table of docs/fewer-tokens.md

The model joins the committed halves by a perceptron; crops pass `conv_merge` first, so an image has 64 tokens of the
global view and 16 of each of its 36 crops, each with a place. It is trained with all tokens, captions first, then
questions. Selectors are put on afterwards; nothing is tuned. `random` and `uniform` are token ops of this file. Each
selects among all tokens, and among those of the crops alone (`crops`), with the global view kept whole. An interrupted
command goes on when it is started again.
"""

import argparse
import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from needle_report import markdown, put
from record import RESULTS, surroundings
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as library_logging

from hires_lmm.evaluation.statistics import score
from hires_lmm.extras import import_pyplot
from hires_lmm.files import write_text
from hires_lmm.modeling.bases_hires_lmm import HiResLmmTokenOp, Traits
from hires_lmm.modeling.parts_hires_lmm import TOKEN_OPS
from hires_lmm.training import get_plan
from needle.from_halves import CAPTION_NEAR, MIX
from needle.runs import (
    Rates,
    RunOptions,
    SceneSet,
    answer_scenes,
    join_halves,
    score_names,
    small_rates,
    train,
    with_token_ops,
)
from needle.runs.run import LOG, MODEL


ROOT = Path(__file__).parents[1]
FILE = RESULTS / "needle" / "selectors.json"
CONNECTOR: dict[str, Any] = {"view_ops": [{"part": "conv_merge", "on": "crops"}], "adapter": {"part": "mlp"}}
TOKENS = 64 + 36 * 16
SHARES = (0.75, 0.5, 0.25, 0.12)
VISITS, SCENES, CAPTION_VIEWS = (16_000, 3_200), 2_000, 8_000
QUESTIONS = 8
GROUPS = ("fine", "scene", "all")
WHERE = {"all": ["global", "crops"], "crops": "crops"}
logger = logging.getLogger("needle_selectors")


class Even(HiResLmmTokenOp):
    """Keeps as many tokens as the budget, without looking at them: evenly spaced in the sequence, or drawn."""

    is_random = False

    @dataclass
    class Options:
        """Where, as of the router; the seed of what is drawn."""

        on: Any = "crops"
        seed: int = 0

    @classmethod
    def describe(cls, options: Any, context: Any) -> Traits:
        """It takes the budget."""
        return Traits(context.grids, context.width, budget_on=options.on)

    def __init__(self, context: Any, options: Any):
        super().__init__(context, options)
        self.generator = torch.Generator().manual_seed(options.seed)

    def forward(self, tokens: Any, question: Any) -> tuple[Any, Any]:
        """Fill `kept`."""
        kept = torch.ones(len(tokens.features), dtype=torch.bool)
        for image, rows in enumerate(tokens.rows(self.options.on)):
            count = len(rows) + tokens.num_tokens[image] - tokens.lengths[image]
            chosen = ((torch.arange(count) + 0.5) * len(rows) / max(count, 1)).long()
            if self.is_random:
                chosen = torch.randperm(len(rows), generator=self.generator)[:count]
            kept[rows] = torch.isin(torch.arange(len(rows)), chosen)
        tokens.kept = kept.to(tokens.features.device)
        return tokens, question


class Drawn(Even):
    """The same, drawn."""

    is_random = True


TOKEN_OPS |= {"uniform": Even, "random": Drawn}


def selectors() -> dict[str, dict[str, Any]]:
    """Name -> token op: each among all tokens, and those with an option for it among those of crops."""
    found: dict[str, dict[str, Any]] = {"globalcom2": {"part": "globalcom2"}}
    for where, on in WHERE.items():
        ending = "" if where == "all" else " crops"
        for name in ("saliency", "cosine"):
            found[name + ending] = {"part": "router", "score": name, "on": on}
        for name in ("uniform", "random"):
            found[name + ending] = {"part": name, "on": on}
    return found


def train_model(options: argparse.Namespace) -> None:
    """Join, train, and score on validation scenes to see that it has learnt."""
    model, processor = join_halves(ROOT / "checkpoints" / "halves", connector_config=CONNECTOR)
    settings = RunOptions(
        cache=str(options.work / "cache"),
        visits=VISITS,
        scenes=SCENES,
        mix=MIX,
        near=CAPTION_NEAR,
        captions=True,
        caption_views=CAPTION_VIEWS,
        note="1 of 2 CPU cores",
        command="python benchmarks/needle_selectors.py train",
    )
    stages = small_rates(get_plan("end_to_end"), Rates(language=4e-4))
    model = train(model, processor, stages, options.work / "selectors", settings)
    answers = answer_scenes(model, processor, SceneSet("validation", options.scenes), options.work / "cache")
    for group in GROUPS:
        right = [answer.right for answer in answers if group in score_names(answer.question)]
        logger.info("validation, %s: %.3f of %d", group, sum(right) / len(right), len(right))


def score_model(options: argparse.Namespace) -> None:
    """Ask the same questions with every selector and share; one file each."""
    folder = options.work / "selectors"
    model = AutoModelForImageTextToText.from_pretrained(folder / MODEL)
    processor = AutoProcessor.from_pretrained(folder / MODEL)
    (folder / "answers").mkdir(exist_ok=True)
    ops = selectors()
    names = sorted(ops, key=lambda name: name.endswith("crops"))
    asked = [("none", 1.0, seed) for seed in options.seeds]
    asked += [(name, share, seed) for seed in options.seeds for name in names for share in SHARES]
    asked.sort(key=lambda case: case[0].endswith("crops"))  # those among all tokens come first
    for name, share, seed in asked:
        file = folder / "answers" / f"{options.split}-{seed}-{name.replace(' ', '_')}-{share:g}.json"
        if file.is_file():
            continue
        changed = with_token_ops(model, [ops[name]] if name in ops else [])
        processor.image_processor.token_layout = changed.config.token_layout()
        cache = None if name == "globalcom2" else options.work / "cache"
        budget = round(share * TOKENS) if name in ops else None
        scenes = SceneSet(options.split, options.scenes, seed)
        answers = answer_scenes(changed, processor, scenes, cache, questions=QUESTIONS, budget=budget)
        rows = [[f"{seed}/{scene}", score_names(question), right] for scene, question, right in answers]
        write_text(file, json.dumps({"selector": name, "share": share, "seed": seed, "answers": rows}))
        logger.info("%s: %.3f", file.stem, sum(row[2] for row in rows) / len(rows))


def summarise(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a selector and share, over all seeds.

    Args:
        files (`list[dict]`): What `score_model` wrote.

    Returns:
        Rows with `selector`, `share`, `tokens` and by group of questions the pooled score, see
        `hires_lmm.evaluation.statistics.score`, with the accuracy of each seed.
    """
    rows = []
    for name, share in dict.fromkeys((file["selector"], file["share"]) for file in files):
        own = sorted((f for f in files if (f["selector"], f["share"]) == (name, share)), key=lambda f: f["seed"])
        scores = {}
        for group in GROUPS:
            seeds = [[(scene, right) for scene, names, right in f["answers"] if group in names] for f in own]
            scenes, rights = zip(*(pair for seed in seeds for pair in seed), strict=True)
            each = [sum(right for _, right in seed) / len(seed) for seed in seeds]
            scores[group] = {**score(rights, scenes).to_dict(), "seeds": each}
        rows.append({"selector": name, "share": share, "tokens": round(share * TOKENS), "scores": scores})
    return rows


def report(options: argparse.Namespace) -> None:
    """Write the JSON, draw it, and fill the table of docs/fewer-tokens.md."""
    folder = options.work / "selectors"
    if list((folder / "answers").glob(f"{options.split}-*.json")):
        files = [json.loads(file.read_text()) for file in sorted((folder / "answers").glob(f"{options.split}-*.json"))]
        counts = Counter(file["selector"] for file in files)
        whole = {name for name, count in counts.items() if count == len(options.seeds) * len(SHARES)}
        files = [file for file in files if file["selector"] in {*whole, "none"}]
        log = json.loads((folder / LOG).read_text())
        training = {key: log[key] for key in ("command", "machine", "versions", "options", "seconds", "parameters")}
        facts = {"split": options.split, "scenes": options.scenes, "seeds": options.seeds, "questions": QUESTIONS}
        record = {**surroundings(), **facts, "training": training, "rows": summarise(files)}
        write_text(FILE, json.dumps(record, indent=1) + "\n")
    rows = json.loads(FILE.read_text())["rows"]
    page = ROOT / "docs" / "fewer-tokens.md"
    page.write_text(put(page.read_text(), "selectors", table(rows), "needle_selectors.py"))
    plot(rows, ROOT / "docs" / "images" / "needle_selectors.png")


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy by selector and share: fine and scene questions."""
    shares = sorted({row["share"] for row in rows if row["selector"] != "none"}, reverse=True)
    found = {(row["selector"], row["share"]): row["scores"] for row in rows}
    full = found["none", 1.0]
    head = ["selector", *(f"{group}, {100 * share:.0f} %" for group in GROUPS[:2] for share in shares)]
    lines = [["all tokens", *(shown(full[g]) if share == shares[0] else "" for g in GROUPS[:2] for share in shares)]]
    for name in dict.fromkeys(row["selector"] for row in rows if row["selector"] != "none"):
        lines.append([f"`{name}`", *(shown(found[name, share][group]) for group in GROUPS[:2] for share in shares)])
    return markdown(head, lines)


def shown(value: dict[str, Any]) -> str:
    """An accuracy in percent with the outer ends of both intervals."""
    ends = [*value["wilson"], *(value["bootstrap"] or ())]
    return f"{100 * value['accuracy']:.1f} ({100 * min(ends):.0f}–{100 * max(ends):.0f})"


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Accuracy over the share of tokens; dashed: among the tokens of crops alone."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(9.4, 3.8), sharey=True, layout="constrained")
    names = list(dict.fromkeys(row["selector"].removesuffix(" crops") for row in rows if row["selector"] != "none"))
    full = next(row for row in rows if row["selector"] == "none")
    for axis, group in zip(axes, GROUPS[:2], strict=True):
        for number, name in enumerate(names):
            for ending, style in (("", "-"), (" crops", "--")):
                own = sorted((r for r in rows if r["selector"] == name + ending), key=lambda r: r["share"])
                if not own:
                    continue
                scores = [row["scores"][group] for row in [*own, full]]
                middle = [100 * value["accuracy"] for value in scores]
                ends = [[*value["wilson"], *(value["bootstrap"] or ())] for value in scores]
                below = [mid - 100 * min(end) for mid, end in zip(middle, ends, strict=True)]
                above = [100 * max(end) - mid for mid, end in zip(middle, ends, strict=True)]
                places = [100 * row["share"] for row in [*own, full]]
                look = {"color": f"C{number}", "linestyle": style, "label": name + ending}
                axis.errorbar(places, middle, (below, above), marker="o", markersize=3, capsize=2, **look)
        axis.set(xlabel="tokens, % of 640", title=f"{group} questions", ylim=(0, 100))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right, %")
    axes[0].legend(fontsize=7)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "score", "report"))
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "needle")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--scenes", type=int, default=32, help="a seed")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    library_logging.disable_progress_bar()
    torch.set_num_threads(1)
    {"train": train_model, "score": score_model, "report": report}[options.action](options)


if __name__ == "__main__":
    main()

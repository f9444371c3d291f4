"""Tokens that leave inside the language model: trained exits against attention, thresholds and a fixed layer.

    python benchmarks/needle_exits.py train      gates of `dyvte`, two seeds, and thresholds of `atp`
    python benchmarks/needle_exits.py score      every method that is not scored, on test scenes
    python benchmarks/needle_exits.py report     JSON, picture and the table of docs/fewer-tokens.md

Training takes minutes of one core. The model is the shipped checkpoint with its router off: 208 visual tokens, four
layers. Its own weights stay as they are. The share that `keep_after` keeps behind a layer, to save what gates save,
is found on validation scenes (`score --split validation` first). Operations are those of a prompt in the layers of the
language model, without what the ops themselves need. An interrupted command goes on when it is started again.
"""

import argparse
import json
import logging
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from needle_report import markdown, put
from record import RESULTS, surroundings
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as library_logging

from hires_lmm import HiResLmmForConditionalGeneration
from hires_lmm.evaluation.statistics import score
from hires_lmm.extras import import_pyplot
from hires_lmm.files import write_text
from hires_lmm.training import Stage, get_plan
from hires_lmm.training.objectives import TokenBudget
from needle.runs import RunOptions, SceneSet, cache_scenes, encode_once, grade, score_names, small_rates, train
from needle.runs.collator import SceneCollator
from needle.runs.run import LOG, MODEL


ROOT = Path(__file__).parents[1]
FILE = RESULTS / "needle" / "exits.json"
LAYERS = [0, 1, 2]
"""Behind which something may leave; behind the last of the four nothing is saved."""

DYVTE, ATP = {"part": "dyvte", "layers": LAYERS}, {"part": "atp", "layers": [0, 1]}
VISITS, BATCH_SIZE, SCENES, TRAIN_QUESTIONS, QUESTIONS = 480, 4, 2_000, 4, 8
TARGET = 104
"""Tokens that `atp` should keep on average: half."""

SHARES = (0.75, 0.5, 0.25, 0.1, 0.0)
GROUPS = ("fine", "scene", "all")
BIASES = [step / 2 for step in range(-16, 17)]
logger = logging.getLogger("needle_exits")


def with_layer_op(checkpoint: Path, op: dict[str, Any], seed: int) -> tuple[Any, Any]:
    """The shipped checkpoint, router off, with a layer op whose weights are drawn; and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    config = deepcopy(model.config)
    connector: Any = config.connector_config
    connector.token_ops, connector.layer_ops = [], [op]
    connector.resolve()
    torch.manual_seed(seed)
    changed = HiResLmmForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    changed.load_state_dict(model.state_dict(), strict=False)
    changed.tie_weights()
    changed.generation_config = deepcopy(model.generation_config)
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.image_processor.token_layout = config.token_layout()
    return changed.eval(), processor


def operations(config: Any, visual: list[float], text: float, neurons: float = 1.0) -> float:
    """Operations of a prompt in the layers of a language model: two for a multiplication with its addition.

    Args:
        config (`PreTrainedConfig`): Of a Llama.
        visual (`list[float]`): Visual tokens that enter each layer.
        text (`float`): Tokens of text, which enter all.
        neurons (`float`): Share of the neurons that visual tokens use.
    """
    width, middle = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    queries = config.num_attention_heads * config.head_dim
    total = 0.0
    for count in visual:
        tokens = count + text
        total += 2 * tokens * width * (2 * queries + 2 * keys) + 4 * tokens * tokens * queries
        total += 6 * width * middle * (text + neurons * count)
    return total


@dataclass
class Asked:
    """Some questions: inputs of the model, answers, and their batch."""

    inputs: dict[str, Any]
    labels: torch.Tensor
    batch: Any


def ask(model: Any, processor: Any, scenes: SceneSet, cache: Path | None, size: int = 8) -> list[Asked]:
    """All questions about some scenes, one a row, with the features of their pictures.

    Args:
        model (`HiResLmmForConditionalGeneration`): Encodes the pictures.
        processor (`HiResLmmProcessor`): Its processor.
        scenes (`SceneSet`): The scenes.
        cache (`Path`, *optional*): Parent of tower features; None: pictures pass the tower.
        size (`int`): Scenes at once.
    """
    store = None if cache is None else cache_scenes(model, processor, scenes, cache)
    collator = SceneCollator(processor, scenes, store, "all", QUESTIONS, packed=False)
    found = []
    for start in range(0, scenes.count, size):
        batch = collator.build([{"scene": number} for number in range(start, min(start + size, scenes.count))])
        labels = batch.inputs.pop("labels")
        found.append(Asked(encode_once(model, batch.inputs, batch.scenes), labels, batch))
    return found


@torch.inference_mode()
def answer(model: Any, asked: list[Asked], **options: Any) -> list[dict[str, Any]]:
    """One record a question: scene, names of its scores, whether it is right, visual tokens that enter each layer,
    text of the prompt, and what gates said.

    Args:
        model (`HiResLmmForConditionalGeneration`): The model with its layer op.
        asked (`list[Asked]`): The questions.
        options: `layer_options`.
    """
    depth = model.config.text_config.num_hidden_layers
    records = []
    for part in asked:
        output = model(**part.inputs, output_token_map=True, **options)
        image, left = output.token_map.image, output.token_map.left_at
        gates = {name: value for name, value in (output.aux or {}).items() if name.startswith("exit_gate/")}
        for row, ((right,), (question,)) in enumerate(
            zip(grade(part.batch, part.labels, output.logits), part.batch.questions, strict=True)
        ):
            own = left[image == row]
            record = {
                "scene": part.batch.scenes[row],
                "names": score_names(question),
                "right": right,
                "visual": [int(((own == -1) | (own >= layer)).sum()) for layer in range(depth)],
                "text": int(part.inputs["prompt_mask"][row].sum()),
            }
            if gates:
                record["gates"] = [round(float(value[row, 1] - value[row, 0]), 4) for value in gates.values()]
            records.append(record)
    return records


def train_models(options: argparse.Namespace) -> None:
    """Train gates and thresholds."""
    for name, (op, stage, objectives) in trainings().items():
        for seed in options.seeds if name == "dyvte" else options.seeds[:1]:
            folder = options.work / "exits" / f"{name}-{seed}"
            if (folder / MODEL / "config.json").is_file():
                continue
            model, processor = with_layer_op(options.checkpoint, op, seed)
            settings = RunOptions(
                cache=str(options.work / "cache"),
                visits=(VISITS,),
                scenes=SCENES,
                batch_size=BATCH_SIZE,
                questions=TRAIN_QUESTIONS,
                seed=seed,
                note="1 of 2 CPU cores",
                command="python benchmarks/needle_exits.py train",
            )
            train(model, processor, [stage], folder, settings, objectives)


def trainings() -> dict[str, tuple[dict, Stage, dict[str, Any]]]:
    """Name -> layer op, stage and objectives."""
    weights = {"generation": 1.0, "token_budget": 1.0}
    thresholds = Stage("atp/thresholds", {"connector.layer_ops": 2e-3}, loss_weights=weights, noise=False)
    return {
        "dyvte": (DYVTE, small_rates(get_plan("dyvte"))[0], {}),
        "atp": (ATP, thresholds, {"token_budget": TokenBudget(target=TARGET)}),
    }


def methods(options: argparse.Namespace) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name -> layer op, or folder of a trained model, and `layer_options`."""
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    folder = options.work / "exits"
    found["all"] = (folder / "dyvte-0", {"exit_after": None})
    for layer in LAYERS:
        found[f"exit {layer}"] = (folder / "dyvte-0", {"exit_after": layer})
    for seed in options.seeds:
        found[f"dyvte {seed}"] = (folder / f"dyvte-{seed}", {})
        found[f"gates {seed}"] = (folder / f"dyvte-{seed}", {"exit_after": None})
    found["atp"] = (folder / "atp-0", {})
    for cut in (2, 3):
        found[f"yopo {cut}"] = ({"part": "yopo", "layers": "all", "drop_from": cut}, {})
    for layer in LAYERS:
        for share in SHARES[:-1]:
            found[f"keep_after {layer} {share:g}"] = ({"part": "keep_after", "layers": [layer], "share": share}, {})
    for layer, share in equal_shares(options).items():
        found[f"keep_after {layer} equal"] = ({"part": "keep_after", "layers": [layer], "share": share}, {})
    return found


def answers_file(options: argparse.Namespace, name: str, split: str) -> Path:
    """Where the answers of a method are kept."""
    return options.work / "exits" / "answers" / f"{split}-{name.replace(' ', '_')}.json"


def equal_shares(options: argparse.Namespace) -> dict[int, float]:
    """Layer -> share that saves what the gates save, in the mean over validation scenes and seeds; none where it
    cannot, or where that is not known yet."""
    files = [answers_file(options, f"dyvte {seed}", "validation") for seed in options.seeds]
    if not all(file.is_file() for file in files):
        return {}
    wanted = sum(mean_saving(options, json.loads(file.read_text())) for file in files) / len(files)
    record = json.loads(files[0].read_text())[0]
    config, visual, text = text_config(options), record["visual"][0], record["text"]
    full = operations(config, [visual] * config.num_hidden_layers, text)
    shares = {}
    for layer in LAYERS:
        rest = config.num_hidden_layers - layer - 1
        saved = {
            kept / visual: 1 - operations(config, [visual] * (layer + 1) + [kept] * rest, text) / full
            for kept in range(visual + 1)
        }
        if saved[0.0] >= wanted:
            shares[layer] = min(saved, key=lambda share: abs(saved[share] - wanted))
    return shares


def text_config(options: argparse.Namespace) -> Any:
    """Of the language model of the checkpoint."""
    return AutoModelForImageTextToText.from_pretrained(options.checkpoint).config.text_config


def savings(config: Any, records: list[dict[str, Any]], neurons: float = 1.0) -> list[float]:
    """Share of the operations that each question saves."""
    depth = config.num_hidden_layers
    return [
        1
        - operations(config, record["visual"], record["text"], neurons)
        / operations(config, [record["visual"][0]] * depth, record["text"])
        for record in records
    ]


def mean_saving(options: argparse.Namespace, records: list[dict[str, Any]]) -> float:
    """Their mean."""
    values = savings(text_config(options), records)
    return sum(values) / len(values)


def score_models(options: argparse.Namespace) -> None:
    """Ask the same questions of every method, on validation scenes of the gates alone; one file each."""
    scenes = SceneSet(options.split, options.scenes)
    asked: list[Asked] = []
    for name, (source, told) in methods(options).items():
        file = answers_file(options, name, options.split)
        if file.is_file() or (options.split == "validation" and not name.startswith("dyvte")):
            continue
        if isinstance(source, Path):
            model = AutoModelForImageTextToText.from_pretrained(source / MODEL)
            processor = AutoProcessor.from_pretrained(source / MODEL)
        else:
            model, processor = with_layer_op(options.checkpoint, source, 0)
        asked = asked or ask(model, processor, scenes, options.work / "cache")
        records = answer(model.eval(), asked, **({"layer_options": told} if told else {}))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(records))
        logger.info("%s: %.3f", file.stem, sum(record["right"] for record in records) / len(records))


def first_exit(gates: list[float], bias: float = 0.0) -> int | None:
    """The first layer whose gate says so, by how much it prefers leaving; None if none does."""
    return next((layer for layer, value in zip(LAYERS, gates, strict=True) if value > bias), None)


def at_bias(found: dict[str, list[dict[str, Any]]], seed: int, bias: float) -> list[dict[str, Any]]:
    """What gates would have done that leave where their preference is above a bias: put together from the runs that
    leave behind fixed layers."""
    records = []
    for number, said in enumerate(found[f"gates {seed}"]):
        layer = first_exit(said["gates"], bias)
        records.append(found["all" if layer is None else f"exit {layer}"][number])
    return records


def summarise(config: Any, name: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the result: saving, accuracies with intervals, and where questions left."""
    neurons = 0.5 if name.startswith("yopo") else 1.0
    values = savings(config, records, neurons)
    scores = {}
    for group in GROUPS:
        own = [record for record in records if group in record["names"]]
        scores[group] = score([r["right"] for r in own], [str(r["scene"]) for r in own]).to_dict()
    row: dict[str, Any] = {"method": name, "saving": sum(values) / len(values), "scores": scores}
    row["visual"] = [sum(r["visual"][layer] for r in records) / len(records) for layer in range(len(LAYERS) + 1)]
    if "gates" in records[0]:
        kinds = sorted({record["names"][-1] for record in records})
        groups = {name: [r for r in records if name in r["names"]] for name in (*GROUPS, *kinds)}
        row["exits"] = {
            name: {str(layer): sum(first_exit(r["gates"]) == layer for r in own) for layer in (*LAYERS, None)}
            for name, own in groups.items()
        }
    return row


def report(options: argparse.Namespace) -> None:
    """Write the JSON, draw it, and fill the table of docs/fewer-tokens.md."""
    files = {name: answers_file(options, name, options.split) for name in methods(options)}
    if all(file.is_file() for file in files.values()):
        found = {name: json.loads(file.read_text()) for name, file in files.items()}
        config, rows = text_config(options), []
        for name, records in found.items():
            row = summarise(config, name, records)
            if name.startswith("gates"):
                row = {"method": name, "exits": row["exits"]}
            rows.append(row)
        rows += [
            {**summarise(config, f"dyvte {seed}, bias", at_bias(found, seed, bias)), "bias": bias}
            for seed in options.seeds
            for bias in BIASES
        ]
        logs = {
            folder.name: json.loads((folder / LOG).read_text())
            for folder in sorted((options.work / "exits").glob("*-[0-9]"))
        }
        training = {
            name: {key: log[key] for key in ("command", "machine", "versions", "options", "seconds")}
            for name, log in logs.items()
        }
        facts = {"split": options.split, "scenes": options.scenes, "seeds": options.seeds, "questions": QUESTIONS}
        shares = {str(layer): share for layer, share in equal_shares(options).items()}
        record = {**surroundings(), **facts, "equal_shares": shares, "training": training, "rows": rows}
        write_text(FILE, json.dumps(record, indent=1) + "\n")
    rows = json.loads(FILE.read_text())["rows"]
    page = ROOT / "docs" / "fewer-tokens.md"
    page.write_text(put(page.read_text(), "exits", table(rows), "needle_exits.py"))
    plot(rows, ROOT / "docs" / "images" / "needle_exits.png")


def table(rows: list[dict[str, Any]]) -> str:
    """Methods with what they save and get."""
    shown_rows = [row for row in rows if "scores" in row and "bias" not in row]
    lines = [
        [
            f"`{row['method']}`",
            f"{100 * row['saving']:.1f}",
            *(shown(row["scores"][group]) for group in GROUPS),
        ]
        for row in shown_rows
        if not row["method"].startswith("keep_after") or row["method"].endswith("equal")
    ]
    return markdown(["method", "operations saved, %", *(f"{group} questions" for group in GROUPS)], lines)


def shown(value: dict[str, Any]) -> str:
    """An accuracy in percent with the outer ends of both intervals."""
    ends = [*value["wilson"], *(value["bootstrap"] or ())]
    return f"{100 * value['accuracy']:.1f} ({100 * min(ends):.1f}–{100 * max(ends):.1f})"


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Accuracy over saved operations."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(9.4, 3.8), sharey=True, layout="constrained")
    scored = [row for row in rows if "scores" in row]
    full = next(row for row in scored if row["method"] == "all")
    for axis, group in zip(axes, GROUPS[:2], strict=True):
        for layer in LAYERS:
            own = [
                row
                for row in scored
                if row["method"] == f"exit {layer}" or row["method"].startswith(f"keep_after {layer}")
            ]
            look = {"color": f"C{layer}", "marker": "o", "label": f"keep_after {layer}"}
            draw_line(axis, [full, *own], group, **look)
        for number, style in enumerate(("-", "--", ":")):
            own = [row for row in scored if row["method"] == f"dyvte {number}, bias"]
            if own:
                look = {"color": "k", "linestyle": style, "label": "dyvte, other biases" if number == 0 else None}
                own = sorted(own, key=lambda row: row["saving"])
                axis.plot(*points(own, group), **look)
        for name, mark, colour in (("dyvte", "*", "k"), ("atp", "s", "C4"), ("yopo", "^", "C5")):
            own = [row for row in scored if row["method"].split(" ")[0] == name and "bias" not in row]
            draw_line(axis, own, group, color=colour, marker=mark, label=name, linestyle="none")
        axis.set(xlabel="operations of the language model saved, %", title=f"{group} questions", ylim=(0, 100))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right, %")
    axes[0].legend(fontsize=7)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def points(rows: list[dict[str, Any]], group: str) -> tuple[list[float], list[float]]:
    """Savings and accuracies in percent."""
    return [100 * row["saving"] for row in rows], [100 * row["scores"][group]["accuracy"] for row in rows]


def draw_line(axis: Any, rows: list[dict[str, Any]], group: str, **look: Any) -> None:
    """Points with their intervals, by saving."""
    rows = sorted(rows, key=lambda row: row["saving"])
    places, middle = points(rows, group)
    ends = [[*row["scores"][group]["wilson"], *(row["scores"][group]["bootstrap"] or ())] for row in rows]
    below = [mid - 100 * min(end) for mid, end in zip(middle, ends, strict=True)]
    above = [100 * max(end) - mid for mid, end in zip(middle, ends, strict=True)]
    axis.errorbar(places, middle, (below, above), markersize=4, capsize=2, **look)


def main() -> None:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "score", "report"))
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "needle")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "needle-slime")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1])
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    library_logging.disable_progress_bar()
    torch.set_num_threads(1)
    {"train": train_models, "score": score_models, "report": report}[options.action](options)


if __name__ == "__main__":
    main()

"""Seconds and peak memory of `from_pretrained`, ours against a llava_next of equal size.

    python benchmarks/load.py                   about a minute; writes 3.2 GB to a temporary folder
    python benchmarks/load.py --device cuda     onto the device

CLIP ViT-L/14-336 with a language model of 0.5 billion weights, bfloat16, random. Each load is a process of its own;
the file cache is warm for both.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from cases import PEERS, Shared, num_parameters, ours
from measure import in_subprocess, median, median_ratio, own_peak, plot_bars, print_table, report_path, say
from record import write_result
from shapes import SHAPES
from transformers import AutoModelForImageTextToText

import hires_lmm


PEER = "transformers llava_next"
COLUMNS = {
    "model": "model",
    "weights": "weights",
    "seconds": "s",
    "ratio": "of llava_next",
    "peak_mib": "peak MiB",
    "start_mib": "before MiB",
}


def child(case: dict) -> dict:
    """Load one checkpoint and say what it took."""
    start, begin = own_peak(), time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(
        case["folder"], dtype=torch.bfloat16, device_map=case["device"]
    )
    seconds = time.perf_counter() - begin
    weights = num_parameters(model)
    return {"seconds": seconds, "peak": own_peak(), "start": start, "weights": weights, "version": hires_lmm.__name__}


def save(name: str, shapes: str, folder: Path) -> None:
    """Write one random checkpoint."""
    shared = Shared(SHAPES[shapes], "cpu")
    model = (ours(name, shared) if name == "llava_next" else PEERS["llava_next"](shared)).model
    model.save_pretrained(folder)


def main() -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", default="load", choices=tuple(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        sys.stdout.write(json.dumps(child(json.loads(arguments.child))) + "\n")
        return
    rows = []
    with tempfile.TemporaryDirectory() as root:
        names = {"ours": "llava_next", PEER: "transformers"}
        for folder, name in names.items():
            save(name, arguments.shapes, Path(root) / folder)
            say(f"{folder}: written")
        found: dict[str, list] = {name: [] for name in names}
        for number in range(1 + arguments.repeats):
            for name in names:
                case = {"folder": str(Path(root) / name), "device": arguments.device}
                result = in_subprocess(__file__, case)
                found[name] += [result] if number else []
                say(f"{name}: {result['seconds']:.1f} s{'' if number else ', warm-up'}")
    seconds = {name: [result["seconds"] for result in results] for name, results in found.items()}
    for name, results in found.items():
        rows.append(
            {
                "model": name,
                "weights": results[0]["weights"],
                "seconds": median(seconds[name]),
                "ratio": median_ratio(seconds[name], seconds[PEER]),
                "peak_mib": median([result["peak"] for result in results]) / 2**20,
                "start_mib": median([result["start"] for result in results]) / 2**20,
            }
        )
    stem = f"load_{arguments.device}"
    print_table(rows, COLUMNS, f"from_pretrained, {arguments.device}")
    path = write_result(stem, rows, [0])
    plot_bars(stem, rows, "model", "seconds", "seconds", f"from_pretrained, {arguments.device}")
    report_path(path)


if __name__ == "__main__":
    main()

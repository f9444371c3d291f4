"""Time to the first token: ours against transformers' own models on one language model, beside the floor.

    python benchmarks/prefill.py                  small models on the CPU, at most 5 minutes on two idle cores
    python benchmarks/prefill.py --device cuda    CLIP ViT-L/14-336 with Llama-3-8B shapes, bfloat16, random weights

The floor is what cannot be avoided: the tower alone on the same views, the language model alone on as many tokens, and
the counted operations of everything between at the rate of a large matrix product, all measured in the same run.
Overhead = time / floor. Pixels are prepared beforehand (`preprocess.py` times that).
"""

import argparse
import random
from typing import Any

import numpy as np
import torch
from cases import OURS, PEERS, Case, Shared, ours, ours_known
from measure import (
    count_work,
    floor_seconds,
    interleave,
    matrix_rate,
    median,
    peak_memory,
    plot_bars,
    print_table,
    report_path,
)
from PIL import Image
from record import write_result
from rich.progress import track
from shapes import IMAGE_SIZES, SHAPES


BASELINE = "transformers llava_next"
COLUMNS = {
    "images": "images",
    "model": "model",
    "tokens": "visual tokens",
    "milliseconds": "ms",
    "floor_ms": "floor ms",
    "overhead": "overhead",
    "ratio": "of llava_next",
    "peak_mib": "peak MiB",
}
MATRIX = {"cpu": 1536, "cuda": 8192}


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise; what it shows changes no work."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def build_cases(device: str, shapes: str, only: list[str] | None = None) -> list[Case]:
    """All models on one language model.

    Args:
        device (`str`): Where.
        shapes (`str`): Key of `SHAPES`.
        only (`list[str]`, *optional*): Names of models; all by default.
    """
    shared = Shared(SHAPES[shapes], device)
    names = [*ours_known(), *(f"transformers {name}" for name in PEERS)]
    unknown = set(only or []) - {*OURS, *names}
    if unknown:
        raise SystemExit(f"unknown models {sorted(unknown)}; known: {', '.join(names)}")
    chosen = [name for name in names if only is None or name in only]
    return [ours(name, shared) if name in OURS else PEERS[name.split()[-1]](shared) for name in chosen]


def between(case: Case, parts: dict[str, Any]) -> int:
    """Counted operations of a prefill outside tower, language model and head, which `parts` run alone."""
    return count_work(case.prefill)[0] - sum(count_work(part)[0] for part in parts.values())


def measure_batch(cases: list[Case], name: str, repeats: int, rate: float, device: str) -> list[dict[str, Any]]:
    """Time every model on one batch, and its parts alone, in turn.

    Args:
        cases (`list[Case]`): Models.
        name (`str`): Key of `IMAGE_SIZES`.
        repeats (`int`): Rounds.
        rate (`float`): Of `matrix_rate`.
        device (`str`): Where.

    Returns:
        One row a model.
    """
    images = [picture(*size, seed) for seed, size in enumerate(IMAGE_SIZES[name])]
    taken = [case.take(images) for case in cases]
    calls: dict[str, Any] = {}
    operations = {}
    for case in taken:  # also the warm-up
        parts = case.parts_alone()
        operations[case.name] = between(case, parts)
        calls[case.name] = case.prefill
        calls |= {f"{case.name}/{part}": call for part, call in parts.items()}
    seconds = {key: median(values) for key, values in interleave(calls, repeats, 0, device).items()}
    rows = []
    for case in taken:
        tower, language = seconds[f"{case.name}/tower"], seconds[f"{case.name}/language_model"]
        floor = floor_seconds(tower, language, operations[case.name], rate)
        rows.append(
            {
                "images": name,
                "model": case.name,
                "tokens": sum(case.tokens),
                "milliseconds": seconds[case.name] * 1e3,
                "tower_ms": tower * 1e3,
                "language_model_ms": language * 1e3,
                "connector_operations": operations[case.name],
                "floor_ms": floor * 1e3,
                "overhead": seconds[case.name] / floor,
                "ratio": seconds[case.name] / seconds[BASELINE] if BASELINE in seconds else None,
                "peak_mib": peak_memory(case.prefill, device) / 2**20,
            }
        )
    return rows


def main() -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", choices=tuple(SHAPES), help="by default those of the device")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", nargs="*", choices=tuple(IMAGE_SIZES), default=list(IMAGE_SIZES))
    parser.add_argument("--models", nargs="*", help="names of models; all by default")
    arguments = parser.parse_args()
    random.seed(0), torch.manual_seed(0)
    shapes = arguments.shapes or arguments.device
    cases = build_cases(arguments.device, shapes, arguments.models)
    rate = matrix_rate(arguments.device, SHAPES[shapes].dtype, MATRIX[arguments.device])
    rows: list[dict] = []
    for name in track(arguments.images, description="batches"):
        rows += measure_batch(cases, name, arguments.repeats, rate, arguments.device)
    print_table(
        rows, COLUMNS, f"prefill, {arguments.device}, shapes {shapes}, {rate / 1e9:.0f} Gop/s in matrix products"
    )
    stem = f"prefill_{arguments.device}"
    path = write_result(stem, rows, [0])
    for row in rows:
        row["label"] = f"{row['images']}: {row['model']}"
    plot_bars(stem, rows, "label", "milliseconds", "ms to the first token", f"prefill, {arguments.device}")
    report_path(path)


if __name__ == "__main__":
    main()

"""Time to the first token: ours against transformers' own models on one language model, beside the floor.

    python benchmarks/prefill.py                  small models on the CPU, at most 5 minutes on two idle cores
    python benchmarks/prefill.py --shapes wide    ours and llava_next, wider, at one size; at most 5 minutes
    python benchmarks/prefill.py --shapes deep    the same at true depth with all widths / 16
    python benchmarks/prefill.py --count          operations of the true sizes, counted without computing; 5 minutes
    python benchmarks/prefill.py --images 336x336 --name small --models "transformers llava_next" \
        "transformers qwen3_vl" "slime, not enlarged, 144 tokens"
                                                  small images, into a file of their own
    python benchmarks/prefill.py --shapes deep --name published --models "transformers llava_next" mqt llava_uhd ...
                                                  some models, into a file of their own
    python benchmarks/prefill.py --device cuda    CLIP ViT-L/14-336 with Llama-3-8B shapes, bfloat16, random weights

The floor is what cannot be avoided: the tower alone on the same views, the language model alone on as many tokens, in
fusion its transformer alone, and the counted operations of everything else at the rate of a large matrix product, all
measured in the same run.
Overhead = time / floor, the median over the rounds; transformers' models but llava_next have theirs from one round.
Peak memory: tensors above weights and inputs. Pixels are prepared beforehand (`preprocess.py` times that). On the CPU
the mixed batch has its first two rows, and the preset's 6 x 6 crops are taken at one size.
"""

import argparse
import random
from typing import Any

import numpy as np
import torch
from cases import OURS, PEERS, Case, Shared, ours, ours_known
from measure import (
    floor_seconds,
    interleave,
    matrix_rate,
    median,
    median_ratio,
    peak_memory,
    plot_bars,
    print_table,
    report_path,
    say,
)
from PIL import Image
from record import write_result
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
COUNTED_COLUMNS = {
    "images": "images",
    "model": "model",
    "tokens": "visual tokens",
    "tera_operations": "Top",
    "ratio": "of llava_next",
    "between": "share outside tower and language model",
}
MATRIX = {"cpu": 1536, "cuda": 8192}
MOST_ROWS = {"cpu": 2, "cuda": 4}
DEAR = {"slime, 6x6": "2048x2048"}
"""Models that are timed at one size only on the CPU."""

OTHER_IMAGES = {"wide": ("1024x1024",), "deep": ("336x336", "1024x1024", "400x4000")}
"""What other shapes than those of the device are timed on, without the other models of transformers."""
LEAST_SECONDS = {"cpu": 6.0, "cuda": 10.0}
COUNTED = (
    "llava_next",
    "slime, 4 crops",
    "slime, 4 crops, 144 local",
    "slime, 6x6",
    "slime, not enlarged, 144 tokens",
    "slime_release",
    "monkey",
    "mqt",
    "mqt, 4 crops",
    "llava_uhd",
    "inf_llava",
    "hires_llava",
    "mg_llava",
    "llava_next, 720 tokens",
    "llava_next, 288 tokens",
    "globalcom2, 720 tokens",
    "globalcom2, 288 tokens",
    "router, 720 tokens",
)
"""Ours that run on `meta`; `llava_next` does the very work of transformers' llava_next (a test holds that)."""


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise; what it shows changes no work."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def pictures(name: str, device: str) -> list[Image.Image]:
    """The images of a batch, one a row.

    Args:
        name (`str`): Key of `IMAGE_SIZES`.
        device (`str`): Decides how many rows there are at most.
    """
    return [picture(*size, seed) for seed, size in enumerate(IMAGE_SIZES[name][: MOST_ROWS[device]])]


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
    chosen = names if only is None else [name for name in (*OURS, *names[len(ours_known()) :]) if name in only]
    return [ours(name, shared) if name in OURS else PEERS[name.split()[-1]](shared) for name in chosen]


def time_rounds(calls: dict[str, Any], repeats: int, device: str, least_seconds: float) -> dict[str, list[float]]:
    """Time models and their parts in turn: in the first round all; then no parts of the other models of transformers;
    at last, for as long as there is time, ours and `BASELINE` alone.

    Args:
        calls (`dict[str, Callable]`): `"model"`, and `"model/part"` for its parts alone.
        repeats (`int`): Rounds of every model, at least.
        device (`str`): Where.
        least_seconds (`float`): Time for the last rounds.
    """
    ours_and_base = {key: call for key, call in calls.items() if key.split("/")[0] in (*OURS, BASELINE)}
    models = {key: call for key, call in calls.items() if "/" not in key}
    seconds = interleave(calls, 1, 0, device)
    for chosen, rounds, least in (({**models, **ours_and_base}, repeats - 1, 0.0), (ours_and_base, 0, least_seconds)):
        for key, values in interleave(chosen, rounds, 0, device, least).items():
            seconds[key] += values
    return seconds


def measure_batch(
    cases: list[Case], name: str, repeats: int, rate: float, device: str, least_seconds: float = 0.0
) -> list[dict[str, Any]]:
    """Time every model on one batch, and its parts alone, in turn.

    Args:
        cases (`list[Case]`): Models.
        name (`str`): Key of `IMAGE_SIZES`.
        repeats (`int`): Rounds, at least.
        rate (`float`): Of `matrix_rate`.
        device (`str`): Where.
        least_seconds (`float`): Time for more rounds where they are short.

    Returns:
        One row a model.
    """
    images = pictures(name, device)
    surveys, peaks = {}, {}
    calls: dict[str, Any] = {}
    for case in cases:  # also the warm-up
        if device == "cpu" and DEAR.get(case.name, name) != name:
            continue
        case = case.take(images)
        peaks[case.name] = peak_memory(lambda case=case: surveys.update({case.name: case.survey()}), device)
        calls[case.name] = case.prefill
        calls |= {f"{case.name}/{part}": call for part, call in surveys[case.name].alone().items()}
    say(f"{name}: {len(surveys)} models warm")
    seconds = time_rounds(calls, repeats, device, least_seconds)
    rows = []
    for key, survey in surveys.items():
        alone = zip(*(values for part, values in seconds.items() if part.startswith(f"{key}/")), strict=True)
        times, base = seconds[key], seconds.get(BASELINE)
        floors = [floor_seconds(parts, survey.between, rate) for parts in alone]
        rows.append(
            {
                "images": name,
                "model": key,
                "tokens": sum(survey.case.tokens),
                "views": len(survey.case.inputs["pixel_values"]),
                "milliseconds": median(times) * 1e3,
                "tower_ms": median(seconds[f"{key}/tower"]) * 1e3,
                "language_model_ms": median(seconds[f"{key}/language_model"]) * 1e3,
                "connector_operations": survey.between,
                "floor_ms": median(floors) * 1e3,
                "overhead": median_ratio(times[: len(floors)], floors),
                "ratio": median_ratio(times, base[: len(times)]) if base else None,
                "peak_mib": peaks[key] / 2**20,
                "rounds": len(times),
                "overheads": sorted(time / floor for time, floor in zip(times, floors, strict=False)),
            }
        )
    return rows


def count_batch(cases: list[Case], name: str) -> list[dict[str, Any]]:
    """Count the operations of a prefill; the first model is the measure of the others.

    Args:
        cases (`list[Case]`): Models on `meta`.
        name (`str`): Key of `IMAGE_SIZES`.
    """
    rows: list[dict[str, Any]] = []
    first = 0
    for case in cases:
        case = case.take(pictures(name, "cuda"))
        survey = case.survey()
        first = first or survey.operations
        rows.append(
            {
                "images": name,
                "model": case.name,
                "tokens": sum(case.tokens),
                "tera_operations": survey.operations / 1e12,
                "ratio": survey.operations / first,
                "between": survey.between / survey.operations,
            }
        )
        say(f"{name}: {case.name} counted")
    return rows


def write(rows: list[dict], stem: str, columns: dict[str, str], value: str, title: str) -> None:
    """Print, write JSON and plot."""
    print_table(rows, columns, title)
    report_path(write_result(stem, rows, [0]))
    drawn = [{**row, "label": f"{row['images']}: {row['model']}"} for row in rows]
    plot_bars(stem, drawn, "label", value, columns[value], title)


def main() -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--count", action="store_true", help="count operations at true sizes; nothing is computed")
    parser.add_argument("--shapes", choices=tuple(SHAPES), help="by default those of the device")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--images",
        nargs="*",
        choices=tuple(IMAGE_SIZES),
        help="by default all; fewer for other shapes, one image each to count",
    )
    parser.add_argument("--models", nargs="*", help="names of models; all by default")
    parser.add_argument("--name", help="in the name of the result, which then stands beside the usual one")
    arguments = parser.parse_args()
    random.seed(0), torch.manual_seed(0)
    shapes, device = arguments.shapes or arguments.device, arguments.device
    rows: list[dict] = []
    if arguments.count:
        cases = build_cases("meta", arguments.shapes or "cuda", arguments.models or list(COUNTED))
        for name in arguments.images or [name for name in IMAGE_SIZES if len(IMAGE_SIZES[name]) == 1]:
            rows += count_batch(cases, name)
        stem = "_".join(filter(None, ("prefill_counted", arguments.name)))
        write(rows, stem, COUNTED_COLUMNS, "tera_operations", "counted operations of a prefill")
        return
    is_other = shapes not in (device, "tiny")
    models = arguments.models or ([*ours_known(), BASELINE] if is_other else None)
    cases = build_cases(device, shapes, models)
    rate = matrix_rate(device, SHAPES[shapes].dtype, MATRIX[device])
    for name in arguments.images or OTHER_IMAGES.get(shapes, IMAGE_SIZES):
        least = 0.0 if is_other else LEAST_SECONDS[device]
        rows += measure_batch(cases, name, arguments.repeats, rate, device, least)
    title = f"prefill, {device}, shapes {shapes}, {rate / 1e9:.0f} Gop/s in matrix products"
    stem = "_".join(filter(None, ("prefill", arguments.name, None if shapes == device else shapes, device)))
    write(rows, stem, COLUMNS, "ratio" if device == "cpu" else "milliseconds", title)


if __name__ == "__main__":
    main()

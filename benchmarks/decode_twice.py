"""Time a token of decoding with two contexts against plain decoding, in one run.

    python benchmarks/decode_twice.py                  small models on the CPU, about a minute on two idle cores
    python benchmarks/decode_twice.py --device cuda    CLIP ViT-L/14-336 with Llama-3-8B shapes, bfloat16

Greedy `generate`: the time for many new tokens less the time for one, so that no prefill counts.
"""

import argparse
from functools import partial
from typing import Any

import torch
from cases import Case
from measure import interleave, median, median_ratio, print_table, report_path
from prefill import build_cases, picture
from record import write_result
from shapes import PAD_TOKEN, SHAPES

from hires_lmm.decoding import DAMRO, M3ID


COLUMNS = {"model": "model", "decoding": "decoding", "ratio": "time a token, plain = 1"}
METHODS: dict[str, Any] = {
    "plain": None,
    "m3id": M3ID,
    "m3id, sure": partial(M3ID, alpha=0.0),
    "damro": DAMRO,
}
"""`sure`: the indicator never finds the model unsure, so that the second context rests."""


def generate(case: Case, method: Any, number: int) -> Any:
    """Greedy decoding of exactly so many tokens."""
    return case.model.generate(
        **case.inputs,
        logits_processor=[] if method is None else [method(case.model, case.inputs)],
        do_sample=False,
        max_new_tokens=number,
        min_new_tokens=number,
        eos_token_id=None,
        pad_token_id=PAD_TOKEN,
    )


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", choices=tuple(SHAPES), help="by default those of the device")
    parser.add_argument("--side", type=int, default=1024, help="pixels of the square image")
    parser.add_argument("--tokens", type=int, default=33, help="new tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="*", default=["llava_next", "slime, 4 crops"])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cases = build_cases(arguments.device, arguments.shapes or arguments.device, arguments.models)
    taken, calls = [case.take([picture(arguments.side, arguments.side)]) for case in cases], {}
    for case in taken:
        for name, method in METHODS.items():
            for number in (1, arguments.tokens):
                calls[f"{case.name}/{name}/{number}"] = partial(generate, case, method, number)
    seconds = interleave(calls, arguments.repeats, 1, arguments.device)
    rows = []
    for case in taken:
        steps = {
            name: [
                (many - one) / (arguments.tokens - 1)
                for one, many in zip(
                    seconds[f"{case.name}/{name}/1"], seconds[f"{case.name}/{name}/{arguments.tokens}"], strict=True
                )
            ]
            for name in METHODS
        }
        for name, own in steps.items():
            rows.append(
                {
                    "model": case.name,
                    "decoding": name,
                    "ratio": median_ratio(own, steps["plain"]),
                    "milliseconds_a_token": [step * 1e3 for step in own],
                    "median_milliseconds": 1e3 * median(own),
                }
            )
    print_table(rows, COLUMNS, f"decoding twice, {arguments.device}")
    report_path(write_result(f"decode_twice_{arguments.device}", rows, [0]))


if __name__ == "__main__":
    main()

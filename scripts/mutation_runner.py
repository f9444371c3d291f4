"""Runs tests against one changed module at a time, each time in a fork that has imported the libraries already."""

import ast
import gc
import importlib.abc
import importlib.util
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


PACKAGE = "hires_lmm"
KILLED, SURVIVED, TIMEOUT = "killed", "survived", "timeout"
MEMORY = 12 * 1024**3
"""Bytes a fork may take, should a fault make it grow without end."""

CANNOT_RUN = (4, 5)
"""What pytest returns for wrong arguments and for no tests."""


@contextmanager
def snapshot(root: Path) -> Iterator[Path]:
    """A copy of sources and tests as the working directory, so that edits during a run change nothing.

    Args:
        root (`Path`): The repository.
    """
    with tempfile.TemporaryDirectory(prefix="mutation_") as name:
        folder = Path(name)
        for part in ("src", "tests"):
            shutil.copytree(root / part, folder / part, ignore=shutil.ignore_patterns("upstream"))
        shutil.copy(root / "pyproject.toml", folder)
        os.chdir(folder)
        sys.path.insert(0, str(folder / "src"))
        try:
            yield folder
        finally:
            sys.path.remove(str(folder / "src"))
            os.chdir(root)


class ChangedModule(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module another source when it is imported.

    Args:
        name (`str`): Full name of the module.
        path (`Path`): Its file, which is not read.
        source (`str`): What is run instead.
    """

    def __init__(self, name: str, path: Path, source: str):
        self.name, self.path, self.code = name, path, compile(source, str(path), "exec")

    def find_spec(self, fullname, path=None, target=None):
        """Answer for the one module."""
        found = fullname == self.name
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self) if found else None

    def exec_module(self, module):
        """Run the other source."""
        exec(self.code, module.__dict__)


def _run_tests(tests: list[str], changed: ChangedModule | None, note: Path | None) -> int:
    """Run tests in this process, which must be a fork; returns pytest's status."""
    import pytest

    stop = ["-x"]
    if changed is not None:
        for name in _users(changed.name):
            _forget(name)
        sys.meta_path.insert(0, changed)
    if note is not None:
        stop = []
    status = int(pytest.main([*tests, *stop, "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]))
    if note is not None:
        here = str(Path.cwd() / "tests")
        files = {name: str(getattr(module, "__file__", None)) for name, module in list(sys.modules.items())}
        note.write_text("\n".join(name for name, file in files.items() if not file.startswith(here)))
    return status


def _forget(name: str) -> None:
    """Take a module out of `sys.modules` and out of its package, where `from package import module` finds it."""
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        vars(sys.modules[parent]).pop(child, None)
    del sys.modules[name]


def _users(changed: str) -> set[str]:
    """The module, and all loaded modules of its package that import it or a module that does."""
    loaded = {name for name in sys.modules if name.partition(".")[0] == PACKAGE}
    wanted, users = {name: _imports(name) for name in loaded}, {changed} & loaded
    while more := {name for name in loaded - users if wanted[name] & users}:
        users |= more
    return users


@cache
def _imports(name: str) -> set[str]:
    """Modules that a loaded module imports anywhere in its text, and those of which it may import a name."""
    spec = sys.modules[name].__spec__
    base = spec.parent.split(".")
    found = set()
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            stem = ".".join([*base[: len(base) - node.level + 1], *filter(None, [node.module])])
            stem = stem if node.level else node.module
            found |= {stem, *(f"{stem}.{alias.name}" for alias in node.names)}
    return found


def fork_tests(
    tests: list[str],
    seconds: float,
    changed: ChangedModule | None = None,
    note: Path | None = None,
    log: Path | None = None,
) -> str:
    """Run tests in a fork.

    Args:
        tests (`list[str]`): Files or node ids.
        seconds (`float`): Time limit.
        changed (`ChangedModule`, *optional*): The fault.
        note, log (`Path`, *optional*): Get the names of imported foreign modules, and what pytest prints.

    Returns:
        `"survived"` (all tests passed), `"killed"` or `"timeout"`.

    Raises:
        RuntimeError: If pytest finds no tests.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            output = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            status = _run_tests(tests, changed, note)
            sys.stdout.flush(), sys.stderr.flush()
        finally:
            os._exit(status)
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code in CANNOT_RUN:
                raise RuntimeError(f"pytest cannot run {' '.join(tests)} (status {code}).")
            return KILLED if code else SURVIVED
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return TIMEOUT


def warm_up(tests: list[str]) -> None:
    """Import here whatever the tests import, so that forks need not; they import anew what a fault can reach.

    Args:
        tests (`list[str]`): All tests that will run.
    """
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "modules"
        fork_tests(tests, 600, note=note)
        for name in note.read_text().splitlines():
            try:
                importlib.import_module(name)
            except Exception:  # some modules can only be imported by their parents
                continue
    for name in list(sys.modules):
        if name.partition(".")[0] == PACKAGE:
            _imports(name)
    gc.collect()
    gc.freeze()  # forks need not look through all of this again


def time_tests(tests: list[str], unchanged: ChangedModule) -> float:
    """Seconds that the tests take in a warm fork.

    Args:
        tests (`list[str]`): Files or node ids.
        unchanged (`ChangedModule`): The module with its own source: takes the way that faults take.

    Raises:
        RuntimeError: If they fail without any fault.
    """
    start = time.monotonic()
    with tempfile.NamedTemporaryFile("r") as log:
        if fork_tests(tests, 600, unchanged, log=Path(log.name)) != SURVIVED:
            raise RuntimeError(f"{' '.join(tests)} fail without any fault:\n{log.read()[-4000:]}")
    return time.monotonic() - start

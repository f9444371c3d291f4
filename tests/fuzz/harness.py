"""Runs one case under limits and watches what it touches; every case is known by area, seed and number."""

import builtins
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


MEGABYTE = 1 << 20
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {  # audit event -> positions of (path, dir_fd) that it changes
    "os.remove": [(0, 1)],
    "os.rmdir": [(0, 1)],
    "os.mkdir": [(0, 2)],
    "os.rename": [(0, 2), (1, 3)],
    "os.link": [(1, 3)],
    "os.symlink": [(1, 2)],
    "os.chmod": [(0, 2)],
    "os.truncate": [(0, None)],
    "os.utime": [(0, 3)],
}
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "pty.spawn")
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request")


class Fault(AssertionError):
    """A case that ended in anything but what may be."""


class Hang(BaseException):
    """The clock ran out. No `Exception`, so that nobody catches it on the way."""


@dataclass(frozen=True)
class Case:
    """One case: `Case("images", 0, 17)` is the same everywhere."""

    area: str
    seed: int
    number: int

    def rng(self) -> random.Random:
        """A generator of its own."""
        return random.Random(f"{self.area}/{self.seed}/{self.number}")

    @property
    def command(self) -> str:
        """What replays it."""
        return f"python tests/fuzz {self.area} --seed {self.seed} --case {self.number}"


@dataclass
class Subject:
    """What a generator hands to a check.

    Args:
        kind (`str`): Name of the generator.
        value: The input.
        expected: The right result, where the generator knows it.
        refused (`bool`): Whether only an error is right.
        notes (`dict`): Anything else that the check should know.
    """

    kind: str
    value: Any = None
    expected: Any = None
    refused: bool = False
    notes: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Folders of a case: its own, one for temporary files, one that nobody may touch, and what must never appear."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "case"

    @property
    def temporary(self) -> Path:
        return self.root / "temporary"

    @property
    def outside(self) -> Path:
        return self.root / "outside"

    @property
    def marker(self) -> Path:
        """What every payload makes when it runs."""
        return self.root / "PAYLOAD_RAN"

    def prepare(self) -> None:
        """Fresh folders; the canaries are written once."""
        for path in (self.folder, self.temporary):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        self.outside.mkdir(exist_ok=True)
        for name in ("secret.json", "secret.safetensors", "secret.bin", "secret.txt"):
            if not (self.outside / name).exists():
                (self.outside / name).write_text('{"secret": "canary"}')

    def canaries(self) -> dict[str, tuple[bytes, int]]:
        """Content and time of every file outside."""
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(self.outside.iterdir())}


@dataclass(frozen=True)
class Area:
    """A generator, a check and the limits of its cases.

    Args:
        generate (`Callable`): `(rng, number, place) -> Subject`.
        check (`Callable`): `(subject, place) -> str`: `"result"` or `"error"`; raises `Fault`.
        seconds (`float`): Processor time of one case.
        megabytes (`int`): Growth of resident memory in one case.
        may_write (`Callable`): `place -> list` of the folders that a case may change.
        reads_outside (`bool`): Whether files outside may be read (by libraries, through links).
    """

    generate: Callable
    check: Callable
    seconds: float = 5.0
    megabytes: int = 300
    may_write: Callable = lambda place: [place.folder, place.temporary]
    reads_outside: bool = False


class Watch:
    """Hears every file, process and connection that Python code of this process touches."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.active: tuple[list[Path], Path | None] | None = None
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple) -> None:
        if self.active is None or threading.current_thread() is not threading.main_thread():
            return
        active, self.active = self.active, None  # what follows here is not of the case
        try:
            self._judge(event, args, *active)
        finally:
            self.active = active

    def _judge(self, event: str, args: tuple, writable: list[Path], secret: Path | None) -> None:
        if event in STARTS and not _is_own_process(args):
            self.seen.append(f"{event} {str(args[:2])[:300]}")
        elif event in NETWORK:
            self.seen.append(f"{event} {str(args[-1])[:200]}")
        elif event == "open":
            path, mode, flags = args
            writes = bool((flags or 0) & WRITE_FLAGS) or any(letter in (mode or "") for letter in "wax+")
            if writes:
                self._changed(event, path, None, writable)
            elif secret is not None and isinstance(path, (str, bytes)) and _real(path, None).is_relative_to(secret):
                self.seen.append(f"reads {os.fsdecode(path)}")
        for position, where in CHANGES.get(event, []):
            self._changed(event, args[position], None if where is None else args[where], writable)

    def _changed(self, event: str, path: Any, folder: Any, writable: list[Path]) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)) or "\0" in os.fsdecode(path):
            return
        real = _real(path, folder)
        known = "__pycache__" in real.parts or real.parts[:2] in (("/", "dev"), ("/", "proc"))
        if not known and not any(real.is_relative_to(root) for root in writable):
            self.seen.append(f"{event} changes {real}")

    @contextmanager
    def over(self, writable: list[Path], secret: Path | None) -> Iterator[None]:
        """Listen during a block; raise if anything forbidden was heard."""
        self.seen.clear()
        self.active = ([path.resolve() for path in writable], secret.resolve() if secret else None)
        try:
            yield
        finally:
            self.active = None
        if self.seen:
            raise Fault(f"touched what it may not: {'; '.join(self.seen[:5])}")


def _is_own_process(args: tuple) -> bool:
    """The one program that conversions start: foreign chat templates run in it, under limits."""
    command = args[1] if len(args) > 1 else ()
    return isinstance(command, list) and len(command) == 3 and command[2].endswith("template_process.py")


def _real(path: Any, folder: Any) -> Path:
    """Where a path of an event leads, links followed."""
    text = os.fsdecode(path)
    if isinstance(folder, int) and folder >= 0 and not os.path.isabs(text):
        text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
    parent, name = os.path.split(os.path.abspath(text))
    real = os.path.join(os.path.realpath(parent), name)  # the last part of a removed link is the link itself
    return Path(real)


WATCH: list[Watch] = []


def watch() -> Watch:
    """The one listener of this process: hooks cannot be taken out again."""
    if not WATCH:
        WATCH.append(Watch())
    return WATCH[0]


def _memory(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _fresh_peak() -> int:
    """Let the peak of resident memory start anew; what is resident now, or 0 where the system does not allow that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return _memory("VmRSS")


@contextmanager
def limited(seconds: float, megabytes: int) -> Iterator[None]:
    """Bound address space, processor time and, far above, the clock; raise if a bound was met."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    allowed = _memory("VmSize") + (4 * megabytes + 1024) * MEGABYTE
    before, begin, hung = _fresh_peak(), time.process_time(), []

    def ring(*_: Any) -> None:
        hung.append(True)
        raise Hang

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds + 20)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
    try:
        yield
    except Hang:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    used, grown = time.process_time() - begin, (_memory("VmHWM") - before) // MEGABYTE if before else 0
    if hung or used > seconds:
        raise Fault(
            f"{used:.1f} s of processor time, {seconds} are allowed{' (stopped by the clock)' if hung else ''}"
        )
    if grown > megabytes:
        raise Fault(f"resident memory grew by {grown} MB, {megabytes} are allowed")


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Temporary files of the case stay with the case."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def run_case(case: Case, area: Area, root: Path) -> tuple[str, str]:
    """Make a case, run it, and see that nothing was executed, touched or left behind.

    Args:
        case (`Case`): Which.
        area (`Area`): Its generator and check.
        root (`Path`): A folder for all cases.

    Returns:
        Name of the generator, and `"result"` or `"error"`.

    Raises:
        Fault: With the command that replays the case.
    """
    place, kind = Place(root), "generator"
    place.prepare()
    try:
        subject = area.generate(case.rng(), case.number, place)
        kind, before = subject.kind, place.canaries()
        secret = None if area.reads_outside else place.outside
        with (
            temporary_files_in(place.temporary),
            limited(area.seconds, area.megabytes),
            watch().over(area.may_write(place), secret),
        ):
            outcome = area.check(subject, place)
        if place.marker.exists():
            raise Fault("the payload was executed")
        if place.canaries() != before:
            raise Fault("a file outside was changed")
        if any(place.temporary.iterdir()):
            raise Fault(f"temporary files stay: {[path.name for path in place.temporary.iterdir()]}")
        return kind, outcome
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        shutil.rmtree(place.marker, ignore_errors=True)
        text = str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {error}"
        raise Fault(f"{case.command} ({kind}): {text[:1500]}") from error


def run_cases(
    name: str, area: Area, root: Path, seed: int, cases: int, first: int = 0, most_faults: int = 10
) -> Counter:
    """Run some cases of a seed; all faults are shown together, each with the command that replays it.

    Args:
        name (`str`): Name of the area.
        area (`Area`): Its generator and check.
        root (`Path`): A folder for all cases.
        seed (`int`): Which cases.
        cases (`int`): How many.
        first (`int`): Number of the first one.
        most_faults (`int`): After so many it ends.

    Returns:
        Number of results and of errors.

    Raises:
        Fault: If there was one.
    """
    found, faults = Counter(), []
    for number in range(first, first + cases):
        try:
            found[run_case(Case(name, seed, number), area, root)[1]] += 1
        except Fault as fault:
            faults.append(str(fault))
            if len(faults) == most_faults:
                break
    print(f"{name}: cases {first} to {first + cases - 1} of seed {seed}: {dict(found)}")
    if faults:
        raise Fault("\n".join(faults))
    return found


def error_chain(error: BaseException) -> list[BaseException]:
    """An error and all that led to it."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return chain


def expect_clear(error: Exception, kinds: tuple[type[BaseException], ...] = (ValueError, OSError)) -> str:
    """The message of an error that a user can act on; anything else is a fault."""
    if not isinstance(error, kinds):
        raise Fault(f"{type(error).__name__} instead of a clear error: {str(error)[:400]}") from error
    if any(isinstance(each, builtins.MemoryError) for each in error_chain(error)):
        raise Fault(f"memory ran out on the way to: {str(error)[:400]}") from error
    text = str(error)
    if len(text) < 20 or len(text) > 20_000:
        raise Fault(f"{len(text)} characters are no clear message: {text[:200]!r}") from error
    return text

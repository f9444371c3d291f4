"""What holds for every test: one thread, fixed seeds, no network, no deprecated call into transformers."""

import atexit
import ipaddress
import logging
import os
import random
import shutil
import socket
import sys
import tempfile
from pathlib import Path


# Before torch and transformers are imported. Each xdist worker gets a folder of its own: remote code is copied there.
_HF_HOME = tempfile.mkdtemp(prefix="hires_lmm_tests_")
atexit.register(shutil.rmtree, _HF_HOME, ignore_errors=True)
for _name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_ASSETS_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT"):
    os.environ.pop(_name, None)
os.environ.update(
    HF_HOME=_HF_HOME,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))  # tests import `builders` by name

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402


torch.set_num_threads(1)


# ---- no network


class NetworkBlocked(RuntimeError):
    """A test wanted an address outside this machine. No OSError: libraries retry those in silence."""


def check_host(host: object) -> None:
    """Raise unless `host` (a name or an address) is this machine."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return
    try:
        address = ipaddress.ip_address(str(name).split("%")[0])
    except ValueError:
        address = None
    if address is None or not (address.is_loopback or address.is_unspecified):
        raise NetworkBlocked(f"a test tried to reach {name!r}; tests run without a network, use a local stand-in")


def _guard_socket(method: str, position: int) -> None:
    """Check the address in `args[position]` before a socket method runs; unix sockets carry a path and pass."""
    original = getattr(socket.socket, method)

    def guarded(self: socket.socket, *args: object) -> object:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            check_host(args[position][0])  # type: ignore[index]
        return original(self, *args)

    setattr(socket.socket, method, guarded)


def _guard_lookup(name: str) -> None:
    """Check the host before a name is looked up."""
    original = getattr(socket, name)

    def guarded(host: object, *args: object, **kwargs: object) -> object:
        check_host(host)
        return original(host, *args, **kwargs)

    setattr(socket, name, guarded)


_guard_socket("connect", 0)
_guard_socket("connect_ex", 0)
_guard_socket("sendto", -1)
_guard_lookup("getaddrinfo")
_guard_lookup("gethostbyname")


# ---- no deprecated call


class DeprecationCatcher(logging.Handler):
    """Keeps every log line that speaks of a deprecation."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower():
            self.lines.append(f"{record.name}: {message}")

    def take(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines


CATCHER = DeprecationCatcher()
for _name in ("transformers", "transformers_modules"):
    logging.getLogger(_name).addHandler(CATCHER)


@pytest.fixture(scope="session")
def deprecation_catcher() -> DeprecationCatcher:
    """The handler that collects; a test that provokes a line on purpose takes it with `.take()`."""
    return CATCHER


@pytest.fixture(autouse=True)
def fail_on_deprecated_calls():
    """Fail a test during which transformers logged a deprecation (lines from import time count for the first test)."""
    warning_once = getattr(logging.Logger, "warning_once", None)  # transformers says some things once a process
    if warning_once is not None:
        warning_once.cache_clear()
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):  # the command line silences the libraries
        logger.setLevel(level)
    lines = CATCHER.take()
    if lines:
        pytest.fail("transformers logged a deprecation:\n" + "\n".join(lines), pytrace=False)


# ---- the same numbers every time


@pytest.fixture(autouse=True)
def seed_everything():
    """Each test starts from the same random state, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# ---- nothing of transformers stays patched

TIE_WEIGHTS = PreTrainedModel.tie_weights


@pytest.fixture(autouse=True)
def _tie_weights_stays():
    """transformers swaps `tie_weights` while it loads; two loads at once would leave the stand-in there."""
    yield
    left, PreTrainedModel.tie_weights = PreTrainedModel.tie_weights, TIE_WEIGHTS
    assert left is TIE_WEIGHTS, "transformers' stand-in for tie_weights was left in place; heads would not be tied"

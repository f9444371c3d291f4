"""What holds for every test: one thread, fixed seeds, no network, no deprecated call into transformers.

pytest-socket closes the network but for this machine itself (`addopts` in pyproject.toml).
"""

import atexit
import logging
import os
import random
import shutil
import tempfile


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

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402


torch.set_num_threads(1)
settings.register_profile("quick", max_examples=150, derandomize=True, database=None, deadline=None)
settings.register_profile("long", max_examples=2000, deadline=None, print_blob=True)  # --hypothesis-profile long
settings.load_profile("quick")


class DeprecationCatcher(logging.Handler):
    """Keeps every log line that speaks of a deprecation."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower():
            self.lines.append(f"{record.name}: {message}")


CATCHER = DeprecationCatcher()
for _name in ("transformers", "transformers_modules"):
    logging.getLogger(_name).addHandler(CATCHER)


@pytest.fixture(autouse=True)
def deprecations():
    """The lines of a test in which transformers spoke of a deprecation: it fails unless it clears them."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    yield CATCHER.lines
    for logger, level in zip(loggers, levels, strict=True):  # the command line silences the libraries
        logger.setLevel(level)
    lines, CATCHER.lines = CATCHER.lines, []
    assert not lines, "transformers logged a deprecation:\n" + "\n".join(lines)


@pytest.fixture(autouse=True)
def seed_everything():
    """Each test starts from the same random state, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

"""The guards of `conftest.py` and `scripts/check_docstrings.py` really fire."""

import importlib.util
import logging
import os
import random
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch


SCRIPT = Path(__file__).parents[2] / "scripts" / "check_docstrings.py"


# ---- conftest


@pytest.mark.parametrize("address", [("host.invalid", 80), ("host.invalid", 443)])
def test_network_is_blocked(address: tuple[str, int]):
    with pytest.raises(RuntimeError, match="without a network"):
        socket.create_connection(address, timeout=1)
    with socket.socket() as tcp, pytest.raises(RuntimeError, match="without a network"):
        tcp.connect(address)
    with socket.socket(type=socket.SOCK_DGRAM) as udp, pytest.raises(RuntimeError, match="without a network"):
        udp.sendto(b"x", address)
    with pytest.raises(RuntimeError, match="without a network"):
        socket.gethostbyname(address[0])


def test_loopback_is_open():
    with socket.create_server(("127.0.0.1", 0)) as server:
        answer = threading.Thread(target=lambda: server.accept()[0].close())
        answer.start()
        with socket.create_connection(("localhost", server.getsockname()[1]), timeout=5) as client:
            assert client.recv(1) == b""
        answer.join()


@pytest.mark.parametrize("logger", ["transformers", "transformers.models.x", "transformers_modules.y"])
def test_deprecation_lines_are_caught(deprecation_catcher, logger: str):
    logging.getLogger(logger).warning("harmless")
    logging.getLogger(logger).warning("`%s` is Deprecated", "x")
    assert deprecation_catcher.take() == [f"{logger}: `x` is Deprecated"]


def test_deprecation_lines_said_once_are_caught_again(deprecation_catcher):
    from transformers.utils import logging as transformers_logging

    for _ in range(2):
        logging.Logger.warning_once.cache_clear()  # what the fixture does before each test
        transformers_logging.get_logger("transformers.x").warning_once("deprecated")
        assert deprecation_catcher.take()


def test_environment_is_offline_and_private():
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    assert "hires_lmm_tests_" in constants.HF_HOME
    assert os.environ["HF_HOME"] == constants.HF_HOME
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("run", [0, 1])
def test_seeds_are_reset_for_each_test(run: int):
    numbers = (random.random(), float(np.random.rand()), float(torch.rand(())))
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert numbers == (random.random(), float(np.random.rand()), float(torch.rand(())))


# ---- scripts/check_docstrings.py


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check_docstrings", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CLEAN = '''"""A module."""


def double(number: int) -> int:
    """Twice the number.

    Args:
        number (`int`): Any.
    """
    return getattr(vision_config, "scale", 2) * number + config.offset


class Part:
    """A part."""

    def run(self, x):
        return x


def _helper(x):
    return x


def constant() -> int:
    """No argument, no section."""
    return 1
'''

BAD = [
    ("x = 1", "the module has no docstring"),
    ('"""M."""\nclass A:\n    pass', "`A` has no docstring"),
    ('"""M."""\ndef f():\n    pass', "`f` has no docstring"),
    ('"""M."""\nif True:\n    def f():\n        pass', "`f` has no docstring"),
    ('"""M."""\ndef f(x):\n    """F."""', "no `Args:`"),
    ('"""M."""\ndef f(*, x):\n    """F."""', "no `Args:`"),
    ('"""M."""\ndef _f(x):\n    print(x)', "`print`"),
    ('"""M."""\ndef _f(x):\n    assert x', "`assert`"),
    ('"""M."""\ndef _f(self):\n    return getattr(self.config, "x", None)', "`getattr`"),
    ('"""M."""\ny = getattr(connector_config, "x", 1)', "`getattr`"),
    ('"""M."""\n' + "x = 1\n" * 600, "601 lines"),
    ('"""M."""\ndef _f():\n' + "    x = 1\n" * 80, "81 lines"),
]


def test_clean_code_has_no_fault(check):
    assert check.find_faults(CLEAN) == []


@pytest.mark.parametrize(("source", "fault"), BAD)
def test_fault_is_found(check, source: str, fault: str):
    faults = check.find_faults(source)
    assert len(faults) == 1
    assert fault in faults[0][1]


def test_caps_are_inclusive(check):
    assert check.find_faults('"""M."""\n' + "x = 1\n" * 599) == []
    docstring = '    """Long.\n' + "    text\n" * 30 + '    """\n'
    assert check.find_faults('"""M."""\ndef f():\n' + docstring + "    x = 1\n" * 79) == []


def test_exit_status(check, tmp_path: Path, capsys):
    file = tmp_path / "code.py"
    file.write_text(CLEAN)
    assert check.main([str(tmp_path)]) == 0
    file.write_text("print(1)")
    assert check.main([str(tmp_path)]) == 1
    assert "code.py:1: `print`" in capsys.readouterr().out
    (tmp_path / "nothing").mkdir()
    assert check.main([str(tmp_path / "nothing")]) == 1

"""What `conftest.py` and the pytest configuration promise for every test."""

import logging
import socket

import pytest


@pytest.mark.parametrize("logger", ["transformers.models.x", "transformers_modules.y"])
def test_a_deprecated_call_is_seen(deprecations, logger):
    logging.getLogger(logger).warning("harmless")
    logging.getLogger(logger).warning("`%s` is Deprecated", "x")
    assert deprecations == [f"{logger}: `x` is Deprecated"]
    deprecations.clear()


@pytest.mark.filterwarnings("ignore:A test tried to use socket")
def test_only_this_machine_can_be_reached():
    with socket.socket() as tcp, pytest.raises(RuntimeError, match=r"192\.0\.2\.1"):
        tcp.connect(("192.0.2.1", 80))
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()

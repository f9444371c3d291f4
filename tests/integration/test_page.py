"""The demo page: its function without a server, and a real server on this machine."""

import json
import urllib.request
from itertools import pairwise

import pytest
from PIL import Image

from builders_docs import ROOT
from hires_lmm.page import answer_question


BOARD = ROOT / "examples" / "images" / "harbour_board.png"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    from hires_lmm.conversion import compose_random
    from hires_lmm.inference import load_model, load_processor

    folder = str(compose_random(tmp_path_factory.mktemp("serve")))
    return load_model(folder), load_processor(folder)


def test_an_answer_grows_beside_its_picture(loaded):
    image = Image.open(BOARD).convert("RGB")
    steps = list(answer_question(*loaded, image, "Which ferry is cancelled?", 800, 6, 5))
    assert steps[0][0] == "" and steps[0][1] is not None
    answers = [step[0] for step in steps]
    assert all(later.startswith(earlier) for earlier, later in pairwise(answers))
    assert answers[-1]
    assert steps[-1][2] == "3072 x 2048 pixels: 1440 visual tokens, 800 read by the language model."


def test_without_a_budget_the_checkpoint_decides(loaded):
    image = Image.open(BOARD).convert("RGB").resize((300, 200))
    account = next(answer_question(*loaded, image, "x", 0, 1, 1))[2]
    assert account.startswith("300 x 200 pixels: 720 visual tokens")


@pytest.mark.parametrize(
    ("image", "question", "budget", "message"),
    [
        (None, "x", 0, "no image yet"),
        (Image.new("RGB", (50, 40)), "  ", 0, "no question yet"),
        (Image.new("RGB", (50, 40)), "x", 9, "the smallest value"),
    ],
)
def test_mistakes_are_told(loaded, image, question, budget, message):
    with pytest.raises(ValueError, match=message):
        list(answer_question(*loaded, image, question, budget, 6, 4))


def test_without_gradio_the_remedy_is_named(loaded, monkeypatch):
    import sys

    from hires_lmm.page import build_page

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"pip install -e"):
        build_page(*loaded, "x")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_server_answers(loaded, monkeypatch):
    pytest.importorskip("gradio", reason="the extra `demo` is not installed")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    from hires_lmm.page import build_page

    page = build_page(*loaded, "small")
    _, address, _ = page.launch(server_name="127.0.0.1", server_port=None, prevent_thread_lock=True, quiet=True)
    try:
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{address}config", timeout=20) as reply:
            settings = json.load(reply)
        labels = {component["props"].get("label") for component in settings["components"]}
        assert {"Image", "Question", "Answer", "Tokens", "Token budget (0 = none)"} <= labels
        with urllib.request.urlopen(address, timeout=20) as reply:
            assert reply.status == 200 and b"gradio" in reply.read()
    finally:
        page.close()

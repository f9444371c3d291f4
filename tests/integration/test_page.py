"""The demo page: its function without a server, and a real server on this machine."""

import json
import urllib.request
from itertools import pairwise

import pytest
from PIL import Image, ImageChops

from builders.docs import ROOT
from hires_lmm.inference import load_model, load_processor, map_tokens, prepare
from hires_lmm.page import answer_question
from hires_lmm.visualize import draw_token_map


BOARD = ROOT / "examples" / "images" / "harbour_board.png"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    from hires_lmm.conversion import compose_random

    folder = str(compose_random(tmp_path_factory.mktemp("serve")))
    return load_model(folder), load_processor(folder)


def test_an_answer_grows_beside_its_picture(loaded):
    image = Image.open(BOARD).convert("RGB")
    steps = list(answer_question(*loaded, image, "Which ferry is cancelled?", 800, 6, 5))
    answers = [step[0] for step in steps]
    assert all(later.startswith(earlier) for earlier, later in pairwise(answers))
    assert answers[-1] and [step[1] is None for step in steps] == [True] * (len(steps) - 1) + [False]
    assert steps[-1][2] == "3072 x 2048 pixels, 800 of 1440 visual tokens kept."


def test_the_picture_is_that_of_the_command(loaded):
    model, processor = loaded
    image = Image.open(BOARD).convert("RGB")
    picture = list(answer_question(model, processor, image, "Which ferry?", 700, 6, 1))[-1][1]
    token_map = map_tokens(model, prepare(processor, [image], "Which ferry?", max_crops=6, max_image_tokens=700))
    assert (
        ImageChops.difference(picture, draw_token_map(image, token_map, title="Which ferry?", width=1400)).getbbox()
        is None
    )


def test_words_that_the_tokenizer_does_not_know_are_named_from_the_first_piece_on():
    folder = str(ROOT / "checkpoints" / "needle-slime")
    image = Image.open(ROOT / "examples" / "images" / "needle_1.jpg")
    steps = list(answer_question(load_model(folder), load_processor(folder), image, "Which ferry is blue?", 0, 0, 4))
    assert all("does not know 'ferry'" in step[2] for step in steps)
    assert " visual tokens kept. The tokenizer" in steps[-1][2]


def test_without_a_budget_the_checkpoint_decides(loaded):
    image = Image.open(BOARD).convert("RGB").resize((300, 200))
    account = list(answer_question(*loaded, image, "x", 0, 1, 1))[-1][2]
    assert account.startswith("300 x 200 pixels, ") and account.endswith(" of 720 visual tokens kept.")


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
    with pytest.raises(ImportError, match=r"pip install .hires-lmm\[demo\]"):
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
        assert {"Image", "Question", "Answer", "Tokens", "Budget: visual tokens kept (0 = no budget)"} <= labels
        with urllib.request.urlopen(address, timeout=20) as reply:
            assert reply.status == 200 and b"gradio" in reply.read()
    finally:
        page.close()

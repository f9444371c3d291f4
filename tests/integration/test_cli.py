"""Each command as a new user would run it, wrong arguments included: output, exit status, one-line errors."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from builders_docs import ROOT
from hires_lmm.cli import app


BOARD = str(ROOT / "examples" / "images" / "harbour_board.png")
QUESTION = ["--question", "Which ferry is cancelled?"]
CROPS = ["--max-crops", "6"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from hires_lmm.demo import build_demo_checkpoint

    return str(build_demo_checkpoint(tmp_path_factory.mktemp("cli") / "checkpoint"))


def run(*arguments: object):
    """Result of one command: exit_code, stdout, stderr."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# --- start


def test_help_is_fast_and_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['hires-lmm', '--help']\n"
        "from hires_lmm_command import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'transformers', 'hires_lmm', 'numpy'} & set(sys.modules)\n"
        "assert code == 0 and not heavy, (code, heavy)\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "serve-demo" in done.stdout
    assert time.perf_counter() - start < 5  # 0.6 seconds measured on two idle cores


@pytest.mark.parametrize(
    "command",
    ["ask", "tokens", "show", "sweep", "export", "compose", "serve-demo", "convert slime", "convert to-slime"],
)
def test_every_command_has_help(command: str):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_the_entry_point_is_declared():
    assert 'hires-lmm = "hires_lmm_command:main"' in (ROOT / "pyproject.toml").read_text()


# --- ask


def test_ask_streams_an_answer_and_accounts_for_the_tokens(checkpoint):
    result = run("ask", checkpoint, BOARD, *QUESTION, "--max-new-tokens", 6, "--max-image-tokens", 700, *CROPS)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    assert "700 of 1440 tokens" in result.stderr


def test_ask_as_json_with_two_images(checkpoint):
    result = run("ask", checkpoint, BOARD, BOARD, *QUESTION, "--max-new-tokens", 4, "--max-crops", 2, "--json")
    value = json.loads(result.stdout)
    assert [image["tokens"] for image in value["images"]] == [576 + 288] * 2
    assert value["images"][0] | {"image": ""} == {
        "image": "",
        "height": 2048,
        "width": 3072,
        "tokens": 864,
        "full_tokens": 864,
    }
    assert isinstance(value["answer"], str)


def test_a_question_may_hold_the_token_that_stands_for_an_image(checkpoint):
    asked = ["--question", "What does <image> mean?", "--max-crops", 1, "--max-new-tokens", 2, "--json"]
    result = run("ask", checkpoint, BOARD, *asked)
    assert result.exit_code == 0, result.output
    assert [image["tokens"] for image in json.loads(result.stdout)["images"]] == [576 + 144]


def test_ask_in_half_precision(checkpoint):
    result = run("ask", checkpoint, BOARD, *QUESTION, "--max-new-tokens", 2, "--max-crops", 1, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output


# --- tokens


def test_tokens_as_json_agrees_with_the_processor(checkpoint):
    from hires_lmm.inference import load_processor

    sizes = ["336x336", "2048x3072", "4000X400"]
    result = run("tokens", checkpoint, *sizes, "--max-crops", 4, "--max-image-tokens", 650, "--json")
    processor = load_processor(checkpoint)
    for record in json.loads(result.stdout):
        size = record["height"], record["width"]
        assert record["tokens"] == processor.image_tokens(*size, max_crops=4)
        assert record["budget_tokens"] == processor.image_tokens(*size, max_crops=4, max_image_tokens=650)
        assert record["views"] == processor.image_processor.num_views(*size, max_crops=4)
        assert record["patch_tokens"] == 576 * record["views"]
        assert record["views"] == 1 + record["crop_rows"] * record["crop_cols"]


def test_crops_are_those_of_the_checkpoint_unless_given(checkpoint):
    from hires_lmm.inference import load_processor

    own = load_processor(checkpoint).image_tokens(2048, 3072)
    for arguments in (("tokens", checkpoint, "2048x3072", "--json"), ("tokens", "slime", "2048x3072", "--json")):
        assert json.loads(run(*arguments).stdout)[0]["tokens"] == own
    result = run("ask", checkpoint, BOARD, *QUESTION, "--max-new-tokens", 1)
    assert f"{own} of {own} tokens" in result.stderr


def test_tokens_of_the_preset_llava_next_are_those_of_transformers():
    result = run("tokens", "llava_next", "336x336", "1024x1024", "333x1999", "4000x400", "--json")
    records = json.loads(result.stdout)
    assert [record["tokens"] for record in records] == [record["llava_next"] for record in records]
    assert records[0]["llava_next"] == 1176


def test_tokens_as_a_table():
    result = run("tokens", "slime", "2048x3072", "--max-image-tokens", 900, *CROPS)
    assert all(word in result.stdout for word in ("2048 x 3072", "1440", "900", "2144", "LLaVA-NeXT"))
    assert "budget" not in run("tokens", "slime", "2048x3072").stdout


# --- show


def test_show_writes_a_picture(checkpoint, tmp_path):
    out = tmp_path / "kept.png"
    result = run("show", checkpoint, BOARD, *QUESTION, "--out", out, "--max-image-tokens", 800, "--width", 900, *CROPS)
    assert result.exit_code == 0, result.output
    assert "800 of 1440 visual tokens kept" in result.stdout
    assert Image.open(out).width == pytest.approx(900, abs=4)
    value = json.loads(run("show", checkpoint, BOARD, *QUESTION, "--out", out, "--json", *CROPS).stdout)
    assert value["tokens"] == 1440 and 576 < value["kept"] < 1440


# --- export, convert, compose: the functions are tested elsewhere; here that they are called, and one for real


def test_export_writes_a_folder_that_answers(checkpoint, tmp_path):
    result = run("export", checkpoint, tmp_path / "exported")
    assert result.exit_code == 0, result.output
    answer = run("ask", tmp_path / "exported", BOARD, *QUESTION, "--max-new-tokens", 2, "--max-crops", 1)
    assert answer.exit_code == 0, answer.output


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (
            "convert_slime",
            ["convert", "slime", "SRC", "DST", "--vision-config", "V", "--base", "B", "--dtype", "bfloat16"],
            (("SRC", Path("DST")), {"vision_config": "V", "base": "B", "dtype": "bfloat16"}),
        ),
        (
            "convert_llava_next",
            ["convert", "llava-next", "SRC", "DST"],
            (("SRC", Path("DST")), {"dtype": None}),
        ),
        ("convert_to_slime", ["convert", "to-slime", "SRC", "DST"], (("SRC", Path("DST")), {})),
        (
            "compose",
            ["compose", "--vision", "V", "--text", "T", "DST", "--preset", "monkey"],
            (("V", "T", "monkey", Path("DST")), {"dtype": None, "chat_template": None}),
        ),
    ],
)
def test_conversions_pass_their_arguments_on(function, arguments, expected, monkeypatch):
    import hires_lmm.conversion

    calls = []

    def stand_in(*args, progress, **kwargs):
        progress(1, 2, "tensors")
        calls.append((args, kwargs))

    monkeypatch.setattr(hires_lmm.conversion, function, stand_in)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert calls == [expected]


# --- mistakes


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    return tmp_path


FAILURES = {
    "no such image": (["ask", "CKPT", "nope.png", *QUESTION], "no existing file"),
    "not an image": (["ask", "CKPT", "FILES/text.png", *QUESTION], "is not an image"),
    "no such folder": (["ask", "./nowhere", BOARD, *QUESTION], "There is no folder ./nowhere"),
    "no such preset": (["tokens", "slim", "30x30"], "known presets: "),
    "no checkpoint in it": (["ask", "FILES/empty", BOARD, *QUESTION], "has no config.json"),
    "another model": (["tokens", "FILES/other", "30x30"], "holds a 'gpt2' model"),
    "budget too small": (["ask", "CKPT", BOARD, *QUESTION, "--max-image-tokens", "9"], "smallest value for this"),
    "budget too small to count": (["tokens", "CKPT", "90x90", "--max-image-tokens", "9"], "smallest value for this"),
    "too many crops": (["tokens", "CKPT", "90x90", "--max-crops", "99"], "takes from 1 to 36"),
    "no such device": (["ask", "CKPT", BOARD, *QUESTION, "--device", "toaster"], "cannot be used"),
    "no folder for the picture": (["show", "CKPT", BOARD, *QUESTION, "--out", "FILES/no/x.png"], "There is no folder"),
    "nothing to convert": (["convert", "slime", "FILES/empty", "FILES/new"], ""),
    "nothing to export": (["export", "FILES/empty", "FILES/new"], ""),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failed_work_is_one_line_and_status_1(name: str, checkpoint, files):
    arguments, message = FAILURES[name]
    places = {"CKPT": checkpoint, "FILES": str(files)}
    for key, place in places.items():
        arguments = [argument.replace(key, place) for argument in arguments]
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], result.stderr
    assert "Traceback" not in result.stderr


MISUSES = {
    "no such command": ["bogus"],
    "no question": ["ask", "CKPT", BOARD],
    "an empty question": ["ask", "CKPT", BOARD, "--question", "  "],
    "no image": ["ask", "CKPT", *QUESTION],
    "a malformed size": ["tokens", "slime", "3000by2000"],
    "a size of nothing": ["tokens", "slime", "0x20"],
    "a negative budget": ["tokens", "slime", "30x30", "--max-image-tokens", "-4"],
    "a number format": ["ask", "CKPT", BOARD, *QUESTION, "--dtype", "int8"],
    "a picture that is no png": ["show", "CKPT", BOARD, *QUESTION, "--out", "x.jpg"],
    "a port": ["serve-demo", "CKPT", "--port", "70000"],
}


@pytest.mark.parametrize("name", MISUSES)
def test_wrong_usage_is_status_2(name: str):
    result = run(*MISUSES[name])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr

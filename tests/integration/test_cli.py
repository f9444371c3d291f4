"""Each command as a new user would run it, wrong arguments included: output, exit status, one-line errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import hires_lmm
from builders.docs import ROOT
from hires_lmm import PRESETS
from hires_lmm.cli import app
from hires_lmm.conversion.random_model import build_byte_tokenizer
from hires_lmm.decoding import DECODINGS
from hires_lmm.inference import load_processor


NEEDLE, SCENE = str(ROOT / "checkpoints" / "needle-slime"), str(ROOT / "examples" / "images" / "needle_1.jpg")
BOARD = str(ROOT / "examples" / "images" / "harbour_board.png")
QUESTION = ["--question", "Which ferry is cancelled?"]
CROPS = ["--max-crops", "6"]
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from hires_lmm.conversion import compose_random

    return str(compose_random(tmp_path_factory.mktemp("cli") / "checkpoint"))


def run(*arguments: object):
    """Result of one command: exit_code, stdout, stderr."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# --- start


def run_apart(*arguments: object) -> tuple[str, set[str], float]:
    """Output, heavy modules and processor seconds of the installed command in a process of its own."""
    code = (
        "import resource, sys\n"
        "from hires_lmm_command import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'hires_lmm', 'numpy', 'PIL'} & set(sys.modules)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "sys.stderr.write(f'{used.ru_utime + used.ru_stime} {sorted(heavy)}')\n"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT / "src", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, _, heavy = done.stderr.partition(" ")
    return done.stdout, set(eval(heavy)), float(seconds)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "demo"),
        (["ask", "--help"], "--max-image-tokens"),
        (["--version"], f"hires-lmm {hires_lmm.__version__}, transformers {transformers.__version__}, torch "),
        (["tokens", "slime", "2048x3072", "--max-crops", 6, "--max-image-tokens", 900], " 900 "),
        (["tokens", NEEDLE, "1536x1536"], " 208 "),
    ],
    ids=["help", "help of a command", "version", "tokens of a preset", "tokens of a checkpoint"],
)
def test_what_needs_no_model_is_fast_and_loads_nothing_heavy(arguments, expected):
    text, heavy, seconds = run_apart(*arguments)
    assert expected in text
    assert not heavy
    assert seconds < 1  # 0.15 to 0.4 measured


def test_using_a_model_does_not_import_the_converter():
    code = "import sys, hires_lmm.page; assert not [name for name in sys.modules if 'hires_lmm.conversion' in name]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", check=True)


@pytest.mark.parametrize(
    "command",
    ["ask", "tokens", "show", "sweep", "export", "compose", "demo", "convert slime", "convert to-slime"],
)
def test_every_command_has_help(command: str):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


# --- ask


def test_ask_streams_an_answer_and_accounts_for_the_tokens(checkpoint):
    result = run("ask", checkpoint, BOARD, *QUESTION, "--max-new-tokens", 6, "--max-image-tokens", 700, *CROPS)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()
    assert "3072 x 2048 pixels (width x height), 700 of 1440 visual tokens kept" in result.stderr
    assert "warning" not in result.stderr


def test_ask_and_show_say_alike_what_a_threshold_kept(tmp_path):
    words = ["--question", "Which digit is blue?"]
    asked, shown = (
        run("ask", NEEDLE, SCENE, *words),
        run("show", NEEDLE, SCENE, *words, "--out", tmp_path / "kept.png"),
    )
    assert asked.stdout == "3\n"
    assert asked.stderr.endswith("1536 x 1536 pixels (width x height), 167 of 208 visual tokens kept\n")
    assert shown.stdout.endswith("kept.png: 167 of 208 visual tokens kept\n")


def test_words_that_the_tokenizer_does_not_know_are_named():
    result = run("ask", NEEDLE, SCENE, *QUESTION, "--max-new-tokens", 2)
    assert "warning: The tokenizer does not know 'ferry', 'cancelled'" in result.stderr
    value = json.loads(run("ask", NEEDLE, SCENE, *QUESTION, "--max-new-tokens", 2, "--json").stdout)
    assert value["unknown_words"] == ["ferry", "cancelled"]


@pytest.mark.parametrize("name", DECODINGS)
def test_ask_decodes_as_it_is_told(checkpoint, monkeypatch, name):
    """The processor of that name, made of the model and its inputs, acts on every token."""
    made = []

    def make(model, inputs):
        made.append((model.config.model_type, inputs["input_ids"].shape[0], type(real(model, inputs)).__name__))
        return lambda ids, scores: torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([ord("x")]), 0.0)

    real = DECODINGS[name]
    monkeypatch.setitem(DECODINGS, name, make)
    words = [BOARD, *QUESTION, "--max-new-tokens", 4, *CROPS, "--decoding", name, "--json"]
    token = load_processor(checkpoint).tokenizer.decode([ord("x")])
    assert json.loads(run("ask", checkpoint, *words).stdout)["answer"] == 4 * token
    assert made == [("hires_lmm", 1, real.__name__)]


def test_ask_as_json_with_two_images(checkpoint):
    result = run("ask", checkpoint, BOARD, BOARD, *QUESTION, "--max-new-tokens", 4, "--max-crops", 2, "--json")
    value = json.loads(result.stdout)
    kept = [image["kept_tokens"] for image in value["images"]]
    assert all(576 < number < 864 for number in kept) and value["unknown_words"] == []
    assert value["images"][0] == {
        "image": BOARD,
        "height": 2048,
        "width": 3072,
        "visual_tokens": 864,
        "kept_tokens": kept[0],
    }
    assert isinstance(value["answer"], str)


def test_a_question_may_hold_the_token_that_stands_for_an_image(checkpoint):
    asked = ["--question", "What does <image> mean?", "--max-crops", 1, "--max-new-tokens", 2, "--json"]
    result = run("ask", checkpoint, BOARD, *asked)
    assert result.exit_code == 0, result.output
    assert [image["visual_tokens"] for image in json.loads(result.stdout)["images"]] == [576 + 144]


# --- tokens


def test_tokens_as_json_agrees_with_the_processor(checkpoint):
    from hires_lmm.inference import load_processor

    sizes = ["336x336", "2048x3072", "4000X400"]
    result = run("tokens", checkpoint, *sizes, "--max-crops", 4, "--max-image-tokens", 650, "--json")
    processor = load_processor(checkpoint)
    for record in json.loads(result.stdout):
        size = record["height"], record["width"]
        assert record["visual_tokens"] == processor.image_tokens(*size, max_crops=4)
        assert record["kept_tokens"] == processor.image_tokens(*size, max_crops=4, max_image_tokens=650)
        assert record["views"] == len(processor.image_processor.plan(*size, max_crops=4).views)
        assert record["patches"] == 576 * record["views"]
        assert record["views"] == 1 + record["crop_rows"] * record["crop_cols"]


def test_crops_are_those_of_the_checkpoint_unless_given(checkpoint):
    from hires_lmm.inference import load_processor

    own = load_processor(checkpoint).image_tokens(2048, 3072)
    for arguments in (("tokens", checkpoint, "2048x3072", "--json"), ("tokens", "slime", "2048x3072", "--json")):
        assert json.loads(run(*arguments).stdout)[0]["visual_tokens"] == own
    result = run("ask", checkpoint, BOARD, *QUESTION, "--max-new-tokens", 1)
    assert f"of {own} visual tokens kept" in result.stderr


def test_tokens_of_a_checkpoint_without_a_tokenizer(checkpoint, tmp_path):
    """Files of conversions from sources without one: the image processor has a file of its own."""
    saved = json.loads((Path(checkpoint) / "processor_config.json").read_text())["image_processor"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**saved, "max_image_tokens": 700}))
    (tmp_path / "config.json").write_text('{"model_type": "hires_lmm"}')
    record = json.loads(run("tokens", tmp_path, "2048x3072", *CROPS, "--json").stdout)[0]
    assert (record["visual_tokens"], record["kept_tokens"]) == (1440, 700)


def test_tokens_as_a_table():
    result = run("tokens", "slime", "2048x3072", "--max-image-tokens", 900, *CROPS)
    words = ("2048 x 3072", "visual tokens", "1440", "kept", "900", "2144", "LLaVA-NeXT")
    assert all(word in result.stdout for word in words)
    assert "kept" not in run("tokens", "slime", "2048x3072").stdout


# --- show


def test_show_writes_a_picture(checkpoint, tmp_path):
    out = tmp_path / "kept.png"
    result = run("show", checkpoint, BOARD, *QUESTION, "--out", out, "--max-image-tokens", 800, "--width", 900, *CROPS)
    assert result.exit_code == 0, result.output
    assert "800 of 1440 visual tokens kept" in result.stdout
    assert Image.open(out).width == pytest.approx(900, abs=4)
    value = json.loads(run("show", checkpoint, BOARD, *QUESTION, "--out", out, "--json", *CROPS).stdout)
    assert value["visual_tokens"] == 1440 and 576 < value["kept_tokens"] < 1440


# --- export, convert, compose: the functions are tested elsewhere; here that they are called, and one for real


def test_export_writes_a_folder_that_answers(checkpoint, tmp_path):
    result = run("export", checkpoint, tmp_path / "exported")
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    answer = run("ask", tmp_path / "exported", BOARD, *QUESTION, "--max-new-tokens", 2, "--max-crops", 1)
    assert answer.exit_code == 0, answer.output


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (
            "convert_released",
            ["convert", "slime", "SRC", "DST", "--vision-config", "V", "--base", "B", "--dtype", "bfloat16"],
            (("slime", "SRC", Path("DST")), {"vision_config": "V", "base": "B", "dtype": "bfloat16"}),
        ),
        (
            "convert_released",
            ["convert", "mg-llava", "SRC", "DST", "--base", "B", "--extra-tower", "C", "--chat-template", "llama3"],
            (
                ("mg-llava", "SRC", Path("DST")),
                {"base": "B", "vision_config": None, "extra_tower": "C", "chat_template": "llama3", "dtype": None},
            ),
        ),
        (
            "convert_llava_next",
            ["convert", "llava-next", "SRC", "DST"],
            (("SRC", Path("DST")), {"dtype": None}),
        ),
        ("convert_to_released", ["convert", "to-slime", "SRC", "DST"], (("slime", "SRC", Path("DST")), {})),
        (
            "compose",
            [
                *("compose", "--vision", "V", "--text", "T", "DST", "--preset", "monkey"),
                *("--extra-tower", "fine=F", "--set", "vision_feature_layer=-1"),
            ],
            (
                ("V", "T", "monkey", Path("DST")),
                {
                    "dtype": None,
                    "chat_template": None,
                    "extra_towers": {"fine": "F"},
                    "vision_feature_layer": -1,
                },
            ),
        ),
    ],
)
def test_conversions_pass_their_arguments_on(function, arguments, expected, monkeypatch):
    import hires_lmm.conversion

    calls = []

    def stand_in(*args, progress, **kwargs):
        progress(1, 2, "tensors")
        calls.append((args, kwargs))
        return {"conversion": args[0], "unused": ["a.key"], "choices": ["layer: -1"]}

    monkeypatch.setattr(hires_lmm.conversion, function, stand_in)
    monkeypatch.setattr("hires_lmm.cli._show_choices", lambda folder: None)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert calls == [expected]
    assert ("not used: a.key" in result.stderr) == ("convert" in arguments)
    assert ("layer: -1" in result.stderr) == ("compose" in arguments)


def test_compose_random_writes_what_can_be_asked_and_repeated(checkpoint, tmp_path):
    result = run("compose", "--random", tmp_path / "new")
    assert result.stdout.endswith("new; its weights are random\n"), result.output
    for name in ("model.safetensors", "config.json", "processor_config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (Path(checkpoint) / name).read_bytes()
    other = run("compose", "--random", tmp_path / "other", "--seed", 1, "--preset", "monkey")
    assert other.exit_code == 0
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (Path(checkpoint) / name).read_bytes()
    assert json.loads((tmp_path / "other" / "config.json").read_text())["planner"] == PRESETS["monkey"]["planner"]
    assert "its answers mean nothing" in (tmp_path / "new" / "README.md").read_text()


def test_compose_says_what_it_chose(tmp_path):
    tower, text = CLIPVisionConfig(**SMALL, image_size=56, patch_size=14), LlamaConfig(**SMALL, vocab_size=300)
    CLIPVisionModel(tower).save_pretrained(tmp_path / "tower")
    LlamaForCausalLM(text).save_pretrained(tmp_path / "text")
    build_byte_tokenizer().save_pretrained(tmp_path / "text")
    arguments = ["--vision", tmp_path / "tower", "--text", tmp_path / "text", "--preset", "llava_next"]
    result = run("compose", *arguments, tmp_path / "own")
    assert result.exit_code == 0, result.output
    notes = result.stderr
    assert "chat template: `chatml`\n" in notes
    assert "layer of the vision tower: -2\n" in notes
    assert "pixels: mean [0.4815, 0.4578, 0.4082], deviation [0.2686, 0.2613, 0.2758], bicubic\n" in notes
    assert "chat template: `plain`\n" in run("compose", *arguments, "--chat-template", "plain", tmp_path / "b").stderr
    own = run("compose", *arguments, "--chat-template", "{{ messages[0]['content'] }}", tmp_path / "c").stderr
    assert "chat template: the source's own\n" in own


def test_a_source_without_a_tokenizer_is_said_and_cannot_be_asked(tmp_path):
    """The golden SliME source has none: the conversion says what is missing, and asking does not die in a backend."""
    result = run("convert", "slime", ROOT / "tests" / "fixtures" / "slime_tiny", tmp_path / "out")
    assert result.exit_code == 0, result.output
    remedy = "has no tokenizer, so it cannot be asked. Put the tokenizer files of its language model"
    assert f"warning: {tmp_path / 'out'} {remedy}" in result.stderr and "chat template: none\n" in result.stderr
    asked = run("ask", tmp_path / "out", BOARD, *QUESTION)
    assert asked.exit_code == 1 and asked.stderr.startswith(f"error: {tmp_path / 'out'} {remedy}")


# --- mistakes


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "hires_lmm"}')
    (tmp_path / "planned").mkdir()
    (tmp_path / "planned" / "config.json").write_text('{"model_type": "hires_lmm"}')
    (tmp_path / "planned" / "processor_config.json").write_text('{"planner": {"name": "my_parts.Strips"}}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "hires')
    return tmp_path


SWEEP = ["sweep", "CKPT", "needle:validation", "--out", "FILES/sweep", "--data"]
FAILURES = {
    "a word for a number": ([*SWEEP, "scenes=x"], "'needle': scenes='x' is of type str; it must be of type int."),
    "a word for a field": ([*SWEEP, "grid=x"], "grid='x' is of type str; it must be of type int."),
    "no such list": ([*SWEEP, "kinds=[1]"], "The options {'kinds': [1]} do not fit NeedleOptions"),
    "a tower too few": (
        ["compose", "--vision", "V", "--text", "T", "--preset", "mg_llava", "FILES/new"],
        "extra tower 'hires', which is missing: give its folder or Hub id as extra_towers={'hires': REPO}, on the "
        "command line as --extra-tower hires=REPO.",
    ),
    "a planner of one's own": (["tokens", "FILES/planned", "30x30"], "my_parts.Strips, whose code does not run"),
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
    "no processor": (
        ["tokens", "FILES/bare", "30x30"],
        "Neither processor_config.json nor preprocessor_config.json of",
    ),
    "a broken file": (["tokens", "FILES/broken", "30x30"], "config.json of FILES/broken cannot be read as JSON"),
    "a Hub that cannot be reached": (["tokens", "owner/name", "30x30"], ""),
    "nothing to convert": (["convert", "slime", "FILES/empty", "FILES/new"], ""),
    "nothing to export": (["export", "FILES/empty", "FILES/new"], ""),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failed_work_is_one_line_and_status_1(name: str, checkpoint, files):
    arguments, message = FAILURES[name]
    places = {"CKPT": checkpoint, "FILES": str(files)}
    for key, place in places.items():
        arguments = [argument.replace(key, place) for argument in arguments]
        message = message.replace(key, place)
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
    "a decoding": ["ask", "CKPT", BOARD, *QUESTION, "--decoding", "vcd"],
    "a number format": ["ask", "CKPT", BOARD, *QUESTION, "--dtype", "int8"],
    "a picture that is no png": ["show", "CKPT", BOARD, *QUESTION, "--out", "x.jpg"],
    "a port": ["demo", "CKPT", "--port", "70000"],
    "a word too many": ["compose", "--random", "NEW", "--vision", "V"],
    "half of a model": ["compose", "NEW", "--vision", "V"],
    "nothing to compose": ["compose", "NEW"],
    "a dtype of random weights": ["compose", "--random", "NEW", "--dtype", "bfloat16"],
}


@pytest.mark.parametrize("name", MISUSES)
def test_wrong_usage_is_status_2(name: str):
    result = run(*MISUSES[name])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr

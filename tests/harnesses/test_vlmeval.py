"""VLMEvalKit with the trained needle checkpoint: answers, prompts, resuming, what failed."""

import base64
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


pytest.importorskip("vlmeval", reason="ms-vlmeval is not installed: make test-harnesses")

import needle_tasks as needle
import pandas as pd
from vlmeval.dataset import build_dataset
from vlmeval.dataset.image_mcq import ImageMCQDataset, MMMUDataset
from vlmeval.dataset.image_vqa import ImageVQADataset, MathVision
from vlmeval.dataset.image_yorn import ImageYORNDataset

import hires_lmm.evaluation.vlmeval as adapter
from hires_lmm.inference import load_model, load_processor, prepare


RIGHT = [scene["answer"] for scene in needle.SCENES]
STOCK = (ImageMCQDataset, MMMUDataset, ImageVQADataset, MathVision, ImageYORNDataset)


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch) -> Path:
    """A folder of tables, which the harness takes for its own whatever they hold."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("LMUData", str(folder))
    monkeypatch.chdir(tmp_path)
    for kind in STOCK:
        monkeypatch.setattr(kind, "DATASET_MD5", {})
    return folder


def run(name: str, *arguments: str, prompt: str = "harness", **options) -> pd.DataFrame:
    """Runs the harness in this process: its table of predictions."""
    adapter.run_vlmeval(
        str(needle.CHECKPOINT),
        "tiny",
        prompt,
        {"device": "cpu", "max_new_tokens": 16, **options},
        ["--data", name, "--mode", "infer", "--work-dir", "out", *arguments],
    )
    return read(name)


def read(name: str) -> pd.DataFrame:
    (file,) = Path("out").rglob(f"tiny_{name}.xlsx")
    table = pd.read_excel(file, keep_default_na=False)
    table["prediction"] = table["prediction"].astype(str)
    return table


@pytest.mark.parametrize("name", ["needle_openended", "POPE"])
def test_five_of_five_needle_questions_are_right(data, name):
    needle.write_tsv(data, name, needle.needle_rows())
    assert list(run(name)["prediction"]) == RIGHT


def test_five_of_five_are_right_where_an_image_stands_within_the_text():
    model = adapter.HiResLmm(str(needle.CHECKPOINT), device="cpu", max_new_tokens=16)
    for scene in needle.SCENES:
        text = [{"type": "text", "value": f"<image 1>{scene['question']}"}]
        message = MMMUDataset.split_MMMU([{"type": "image", "value": str(needle.IMAGES / scene["image"])}, *text])
        assert model.generate([part for part in message if part["value"]], "MMMU_DEV_VAL") == scene["answer"]


@pytest.fixture(scope="session")
def alone() -> list[str]:
    """One question at a time, through the processor and `generate`, without a harness."""
    folder = str(needle.CHECKPOINT)
    model, processor = load_model(folder, device="cpu"), load_processor(folder)
    found = []
    for row in needle.many_rows():
        inputs = prepare(processor, [row["image"]], row["question"]).inputs
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        found.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("share_images, encoded", [(True, 15), (False, 60)])
def test_sixty_questions_on_fifteen_images(data, monkeypatch, alone, share_images, encoded):
    askers = []
    kept = adapter.HarnessAsker
    monkeypatch.setattr(adapter, "HarnessAsker", lambda *given: askers.append(kept(*given)) or askers[-1])
    needle.write_tsv(data, "needle_openended", needle.many_rows())
    found = list(run("needle_openended", share_images=share_images, answers=str(data / "answers"))["prediction"])
    assert found == alone
    assert askers[0].counts == {"known_answers": 0, "encoded_images": encoded, "model_calls": 60}


COMMAND = [sys.executable, "-c", "from hires_lmm_command import main; main()", "vlmeval", str(needle.CHECKPOINT)]


def test_a_killed_run_goes_on(data, alone, monkeypatch):
    needle.write_tsv(data, "needle_openended", needle.many_rows())
    given = ["--name", "tiny", "--device", "cpu", "--answers", "answers", "--option", "max_new_tokens=16", "--"]
    behind = ["--data", "needle_openended", "--mode", "infer", "--work-dir", "out", "--reuse"]
    with subprocess.Popen([*COMMAND, *given, *behind]) as started:
        limit = time.monotonic() + 300
        while sum(file.read_bytes().count(b"\n") for file in Path("answers").glob("*.jsonl")) < 8:
            assert started.poll() is None and time.monotonic() < limit
            time.sleep(0.02)
        os.kill(started.pid, signal.SIGKILL)
    askers = []
    kept = adapter.HarnessAsker
    monkeypatch.setattr(adapter, "HarnessAsker", lambda *given: askers.append(kept(*given)) or askers[-1])
    assert list(run("needle_openended", "--reuse", answers="answers")["prediction"]) == alone
    assert askers[0].counts["model_calls"] < 60


class VideoData:
    """What the harness reads of a data set of videos."""

    dataset_name, fps = "needle_8frame", -1

    def __init__(self, nframe: int = 8, fps: float = -1):
        self.nframe, self.fps = nframe, fps
        self.data = pd.DataFrame({"index": range(8)})

    def build_prompt(self, number: int, video_llm: bool) -> list[dict]:
        row = needle.video_rows()[number]
        video = str(needle.ROOT / "examples" / "videos" / row["video"])
        assert video_llm
        return [{"type": "video", "value": video}, {"type": "text", "value": row["question"]}]


def test_videos_are_read_with_the_frames_that_the_data_set_asks_for(tmp_path):
    from vlmeval.inference_video import infer_data

    needle.write_frames_checkpoint(tmp_path / "frames")
    given = {"model_path": str(tmp_path / "frames"), "device": "cpu", "max_new_tokens": 6}
    model = adapter.HiResLmm(**given, num_frames=8)
    infer_data(model, "tiny", str(tmp_path), VideoData(), str(tmp_path / "out.pkl"))
    found = pd.read_pickle(tmp_path / "out.pkl")
    alone, processor = load_model(str(tmp_path / "frames"), device="cpu"), load_processor(str(tmp_path / "frames"))
    for number, row in enumerate(needle.video_rows()):
        video = str(needle.ROOT / "examples" / "videos" / row["video"])
        assert found[number] == needle.answer_clip(alone, processor, video, row["question"])
    assert model.asker.counts["encoded_images"] == 4
    for options, data, words in (
        ({}, VideoData(), "takes num_frames=8 of a video, the model has num_frames=None; pass --option num_frames=8"),
        ({"num_frames": 4}, VideoData(), "num_frames=8 of a video, the model has num_frames=4"),
        ({"fps": 2.0}, VideoData(0, 1), "takes fps=1 of a video, the model has fps=2"),
        ({"num_frames": 8}, VideoData(0, 1), "fps is not suitable"),
    ):
        other = adapter.HiResLmm(**given, **options)
        with pytest.raises(ValueError, match=words):
            infer_data(other, "tiny", str(tmp_path), data, str(tmp_path / "other.pkl"))


# --- what failed


def test_the_exit_code_says_that_something_failed(data):
    rows = needle.needle_rows()
    needle.write_tsv(
        data, "needle_openended", [{**rows[0], "image": b"no image, but long enough to be taken for one" * 9}]
    )
    given = ["--name", "tiny", "--device", "cpu", "--", "--mode", "infer", "--work-dir", "out", "--data"]
    done = subprocess.run([*COMMAND, *given, "needle_openended"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "VLMEvalKit went on without what failed" in done.stderr


def test_what_the_harness_left_out_is_an_error(data):
    with pytest.raises(ValueError, match="went on without what failed: Dataset no_such_data is not valid"):
        run("no_such_data")
    with pytest.raises(ValueError, match="hires_lmm has no option 'colour'"):
        run("no_such_data", colour="red")
    with pytest.raises(ValueError, match="prompt='short' is unknown; choose one of harness, slime"):
        adapter.HiResLmm("nowhere", prompt="short")
    with pytest.raises(ValueError, match="leave out --model and --config"):
        run("needle_openended", "--model", "other")


# --- prompts

WORD, LETTER = needle.WORD, "\n" + needle.LETTER
CHOICES = {"A": ["red"], "B": ["blue"], "hint": ["Look."]}
YES_NO = "Is it red? Please answer yes or no."
ASKED = [
    ("TextVQA_VAL", {}, "Which?" + WORD, "Which?" + WORD),
    ("GQA_TestDev_Balanced", {}, "Which?" + WORD, "Which?" + WORD),
    (
        "MMBench_DEV_EN",
        CHOICES,
        "Hint: Look.\nQuestion: Which?\nOptions:\nA. red\nB. blue\n"
        "Please select the correct answer from the options above. \n",
        f"Look.\nWhich?\nA. red\nB. blue{LETTER}",
    ),
    (
        "MMBench_DEV_CN",
        CHOICES,
        "Hint: Look.\nQuestion: Which?\nOptions:\nA. red\nB. blue\n"
        "Please select the correct answer from the options above. \n",
        "Look.\nWhich?\nA. red\nB. blue\n请直接回答选项字母。",
    ),
    (
        "ScienceQA_TEST",
        CHOICES,
        "Hint: Look.\nQuestion: Which?\nOptions:\nA. red\nB. blue\n"
        "Please select the correct answer from the options above. \n",
        f"Look.\nWhich?\nA. red\nB. blue{LETTER}",
    ),
    (
        "MME",
        {"question": ["Is it red? Please answer yes or no."]},
        "Is it red? Please answer yes or no.",
        "Is it red?" + WORD,
    ),
    (
        "POPE",
        {"question": ["Is it red? Please answer yes or no."]},
        "Is it red? Please answer yes or no.",
        "Is it red?" + WORD,
    ),
    ("AMBER", {}, "Which?\nPlease answer yes or no.", "Which?" + WORD),
    ("HallusionBench", {}, "Which?", "Which?" + WORD),
    ("MathVision", {}, "Which?", "Which?" + WORD),
]


@pytest.mark.parametrize("name, columns, harness, slime", ASKED, ids=[row[0] for row in ASKED])
def test_the_prompts_of_the_harness_and_of_the_paper(data, name, columns, harness, slime):
    row = {"image": needle.image_bytes(needle.SCENES[0]["image"], 64), "question": "Which?", "answer": "A"}
    needle.write_tsv(data, name, [row], **columns)
    dataset = build_dataset(name)
    model = adapter.HiResLmm.__new__(adapter.HiResLmm)
    model.set_dump_image(dataset.dump_image)
    line = dataset.data.iloc[0]
    assert [part["value"] for part in dataset.build_prompt(line) if part["type"] == "text"] == [harness]
    model.prompt = "slime"
    custom = model.use_custom_prompt(name)
    message = model.build_prompt(line, name) if custom else dataset.build_prompt(line)
    assert [part["value"] for part in message if part["type"] == "text"] == [slime]
    assert [part["type"] for part in message] == ["image", "text"]
    model.prompt = "harness"
    assert not model.use_custom_prompt(name)


def test_mmmu_is_interleaved_and_its_open_questions_ask_for_a_word(data):
    image = needle.image_bytes(needle.SCENES[0]["image"], 64)
    row = {"image": image, "question": "See <image 1>: which?", "answer": "A"}
    pair = str([base64.b64encode(image).decode()])
    needle.write_tsv(data, "MMMU_DEV_VAL", [row, row], image=[pair] * 2, A=["red", None], B=["blue", None])
    dataset = build_dataset("MMMU_DEV_VAL")
    model = adapter.HiResLmm.__new__(adapter.HiResLmm)
    model.set_dump_image(dataset.dump_image)
    for index, ending in enumerate([f"\nA. red\nB. blue{LETTER}", WORD]):
        message = model.build_prompt(dataset.data.iloc[index], "MMMU_DEV_VAL")
        assert [part["type"] for part in message] == ["text", "image", "text"]
        assert [message[0]["value"], message[2]["value"]] == ["See ", f": which?{ending}"]

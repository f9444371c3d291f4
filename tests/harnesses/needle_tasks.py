"""Needle questions as tasks of both harnesses, in the formats of TextVQA, POPE, MMBench and MMMU."""

import base64
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image


ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "checkpoints" / "needle-slime"
IMAGES = ROOT / "examples" / "images"
SCENES = json.loads((IMAGES / "needle_scenes.json").read_text(encoding="utf-8"))
WORD = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."

UTILS = """
def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"] + (lmms_eval_specific_kwargs or {}).get("post_prompt", "")


def visual(doc):
    return [doc["image"].convert("RGB")]


def interleaved(doc):
    before, behind = doc["question"].split("<image 1>")
    content = [{"type": "text", "text": before}] * bool(before)
    content += [{"type": "image", "url": doc["image"]}, {"type": "text", "text": behind}]
    return [{"role": "user", "content": content}]


def score(doc, results):
    return {"right": float(results[0].strip() == doc["answer"])}


def fail(doc, results):
    raise RuntimeError("this metric always fails")
"""

TASK = """task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function needle_utils.visual
doc_to_text: !function needle_utils.text
doc_to_target: answer
process_results: !function needle_utils.score
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""


def image_bytes(name: str, side: int | None = None) -> bytes:
    """The file of an image, or a smaller one."""
    if side is None:
        return (IMAGES / name).read_bytes()
    stream = BytesIO()
    with Image.open(IMAGES / name) as picture:
        picture.convert("RGB").resize((side, side)).save(stream, "PNG")
    return stream.getvalue()


def write_task(folder: Path, name: str, rows: list[dict], extra: str = "") -> None:
    """A task of lmms-eval, its file of rows and its functions; `image` of a row is the bytes of a file."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    features = Features({"image": ImageColumn(), "question": Value("string"), "answer": Value("string")})
    rows = [{**row, "image": {"bytes": row["image"], "path": None}} for row in rows]
    Dataset.from_list(rows, features=features).to_parquet(folder / f"{name}.parquet")
    (folder / "needle_utils.py").write_text(UTILS)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=folder / f"{name}.parquet") + extra)


def needle_rows(form: str = "") -> list[dict]:
    """The five committed scenes, with what a format puts behind the question."""
    rows = [{"image": image_bytes(s["image"]), "question": s["question"], "answer": s["answer"]} for s in SCENES]
    return [{**row, "question": row["question"] + form} for row in rows]


def video_rows() -> list[dict]:
    """The questions about the four committed clips, with the names of their files."""
    folder = ROOT / "examples" / "videos"
    entries = json.loads((folder / "needle_clips.json").read_text(encoding="utf-8"))
    return [{"video": entry["video"], **asked} for entry in entries for asked in entry["questions"]]


def answer_clip(model: Any, processor: Any, video: str, question: str) -> str:
    """Six tokens at most about eight frames, through the processor and `generate`, without a harness."""
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"images_kwargs": {"num_frames": 8}},
    )
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def write_frames_checkpoint(folder: Path) -> None:
    """The shipped weights with places for frames; its answers are not right, but its own."""
    from needle.runs.clips import join_clips

    layout = {"order": ["global", "crops", "frames"]}
    parts = {"adapter": {"part": "mlp"}, "map_ops": [{"part": "pool3d", "shape": [8, 4, 4]}], "layout": layout}
    model, processor = join_clips(CHECKPOINT, CHECKPOINT.parent / "halves", "llava_next", connector_config=parts)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_pans(folder: Path) -> list[dict]:
    """A camera passes over each of the five scenes, in 36 frames; questions that need no order of them."""
    import av
    import numpy as np

    rows, last = [], SCENES[-1]["steps"][1]
    for scene in SCENES:
        file, wall = (
            folder / scene["image"].replace(".jpg", ".mp4"),
            Image.open(IMAGES / scene["image"]).convert("RGB"),
        )
        corners = [(x, y) for y in range(0, wall.height, 256) for x in range(0, wall.width, 256)]
        with av.open(str(file), "w") as container:
            stream = container.add_stream("h264", rate=12)
            stream.height = stream.width = 256
            stream.pix_fmt, stream.options = "yuv444p", {"crf": "12"}
            for x, y in corners:
                shown = np.asarray(wall.crop((x, y, x + 256, y + 256)))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
            container.mux(stream.encode())
        question, answer = last if scene is SCENES[-1] else (scene["question"], scene["answer"])
        rows.append({"video": str(file), "question": question, "answer": answer})
    return rows


def write_pan_checkpoint(folder: Path) -> None:
    """The shipped checkpoint with frames in the place of crops, as docs/video.md shows."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    from hires_lmm import HiResLmmProcessor

    config = AutoConfig.from_pretrained(CHECKPOINT)
    config.connector_config.layout = {"order": ["global", "crops", "frames"]}
    for op in (*config.connector_config.view_ops, *config.connector_config.token_ops):
        op["on"] = ["crops", "frames"]
    config.video_planner = {"name": "frames", "overview": True, "num_frames": 36}
    AutoModelForImageTextToText.from_pretrained(CHECKPOINT, config=config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    HiResLmmProcessor.from_config(config, tokenizer, chat_template="chatml").save_pretrained(folder)


def many_rows(images: int = 15, side: int = 192) -> list[dict]:
    """Four questions on each of some images, the questions of an image not beside each other."""
    pictures = []
    for number in range(images):
        stream = BytesIO()
        with Image.open(IMAGES / SCENES[number % 5]["image"]) as picture:
            turned = picture.convert("RGB").resize((side + 16 * number, side)).rotate(90 * (number // 5))
        turned.save(stream, "PNG")
        pictures.append(stream.getvalue())
    questions = [scene["question"] for scene in SCENES[:4]]
    return [{"image": image, "question": question, "answer": "?"} for question in questions for image in pictures]


def write_tsv(folder: Path, name: str, rows: list[dict], **columns: list) -> None:
    """A table of VLMEvalKit."""
    table = {
        "index": list(range(len(rows))),
        "image": [base64.b64encode(row["image"]).decode() for row in rows],
        "question": [row["question"] for row in rows],
        "answer": [row["answer"] for row in rows],
        **columns,
    }
    pd.DataFrame(table).to_csv(folder / f"{name}.tsv", sep="\t", index=False)

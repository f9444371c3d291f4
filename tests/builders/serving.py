"""Checkpoints and requests for the engine, and what transformers answers to them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from builders.reload import CHANGES, SETTINGS, TEMPLATE
from builders.tiny import (
    plain_tokenizer,
    random_image,
    randomise,
    tiny_config,
    tiny_processor,
    tiny_text_config,
    tiny_vision_config,
)
from hires_lmm import HiResLmmForConditionalGeneration


ROOT = Path(__file__).parents[2]
NEEDLE = ROOT / "checkpoints" / "needle-slime"
SCENES = ROOT / "examples" / "images"
ENGINE = ROOT / "tests" / "serving" / "engine.py"
SIZES = [(100, 130), (60, 300), (200, 56), (56, 56), (300, 310), (33, 90), (150, 75), (120, 121)]
QUESTIONS = ["How many cats?", "which one is red", "Tell me more.", "where is it", "What is written on the sign?"]
BUDGETS = {"slime": 22, "llava_next": 60, "monkey": 30, "mqt": 9, "llava_uhd": 40}


def chat(processor, question: str, images: int) -> str:
    """The prompt of a question about some images."""
    parts = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)


def needle_requests(processor, folder: Path) -> list[dict]:
    """Fifteen requests about the scenes: of several sizes, two images, long texts, text only."""
    scenes = json.loads((SCENES / "needle_scenes.json").read_text())
    files = [str(SCENES / scene["image"]) for scene in scenes]
    requests = [
        {"text": chat(processor, scene["question"], 1), "images": [file], "answer": scene["answer"]}
        for scene, file in zip(scenes, files, strict=True)
    ]
    for number, size in enumerate([(700, 400), (336, 336), (200, 1100)]):
        file = folder / f"{number}.png"
        random_image(*size, seed=number).save(file)
        requests.append({"text": chat(processor, scenes[number]["question"], 1), "images": [str(file)]})
    for pair in (files[:2], files[3:5]):
        requests.append({"text": chat(processor, "which digit is blue ?", 2), "images": pair})
    long = " ".join(scene["question"] for scene in scenes)
    requests += [{"text": chat(processor, long, 1), "images": [file]} for file in files[2:4]]
    requests += [{"text": chat(processor, question, 0), "images": []} for question in ("which digit is blue ?", long)]
    return [*requests, {"text": chat(processor, "where is the red object ?", 1), "images": files[:1]}]


def tiny_requests(processor, folder: Path, pairs: bool = True) -> list[dict]:
    """Fifteen requests to a random model."""
    files = []
    for number, size in enumerate(SIZES):
        files.append(str(folder / f"{number}.png"))
        random_image(*size, seed=number).save(files[-1])
    requests = [
        {"text": chat(processor, QUESTIONS[number % 5], 1), "images": [file]} for number, file in enumerate(files)
    ]
    if pairs:
        requests += [{"text": chat(processor, QUESTIONS[k], 2), "images": files[k : k + 2]} for k in (0, 3)]
    requests += [{"text": chat(processor, QUESTIONS[k], 0), "images": []} for k in (1, 4)]
    long = " ".join(QUESTIONS * 6)
    requests += [{"text": chat(processor, long, 1), "images": files[k : k + 1]} for k in (2, 5, 7)]
    return requests


def save_tiny(preset: str, folder: Path, tie: bool = False, **connector) -> Path:
    """A random checkpoint of a preset with heads of 32, which is what engines have kernels for, and an untied head."""
    text = tiny_text_config(
        "llama", hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32, tie_word_embeddings=tie
    )
    changes = dict(CHANGES.get(preset, {}))
    if connector:
        changes["connector_config"] = {**changes.get("connector_config", {}), **connector}
    vision = tiny_vision_config("clip", hidden_size=64, num_attention_heads=2)
    config = tiny_config(preset, vision, text, **changes)
    processor = tiny_processor(config, "chatml" if preset == "fusion" else TEMPLATE)
    settings = {name: value for name, value in SETTINGS[preset].items() if name in ("max_crops",)}
    for name, value in settings.items():
        setattr(processor.image_processor, name, value)
    model = randomise(HiResLmmForConditionalGeneration(config)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = plain_tokenizer().pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def expected(folder: Path, requests: list[dict], max_tokens: int, change=None, **options) -> list[list[int]]:
    """What transformers' `generate` answers, one request at a time; `change` may change the model before."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    if change is not None:
        change(model)
    answers = []
    for request in requests:
        images = [_open(path) for path in request["images"]]
        own = {**options, **request.get("options", {})} if images else {}
        inputs = processor(images=images or None, text=request["text"], return_tensors="pt", **own)
        answer = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        answers.append(answer[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def _open(path: str):
    from PIL import Image

    return Image.open(path)


def serve(folder: Path, requests: list[dict], work: Path, max_tokens: int, **spec) -> list:
    """What the engine answers; a RuntimeError with the end of its log where it does not load."""
    done = run_engine(folder, requests, work, max_tokens, **spec)
    if done.returncode:
        raise RuntimeError(done.stderr[-6000:])
    return json.loads((work / "answers.json").read_text())


def run_engine(folder: Path, requests: list[dict], work: Path, max_tokens: int, **spec):
    """The process of an engine."""
    work.mkdir(exist_ok=True, parents=True)
    values = {"checkpoint": str(folder), "requests": requests, "max_tokens": max_tokens, **spec}
    (work / "spec.json").write_text(json.dumps(values))
    command = [sys.executable, str(ENGINE), str(work / "spec.json"), str(work / "answers.json")]
    environment = {**os.environ, "HF_HOME": os.environ["HF_HOME"]}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def cut(answers: list[list[int]], eos: int | None) -> list[list[int]]:
    """Answers up to their end."""
    return [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in answers]

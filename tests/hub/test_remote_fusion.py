"""A saved fusion checkpoint chats in a process that cannot import the package, with the prefix kept between turns."""

import json
import os
import subprocess
import sys

import torch

from builders import GEOMETRY, random_image
from builders.chat import QUESTIONS, chat, fusion_setup, inputs_of
from hires_lmm.modeling.compat_hires_lmm import CACHE


WORKER = """
import json, sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache
folder, out, CACHE = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image, chats = Image.open(out + "/image.png"), json.load(open(out + "/chats.json"))
found, features, lengths = [], None, []
cache = DynamicCache(config=model.config.get_text_config())
model.model.connector.token_ops[0].model.register_forward_pre_hook(
    lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
)
with torch.no_grad():
    for messages in chats:
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        batch = processor(text=[text], images=[image], return_tensors="pt")
        if features is None:
            names = ("pixel_values", "view_positions", "view_boxes", "view_spans")
            features = model.get_image_features(**{name: batch[name] for name in names}, return_dict=True)
        ids, mask = batch["input_ids"][:, cache.get_seq_length():], batch["attention_mask"]
        told = {"input_ids": ids, "attention_mask": mask, "mm_encoder_outputs": {"image": features}, CACHE: cache}
        found.append(model(**told).logits)
assert "hires_lmm" not in sys.modules
torch.save({"logits": found, "lengths": lengths}, out + "/found.pt")
model.save_pretrained(out + "/again")
processor.save_pretrained(out + "/again")
"""


def run_worker(folder, work) -> dict:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "COV"))}
    environment = {**kept, "HF_HOME": str(work / "hf_home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", WORKER, str(folder), str(work), CACHE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=work, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(work / "found.pt")


@torch.no_grad()
def test_two_turns_and_a_second_save(tmp_path):
    model, processor = fusion_setup()
    folder, work = tmp_path / "checkpoint", tmp_path / "work"
    work.mkdir()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    image = random_image(100, 130)
    image.save(work / "image.png")
    (work / "chats.json").write_text(json.dumps([chat(1), chat(2)]))
    expected = []
    for turns in (1, 2):
        batch = inputs_of(processor, turns, image, QUESTIONS)
        expected.append(model(**{name: batch[name] for name in ("input_ids", "attention_mask", *GEOMETRY)}).logits)
    for source in (folder, work / "again"):
        found = run_worker(source, work)
        for one, other in zip(found["logits"], expected, strict=True):  # the second turn reads its own ids only
            torch.testing.assert_close(one, other[:, -one.shape[1] :], atol=2e-5, rtol=1e-4)
        assert len(found["lengths"]) == 2 and found["lengths"][1] < 40 < found["lengths"][0]

"""Checkpoints of all presets, families and number formats, what they must give, and processes that load them."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from builders.tiny import (
    TEXT_FAMILIES,
    VISION_FAMILIES,
    random_image,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_text_config,
)


ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "hub" / "reload_worker.py"
QUESTION = "How many cats are on the table?"
SIZE = (100, 130)
SIZES = [(100, 130), (60, 300), (200, 56)]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}> {% for part in m.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}\n{% endfor %}own> "
)
COMPRESS = {"part": "query_compressor", "on": "crops", "num_queries": 4}
CHANGES = {
    "slime": {"connector_config": {"view_ops": [COMPRESS]}},
    "slime_release": {
        "connector_config": {
            "view_ops": [COMPRESS],
            "layout": {"separators": {"separator": {"place": "between_views", "value": [198]}}},
        }
    },
    "monkey": {"connector_config": {"view_ops": [{**COMPRESS, "on": "all"}]}},
    "llava_uhd": {
        "connector_config": {
            "view_ops": [{"part": "uhd_resampler", "num_queries": 9, "num_heads": 2}],
            "layout": {
                "order": ["crops", "global"],
                "crop_order": "views",
                "separators": {
                    "comma": {"place": "crop_column", "value": [198], "on": "crops"},
                    "newline": {"place": "crop_row_end", "value": [199], "on": "crops"},
                },
            },
        }
    },
    "hires_llava": {
        "connector_config": {
            "view_ops": [{"part": "self_mining_sampler", "pool": [2, 3], "num_heads": 2}],
            "layer_ops": [{"part": "slice_restore", "num_heads": 2}],
        }
    },
    "mqt": {"connector_config": {"view_ops": [{"part": "mqt", "num_queries": 16, "num_heads": 2}]}},
    "pllava": {"connector_config": {"map_ops": [{"part": "pool3d", "shape": [4, 3, 2]}]}},
    "ts_llava": {
        "planner": {"name": "llava_next", "pinpoints": [[56, 112], [112, 56], [112, 112]]},
        "connector_config": {"view_ops": [{"part": "sample_tokens", "number": 20}]},
    },
    "slime_video": {
        "connector_config": {
            "view_ops": [{"part": "mean_global"}, {**COMPRESS, "on": ["crops", "frames"]}],
            "layout": {
                "order": ["global", "crops", "frames"],
                "separators": {"separator": {"place": "between_views", "value": [198]}},
            },
        },
    },
}
SETTINGS = {  # of the image processor, each different from what the preset would give
    "llava_next": {"max_image_tokens": 40},
    "llava_hd": {"background": [10, 20, 30], "max_crops": 4},
    "slime": {"max_crops": 3, "max_image_tokens": 22},
    "slime_release": {"max_crops": 2, "pixel_limit": 70000},
    "monkey": {"image_mean": [0.1, 0.2, 0.3], "max_crops": 2},
    "fusion": {"max_crops": 4, "global_view": "pad"},
    "vlsa": {"max_crops": 4, "resample": 2},
    "mqt": {"max_image_tokens": 9, "views": "all"},
    "llava_mini": {"max_crops": 2, "unpad": True},
    "mg_llava": {"views": "all", "max_image_tokens": 30},
    "llava_uhd": {"max_crops": 6, "max_image_tokens": 40},
    "hires_llava": {"max_crops": 2, "max_image_tokens": 11},
    "inf_llava": {"max_crops": 4, "max_image_tokens": 9},
    "pllava": {"max_image_tokens": 13, "num_frames": 5},
    "ts_llava": {"max_image_tokens": 30, "num_frames": 9},
    "slime_video": {"max_crops": 2, "frame_sampling": "segments"},
}
PRESETS = tuple(SETTINGS)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """One checkpoint."""

    preset: str
    vision: str
    text: str
    dtype: str
    tied: bool
    sharded: bool

    @property
    def name(self) -> str:
        flags = ("tied" if self.tied else "untied", "sharded" if self.sharded else "whole")
        return "-".join((self.preset, self.vision, self.text, self.dtype, *flags))


DIAGONAL = [  # every preset, every family and every number format at least once
    Case("llava_next", "clip", "llama", "float32", False, False),
    Case("llava_hd", "siglip", "qwen2", "bfloat16", True, True),
    Case("slime", "clip", "qwen3", "float16", False, True),
    Case("slime_release", "siglip", "mistral", "float32", True, False),
    Case("monkey", "clip", "gemma2", "bfloat16", False, False),
    Case("fusion", "siglip", "gemma3_text", "bfloat16", True, True),
    Case("vlsa", "clip", "llama", "float16", True, False),
    Case("mqt", "siglip", "llama", "float32", True, True),
    Case("llava_mini", "clip", "qwen2", "bfloat16", False, True),
    Case("mg_llava", "siglip", "llama", "float32", False, True),
    Case("llava_uhd", "siglip", "mistral", "float32", False, True),
    Case("hires_llava", "siglip", "llama", "float16", True, True),
    Case("inf_llava", "clip", "qwen3", "bfloat16", True, False),
    Case("pllava", "siglip", "qwen2", "float32", True, False),
    Case("ts_llava", "clip", "mistral", "bfloat16", False, True),
    Case("slime_video", "siglip", "llama", "float16", True, False),
]


def matrix() -> list[Case]:
    """All presets, families and number formats; tied and sharded alternate."""
    combinations = itertools.product(PRESETS, VISION_FAMILIES, TEXT_FAMILIES, DTYPES)
    return [Case(*found, index % 2 == 0, index // 2 % 2 == 0) for index, found in enumerate(combinations)]


def case_config(preset: str, vision: str, text: str, **text_changes):
    """The tiny config of a preset."""
    return tiny_config(preset, vision, tiny_text_config(text, **text_changes), **CHANGES.get(preset, {}))


def cast(model, dtype: torch.dtype):
    """Another number format for weights and saved buffers; unsaved buffers stay, as in a model made in that format."""
    kept = {name: buffer.clone() for name, buffer in model.named_non_persistent_buffers()}
    model.to(dtype)
    for name, buffer in kept.items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, buffer)
    return model


def build(case: Case):
    """A model that was never loaded, and its processor, both with settings of their own."""
    config = case_config(case.preset, case.vision, case.text, tie_word_embeddings=case.tied)
    # fusion needs a template that marks later turns
    processor = tiny_processor(config, "chatml" if case.preset == "fusion" else TEMPLATE)
    for name, value in SETTINGS[case.preset].items():
        setattr(processor.image_processor, name, value)
    model = tiny_model(config, seed=len(case.name))
    model.config.answer_prefix_ids = [5, 208]
    model.config.vision_chunk_size = 3
    for name, value in {"max_new_tokens": 5, "repetition_penalty": 1.3, "suppress_tokens": [3]}.items():
        setattr(model.generation_config, name, value)
    return cast(model, getattr(torch, case.dtype)), processor


def texts_for(processor) -> dict:
    """What a loaded processor is asked."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    chat = processor.apply_chat_template(messages, add_generation_prompt=True)
    return {"messages": messages, "texts": [chat], "sizes": SIZES}


@torch.no_grad()
def write_reference(folder: Path, model, processor) -> dict:
    """Write what the worker compares with; return what it must report."""
    folder.mkdir(parents=True)
    image, texts = random_image(*SIZE, seed=1), texts_for(processor)
    image.save(folder / "image.png")
    (folder / "texts.json").write_text(json.dumps(texts))
    batch = dict(processor(text=texts["texts"], images=[image], return_tensors="pt"))
    logits = model(**batch).logits
    assert logits.isfinite().all() and logits[0].std(0).min() > 0
    hidden = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    torch.save({"batch": batch, "logits": logits, "hidden": hidden(**batch).last_hidden_state}, folder / "tensors.pt")
    found = {
        "chat": texts["texts"][0],
        "image_tokens": [processor.image_tokens(*size) for size in SIZES],
        "settings": processor.image_processor.to_dict(),
        "template": processor.chat_template,
        "generation": model.generation_config.to_dict(),
        "config": model.config.to_dict(),
        "answer": model.generate(**batch, max_new_tokens=5).tolist(),
    }
    return json.loads(json.dumps(found, default=str))


def write_case(case: Case, root: Path) -> tuple[dict, dict]:
    """Save a checkpoint and its reference; return the job that loads it and what it must report."""
    model, processor = build(case)
    folder, reference = root / case.name, root / "references" / case.name
    shards = {"max_shard_size": "40KB"} if case.sharded else {}
    model.save_pretrained(folder, **shards)
    processor.save_pretrained(folder)
    assert (len(list(folder.glob("*.safetensors"))) > 3) == case.sharded
    expected = write_reference(reference, model, processor)
    paths = {"folder": str(folder), "reference": str(reference)}
    return {"name": case.name, "how": "model", "tied": case.tied, **paths}, expected


def run_worker(
    jobs: list[dict], work: Path, with_package: bool, timeout: int = 600, python: str = sys.executable
) -> dict:
    """What a fresh process finds; without the package it has only the code in the folders."""
    work.mkdir(parents=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "COV"))}
    environment = {
        **kept,
        "HF_HOME": str(work / "hf_home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    (work / "jobs.json").write_text(json.dumps(jobs))
    source = str(ROOT / "src") if with_package else "-"
    command = [python, "-I", str(WORKER), source, str(work / "jobs.json"), str(work / "out.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=work, stdin=subprocess.DEVNULL, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((work / "out.json").read_text())


def settled(value):
    """Plain settings: without private entries, entries that say None, and those that saving itself writes."""
    if not isinstance(value, dict):
        return value
    own = ("auto_map", "processor_class", "transformers_version", "architectures", "dtype")
    return {
        name: settled(entry)
        for name, entry in value.items()
        if entry is not None and name not in own and not name.startswith("_")
    }


def unlike(found: dict, expected: dict, names: tuple[str, ...]) -> dict:
    """Settings that differ: name -> what was found and what was expected."""
    pairs = {name: (settled(found.get(name)), settled(expected[name])) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

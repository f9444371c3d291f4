"""A whole checkpoint of the released SliME code, number by number (the set's README tells its origin)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig

from builders.images import assert_same_views
from builders.tiny import random_image, randomise
from hires_lmm import HiResLmmConfig, HiResLmmForConditionalGeneration, HiResLmmImageProcessor
from hires_lmm.conversion import convert_released
from hires_lmm.conversion.mapping import map_backward, map_forward
from hires_lmm.conversion.slime import key_table
from hires_lmm.conversion.slime_options import connector_settings
from hires_lmm.conversion.tensors import entry_of

from .base import GoldenSet, write_set


NAME = "slime_tiny"
GOLDEN = GoldenSet(NAME, tensors="expected.safetensors")
IMAGE = -200  # stands for the image in `input_ids`
STEP = 16  # long tensors keep every 16th token, pictures every 16th pixel
WIDE = {"router_scores": 2e-4}  # sums of up to 22 cosines


def build_model(released: dict, vision: dict, image_token: int) -> HiResLmmForConditionalGeneration:
    """Our model of a released configuration."""
    text = {key: released[key] for key in LlamaConfig.__dataclass_fields__ if key in released}
    tower = {key: vision[key] for key in CLIPVisionConfig.__dataclass_fields__ if key in vision}
    for values in (text, tower):
        for name in ("dtype", "model_type", "architectures"):
            values.pop(name, None)
    config = HiResLmmConfig(
        vision_config=CLIPVisionConfig(**tower),
        text_config=LlamaConfig(**text),
        image_token_id=image_token,
        **connector_settings(released),
    )
    return HiResLmmForConditionalGeneration(config).eval()


def load_released(model: HiResLmmForConditionalGeneration, tensors: dict, released: dict) -> None:
    """Give a model the tensors of a released checkpoint, by the key table."""
    entries = {key: entry_of(tensor) for key, tensor in tensors.items()}
    mapped = map_forward(key_table(released["mm_projector_type"], released.get("mm_resampler_type")), entries)
    assert mapped.problems == []
    model.load_state_dict({name: entry.read().float() for name, entry in mapped.entries.items()}, strict=True)


def inputs_of(model: HiResLmmForConditionalGeneration, case: dict, folder: Path, backend: str = "pillow") -> dict:
    config = model.config
    planner = {"planner" if key == "name" else key: value for key, value in config.planner.items()}
    processor = HiResLmmImageProcessor(
        view_size=config.view_size, patch_size=config.patch_size, token_layout=config.token_layout(), **planner
    )
    views = processor(Image.open(folder / case["image"]), return_tensors="pt", resize_backend=backend)
    placeholders = [config.image_token_id] * int(views["view_positions"][0, 5])
    ids = [i for token in case["input_ids"] for i in (placeholders if token == IMAGE else [token])]
    return {"input_ids": torch.tensor([ids]), **views}


@torch.no_grad()
def measure(model: HiResLmmForConditionalGeneration, inputs: dict, case: dict) -> dict[str, torch.Tensor]:
    """Every number on the way, by the names of the set."""
    seen: dict = {}
    connector, layer = model.model.connector, model.config.vision_feature_layer
    parts = {"gates": connector.adapter.gate, "compressed": connector.view_ops[0], "tokens": connector.layout}
    hooks = [
        part.register_forward_hook(lambda _, args, output, name=name: seen.update({name: output}))
        for name, part in parts.items()
    ]
    output = model(**inputs, output_token_map=True)
    for hook in hooks:
        hook.remove()
    features = model.model.encode_pixels(inputs["pixel_values"], layer)
    pixels, tokens, token_map = inputs["pixel_values"], seen["tokens"].features, output.token_map
    local, after = token_map.kind == 1, len(case["input_ids"]) - 1 - case["input_ids"].index(IMAGE)
    assert int(output.kept_mask.sum()) == int(token_map.kept.sum()) + len(case["input_ids"]) - 1
    return {
        "pixel_values_mean": pixels.mean((2, 3)),
        "pixel_values_crop0": pixels[0, :, ::STEP, ::STEP],
        "pixel_values_last": pixels[-1, :, ::STEP, ::STEP],
        "vision_features_mean": features.mean(1),
        "gates": seen["gates"][0, ::STEP],
        "compressed_mean": seen["compressed"].group("crops").features.mean(1),
        "compressed_last": seen["compressed"].group("crops").features[-1, ::STEP],
        "global_tokens": tokens[: features.shape[1]][::STEP],
        "local_tokens": tokens[local][::STEP],
        "router_scores": token_map.score[local],
        "selected": token_map.kept[local].nonzero()[:, 0],
        "logits_last": output.logits[0, -1],
        "logits_text": output.logits[0, -after:],
    }


@pytest.fixture(scope="module")
def model() -> HiResLmmForConditionalGeneration:
    released = GOLDEN.json("config.json")
    used = {token for case in GOLDEN.cases for token in case["input_ids"]}
    free = next(token for token in reversed(range(released["vocab_size"])) if token not in used)
    made = build_model(released, GOLDEN.json("vision_config.json"), free)
    tensors = {
        key: value for shard in GOLDEN.folder.glob("model*.safetensors") for key, value in load_file(shard).items()
    }
    load_released(made, tensors, released)
    return made


@pytest.mark.parametrize("number", range(len(GOLDEN.cases)))
def test_every_stage(number, model):
    case = GOLDEN.cases[number]
    inputs = inputs_of(model, case, GOLDEN.folder)
    positions = inputs["view_positions"]
    assert len(positions) == case["crops"] and positions[0, 1:3].tolist() == [case["grid_h"], case["grid_w"]]
    assert inputs["pixel_values"].double().sum().item() == pytest.approx(case["pixel_sum"], abs=0.1)
    found = measure(model, inputs, case)
    assert int(found["selected"].numel()) == case["num_selected"]
    wanted = GOLDEN.under(f"case{number}.").keys() & found.keys()
    assert {"local_tokens", "router_scores", "selected", "logits_last"} <= wanted
    for name in sorted(wanted):
        GOLDEN.close(found[name], f"case{number}.{name}", atol=WIDE.get(name, 1e-4))


@pytest.mark.parametrize("number", range(len(GOLDEN.cases)))
def test_torch_resizes_so_that_the_same_tokens_are_selected_and_the_same_word_follows(number, model):
    case = GOLDEN.cases[number]
    inputs = inputs_of(model, case, GOLDEN.folder, "torch")
    pillows = inputs_of(model, case, GOLDEN.folder)["pixel_values"]
    assert_same_views(inputs["pixel_values"], pillows, "torch")
    found, wanted = measure(model, inputs, case), GOLDEN.under(f"case{number}.")
    assert torch.equal(found["selected"], wanted["selected"])
    assert found["logits_last"].argmax() == wanted["logits_last"].argmax()
    torch.testing.assert_close(found["logits_last"], wanted["logits_last"], atol=1e-2, rtol=0)


def test_the_converted_checkpoint_gives_them_without_the_package(tmp_path):
    convert_released("slime", GOLDEN.folder, tmp_path / "converted")
    worker = Path(__file__).with_name("slime_worker.py")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "COV"))}
    environment = {**kept, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", str(worker), str(tmp_path / "converted"), str(GOLDEN.folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(GOLDEN.cases)
    for result in results:
        assert result["pixels"] < 1e-5 and result["selected"] and result["greedy"], result
        assert max(result[name] for name in ("last", "text", "first_step")) <= 1e-4, result
        assert result["scores"] <= WIDE["router_scores"]
        assert result["cache"] <= 1e-4 and result["moves"] > 1e-2


# ---- a set at other sizes


def remake(folder: Path, seed: int) -> None:
    released = {
        "model_type": "llava_llama",
        "torch_dtype": "bfloat16",
        "vocab_size": 512,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "image_aspect_ratio": "anyres",
        "mm_hidden_size": 64,
        "mm_patch_merge_type": "spatial",
        "mm_projector_type": "gated",
        "mm_resampler_dim": 36,
        "mm_resampler_temp": 0.5,
        "mm_resampler_topp": 0.9,
        "mm_resampler_type": "cosine",
        "mm_vision_select_layer": -3,
        "seperator": 77,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 168,
        "patch_size": 14,
    }
    (folder / "config.json").write_text(json.dumps(released))
    (folder / "vision_config.json").write_text(json.dumps(vision))
    model = randomise(build_model(released, vision, released["vocab_size"] - 1), seed)
    entries = {name: entry_of(tensor.to(torch.bfloat16)) for name, tensor in model.state_dict().items()}
    made = map_backward(key_table("gated", "cosine"), entries).entries
    tensors = {key: entry.read().contiguous() for key, entry in made.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    load_released(model, tensors, released)
    cases, expected = [], {}
    for number, (height, width) in enumerate([(200, 300), (400, 90), (150, 151)]):
        name = f"image_{number}_{width}x{height}.png"
        random_image(height, width, seed + number).save(folder / name)
        ids = torch.randint(3, released["vocab_size"] - 2, (9 + number,)).tolist()
        case = {"image": name, "size": [width, height], "input_ids": [1, *ids[:4], IMAGE, *ids[4:]]}
        inputs = inputs_of(model, case, folder)
        found = measure(model, inputs, case)
        greedy = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
        positions = inputs["view_positions"]
        case |= {
            "crops": len(positions),
            "grid_h": int(positions[0, 1]),
            "grid_w": int(positions[0, 2]),
            "num_selected": found["selected"].numel(),
            "generated": [1, *greedy[0, inputs["input_ids"].shape[1] :].tolist()],
            "pixel_sum": inputs["pixel_values"].double().sum().item(),
        }
        cases.append(case)
        expected |= {f"case{number}.{name}": value for name, value in found.items()}
    write_set(folder, cases, expected, GOLDEN.file)

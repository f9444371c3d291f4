"""A 4 GB checkpoint in shards of 1 GB converts in the memory of one new shard, which is 0.5 GB here, and torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


GOLDEN = Path(__file__).parents[1] / "fixtures" / "slime_tiny"
LIMIT = 1.3e9  # bytes resident
SHARD = 1_000_000_000
HIDDEN, INNER, LAYERS, VOCABULARY = 2048, 8192, 22, 128000

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys, threading, time
import psutil, torch
from hires_lmm.conversion import convert_released, convert_to_released

process, peak, done = psutil.Process(), [0], []
start = process.memory_info().rss

def watch():
    while not done:
        peak[0] = max(peak[0], process.memory_info().rss)
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
begin = time.time()
if sys.argv[1] == "back":
    convert_to_released("slime", sys.argv[2], sys.argv[3], max_shard_bytes=5 * 10**8)
else:
    convert_released("slime", sys.argv[2], sys.argv[3], max_shard_bytes=5 * 10**8)
done.append(True)
print(json.dumps({"start": start, "peak": peak[0], "seconds": time.time() - begin}))
"""


def large_tensors() -> dict[str, torch.Size]:
    """Shapes of a Llama of 4 GB in bfloat16."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    for number in range(LAYERS):
        layer = f"model.layers.{number}."
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (HIDDEN,)
    return shapes


def small_tensors() -> dict[str, torch.Tensor]:
    """Tower and adapter of the golden checkpoint, widened to the language model."""
    from safetensors.torch import load_file

    found = {}
    for path in sorted(GOLDEN.glob("model-*.safetensors")):
        found |= {k: v for k, v in load_file(path).items() if "tower" in k or "projector" in k or "sampler" in k}
    root = "model.mm_projector.projection."
    found |= {f"{root}0.weight": torch.zeros(HIDDEN, 128), f"{root}0.bias": torch.zeros(HIDDEN)}
    found |= {f"{root}2.weight": torch.zeros(HIDDEN, HIDDEN), f"{root}2.bias": torch.zeros(HIDDEN)}
    return found


def write_large(folder: Path, suffix: str) -> int:
    """Write the checkpoint shard by shard; returns its size in bytes."""
    folder.mkdir()
    config = json.loads((GOLDEN / "config.json").read_text())
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
    (folder / "config.json").write_text(json.dumps({**config, **sizes, **heads}))
    (folder / "vision_config.json").write_bytes((GOLDEN / "vision_config.json").read_bytes())
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    index, shard, size, number, total = {}, small_tensors(), 0, 0, 0

    def flush() -> None:
        name = f"{stem}-{number:05d}.{suffix}"
        if suffix == "safetensors":
            save_file(shard, folder / name, {"format": "pt"})
        else:
            torch.save(shard, folder / name)
        index.update(dict.fromkeys(shard, name))

    for key, shape in large_tensors().items():
        tensor = torch.empty(shape, dtype=torch.bfloat16).fill_(0.01 * (len(index) % 7))
        if size + tensor.nbytes > SHARD:
            flush()
            shard, size, number = {}, 0, number + 1
        shard[key] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return total


def measure(*arguments: str) -> dict:
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_peak_memory(tmp_path, suffix):
    pytest.importorskip("psutil")
    total = write_large(tmp_path / "source", suffix)
    assert total > 3.9e9
    there = measure("there", str(tmp_path / "source"), str(tmp_path / "out"))
    back = measure("back", str(tmp_path / "out"), str(tmp_path / "back"))
    for name, numbers in (("there", there), ("back", back)):
        sys.stdout.write(f"{suffix} {name}: {total / 1e9:.2f} GB, {numbers}\n")
        assert numbers["peak"] < LIMIT, numbers

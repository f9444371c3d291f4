"""VLSA trained with everything it has: what is saved, what reloads where, and processes that see no image."""

import json
import os
import runpy
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForImageTextToText


pytest.importorskip("diffusers")

import vlsa_run
from builders.objectives import diffusion_parts, vlsa_parts
from builders.tiny import make_batch, random_image
from builders.training import losses
from hires_lmm.training.data.cognition import CognitionTransform, cache_codes
from hires_lmm.training.objectives import load_objectives
from launching import TESTS, run_launcher


CHILD = """
import json, sys
BLOCKED = ("hires_lmm", "triton", "diffusers")
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)
sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
folder = sys.argv[1]
batch = torch.load(folder + "/batch.pt")
model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = model.eval()(**batch["inputs"]).logits
ids = model.generate(**batch["inputs"], max_new_tokens=4, do_sample=False, pad_token_id=0)
print(json.dumps({
    "same": torch.equal(logits, batch["logits"]),
    "ids": ids.tolist(),
    "info": {key: sorted(map(str, value)) for key, value in info.items() if value},
    "children": [name for name, _ in model.named_children()],
    "tokens": processor.image_tokens(333, 555),
    "loaded": sorted({name for name in sys.modules if name.partition(".")[0] in BLOCKED}),
}))
"""


def tensors(folder) -> set[str]:
    """Names of all tensors that a checkpoint holds."""
    names = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    return names


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlsa")
    trainer = vlsa_run.run(folder, steps=2, save_strategy="steps", save_steps=2)
    trainer.save_model(str(folder / "final"))
    return folder, trainer


def test_the_run_used_everything(trained):
    _, trainer = trained
    fresh = dict(vlsa_parts()[0].named_parameters())
    moved = {name for name, parameter in fresh.items() if not torch.equal(parameter, trainer.model.state_dict()[name])}
    for part in ("model.vision_tower.", "model.connector.view_ops.", "model.language_model.", "lm_head."):
        assert any(name.startswith(part) for name in moved), part
    assert len(losses(trainer)) == 2
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["loss/reconstruction"] > 0 and entry["loss/generation"] > 0 for entry in logged)
    assert all(len(row["messages"]) == 6 for row in (trainer.train_dataset[n] for n in range(2)))


@pytest.mark.parametrize("name", ["final", "checkpoint-2"])
def test_what_is_saved_is_what_inference_needs(trained, name):
    folder, _ = trained
    expected = set(vlsa_parts()[0].state_dict())
    assert tensors(folder / name) == expected
    config = json.loads((folder / name / "config.json").read_text())
    text = json.dumps({key: value for key, value in config.items() if key != "training_stage"})
    for word in ("reconstruction", "epigone", "diffusers", "objective"):
        assert word not in text.lower(), word
    code = " ".join(file.name for file in (folder / name).glob("*.py"))
    assert "sa_perceiver" in code and "reconstruction" not in code and "cognition" not in code


def test_it_reloads_where_nothing_optional_can_be_imported(trained, tmp_path):
    folder, trainer = trained
    final, model = folder / "final", trainer.model
    assert torch.cuda.is_available() or model.device.type == "cpu"
    batch = make_batch(trainer.processing_class, [("USER: <image> a boat", [random_image(100, 180)])])
    plain = AutoModelForImageTextToText.from_pretrained(final).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        logits = plain(**batch).logits
        assert torch.equal(model.eval()(**batch).logits, logits)
    ids = plain.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    torch.set_num_threads(threads)
    torch.save({"inputs": dict(batch), "logits": logits}, final / "batch.pt")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "COV"))}
    environment = {**kept, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", CHILD, str(final)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["loaded"] == [] and result["info"] == {}
    assert result["same"] and result["ids"] == ids.tolist()
    assert result["children"] == ["model", "lm_head"] and result["tokens"] == 16


@pytest.mark.slow
def test_ddp_with_a_text_only_rank_does_not_hang(tmp_path):
    settings = {"folder": str(tmp_path), "steps": 3, "text_rank": True}
    run_launcher("ddp.yaml", [str(TESTS / "vlsa_run.py"), json.dumps(settings)])
    results = [json.loads((tmp_path / f"result-{rank}.json").read_text()) for rank in range(2)]
    assert {result["kind"] for result in results} == {"DistributedDataParallel"}
    assert len(results[0]["losses"]) == 3 and all(map(_finite, results[0]["losses"]))
    assert results[0]["sums"] == pytest.approx(results[1]["sums"], rel=1e-6)
    fresh = {name: float(p.detach().double().abs().sum()) for name, p in vlsa_parts()[0].named_parameters()}
    moved = {name for name, total in fresh.items() if abs(results[0]["sums"].get(name, total) - total) > 1e-9}
    assert any("sa_perceiver" in name or "view_ops" in name for name in moved)
    assert tensors(tmp_path / "final") == set(vlsa_parts()[0].state_dict())


def _finite(number: float) -> bool:
    return number == number and abs(number) < 1e6


@pytest.mark.slow
def test_the_recipe_runs_through_the_example(tmp_path, monkeypatch):
    """All stages of the shipped recipe, with tiny parts in place of the named ones."""
    recipe = yaml.safe_load((TESTS.parent / "examples" / "recipes" / "vlsa_llama3_8b.yaml").read_text())
    model, processor = vlsa_parts()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    parts = diffusion_parts()
    saved = {"denoiser": parts[0], "vae": parts[1]}
    for part, name in zip(parts, ("transformer", "vae", "scheduler"), strict=True):
        part.save_pretrained(tmp_path / "sd3" / name)
    images = [random_image(60 + 10 * number, 90, number) for number in range(4)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    cache_codes(vlsa_run.Brightness(), images, tmp_path / "codes", show_progress=False)
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "That one."}]
    records = [{"id": n, "image": f"{n}.png", "conversations": turns} for n in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    recipe["objectives"]["reconstruction"].update(checkpoint=str(tmp_path / "sd3"), image_size=16, rank=6)
    recipe["cognition"] = {"pixels": {"grid": [1, 2]}, "codebook": {"cache": str(tmp_path / "codes"), "block": [1, 2]}}
    recipe["arguments"].update(bf16=False, use_cpu=True, max_steps=2, dataloader_num_workers=0, save_strategy="no")
    recipe["arguments"].update(per_device_train_batch_size=2, gradient_accumulation_steps=1, disable_tqdm=True)
    recipe["stage_arguments"] = {}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ["train.py", "--recipe", str(tmp_path / "recipe.yaml"), "--model", str(tmp_path / "model")]
    command += ["--output", str(tmp_path / "out"), "--data", str(tmp_path / "data.json")]
    monkeypatch.setattr(sys, "argv", command)
    asked = []
    monkeypatch.setattr(CognitionTransform, "__call__", _listening(CognitionTransform.__call__, asked))
    runpy.run_path(str(TESTS.parent / "examples" / "train.py"), run_name="__main__")
    weights = []
    for number in ("I", "II", "III"):
        folder = tmp_path / "out" / "vlsa" / number
        assert tensors(folder / "final") == set(model.state_dict())
        weights.append(load_objectives(folder / "objectives")["reconstruction"].state_dict())
    given = {f"{name}.{key}": value for name, part in saved.items() for key, value in part.state_dict().items()}
    assert all(torch.equal(weights[0][name], value) for name, value in given.items())  # stage I: the Epigone only
    for one, other in ((0, 1), (1, 2)):  # small steps from what the stage before left, not a new start
        moved = {name for name in weights[0] if not torch.equal(weights[one][name], weights[other][name])}
        assert {name.split(".")[0] for name in moved} == {"epigone", "denoiser"}
        assert max(float((weights[one][name] - weights[other][name]).abs().max()) for name in moved) < 1e-3
    assert len(asked) == 4 and any(len(messages) > 2 for messages in asked)


def _listening(call, asked):
    """A transform that notes what it gave."""

    def listen(self, row):
        new = call(self, row)
        asked.append(new["messages"])
        return new

    return listen

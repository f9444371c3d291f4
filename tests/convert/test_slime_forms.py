"""A released checkpoint gives the same weights from every form: shards, pickles, a separate tower, LoRA, stage files.

That they give the published numbers is seen in `tests/golden/test_slime.py`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from convert_tools import (
    GOLDEN,
    convert_slime,
    golden_config,
    language_part,
    save_bin_shards,
    tensors_of,
    without_tower,
    write_json,
    write_language_model,
    write_tower,
)
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """The golden checkpoint, converted as it is."""
    folder = tmp_path_factory.mktemp("golden") / "out"
    convert_slime(GOLDEN, folder)
    return folder


def same_weights(folder: Path, converted: Path) -> None:
    ours, wanted = tensors_of(folder), tensors_of(converted)
    assert set(ours) == set(wanted)
    different = [
        key for key in wanted if ours[key].dtype != wanted[key].dtype or not torch.equal(ours[key], wanted[key])
    ]
    assert different == []


def same_settings(folder: Path, converted: Path) -> None:
    for name in ("config.json", "preprocessor_config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((converted / name).read_text())


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_bin_shards(converted, tmp_path, index):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN, source, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_bin_shards(source, tensors_of(GOLDEN), index=index)
    convert_slime(source, tmp_path / "out")
    same_weights(tmp_path / "out", converted)
    same_settings(tmp_path / "out", converted)


def test_an_old_pickle_that_cannot_be_mapped(converted, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN, source, ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(tensors_of(GOLDEN), source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert_slime(source, tmp_path / "out")
    same_weights(tmp_path / "out", converted)


def test_tower_weights_given_separately(converted, tmp_path):
    source = tmp_path / "source"
    write_json(source / "config.json", golden_config())
    save_file(without_tower(tensors_of(GOLDEN)), source / "model.safetensors", {"format": "pt"})
    tower = write_tower(tmp_path / "tower")
    convert_slime(source, tmp_path / "out", vision_config=tower)
    same_weights(tmp_path / "out", converted)
    same_settings(tmp_path / "out", converted)


def test_tower_named_by_the_released_configuration(converted, tmp_path):
    source, tower = tmp_path / "source", write_tower(tmp_path / "tower")
    write_json(source / "config.json", golden_config(mm_vision_tower=str(tower)))
    save_file(without_tower(tensors_of(GOLDEN)), source / "model.safetensors", {"format": "pt"})
    convert_slime(source, tmp_path / "out")
    same_weights(tmp_path / "out", converted)


def test_stage_files_on_a_language_model(converted, tmp_path):
    golden = tensors_of(GOLDEN)
    base = write_language_model(tmp_path / "base", language_part(golden))
    source = tmp_path / "source"
    write_json(source / "config.json", golden_config())
    buffers = ("mm_projector.mean", "mm_projector.std")  # the trainer saves parameters, not buffers
    for word in ("mm_projector", "sampler"):
        part = {key: value for key, value in golden.items() if f".{word}." in key and not key.endswith(buffers)}
        torch.save(part, source / f"{word}.bin")
    convert_slime(source, tmp_path / "out", vision_config=write_tower(tmp_path / "tower"), base=base)
    same_weights(tmp_path / "out", converted)


def lora_split(golden: dict, folder: Path, rank: int = 4, **options) -> tuple[Path, Path]:
    """A base and a LoRA folder as the released trainer writes it, whose sum is (nearly) the golden language model."""
    generator = torch.Generator().manual_seed(3)
    base, adapter = language_part(golden), {}
    scale = 2 * rank / (rank**0.5 if options.get("use_rslora") else rank)
    for key in [key for key in base if "_proj.weight" in key]:
        up = torch.randn(base[key].shape[0], rank, generator=generator) * 0.02
        down = torch.randn(rank, base[key].shape[1], generator=generator) * 0.02
        base[key] = base[key].float() - scale * up @ down
        module = "base_model.model." + key.removesuffix("weight")
        adapter |= {f"{module}lora_A.weight": down, f"{module}lora_B.weight": up}
    trained = {
        f"base_model.model.{key}": value
        for key, value in golden.items()
        if (".mm_projector." in key or ".sampler." in key)
        and not key.endswith(("pos_embed", "mm_projector.mean", "mm_projector.std"))
    }
    write_json(folder / "config.json", golden_config(_name_or_path="another/name"))
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "fan_in_fan_out": False}
    write_json(folder / "adapter_config.json", {**settings, "target_modules": ["q_proj"], **options})
    save_file(adapter, folder / "adapter_model.safetensors", {"format": "pt"})
    torch.save(trained, folder / "non_lora_trainables.bin")
    return folder, write_language_model(folder.parent / "base", base)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_split_of_the_same_weights(converted, tmp_path, rslora):
    golden = tensors_of(GOLDEN)
    source, base = lora_split(golden, tmp_path / "lora", use_rslora=rslora)
    report = convert_slime(source, tmp_path / "out", vision_config=write_tower(tmp_path / "tower"), base=base)
    assert report["form"] == "lora"
    ours, wanted = tensors_of(tmp_path / "out"), tensors_of(converted)
    assert set(ours) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(ours[key].float(), value.float(), atol=1e-6, rtol=0, msg=key)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft still asks for an old property
def test_the_merge_is_that_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    golden = tensors_of(GOLDEN)
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    source, base = lora_split(golden, tmp_path / "lora", target_modules=targets)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, source).merge_and_unload().state_dict()
    convert_slime(source, tmp_path / "out", vision_config=write_tower(tmp_path / "tower"), base=base)
    ours = tensors_of(tmp_path / "out")
    for key in [key for key in merged if "_proj.weight" in key]:
        torch.testing.assert_close(
            ours[key.replace("model.", "model.language_model.", 1)], merged[key], atol=1e-6, rtol=0
        )


def test_a_chosen_dtype(tmp_path):
    convert_slime(GOLDEN, tmp_path / "out", dtype="float16", max_shard_bytes=400_000)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.float16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = {path.name for path in (tmp_path / "out").glob("model-*.safetensors")}
    assert set(index["weight_map"].values()) == shards and len(shards) > 2
    assert all((tmp_path / "out" / name).stat().st_size < 450_000 for name in shards)

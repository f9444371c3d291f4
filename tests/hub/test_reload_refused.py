"""A checkpoint that does not fit raises and names its tensors: no model starts with random weights unnoticed."""

import json
import shutil
import threading

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PreTrainedModel

from builders.reload import case_config
from builders.tiny import tiny_model
from hires_lmm import HiResLmmForConditionalGeneration
from hires_lmm.modeling.loading_hires_lmm import HiResLmmCheckpointError


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
GATE = "model.connector.adapter.gate.gate_weight"
HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"
load = AutoModelForImageTextToText.from_pretrained


@pytest.fixture(autouse=True)
def quiet():
    """The report of transformers is no warning here: the error says it."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder, the same in shards, and the tensors."""
    root = tmp_path_factory.mktemp("refused")
    model = tiny_model(case_config("slime", "clip", "llama"))
    model.save_pretrained(root / "whole")
    model.save_pretrained(root / "shards", max_shard_size="40KB")
    model.model.save_pretrained(root / "base")
    return root, load_file(root / "whole" / "model.safetensors")


@pytest.fixture
def changed(saved, tmp_path):
    """Makes a copy of the folder with other tensors and other entries in the configuration."""

    def make(change, **entries):
        shutil.copytree(saved[0] / "whole", tmp_path / "changed")
        save_file(change(dict(saved[1])), tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
        path = tmp_path / "changed" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
        return tmp_path / "changed"

    return make


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def renamed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "name",
    [
        GATE,
        HEAD,
        EMBEDDING,
        "model.connector.view_ops.0.query_former.queries",
        "model.connector.view_ops.0.query_former.positions",
        "model.vision_tower.encoder.layers.1.mlp.fc1.bias",
        "model.language_model.layers.1.self_attn.q_proj.weight",
    ],
)
def test_a_missing_tensor(changed, name):
    with pytest.raises(HiResLmmCheckpointError, match=f"(?s)missing: {name}. .*output_loading_info=True"):
        load(changed(without(name)))


def test_a_superfluous_tensor(changed):
    name = "model.connector.token_ops.0.extra"
    with pytest.raises(HiResLmmCheckpointError, match=f"not part of the model: {name}. .*the configuration"):
        load(changed(lambda tensors: {**tensors, name: torch.ones(2)}))


def test_a_configuration_with_fewer_or_more_parts(saved):
    config = AutoConfig.from_pretrained(saved[0] / "whole")
    config.connector_config.view_ops = []
    with pytest.raises(HiResLmmCheckpointError, match=r"not part of the model: model.connector.view_ops.0"):
        load(saved[0] / "whole", config=config)
    config.connector_config.view_ops = [{"part": "query_compressor", "on": "crops", "num_queries": 4}] * 2
    with pytest.raises(HiResLmmCheckpointError, match=r"missing: model.connector.view_ops.1"):
        load(saved[0] / "whole", config=config)


def shorter(tensors):
    return {**tensors, GATE: tensors[GATE][:-1].clone()}


def test_a_tensor_of_another_shape(changed):
    folder = changed(shorter)
    text = rf"{GATE} \(\(31, 2\) in the checkpoint, \(32, 2\) in the model\).*ignore_mismatched_sizes"
    for error in (HiResLmmCheckpointError, RuntimeError, ValueError):  # the last two: what others raise and catch
        with pytest.raises(error, match=text):
            load(folder)
    with pytest.raises(HiResLmmCheckpointError, match=GATE):
        load(folder, output_loading_info=True)


def test_missing_and_superfluous_on_purpose(changed, saved):
    folder = changed(lambda tensors: {"extra": torch.ones(2), **without(GATE)(tensors)})
    model, info = load(folder, output_loading_info=True)
    assert info["missing_keys"] == {GATE} and info["unexpected_keys"] == {"extra"} and not info["mismatched_keys"]
    states = model.state_dict()
    assert states.pop(GATE).eq(0).all()
    assert all(torch.equal(tensor, saved[1][name]) for name, tensor in states.items())


@pytest.mark.parametrize("prefix", ["base_model.model.", "module.", "_orig_mod."])
def test_names_of_a_wrapped_model(changed, saved, prefix):
    folder = changed(renamed(prefix))
    pattern = {f"^{prefix}".replace(".", "[.]"): ""}
    with pytest.raises(HiResLmmCheckpointError) as caught:
        load(folder)
    assert f"begins with {prefix!r}" in str(caught.value) and f"key_mapping={pattern!r}" in str(caught.value)
    model = load(folder, key_mapping=pattern)  # the remedy of the message
    assert all(torch.equal(tensor, saved[1][name]) for name, tensor in model.state_dict().items())


def test_lora_inside_a_whole_checkpoint(changed):
    name = "model.language_model.layers.0.self_attn.q_proj"

    def wrap(tensors):
        base = {name + ".base_layer.weight": tensors.pop(name + ".weight")}
        return {**tensors, **base, name + ".lora_A.default.weight": torch.ones(2, 32)}

    with pytest.raises(HiResLmmCheckpointError, match=f"missing: {name}.weight; .*lora_A.*merge_and_unload"):
        load(changed(wrap))


def test_a_base_model_is_no_model_with_a_head(saved):
    with pytest.raises(HiResLmmCheckpointError, match=f"missing: {HEAD}. .*AutoModel"):
        load(saved[0] / "base")
    states = AutoModel.from_pretrained(saved[0] / "base").state_dict()
    whole = AutoModel.from_pretrained(saved[0] / "whole").state_dict()  # the head is left out without a word
    assert states.keys() == whole.keys() == {n.removeprefix("model.") for n in saved[1] if n != HEAD}
    for name, tensor in states.items():
        assert torch.equal(tensor, whole[name]) and torch.equal(tensor, saved[1]["model." + name])


@pytest.mark.parametrize("gone", [HEAD, EMBEDDING, None])
def test_tied_embeddings_need_one_of_the_two(changed, saved, gone):
    text = {**json.loads((saved[0] / "whole" / "config.json").read_text())["text_config"], "tie_word_embeddings": True}
    model = load(changed(without(gone), text_config=text))
    head, embedding = model.lm_head.weight, model.model.language_model.embed_tokens.weight
    if gone is None:  # both are there and differ: nothing is overwritten
        assert torch.equal(head, saved[1][HEAD]) and torch.equal(embedding, saved[1][EMBEDDING])
    else:
        left = {HEAD: EMBEDDING, EMBEDDING: HEAD}[gone]
        assert head is embedding and torch.equal(head, saved[1][left])


@pytest.mark.parametrize("dtype", ["float31", "int64", "bool", "nn", "torch.float32"])
def test_a_wrong_number_format(saved, changed, dtype):
    with pytest.raises(ValueError, match=f"dtype='{dtype}' is no floating-point format; use float32"):
        load(saved[0] / "whole", dtype=dtype)
    with pytest.raises(ValueError, match=f"dtype='{dtype}' is no floating-point format"):
        HiResLmmForConditionalGeneration.from_pretrained(saved[0] / "whole", dtype=dtype)
    with pytest.raises(ValueError, match=f"dtype='{dtype}' is no floating-point format"):
        load(changed(without(), dtype=dtype))


def drop_half(path):
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[: len(tensors) // 2]), path, metadata={"format": "pt"})


def take_first(path):
    shutil.copy(path.with_name("model-00001" + path.name[11:]), path)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage, error, text",
    [
        (drop_half, HiResLmmCheckpointError, "missing: model"),
        (take_first, HiResLmmCheckpointError, "missing"),
        (lambda path: path.unlink(), OSError, "model-00002-of"),
        (cut, SafetensorError, "not fully covered"),
        (lambda path: path.write_bytes(b""), SafetensorError, "header"),
    ],
    ids=["half", "swapped", "gone", "truncated", "empty"],
)
def test_a_damaged_shard(saved, tmp_path, damage, error, text):
    shutil.copytree(saved[0] / "shards", tmp_path / "shards")
    damage(sorted((tmp_path / "shards").glob("*.safetensors"))[1])
    with pytest.raises(error, match=text):
        load(tmp_path / "shards")


def test_an_adapter_on_a_damaged_base(saved, changed, tmp_path):
    peft = pytest.importorskip("peft")
    base = changed(without())
    wrapped = peft.get_peft_model(load(base), peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    wrapped.save_pretrained(tmp_path / "adapter")
    load(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    save_file(dict(list(whole.items())[1:]), file, metadata={"format": "pt"})
    with pytest.raises(HiResLmmCheckpointError, match=r"missing: .*lora_A"):
        load(tmp_path / "adapter")
    save_file(whole, file, metadata={"format": "pt"})
    save_file(without(GATE)(saved[1]), base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HiResLmmCheckpointError, match=f"missing: {GATE}"):
        load(tmp_path / "adapter")


def test_other_processes_of_fsdp_wait_for_the_first(saved, monkeypatch):
    """Under FSDP with efficient loading only the first process has values; the others get theirs later."""
    file = saved[0] / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    try:
        for name, value in {
            "ACCELERATE_USE_FSDP": "1",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "1",
            "LOCAL_RANK": "1",
        }.items():
            monkeypatch.setenv(name, value)
        load(saved[0] / "whole")
    finally:
        torch.distributed.destroy_process_group()


def test_two_threads_load_at_once(saved, changed):
    """What one load finds is not told to another, and transformers' own functions are back in their places."""
    tie_weights = PreTrainedModel.tie_weights
    folders, found = [saved[0] / "whole", changed(without(GATE))] * 4, {}

    def run(index):
        try:
            found[index] = load(folders[index]).dtype
        except HiResLmmCheckpointError as error:
            found[index] = str(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[index] == torch.float32) == (index % 2 == 0) for index in range(len(folders))), found
    assert all(GATE in str(found[index]) for index in range(1, len(folders), 2))
    assert PreTrainedModel.tie_weights is tie_weights, "heads of later models would not be tied"
    assert PreTrainedModel.tie_weights is tie_weights

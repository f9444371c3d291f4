"""Dense language models with experts in place of their feed-forwards: the same answers, and what is refused."""

import functools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from typer.testing import CliRunner

from builders.text import tiny_tokenizer
from builders.tiny import make_batch, randomise
from families.checks import SAMPLES, close
from families.language import family_config, family_model
from hires_lmm.cli import app
from hires_lmm.conversion import ConversionError, compose, export, upcycle


FAMILIES = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
SLOW = pytest.mark.slow
QUICK_AND_SLOW = [pytest.param(name, marks=[] if name in ("mistral", "qwen2") else SLOW) for name in FAMILIES]
SCALED = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CHANGES = {  # what the two families have other defaults for
    "llama": {"rms_norm_eps": 1e-3, "rope_parameters": {**SCALED, "original_max_position_embeddings": 64}},
    "mistral": {"sliding_window": 12, "rms_norm_eps": 1e-3},
    "qwen2": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 3e4}},
    "qwen3": {"hidden_act": "gelu", "attention_bias": True, "head_dim": 16},  # not hidden_size / heads
}


@functools.cache
def dense(family: str, depth: int = 4):
    """A dense model of ours, and its processor."""
    return family_model(family, num_hidden_layers=depth, **CHANGES[family])


def saved(family: str, folder, **options):
    """A checkpoint of ours on disk."""
    model, processor = dense(family)
    model.save_pretrained(folder, **options)
    processor.save_pretrained(folder)
    return folder


def sparse_layers(language_model) -> list[int]:
    return [number for number, layer in enumerate(language_model.layers) if hasattr(layer.mlp, "experts")]


@pytest.mark.parametrize("family", QUICK_AND_SLOW)
@torch.no_grad()
def test_a_checkpoint_with_experts_answers_as_the_dense_one(family, tmp_path):
    every = 1 if FAMILIES[family] == "mixtral" else 2
    steps = []
    source = saved(family, tmp_path / "dense", max_shard_size="40KB")
    upcycle(source, tmp_path / "out", 4, 2, every, lambda *step: steps.append(step), max_shard_bytes=50_000)
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert steps[-1][0] == steps[-1][1] and len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    config, language = model.config.text_config, model.model.language_model
    assert config.model_type == FAMILIES[family] and config.output_router_logits
    assert sparse_layers(language) == list(range(0, 4, every))
    old, processor = dense(family)
    batch = make_batch(AutoProcessor.from_pretrained(tmp_path / "out"), SAMPLES)
    assert torch.equal(batch["input_ids"], make_batch(processor, SAMPLES)["input_ids"])
    found, wanted, real = model.eval()(**batch), old(**batch).logits, batch["attention_mask"].bool()
    assert (found.logits - wanted)[real].abs().max() < 1e-5 * wanted.abs().max()
    assert found.aux_loss > 1.9  # two of four experts; balanced routers give 2
    model.generation_config = old.generation_config
    assert torch.equal(model.generate(**batch, max_new_tokens=8), old.generate(**batch, max_new_tokens=8))
    experts = language.layers[0].mlp.experts
    assert all(torch.equal(experts.down_proj[0], each) for each in experts.down_proj[1:])
    assert language.layers[0].mlp.gate.weight.std() > 0
    export(tmp_path / "out", tmp_path / "again")  # what others do with checkpoints, they do with this one


@pytest.mark.parametrize("family", QUICK_AND_SLOW)
@torch.no_grad()
def test_a_text_model_with_experts_is_that_of_transformers(family, tmp_path):
    config = family_config(family, num_hidden_layers=3, **CHANGES[family])
    old = randomise(AutoModelForCausalLM.from_config(config)).eval()
    old.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "out", experts=3, top_k=3)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and sparse_layers(model.model) == [0, 1, 2]
    ids = torch.randint(10, 300, (2, 30))
    close(model.eval()(ids).logits, old(ids).logits, family)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a boat").input_ids == tiny_tokenizer()("a boat").input_ids


@pytest.mark.parametrize(
    ("family", "changes", "options", "match"),
    [
        ("gemma2", {}, {}, "'gemma2' cannot be upcycled; llama, mistral, qwen2, qwen3 can"),
        ("mixtral", {}, {}, "'mixtral' cannot be upcycled"),
        ("llama", {}, {"every": 2}, "all layers of Mixtral, which llama becomes, have experts; leave it out"),
        ("qwen2", {}, {"every": 3}, "every=3 must be 1 to 2"),
        ("qwen2", {}, {"experts": 2, "top_k": 3}, "top_k=3 of 2 experts"),
        ("qwen3", {}, {"experts": 1, "top_k": 1}, "top_k=1 of 1 experts: give 2 experts or more"),
        ("llama", {"attention_bias": True}, {}, "q_proj.bias"),
        ("llama", {"mlp_bias": True}, {}, "gate_proj.bias"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            {},
            "attend to a window of positions",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else None,
)
def test_what_cannot_be_upcycled_is_refused_and_leaves_nothing(family, changes, options, match, tmp_path):
    AutoModelForCausalLM.from_config(family_config(family, **changes)).save_pretrained(tmp_path / "dense")
    with pytest.raises(ConversionError, match=match):
        upcycle(tmp_path / "dense", tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_the_command_writes_it_and_refuses_in_one_line(tmp_path):
    source = str(saved("qwen3", tmp_path / "dense"))
    run = CliRunner().invoke(app, ["upcycle", source, str(tmp_path / "out"), "--experts", "3", "--every", "2"])
    assert run.exit_code == 0 and "its language model is qwen3_moe" in run.output
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert (report["experts"], report["top_k"], report["every"]) == (3, 2, 2)
    run = CliRunner().invoke(app, ["upcycle", str(tmp_path / "out"), str(tmp_path / "more")])
    assert run.exit_code == 1 and "'qwen3_moe' cannot be upcycled" in run.output


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mamba2", *(pytest.param(name, marks=SLOW) for name in ("mixtral", "gpt_neox", "opt"))]
)
@torch.no_grad()
def test_compose_takes_language_models_that_name_their_halves_otherwise(family, tmp_path):
    from transformers import AutoModel

    from builders.tiny import tiny_vision_config

    tokenizer = tiny_tokenizer(image_token=False)
    text = randomise(AutoModelForCausalLM.from_config(family_config(family, vocab_size=len(tokenizer)))).eval()
    text.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    AutoModel.from_config(tiny_vision_config("clip")).save_pretrained(tmp_path / "clip")
    compose(tmp_path / "clip", tmp_path / "text", "llava_next", tmp_path / "out", chat_template="chatml")
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    ids = torch.randint(10, 300, (1, 12))
    close(model.eval()(ids).logits[..., : len(tokenizer)], text(ids).logits, family)
    assert len(model.get_input_embeddings().weight) == len(tokenizer) + 1

"""A checkpoint gives the same logits, bit for bit, in a fresh process with the package and without it.

Two processes load everything this file saves; the whole matrix is in `tests/slow/test_reload_matrix.py`.
"""

import importlib.util

import pytest
import torch

from builders.reload import DIAGONAL, Case, build, run_worker, unlike, write_case, write_reference
from builders.training import conversations, make_trainer, slime_parts
from hires_lmm.training import Stage
from hires_lmm.training.plans import FORCED_EXPERT


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
STAGE = Stage(
    "mine",
    {"connector": 1e-3, "language_model": 1e-3, "lm_head": 1e-3},
    settings={FORCED_EXPERT: None},
)
OFFLOADED = [case for case in DIAGONAL if case.preset in ("slime", "fusion", "vlsa", "llava_hd", "mg_llava")]


def job(how: str, like: dict, **changes) -> dict:
    """Another way to load what a job names."""
    return {**like, "name": f"{how}:{like['name']}", "how": how, **changes}


def write_cases(root) -> tuple[list[dict], dict]:
    """Jobs and expectations: each case, some as base models, offloaded, and cast while loading."""
    jobs, expected = [], {}
    for case in DIAGONAL:
        one, expected[case.name] = write_case(case, root)
        jobs.append(one)
        jobs.append(job("base", one))
        if case in OFFLOADED:
            jobs.append(job("disk", one, offload=str(root / "offload" / case.name)))
            jobs.append(job("cpu_offload", one))
    return jobs, expected


def write_peft(root) -> list[dict]:
    """Jobs for a base model with an adapter: attached, loaded by the folder of the adapter, merged."""
    if importlib.util.find_spec("peft") is None:
        return []
    import peft

    model, processor = build(Case("slime", "clip", "llama", "float32", False, False))
    model.save_pretrained(root / "lora_base")
    processor.save_pretrained(root / "lora_base")
    model.name_or_path = str(root / "lora_base")
    targets = r".*(language_model|connector).*\.(q_proj|v_proj|linear_1)"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["gate"])).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(root / "lora")
    write_reference(root / "references" / "lora", wrapped, processor)
    base = {"name": "lora", "folder": str(root / "lora_base"), "reference": str(root / "references" / "lora")}
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(root / "merged")
    write_reference(root / "references" / "merged", merged, processor)
    return [
        job("peft", base, adapter=str(root / "lora")),
        job("model", base, folder=str(root / "lora")),
        job("model", base, name="merged", folder=str(root / "merged"), reference=str(root / "references" / "merged")),
    ]


def write_trainer(root) -> list[dict]:
    """A job for the checkpoint folder that two steps of the Trainer leave."""
    model, processor = slime_parts()
    steps = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer(model, processor, STAGE, conversations(4), root / "run", **steps).train()
    write_reference(root / "references" / "trainer", model.eval(), processor)
    folder, reference = root / "run" / "checkpoint-2", root / "references" / "trainer"
    return [{"name": "trainer", "how": "model", "folder": str(folder), "reference": str(reference)}]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """All jobs, and what the cases must report."""
    root = tmp_path_factory.mktemp("reload")
    jobs, expected = write_cases(root)
    return jobs + write_peft(root) + write_trainer(root), expected


@pytest.fixture(scope="module")
def both(written, tmp_path_factory):
    """What the two processes found."""
    work = tmp_path_factory.mktemp("work")
    return {kind: run_worker(written[0], work / kind, kind == "package") for kind in ("package", "remote")}


@pytest.fixture(params=["package", "remote"])
def found(request, both):
    """Results of one process; a job that failed shows its traceback."""

    def get(name: str) -> dict:
        result = both[request.param][name]
        assert "exception" not in result, result["exception"]
        return result

    get.prefix = "hires_lmm." if request.param == "package" else "transformers_modules."
    return get


def check_same(result: dict, prefix: str) -> None:
    assert result["same"], f"logits differ by {result['difference']}"
    assert result["module"].startswith(prefix)
    assert {key: value for key, value in result["info"].items() if value} == {}


@pytest.mark.parametrize("case", DIAGONAL, ids=lambda case: case.name)
def test_logits_and_settings_survive(found, written, case):
    result, expected = found(case.name), written[1][case.name]
    check_same(result["model"], found.prefix)
    assert result["model"]["dtypes"] == [f"torch.{case.dtype}"]
    assert result["model"]["tied"] == case.tied
    assert unlike(result["model"], expected, ("generation", "config", "answer")) == {}
    processor = result["processor"]
    assert processor["different"] == []
    assert unlike(processor, expected, ("chat", "image_tokens", "settings", "template")) == {}
    assert processor["module"].startswith(found.prefix)


@pytest.mark.parametrize("case", DIAGONAL, ids=lambda case: case.name)
def test_the_model_without_its_head(found, case):
    result = found(f"base:{case.name}")["model"]
    assert result["same"], result["difference"]
    assert result["info"] == {}


@pytest.mark.parametrize("how", ["disk", "cpu_offload"])
@pytest.mark.parametrize("case", OFFLOADED, ids=lambda case: case.name)
def test_offloaded_weights(found, case, how):
    check_same(found(f"{how}:{case.name}")["model"], found.prefix)


@pytest.mark.parametrize("name", ["peft:lora", "model:lora", "merged"])
def test_adapters(found, name):
    pytest.importorskip("peft")
    result = found(name)["model"]
    assert result["same"], result["difference"]


def test_a_checkpoint_of_the_trainer(found):
    check_same(found("trainer")["model"], found.prefix)
    assert found("trainer")["processor"]["different"] == []

"""Language models with experts: router logits and the loss that balances them, against transformers' own classes."""

import copy
import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from builders.reload import CHANGES
from builders.tiny import make_batch, tiny_config, tiny_model, tiny_processor
from builders.trl import as_dataset, logged, preferences, trl_arguments
from families.checks import LONG, SAMPLES, TWO, close
from families.language import family_config, family_model
from hires_lmm.modeling.compat_hires_lmm import CACHE


BALANCED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "jamba", "qwen3_next")
TEXTS = [("USER: How many? ASSISTANT:", []), ("USER: A small red boat on a lake, or in the picture? ASSISTANT: A", [])]


@functools.cache
def made(family: str):
    """Model and processor; do not change them."""
    return family_model(family)


def own_class(model):
    """The language half in transformers' own class."""
    own = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.text_config)).eval()
    own.base_model.load_state_dict(model.model.language_model.state_dict())
    own.lm_head.load_state_dict(model.lm_head.state_dict())
    return own


def labelled(processor, samples) -> dict:
    """A batch with labels on all but padding and image tokens."""
    batch = make_batch(processor, samples)
    hidden = (batch["attention_mask"] == 0) | (batch["input_ids"] == processor.image_token_id)
    return {**batch, "labels": batch["input_ids"].masked_fill(hidden, -100)}


def balance(logits: list[torch.Tensor], top_k: int = 2) -> torch.Tensor:
    """The loss written out: experts, times the sum over experts of share of choices and mean probability."""
    rows = torch.cat(logits).softmax(dim=-1)
    chosen = torch.zeros_like(rows).scatter_(1, rows.topk(top_k).indices, 1.0)
    return rows.shape[1] * (chosen.mean(dim=0) * rows.mean(dim=0)).sum()


def heard(model, *batches: dict) -> list[list[torch.Tensor]]:
    """What each router says in some calls, one list a layer, by hooks of our own."""
    routers = [part for part in model.model.language_model.modules() if type(part).__name__.endswith("TopKRouter")]
    said: list[list[torch.Tensor]] = [[] for _ in routers]
    hooks = [
        router.register_forward_hook(lambda module, args, output, said=said[number]: said.append(output[0]))
        for number, router in enumerate(routers)
    ]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return said


@pytest.mark.parametrize("family", [*BALANCED, "deepseek_v3"])
@pytest.mark.parametrize("training", [False, True])
def test_loss_router_logits_and_balance_are_those_of_the_own_class(family, training):
    model, processor = made(family)
    model, own = copy.deepcopy(model).train(training), own_class(model).train(training)
    batch = labelled(processor, TEXTS)
    found, wanted = (each(**batch, output_router_logits=True) for each in (model, own))
    close(found.loss[None], wanted.loss[None], "loss")
    assert len(found.router_logits) == len(wanted.router_logits)
    for mine, theirs in zip(found.router_logits, wanted.router_logits, strict=True):
        close(mine, theirs.reshape(mine.shape), "router logits")
    if family == "deepseek_v3":
        assert found.aux_loss is None and getattr(wanted, "aux_loss", None) is None
        return
    close(found.aux_loss[None], wanted.aux_loss[None], "aux loss")
    plain = model(**batch).loss
    weight = model.config.text_config.router_aux_loss_coef
    close((plain + weight * found.aux_loss)[None], found.loss[None], "loss and its parts")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_configuration_turns_the_loss_on_and_a_keyword_off(family):
    model, processor = family_model(family, output_router_logits=True, router_aux_loss_coef=0.5)
    batch = labelled(processor, SAMPLES)
    on, off = model(**batch), model(**batch, output_router_logits=False)
    assert off.aux_loss is None and off.router_logits is None
    close((off.loss + 0.5 * on.aux_loss)[None], on.loss[None], "loss")
    model.train()(**batch).aux_loss.backward()
    assert all(part.grad.any() for name, part in model.named_parameters() if name.endswith("gate.weight"))


@torch.no_grad()
def test_what_a_threshold_drops_is_not_counted():
    config = tiny_config("slime", text=family_config("mixtral"), **CHANGES["slime"])
    model, processor = tiny_model(config), tiny_processor(config)
    samples = [LONG, TWO]
    found = model(**make_batch(processor, samples), output_router_logits=True)
    assert not found.kept_mask.all()
    said = heard(model, *(make_batch(processor, [sample]) for sample in samples))
    close(found.aux_loss[None], balance([part for layer in said for part in layer])[None], "aux loss")
    counted = sum(map(len, said[0]))
    assert counted == int(found.packed_attention_mask.sum()) < found.kept_mask.numel()
    for logits in found.router_logits:  # as the states: a dropped position repeats the kept one before it
        shown = logits.view(*found.kept_mask.shape, -1)
        dropped = (~found.kept_mask[:, 1:]).nonzero()
        assert len(dropped) and all(torch.equal(shown[row, at + 1], shown[row, at]) for row, at in dropped.tolist())


@torch.no_grad()
@pytest.mark.parametrize("hides", [False, True])
def test_what_layer_ops_let_leave_is_not_counted_from_that_layer_on(hides):
    config = tiny_config(
        "llava_next",
        text=family_config("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[1]),
        connector_config={"layer_ops": [{"part": "keep_after", "layers": 1}]},
    )
    model, processor = tiny_model(config), tiny_processor(config)
    samples = [LONG, TWO]
    batch = make_batch(processor, samples)
    found = model(**batch, output_router_logits=True, output_hidden_states=hides)
    said = heard(model, *(make_batch(processor, [sample]) for sample in samples))
    lengths = [sum(map(len, layer)) for layer in said]
    assert len(said) == 3 and lengths[0] == int(batch["attention_mask"].sum()) > lengths[1] == lengths[2]
    close(found.aux_loss[None], balance([part for layer in said for part in layer])[None], "aux loss")
    assert {tuple(part.shape) for part in found.router_logits} == {(batch["input_ids"].numel(), 4)}


@torch.no_grad()
def test_router_logits_of_a_step_behind_a_cache_count_the_step():
    model, processor = made("mixtral")
    batch = make_batch(processor, SAMPLES)
    cache = model(**batch, use_cache=True)[CACHE]
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 1, dtype=torch.long)], dim=1)
    step = model(input_ids=torch.full((4, 1), 20), attention_mask=mask, cache=cache, output_router_logits=True)
    close(step.aux_loss[None], balance(list(step.router_logits))[None], "aux loss")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # by TRL
@pytest.mark.filterwarnings("ignore::UserWarning:trl")
@pytest.mark.parametrize(("trainer", "family"), [("DPO", "mixtral"), ("DPO", "qwen3_moe"), ("SFT", "mixtral")])
def test_trl_logs_the_loss_that_balances_experts(trainer, family, tmp_path):
    trl = pytest.importorskip("trl")
    config = tiny_config("llava_next", text=family_config(family, router_aux_loss_coef=0.01))
    processor = tiny_processor(config, "chatml")
    rows = preferences([1, 1])
    if trainer == "SFT":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"], "images": row["images"]} for row in rows]
    model = tiny_model(config)
    config_class, trainer_class = getattr(trl, f"{trainer}Config"), getattr(trl, f"{trainer}Trainer")
    reference = {"ref_model": copy.deepcopy(model)} if trainer == "DPO" else {}
    run = trainer_class(
        model=model,
        **reference,
        args=trl_arguments(config_class, tmp_path, max_length=None),
        train_dataset=as_dataset(rows),
        processing_class=processor,
    )
    batch = next(iter(run.get_train_dataloader()))
    batch.pop("labels", None)
    inputs = {name: part for name, part in batch.items() if name != "completion_mask"}
    with torch.no_grad():
        wanted = model.eval()(**inputs, output_router_logits=True).aux_loss
    run.train()
    assert logged(run, "aux_loss")[0] == pytest.approx(float(wanted), rel=1e-4)
    if trainer == "DPO":
        assert logged(run)[0] == pytest.approx(0.6931 + 0.01 * float(wanted), abs=1e-3)

"""State-space models and hybrids as language model: what every mode of generate gives, and what is refused by name.

Batches, caches, dropped tokens, training and reloading are checked in `tests/families`.
"""

import copy
import functools

import pytest
import torch

from builders.sketches import HalfSteps
from builders.tiny import make_batch, tiny_config, tiny_model
from families.checks import LONG, SAMPLES, close
from families.language import STATES, family_config, family_model
from hires_lmm.modeling.compat_hires_lmm import CACHE
from hires_lmm.training.settings import set_options


ALONE, FORGETFUL = ("mamba", "mamba2"), ("mamba", "jamba")
SHORT = 5


@functools.cache
def made(family: str):
    """Model, processor, a batch of four rows and one of one."""
    model, processor = family_model(family)
    return model, processor, make_batch(processor, SAMPLES), make_batch(processor, [LONG])


@functools.cache
def answer(family: str) -> torch.Tensor:
    """What greedy search gives for one row."""
    model, _, _, one = made(family)
    return model.generate(**one, max_new_tokens=SHORT)


@pytest.mark.parametrize("family", STATES)
def test_sampling_and_beams_of_a_batch_are_those_of_its_rows(family):
    model, processor, batch, _ = made(family)
    drawn = [model.generate(**batch, max_new_tokens=SHORT, do_sample=True, top_k=1)[:, -SHORT:]]
    drawn += [model.generate(**batch, max_new_tokens=SHORT, num_beams=2, num_return_sequences=2)[::2, -SHORT:]]
    for row, sample in enumerate(SAMPLES):
        alone = make_batch(processor, [sample])
        assert torch.equal(drawn[0][row], model.generate(**alone, max_new_tokens=SHORT)[0, -SHORT:])
        assert torch.equal(drawn[1][row], model.generate(**alone, max_new_tokens=SHORT, num_beams=2)[0, -SHORT:])


@pytest.mark.parametrize("family", STATES)
def test_static_caches_hold_hybrids_and_are_refused_where_there_are_states_alone(family):
    model, _, _, one = made(family)
    if family in ALONE:
        with pytest.raises(ValueError, match=f"cache_implementation='static' .* {family!r} has states alone"):
            model.generate(**one, max_new_tokens=2, cache_implementation="static")
    else:
        assert torch.equal(model.generate(**one, max_new_tokens=SHORT, cache_implementation="static"), answer(family))


@pytest.mark.parametrize("family", STATES)
def test_drafts_are_refused_but_where_the_cache_can_be_cropped(family, deprecations):
    model, _, _, one = made(family)
    if family == "lfm2":
        assert torch.equal(model.generate(**one, max_new_tokens=SHORT, prompt_lookup_num_tokens=2), answer(family))
        return
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(**one, max_new_tokens=2, prompt_lookup_num_tokens=2)
    if family in ALONE:
        dense, _ = family_model("llama")
        with pytest.raises(ValueError, match="cannot draft as an assistant"):
            dense.generate(**one, max_new_tokens=2, assistant_model=model)
        deprecations.clear()  # of the library's own call of an assistant


@pytest.mark.parametrize("family", STATES)
@torch.no_grad()
def test_several_positions_behind_a_cache_go_on_from_its_state_or_are_refused(family):
    model, _, _, one = made(family)
    ids, whole = one["input_ids"], model(**one).logits
    start = {**one, "input_ids": ids[:, :-4], "attention_mask": one["attention_mask"][:, :-4]}
    cache = model(**start, use_cache=True)[CACHE]
    rest = {"input_ids": ids[:, -4:], "attention_mask": one["attention_mask"], "cache": cache, "use_cache": True}
    if family in FORGETFUL:
        with pytest.raises(ValueError, match="one position at a time, and the call has 4"):
            model(**rest)
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            model.generate(**one, max_new_tokens=2, prefill_chunk_size=7)
        return
    close(model(**rest).logits, whole[:, -4:], family)
    assert torch.equal(model.generate(**one, max_new_tokens=SHORT, prefill_chunk_size=7), answer(family))


@pytest.mark.parametrize("family", [family for family in STATES if family not in FORGETFUL])
def test_a_conversation_goes_on_from_a_cache(family):
    model, _, _, one = made(family)
    images = {name: part for name, part in one.items() if name not in ("input_ids", "attention_mask")}
    first = model.generate(**one, max_new_tokens=3, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[20, 21, 22]])], dim=1)
    whole = model.generate(input_ids=ids, **images, max_new_tokens=SHORT)
    if family in ALONE:
        with pytest.raises(ValueError, match="pass the new ids alone"):
            model.generate(input_ids=ids, **images, **{CACHE: copy.deepcopy(first[CACHE])}, max_new_tokens=2)
        new = {"input_ids": ids[:, -4:], "attention_mask": torch.ones_like(ids)}  # the last answer token was not read
        found = model.generate(**new, **{CACHE: first[CACHE]}, max_new_tokens=SHORT)
    else:
        found = model.generate(input_ids=ids, **images, **{CACHE: first[CACHE]}, max_new_tokens=SHORT)
    assert torch.equal(found[:, -SHORT:], whole[:, -SHORT:])


@pytest.mark.parametrize("family", STATES)
def test_layer_ops_and_position_plans_are_refused_by_name(family):
    with pytest.raises(ValueError, match="Layer ops work with full and sliding attention, and layer"):
        set_options(copy.deepcopy(made(family)[0]), {"layer_ops": [{"part": "keep_after", "layers": 1}]})
    plan = {"connector_config": {"position_plan": {"part": HalfSteps}}}
    with pytest.raises(ValueError, match=f"position plan .* {family!r} has recurrent layers"):
        tiny_model(tiny_config("llava_next", text=family_config(family), **plan))


@pytest.mark.parametrize("family", STATES)
@torch.no_grad()
def test_padding_of_a_row_alone_does_not_reach_its_state(family):
    model, processor, _, one = made(family)
    pad = torch.full((1, 6), processor.tokenizer.pad_token_id)
    mask = torch.cat([torch.zeros_like(pad), one["attention_mask"]], dim=1)
    padded = {**one, "input_ids": torch.cat([pad, one["input_ids"]], dim=1), "attention_mask": mask}
    close(model(**padded).logits[:, 6:], model(**one).logits, family)
    assert torch.equal(model.generate(**padded, max_new_tokens=SHORT)[:, 6:], answer(family))


@pytest.mark.parametrize(
    ("family", "field"), [("mamba", "use_bias"), ("falcon_h1", "mamba_proj_bias"), ("lfm2", "conv_bias")]
)
@torch.no_grad()
def test_padding_that_would_reach_a_state_is_refused(family, field):
    model, processor = family_model(family, **{field: True})
    with pytest.raises(ValueError, match=f"{field}=True lets padding reach the states"):
        model(**make_batch(processor, SAMPLES))
    processor.tokenizer.padding_side = "right"
    logits = model(**make_batch(processor, SAMPLES)).logits
    alone = model(**make_batch(processor, [SAMPLES[0]])).logits[0]
    close(logits[0, : len(alone)], alone, "padding behind what is read")


@pytest.mark.parametrize("family", ["mamba2", "falcon_h1", "lfm2"])
@torch.no_grad()
def test_padding_between_a_cache_and_what_comes_is_refused(family):
    model, _, batch, _ = made(family)
    rows = len(batch["input_ids"])
    more = {"input_ids": torch.full((rows, 3), 20), "use_cache": True}
    for later in (torch.ones(rows, 3), torch.tensor([[0, 1, 1]]).expand(rows, -1)):
        cache = model(**batch, use_cache=True)[CACHE]
        mask = torch.cat([batch["attention_mask"], later.long()], dim=1)
        if later.all():
            whole = torch.cat([batch["input_ids"], more["input_ids"]], dim=1)
            images = {name: part for name, part in batch.items() if name not in ("input_ids", "attention_mask")}
            wanted = model(input_ids=whole, attention_mask=mask, **images).logits[:, -3:]
            close(model(**more, attention_mask=mask, cache=cache).logits, wanted, family)
        else:
            with pytest.raises(ValueError, match=r"Padding between what .* has read and what comes"):
                model(**more, attention_mask=mask, cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("family", ALONE)
def test_states_in_half_precision_give_logits_of_that_precision(family):
    model, _, batch, _ = made(family)
    half = {name: part.bfloat16() if part.is_floating_point() else part for name, part in batch.items()}
    logits = copy.deepcopy(model).bfloat16()(**half).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - model(**batch).logits)[batch["attention_mask"].bool()].abs().mean() < 0.5


def test_tied_words_of_a_model_that_names_them_otherwise_are_tied_and_saved_once(tmp_path):
    model, processor = family_model("mamba2", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.language_model.embeddings.weight
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.lm_head.weight is loaded.model.language_model.embeddings.weight
    batch = make_batch(processor, SAMPLES)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    model.resize_token_embeddings(512)
    assert model.lm_head.weight is model.get_input_embeddings().weight and len(model.lm_head.weight) == 512

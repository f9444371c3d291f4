"""Mechanisms of others in whole models: budgets, presets that they join, generation, saving, and what is refused."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, interpolate

from builders import (
    geometry_of,
    make_batch,
    plain_tokenizer,
    random_image,
    tiny_config,
    tiny_convnext,
    tiny_model,
    tiny_processor,
    tiny_vision_config,
)
from builders.reload import CHANGES
from builders.training import conversations
from hires_lmm import HiResLmmForConditionalGeneration
from hires_lmm.modeling.bases_hires_lmm import follow_grid
from hires_lmm.modeling.carriers_hires_lmm import ViewGroup
from hires_lmm.modeling.compat_hires_lmm import CACHE
from hires_lmm.modeling.geometry_hires_lmm import Grid
from hires_lmm.modeling.globalcom2_hires_lmm import crop_weights
from hires_lmm.training import HiResLmmCollator, set_options


TEXT = "<image>What is it?"
GLOBALCOM2 = {"token_ops": [{"part": "globalcom2"}]}


def parts(preset: str, vision="clip", **changes):
    config = tiny_config(preset, vision, **changes)
    return tiny_model(config), tiny_processor(config)


def connector(preset: str, **changes) -> dict:
    return {**CHANGES.get(preset, {}).get("connector_config", {}), **changes}


def ask(processor, *sizes, **options):
    return make_batch(processor, [(TEXT, [random_image(*size)]) for size in sizes], **options)


def generated(model, batch, **options) -> list[list[int]]:
    length = batch["input_ids"].shape[1]
    return model.generate(**batch, max_new_tokens=6, do_sample=False, **options)[:, length:].tolist()


@torch.no_grad()
def logits_of(model, batch) -> torch.Tensor:
    return model(**batch).logits


# ---- globalcom2


@pytest.mark.parametrize("preset", ["llava_next", "llava_hd", "slime", "slime_release", "monkey"])
@torch.no_grad()
def test_globalcom2_keeps_every_budget_exactly_in_every_preset_with_crops(preset):
    model, processor = parts(preset, connector_config=connector(preset, **GLOBALCOM2))
    size = (90, 150)
    full, least = processor.image_tokens(*size), processor.image_processor.min_image_tokens(*size)
    for budget in range(least, full + 1, 3):
        batch = ask(processor, size, (40, 200), max_image_tokens=budget)
        found = model(**batch, output_token_map=True)
        own = found.token_map.image == 0
        assert int(found.token_map.kept[own].sum()) == budget
    token_map = model(**ask(processor, size, max_image_tokens=(full + least) // 2), output_token_map=True).token_map
    assert set(token_map.kind[token_map.kept].tolist()) >= {0, 1}, "global view and crops share the budget"


@torch.no_grad()
def test_the_global_view_commands_how_many_tokens_each_crop_keeps():
    model, processor = parts("llava_next", connector_config=GLOBALCOM2)
    batch = ask(processor, (90, 60), max_image_tokens=40)
    token_map = model(**batch, output_token_map=True).token_map
    image = model.model.read_images(batch["view_positions"], batch["view_spans"])[0]
    rows, cols = image.grid(1)
    kept, score = token_map.kept, token_map.score
    total = int((token_map.kind >= 0).sum())
    assert int(kept.sum()) == 40
    whole = token_map.kind == 0
    ratio = (total - (len(kept) - 40)) / total
    least = int(ratio * 16)
    assert int(kept[whole].sum()) == least and score[whole & kept].min() >= score[whole & ~kept].max()
    thumbnail = score[whole].view(4, 4)
    high, wide = 4 // rows, 4 // cols
    cells = [thumbnail[a * high : (a + 1) * high, b * wide : (b + 1) * wide] for a, b in np.ndindex(rows, cols)]
    powers = [math.exp(float(cell.sum()) / 10) for cell in cells]
    views = [row for row in range(len(image.views)) if image.views[row][0] == 1]
    sizes = [int((token_map.view == view).sum()) for view in views]
    ideal = [(1 + p / sum(powers) - 1 / len(views)) * size for p, size in zip(powers, sizes, strict=True)]
    found = [int(kept[token_map.view == view].sum()) for view in views]
    for own, size, wanted in zip(found, sizes, ideal, strict=True):
        assert abs(own - min(size, wanted * sum(found) / sum(ideal))) < 1.5


def test_a_live_model_gets_globalcom2_and_keeps_it(tmp_path):
    model, processor = parts("llava_next")
    batch, before = ask(processor, (90, 60), max_image_tokens=30), {id(p) for p in model.parameters()}
    saliency, whole = logits_of(model, batch), logits_of(model, ask(processor, (90, 60)))
    set_options(model, GLOBALCOM2)
    assert {id(parameter) for parameter in model.parameters()} == before
    found = logits_of(model, batch)
    assert not torch.allclose(found, saliency, atol=1e-3)
    torch.testing.assert_close(logits_of(model, ask(processor, (90, 60))), whole)
    built = tiny_model(tiny_config("llava_next", connector_config=GLOBALCOM2))
    torch.testing.assert_close(found, logits_of(built, batch))
    model.save_pretrained(tmp_path)
    again = HiResLmmForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.connector_config.token_ops == GLOBALCOM2["token_ops"]
    torch.testing.assert_close(logits_of(again, batch), found)


@torch.no_grad()
def test_a_share_without_a_budget_leaves_at_the_splice():
    model, processor = parts("llava_next", connector_config={"token_ops": [{"part": "globalcom2", "ratio": 0.25}]})
    batch = ask(processor, (90, 60))
    token_map = model(**batch, output_token_map=True).token_map
    is_view = token_map.kind >= 0
    assert int(token_map.kept[is_view].sum()) == int(is_view.sum()) // 4 and bool(token_map.kept[~is_view].all())
    plain, sparse = parts("llava_next", connector_config=GLOBALCOM2)
    with_budget = ask(sparse, (90, 60), max_image_tokens=int(token_map.kept.sum()))
    assert generated(model, batch) == generated(plain, with_budget)


def test_globalcom2_without_a_global_view_shares_alike():
    model, processor = parts("llava_next", connector_config=GLOBALCOM2)
    batch = ask(processor, (112, 112), views="crops", max_image_tokens=24)
    with torch.no_grad():
        token_map = model(**batch, output_token_map=True).token_map
    view = token_map.view[token_map.kept & (token_map.kind == 1)]
    assert int(token_map.kept.sum()) == 24 and torch.bincount(view)[1:].tolist() == [4, 4, 4, 4]


def test_sums_of_probabilities_are_the_shares_of_their_crops():
    """And of logits through a softmax, as released."""
    sums = torch.tensor([0.2, 0.6])
    torch.testing.assert_close(crop_weights(sums, None), torch.tensor([0.75, 1.25]))
    power = math.exp(0.04)
    wanted = torch.tensor([1 / (1 + power) + 0.5, power / (1 + power) + 0.5])
    torch.testing.assert_close(crop_weights(sums, 10.0), wanted)
    for score, temperature in (("logits", 10.0), ("probabilities", None)):
        spec = {"part": "globalcom2", "score": score}
        model = parts("llava_next", connector_config={"token_ops": [spec]})[0]
        assert model.model.connector.token_ops[0].temperature == temperature


def test_scores_follow_the_grid_of_their_views():
    score = torch.arange(16.0).view(1, 4, 4)
    group = ViewGroup(1, torch.zeros(1, 16, 3), (4, 4), (0,), scores={"cls_logits": score.flatten(1)})
    wanted = torch.tensor([[score[0, a : a + 2, b : b + 2].mean() for a in (0, 2) for b in (0, 2)]])
    torch.testing.assert_close(follow_grid(group, Grid(2, 2))["cls_logits"], wanted)
    assert follow_grid(group, Grid(2, 2, None, whole=True)) == {}


def test_what_globalcom2_cannot_join_is_refused_by_name():
    with pytest.raises(ValueError, match="needs cls_logits, but a tower of type 'siglip_vision_model' has no class"):
        tiny_config("llava_next", "siglip", connector_config=GLOBALCOM2)
    with pytest.raises(ValueError, match="globalcom2 shares a budget among crops, but none reach it"):
        tiny_config("vlsa", connector_config=GLOBALCOM2)
    fusion = {"part": "fusion", "num_queries": 12, "later_queries": 3, "num_layers": 2, "num_heads": 4}
    with pytest.raises(ValueError, match=r"Two parts would consume max_image_tokens: .*GlobalCom2"):
        tiny_config("fusion", connector_config={"token_ops": [*GLOBALCOM2["token_ops"], fusion]})


def test_a_live_model_gets_no_untrained_weights():
    model = parts("llava_next")[0]
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=r"have weights \(token_ops\.0\.attention_score"):
        set_options(model, {"token_ops": [{"part": "router", "score": "attention"}]})
    with pytest.raises(ValueError, match="Unknown option 'rate'"):
        set_options(model, {"token_ops": [{"part": "globalcom2", "rate": 0.25}]})
    for slot in ("token_ops", "layer_ops"):
        for given in ({"part": "globalcom2"}, "globalcom2", 3):
            with pytest.raises(ValueError, match=rf"{slot}=.*globalcom2|3.* must be a list of parts"):
                set_options(model, {slot: given})
    with pytest.raises(ValueError, match="set_options takes a dict, place -> value, not None"):
        set_options(model, None)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("preset", ["fusion", "llava_mini"])
def test_trained_operations_are_not_thrown_away(preset):
    model = parts(preset)[0]
    before = model.config.to_dict()
    with pytest.raises(ValueError, match=r"have weights \(token_ops\.0\..*which would be lost"):
        set_options(model, GLOBALCOM2)
    assert model.config.to_dict() == before


def test_a_live_model_gets_layer_ops_loses_them_and_keeps_them_when_saved(tmp_path):
    model, processor = parts("llava_next")
    batch, options = ask(processor, (90, 60)), {"max_new_tokens": 6, "do_sample": False}
    plain = logits_of(model, batch)
    model(**batch, output_hidden_states=True)  # the library hangs up its hooks
    for layers in (0, 1, 0):
        ops = {"layer_ops": [{"part": "keep_after", "layers": layers, "share": 0.25}]}
        set_options(model, ops)
    built = tiny_model(tiny_config("llava_next", connector_config=ops))
    assert not torch.allclose(logits_of(model, batch), plain, atol=1e-3)
    torch.testing.assert_close(logits_of(model, batch), logits_of(built, batch))
    for own, wanted in zip(
        *(each(**batch, output_hidden_states=True).hidden_states for each in (model, built)), strict=True
    ):
        torch.testing.assert_close(own, wanted)
    assert model.generate(**batch, **options).tolist() == built.generate(**batch, **options).tolist()
    model.save_pretrained(tmp_path)
    again = HiResLmmForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(again, batch), logits_of(built, batch))
    set_options(model, {"layer_ops": None})
    torch.testing.assert_close(logits_of(model, batch), plain)
    assert model.config.connector_config.layer_ops == []
    assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)


@pytest.mark.parametrize("preset", ["mqt", "mg_llava", "slime"])
def test_training_sees_the_views_of_the_checkpoint(preset):
    processor = parts(preset)[1]
    picture = random_image(130, 200)
    image, text = {"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A boat."}]}
    batch = HiResLmmCollator(processor)([{"messages": [{"role": "user", "content": [image, text]}, answer]}])
    own = processor.image_processor(picture, return_tensors="pt")
    assert torch.equal(batch["pixel_values"], own["pixel_values"])


# ---- mqt


MQT = {"view_ops": [{"part": "mqt", "num_queries": 16, "num_heads": 2}], "layout": {"crop_order": "views"}}


@torch.no_grad()
def test_mqt_gives_the_first_queries_of_each_view_at_any_budget():
    model, processor = parts("mqt", connector_config=MQT)
    whole = model.model.get_image_features(**geometry_of(ask(processor, (90, 60), views="all"))).pooler_output[0]
    views = len(whole) // 16
    assert views == 5 and processor.image_tokens(90, 60) == 16
    for budget in range(1, len(whole) + 1):
        batch = ask(processor, (90, 60), views="all", max_image_tokens=budget)
        found = model.model.get_image_features(**geometry_of(batch)).pooler_output[0]
        shares = [budget // views + (view < budget % views) for view in range(views)]
        wanted = [whole[16 * view : 16 * view + own] for view, own in enumerate(shares)]
        torch.testing.assert_close(found, torch.cat(wanted))


def test_queries_of_a_view_enter_whatever_its_padding():
    assert parts("mqt", connector_config=MQT)[1].image_tokens(40, 200, unpad=True, global_view="pad") == 16


def test_mqt_trains_at_a_number_of_tokens_drawn_for_each_step_alike_on_all_processes():
    model, processor = parts("mqt", connector_config=MQT)
    budgets, rows = list(range(2, 17, 2)), conversations(1)
    ranks = [HiResLmmCollator(processor, views="global", max_image_tokens=budgets, seed=3) for _ in range(2)]
    drawn = set()
    for _ in range(6):
        batches = [collator(rows) for collator in ranks]
        counts = {int(batch["view_positions"][0, 5]) for batch in batches}
        assert len(counts) == 1
        drawn |= counts
        model.train().zero_grad()
        model(**batches[0]).loss.backward()
        m = counts.pop()
        gradient = model.model.connector.view_ops[0].queries.grad
        assert bool((gradient[:m].abs().sum(dim=1) > 0).all()) and not gradient[m:].any()
    assert len(drawn) > 2 and drawn <= set(budgets)


def test_what_mqt_cannot_join_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r'fewer tokens of each crop or frame under a budget needs layout\.crop_order="views"'
    ):
        tiny_config("slime", connector_config={**MQT, "layout": {}, "token_ops": [], "adapter": {"part": "mlp"}})
    with pytest.raises(ValueError, match="Two parts would consume max_image_tokens: HiResLmmMqt, HiResLmmRouter"):
        tiny_config("mqt", connector_config={**MQT, "token_ops": [{"part": "router", "score": "saliency"}]})
    with pytest.raises(ValueError, match="HiResLmmMqt makes fewer tokens of a view under a budget, but a part behind"):
        tiny_config("mqt", connector_config={**MQT, "adapter": {"part": "query_former", "num_queries": 4}})


# ---- llava_mini


MINI = {
    "view_ops": [{"part": "mini_compressor", "num_queries": 4, "num_heads": 2}],
    "token_ops": [{"part": "prompt_fuser", "num_layers": 2, "num_heads": 2, "rope_theta": 100}],
}
MARKS = {"question": " USER:", "answer": " ASSISTANT:"}
CHAT = "USER: <image>How many cats? ASSISTANT:"
PROMPTS = [(CHAT, [(90, 60)]), ("USER: <image> or <image> - which? ASSISTANT:", [(40, 200), (60, 60)])]


@pytest.fixture(scope="module")
def mini():
    prefixes = {f"{name}_prefix_ids": plain_tokenizer()(mark).input_ids for name, mark in MARKS.items()}
    return parts("llava_mini", connector_config=MINI, **prefixes)


def chats(processor, prompts=PROMPTS, **options):
    rows = [(text, [random_image(*size) for size in sizes]) for text, sizes in prompts]
    return make_batch(processor, rows, **options)


def embeds_of(model, **inputs) -> torch.Tensor:
    """What the language model reads."""
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(embeds=kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen["embeds"]


def one_by_one(model, batch, steps: int = 6) -> list[list[int]]:
    """Greedy ids of a batch without a cache: everything is read anew at each step."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(steps):
        with torch.no_grad():
            logits = model(**{**batch, "input_ids": ids, "attention_mask": mask}, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
        mask = torch.cat([mask, mask[:, -1:]], dim=1)
    return ids[:, batch["input_ids"].shape[1] :].tolist()


def test_llava_mini_makes_four_tokens_of_any_image(mini):
    processor = mini[1]
    assert {processor.image_tokens(*size) for size in ((90, 60), (40, 200), (900, 900))} == {4}
    with pytest.raises(ValueError, match="this model uses 4 tokens for it"):
        ask(processor, (90, 60), max_image_tokens=3)


def test_the_layers_write_into_the_question_alone(mini):
    model, processor = mini
    text = CHAT + " Two. USER: And dogs? ASSISTANT:"
    batch = chats(processor, [(text, [(90, 60)])])
    ids, found = batch["input_ids"][0], embeds_of(model, **batch)[0]
    is_raw = (found == model.get_input_embeddings()(ids)).all(dim=-1)
    answer = plain_tokenizer()(MARKS["answer"]).input_ids
    start = next(at for at in range(len(ids)) if ids[at : at + len(answer)].tolist() == answer)
    assert not is_raw[:start].any() and is_raw[start:].all()
    other = chats(processor, [(CHAT + " Six. USER: And a dog? ASSISTANT:", [(90, 60)])])
    assert torch.equal(embeds_of(model, **other)[0, :start], found[:start])


def test_llava_mini_in_every_mode_of_generate(mini, deprecations):
    model, processor = mini
    batch = chats(processor)
    wanted = one_by_one(model, batch)
    assert generated(model, batch) == wanted
    assert generated(model, batch, use_cache=False) == wanted
    assert generated(model, batch, num_beams=3, num_return_sequences=1) == generated(
        model, batch, num_beams=3, use_cache=False
    )
    assert wanted == [generated(model, chats(processor, [prompt]))[0] for prompt in PROMPTS]
    single = chats(processor, PROMPTS[:1])
    assert generated(model, single, prompt_lookup_num_tokens=2) == wanted[:1]
    assert generated(model, single, assistant_model=model) == wanted[:1]
    deprecations.clear()  # the library's own, about an assistant
    assert generated(model, batch, cache_implementation="static") == wanted
    assert generated(model, batch, prefill_chunk_size=3) == wanted
    torch.manual_seed(0)
    sampled = model.generate(**single, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert sampled.shape == (3, single["input_ids"].shape[1] + 4)


def test_features_of_one_image_serve_two_questions(mini):
    model, processor = mini
    texts = (CHAT, "USER: <image>Where? ASSISTANT:")
    batches = [chats(processor, [(text, [(90, 60)])]) for text in texts]
    features = model.model.get_image_features(**geometry_of(batches[0]))
    for batch in batches:
        text = {name: batch[name] for name in ("input_ids", "attention_mask")}
        assert generated(model, {**text, "mm_encoder_outputs": {"image": features}}) == generated(model, batch)


def test_llava_mini_in_a_conversation_on_a_cache(mini):
    model, processor = mini
    first = chats(processor, PROMPTS[:1])
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(**first, **options)
    more = chats(processor, [(" USER: <image>And here? ASSISTANT:", [(120, 50)])])
    new = torch.cat([out.sequences[:, -1:], more["input_ids"]], dim=1)
    cache = out[CACHE]
    mask = torch.ones(1, cache.get_seq_length() + new.shape[1], dtype=torch.long)
    second = {**more, "input_ids": new, "attention_mask": mask}
    found = model.generate(**second, **{CACHE: cache}, **options).sequences[:, new.shape[1] :]
    both = chats(processor, [(CHAT + " USER: <image>And here? ASSISTANT:", [(90, 60), (120, 50)])])
    whole = torch.cat([out.sequences, more["input_ids"]], dim=1)
    both = {**both, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
    assert found.tolist() == model.generate(**both, **options).sequences[:, whole.shape[1] :].tolist()


def test_the_layers_train_with_and_without_images_and_never_read_labels(mini):
    model, processor = copy.deepcopy(mini[0]).train(), mini[1]
    batch = chats(processor, [(CHAT + " Two", [(90, 60)])])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = batch["input_ids"][:, -1]
    for inputs in (batch, processor(text=["a b"], return_tensors="pt")):
        model.zero_grad()
        own = labels if inputs is batch else inputs["input_ids"]
        model(**inputs, labels=own).loss.backward()
        missing = [name for name, p in model.model.connector.named_parameters() if p.grad is None]
        assert missing == []
    assert model.model.language_model.embed_tokens.weight.grad.any()


def test_released_layers_skip_the_id_zero_and_give_the_word_embeddings_no_gradient():
    for compat, is_read in ((None, True), ("release", False)):
        layers = {**MINI["token_ops"][0], "compat": compat}
        prefixes = {"answer_prefix_ids": plain_tokenizer()(MARKS["answer"]).input_ids}
        model, processor = parts("llava_mini", connector_config={**MINI, "token_ops": [layers]}, **prefixes)
        batch = chats(processor, PROMPTS[:1])
        table = model.get_input_embeddings()
        zero = batch["input_ids"].clone()
        zero[0, 0] = 0
        raw = embeds_of(model, **{**batch, "input_ids": zero})[0, 0] == table(torch.tensor(0))
        assert bool(raw.all()) != is_read
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -1] = 7
        model.train()(**batch, labels=labels).loss.backward()
        assert bool(table.weight.grad[batch["input_ids"][0, 0]].any()) == is_read


def test_an_image_without_its_global_view_has_no_compressed_tokens(mini):
    model, processor = mini
    with pytest.raises(ValueError, match=r"Image 0 of .* has no tokens with views='crops'; take other views"):
        chats(processor, PROMPTS[:1], views="crops")
    assert chats(processor, PROMPTS[:1], views="global")["pixel_values"].shape[0] == 1
    assert generated(model, chats(processor, PROMPTS[:1], views="global"))


def test_what_llava_mini_cannot_join_is_refused_by_name():
    with pytest.raises(ValueError, match="prompt_fuser leaves the tokens of the view op mini_compressor, but there"):
        tiny_config("llava_mini", connector_config={**MINI, "view_ops": []})
    with pytest.raises(ValueError, match=r'"detail" last into layout\.order'):
        tiny_config("llava_mini", connector_config={**MINI, "layout": {}})
    ops, vision = [*GLOBALCOM2["token_ops"], *MINI["token_ops"]], tiny_vision_config("clip", hidden_size=16)
    with pytest.raises(ValueError, match="GlobalCom2 would consume max_image_tokens, but HiResLmmPromptFuser makes"):
        tiny_config("llava_mini", connector_config={**MINI, "token_ops": ops})
    with pytest.raises(ValueError, match="Nothing reads the views 'detail' that an operation makes"):
        tiny_config("llava_next", connector_config={"view_ops": MINI["view_ops"]})
    with pytest.raises(ValueError, match="use an adapter that projects, such as mlp"):
        tiny_config("llava_mini", vision, connector_config={**MINI, "adapter": {"part": "identity"}})


# ---- conv_gate


@pytest.mark.parametrize("model_type", ["convnext", "convnextv2", "dinov3_convnext"])
@torch.no_grad()
def test_any_convnext_is_gated_into_the_global_view(model_type):
    towers = {"hires": tiny_convnext(model_type)}
    model, processor = parts("mg_llava", extra_towers=towers)
    batch = ask(processor, (90, 60), (40, 200))
    assert batch["pixel_values_hires"].shape == (2, 3, 64, 64) and processor.image_tokens(90, 60) == 16
    part = model.model.connector.view_ops[1]
    maps = model.model.extra_towers["hires"](batch["pixel_values_hires"], output_hidden_states=True).hidden_states[-1]
    patches = model.model.encode_pixels(batch["pixel_values"])
    plane = patches.transpose(1, 2).unflatten(2, (4, 4))
    low = plane + part.main_proj(gelu(part.main_conv(plane)))
    high = interpolate(part.other_proj(gelu(part.other_conv(maps))), (4, 4), mode="bilinear")
    means = torch.cat([low.mean(dim=(2, 3)), high.mean(dim=(2, 3))], dim=1)
    hidden = gelu(means @ part.gate_1.weight.flatten(1).T + part.gate_1.bias)
    gate = torch.tanh(hidden @ part.gate_2.weight.flatten(1).T + part.gate_2.bias)
    fused = low + gate[..., None, None] * high
    wanted = model.model.connector.adapter(fused.flatten(2).transpose(1, 2), 0)
    found = model.model.get_image_features(**geometry_of(batch), pixel_values_hires=batch["pixel_values_hires"])
    torch.testing.assert_close(torch.stack(list(found.pooler_output)), wanted, atol=1e-4, rtol=1e-4)
    assert (fused - plane).abs().max() > 0.1
    assert generated(model, batch) == [generated(model, ask(processor, size))[0] for size in ((90, 60), (40, 200))]


@torch.no_grad()
def test_a_new_gate_changes_nothing():
    config = tiny_config("mg_llava")
    model, processor = HiResLmmForConditionalGeneration(config).eval(), tiny_processor(config)
    batch = ask(processor, (90, 60))
    features = model.model.get_image_features(**geometry_of(batch), pixel_values_hires=batch["pixel_values_hires"])
    plain = model.model.connector.adapter(model.model.encode_pixels(batch["pixel_values"]), 0)
    assert torch.equal(features.pooler_output[0], plain[0])


def test_the_gate_joins_crops_budgets_and_globalcom2_and_trains():
    towers = {"hires": tiny_convnext()}
    gate = {"view_ops": [{"part": "conv_gate"}], **GLOBALCOM2}
    model, processor = parts("llava_next", extra_towers=towers, connector_config=gate)
    batch = ask(processor, (90, 60), (40, 200), max_image_tokens=30)
    together = generated(model, batch)
    assert together == [
        generated(model, ask(processor, size, max_image_tokens=30))[0] for size in ((90, 60), (40, 200))
    ]
    model.train()
    for inputs in (batch, processor(text=["a b"], return_tensors="pt")):
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(parameter.grad is not None for parameter in model.model.connector.parameters())


def test_the_gate_needs_every_global_view_in_training():
    model, processor = parts("mg_llava", connector_config={"view_ops": [{"part": "conv_gate"}]})
    model.train().model.connector.training_views = "crops"
    with pytest.raises(ValueError, match="global view of every image beside that of 'hires'"):
        model(**ask(processor, (90, 60), views="crops"))


def test_what_the_gate_cannot_join_is_refused_by_name():
    with pytest.raises(ValueError, match="conv_gate reads a second tower, but there are none"):
        tiny_config("mg_llava", extra_towers={}, connector_config={"view_ops": [{"part": "conv_gate"}]})
    with pytest.raises(ValueError, match=r"conv_gate reads the tower 'fine', but extra_towers has \['hires'\] here"):
        tiny_config("mg_llava", connector_config={"view_ops": [{"part": "conv_gate", "tower": "fine"}]})
    two = {name: tiny_convnext() for name in ("fine", "hires")}
    for part in ("conv_gate", "object_tokens"):
        with pytest.raises(ValueError, match=rf"{part} reads .*there are \['fine', 'hires'\]; name one by tower"):
            tiny_config("mg_llava", extra_towers=two, connector_config={"view_ops": [{"part": part}]})

"""Tokens that leave the language model behind a layer: in every mode equal to a reference that masks them."""

import copy
import functools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    CompileConfig,
    GenerationConfig,
    StaticCache,
)

import reference_generation as reference
from builders import (
    TEXT_FAMILIES,
    geometry_of,
    make_batch,
    plain_tokenizer,
    random_image,
    randomise,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_text_config,
)
from hires_lmm.modeling.compat_hires_lmm import CACHE
from hires_lmm.modeling.yopo_hires_lmm import vote_heads
from hires_lmm.training import set_options
from reference_layers import (
    exit_by_gates,
    keep_share,
    masked_model,
    over_thresholds,
    prompts_of,
    prune,
    select_all,
    spans,
)


NEW_TOKENS = 6
ROWS = [
    ("USER: <image>\nHow many cats are on the table? ASSISTANT:", [random_image(100, 180, 1)]),
    ("USER: Describe the image. ASSISTANT:", []),
    ("<image> and <image> How many?", [random_image(120, 100, 2), random_image(57, 150, 3)]),
]
DEEP = {"num_hidden_layers": 4}
GEMMA = {**DEEP, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 12}
THRESHOLD = [{"part": "router", "on": "all", "score": "saliency", "keep": {"rule": "threshold", "gamma": 0.6}}]
MODELS = {
    "llama": ("llama", DEEP, [0, 2]),
    "window": ("mistral", {**DEEP, "sliding_window": 16}, [1]),
    "mixed": ("gemma3_text", GEMMA, [0, 2]),
}
CAPPED = {"gemma2": {"attn_logit_softcapping": 1.0}}  # so low that the cap matters
HEADS = [[1, 1, 0, 1], [0, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 0]]
PARTS = {
    "keep_after": {"share": 0.4},
    "dyvte": {"layers": "all"},
    "atp": {},
    "yopo": {"layers": "all", "window": 3, "heads": HEADS, "drop_from": 3},
}
# seeds with which rows leave, apart where layers are many
GATES = {"llama": 8, "window": 4, "mixed": 4, "qwen2": 2, "qwen3": 3, "mistral": 3}
OTHERS = [f"{model}+{part}" for part in ("dyvte", "atp", "yopo") for model in ("llama", "mixed")]
all_models = pytest.mark.parametrize("name", [*MODELS, *OTHERS, "window+dyvte"])
families = pytest.mark.parametrize(
    "family", [f"{family}{part}" for family in TEXT_FAMILIES for part in ("", "+dyvte")]
)


def settings_of(name):
    """Family, changes of its configuration and layer op of `model` or `model+part`; a model is one of `MODELS`, or a
    family with its two layers and tokens leaving between."""
    model, _, part = name.partition("+")
    family, changes, layers = MODELS.get(model, (model, CAPPED.get(model, {}), [0]))
    part = part or "keep_after"
    return family, changes, {"part": part, "layers": layers, **PARTS[part]}


@torch.no_grad()
def cells_of(model, processor, number, turn):
    """Number of the turn, view, row and column of its visual tokens; None for separators."""
    if not turn[1]:
        return []
    placed = model(**make_batch(processor, [turn]), output_token_map=True).token_map
    return [
        None if view < 0 else (number, view, *cell)
        for view, cell in zip(placed.view.tolist(), placed.cell.tolist(), strict=True)
    ]


def leave_of(name, *turns):
    """The rule of its layer op, written anew."""
    model, processor = build(name)
    spec, op = settings_of(name)[2], model.model.connector.layer_ops[0]
    if spec["part"] == "keep_after":
        return keep_share(spec["layers"], 0.4)
    if spec["part"] == "dyvte":
        return exit_by_gates(op.gates[0])
    cells = [cell for number, turn in enumerate(turns) for cell in cells_of(model, processor, number, turn)]
    return over_thresholds(op, cells) if spec["part"] == "atp" else prune(cells, 3, HEADS, 0.5, 3)


@functools.cache
def build(name, attention="sdpa", threshold=False, seed=0):
    """Model and processor, see `settings_of`."""
    family, changes, spec = settings_of(name)
    connector = {"layer_ops": [spec]}
    connector |= {"token_ops": THRESHOLD} if threshold else {}
    config = tiny_config("llava_next", "clip", tiny_text_config(family, **changes), connector_config=connector)
    model = tiny_model(config, seed)
    randomise(model.model.connector.layer_ops, GATES.get(name.partition("+")[0], 0))
    for head in getattr(model.model.connector.layer_ops[0], "thresholds", ()):
        head.redundancy.bias.data.sub_(4)  # so that scores of this size can pass
    model.set_attn_implementation({"text_config": "eager" if family == "gemma2" else attention})
    model.generation_config.suppress_tokens = [config.image_token_id]
    return model, tiny_processor(config)


def expectation(name, row, **options):
    """The stand-in model of a row and the embeddings of its prompt."""
    model, processor = build(name, **options)
    text, images = ROWS[row]
    lengths = [len(tokens) for tokens in reference.full_visual_tokens(model, processor, images)[0]]
    embeds = reference.prompt_embeds(model, processor, text, images, select=select_all)
    return masked_model(model, leave_of(name, ROWS[row]), prompts_of([spans(processor, text, lengths)])), embeds


@functools.cache
def greedy(name, row, count=NEW_TOKENS):
    return reference.greedy(*expectation(name, row), count, process=hide_image)


def hide_image(ids, logits):
    logits[plain_tokenizer().convert_tokens_to_ids("<image>")] = -torch.inf
    return logits


def generate(name, rows=(0, 1, 2), side="left", attention="sdpa", **options):
    model, processor = build(name, attention)
    batch = make_batch(processor, [ROWS[row] for row in rows], padding_side=side)
    output = model.generate(**batch, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **options})
    return reference.new_tokens(output, batch["input_ids"].shape[1])


# --- modes ---------------------------------------------------------------------------------------------------------
@families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_logits_are_those_of_masking(family, attention):
    """Every text position of every row, under either backend; and the tokens that left matter."""
    model, processor = build(family, attention)
    batch = make_batch(processor, ROWS)
    logits = model(**batch).logits
    for row, mask in enumerate(batch["attention_mask"].bool()):
        stand_in, embeds = expectation(family, row)
        wanted = reference.run_logits(stand_in, embeds)
        text = batch["input_ids"][row][mask] != model.config.image_token_id
        torch.testing.assert_close(logits[row][mask][text], wanted[text], atol=1e-4, rtol=0)
        whole = reference.run_logits(model, embeds)[text]
        assert row == 1 or (whole - wanted[text])[-1].abs().max() > 1e-2


@all_models
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_greedy(name, side, options):
    assert generate(name, side=side, **options) == [greedy(name, row) for row in range(3)]


@families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_of_every_family(family, attention):
    assert generate(family, attention=attention) == [greedy(family, row) for row in range(3)]


@all_models
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_beams_and_returned_sequences(name, options):
    wanted = [
        ids
        for row in range(3)
        for ids in reference.beam_search(*expectation(name, row), 3, NEW_TOKENS, 2, process=hide_image)
    ]
    assert generate(name, num_beams=3, num_return_sequences=2, **options) == wanted


@all_models
@pytest.mark.parametrize("helper", ["itself", "another", "text"])
def test_assistant_model(name, helper, deprecations):
    family, changes, _ = settings_of(name)
    if helper == "text":
        assistant = randomise(AutoModelForCausalLM.from_config(tiny_text_config(family, **changes)).eval(), 6)
        assistant.generation_config.eos_token_id = None
    else:
        assistant = build(name, seed=0 if helper == "itself" else 9)[0]
    assistant.generation_config.num_assistant_tokens = 3
    assert generate(name, (0,), assistant_model=assistant) == [greedy(name, 0)]
    deprecations.clear()


@all_models
def test_prompt_lookup(name):
    assert generate(name, (0,), prompt_lookup_num_tokens=3, max_new_tokens=12) == [greedy(name, 0, 12)]


@all_models
@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize("drafts", [{}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_a_second_turn_on_the_cache(name, with_image, drafts):
    """Also one from which drafts were cropped."""
    model, processor = build(name)
    text, images = ROWS[0]
    batch = make_batch(processor, [ROWS[0]])
    length = batch["input_ids"].shape[1]
    first = model.generate(**batch, **drafts, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    later = " USER: <image>\nWhat is in it? ASSISTANT:" if with_image else " USER: What is in it? ASSISTANT:"
    new = [random_image(130, 60, 77)] if with_image else []
    second = make_batch(processor, [(later, new)])
    answer = first.sequences[0, length:]
    ids = torch.cat([answer[-1:], second["input_ids"][0]])[None]
    mask = torch.ones(1, first[CACHE].get_seq_length() + ids.shape[1], dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": mask, CACHE: first[CACHE], **(geometry_of(second) if new else {})}
    got = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()

    sizes = [[len(part) for part in reference.full_visual_tokens(model, processor, some)[0]] for some in (images, new)]
    parts = [spans(processor, text, sizes[0]), [(False, 4), *spans(processor, later, sizes[1])]]
    table = model.model.language_model.get_input_embeddings()
    turns = [reference.prompt_embeds(model, processor, *turn, select=select_all) for turn in (ROWS[0], (later, new))]
    whole = torch.cat([turns[0], table(answer)[None], turns[1]], 1).detach()
    stand_in = masked_model(model, leave_of(name, ROWS[0], (later, new)), prompts_of(parts))
    assert got == reference.greedy(stand_in, whole, NEW_TOKENS, process=hide_image)


@pytest.mark.parametrize("side", ["left", "right"])
def test_behind_a_threshold(side):
    """The splice drops tokens first; of the others a share leaves."""
    model, processor = build("llama", threshold=True)
    batch = make_batch(processor, ROWS, padding_side=side)
    kept = model(**batch).kept_mask
    got = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)[
        :, batch["input_ids"].shape[1] :
    ].tolist()
    for row, (text, images) in enumerate(ROWS):
        mask = batch["attention_mask"][row].bool()
        flags = kept[row][mask][batch["input_ids"][row][mask] == model.config.image_token_id]
        tokens = reference.full_visual_tokens(model, processor, images)[0]
        chosen = (
            [part.nonzero()[:, 0].tolist() for part in flags.split([len(part) for part in tokens])] if images else []
        )
        assert all(0 < len(part) < len(whole) for part, whole in zip(chosen, tokens, strict=True))
        order = iter(chosen)
        embeds = reference.prompt_embeds(model, processor, text, images, select=lambda *_, order=order: next(order))
        parts = prompts_of([spans(processor, text, [len(part) for part in chosen])])
        stand_in = masked_model(model, keep_share([0, 2], 0.4), parts)
        assert got[row] == reference.greedy(stand_in, embeds, NEW_TOKENS, process=hide_image)


def test_nothing_is_compiled_by_itself_whatever_the_cache():
    """Elsewhere than on a GPU too, where somebody asks for all devices."""
    compiled = CompileConfig()
    compiled._compile_all_devices = True
    cache = StaticCache(build("llama")[0].config.text_config, max_cache_len=8)
    for layer_ops, valid in (([], True), ([{"part": "keep_after"}], False)):
        model = tiny_model(tiny_config(connector_config={"layer_ops": layer_ops}))
        config = GenerationConfig(compile_config=compiled)
        assert model._valid_auto_compile_criteria({CACHE: cache}, config) is valid


@all_models
def test_chunked_prefill(name):
    assert generate(name, prefill_chunk_size=8) == [greedy(name, row) for row in range(3)]


# --- what the caller sees ------------------------------------------------------------------------------------------
@torch.no_grad()
def test_later_layers_cache_what_stayed():
    model, processor = build("llama")
    out = model(**make_batch(processor, [ROWS[0]]), use_cache=True)
    lengths = [layer.get_seq_length() for layer in out[CACHE].layers]
    image_tokens = int((make_batch(processor, [ROWS[0]])["input_ids"] == model.config.image_token_id).sum())
    rest = lengths[0] - image_tokens
    first = int(0.4 * image_tokens + 0.5)
    assert lengths == [rest + image_tokens, rest + first, rest + first, rest + int(0.4 * first + 0.5)]


@all_models
@torch.no_grad()
def test_hidden_states_keep_their_length_and_the_result_its_values(name):
    """Whoever asks for all states gets masks in place of removal, on the same cache too."""
    model, processor = build(name)
    batch = make_batch(processor, ROWS, padding_side="left")
    packed, shown = model(**batch, use_cache=True), model(**batch, use_cache=True, output_hidden_states=True)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(packed.logits[real], shown.logits[real], atol=1e-4, rtol=0)
    assert {states.shape[1] for states in shown.hidden_states} == {real.shape[1]}
    token, mask = packed.logits[:, -1:].argmax(-1), torch.cat([real, real[:, :1] | True], 1).long()
    steps = [
        model(input_ids=token, attention_mask=mask, **{CACHE: out[CACHE]}, output_hidden_states=flag).logits
        for out, flag in ((packed, True), (shown, False))
    ]
    torch.testing.assert_close(*steps, atol=1e-4, rtol=0)


@torch.no_grad()
def test_features_given_back_and_the_token_map_of_generate():
    model, processor = build("llama")
    batch = make_batch(processor, [ROWS[2]])
    features = model.get_image_features(**geometry_of(batch))
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
    for _ in range(2):
        out = model.generate(**text, mm_encoder_outputs={"image": features}, output_token_map=True, **options)
        assert out.sequences[0, batch["input_ids"].shape[1] :].tolist() == greedy("llama", 2)
    stand_in, embeds = expectation("llama", 2)
    stand_in.model.language_model(embeds)
    left = stand_in.model.language_model.left_at
    visual = [
        place for place, token in enumerate(batch["input_ids"][0].tolist()) if token == model.config.image_token_id
    ]
    assert out.token_map.left_at.tolist() == [left.get(place, -1) for place in visual]
    assert set(left.values()) == {0, 2}
    bare = model.generate(
        **text, mm_encoder_outputs={"image": SimpleNamespace(pooler_output=features.pooler_output)}, **options
    )
    assert bare.sequences.tolist() == out.sequences.tolist()


@torch.no_grad()
def test_a_cache_is_not_cropped_to_before_what_left_and_its_rows_repeat():
    model, processor = build("llama")
    batch = make_batch(processor, [ROWS[0]])
    out = model(**batch, use_cache=True)
    token = out.logits[:, -1:].argmax(-1)
    cropped = copy.deepcopy(out[CACHE])
    cropped.crop(-1)
    with pytest.raises(ValueError, match="crop it to no less than 67"):
        model(input_ids=token, **{CACHE: cropped})
    repeated = copy.deepcopy(out[CACHE])
    repeated.batch_repeat_interleave(2)
    logits = model(input_ids=token.expand(2, -1), **{CACHE: repeated}).logits
    torch.testing.assert_close(logits[1:], model(input_ids=token, **{CACHE: out[CACHE]}).logits)


def test_copies_reloads_and_threads_share_nothing(tmp_path):
    """What is known of a call travels with it: no hook holds another model's parts."""
    model, processor = build("llama")
    twin = randomise(copy.deepcopy(model), 5)
    batches = [make_batch(processor, [ROWS[row]]) for row in (0, 2)]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    other = twin.generate(**batches[0], **options)[0, batches[0]["input_ids"].shape[1] :].tolist()
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(lambda batch: model.generate(**batch, **options), batches * 3))
    for number, batch in enumerate(batches * 3):
        assert texts[number][0, batch["input_ids"].shape[1] :].tolist() == greedy("llama", (0, 2)[number % 2])
    assert other != greedy("llama", 0)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.connector_config.layer_ops == [{"part": "keep_after", "layers": [0, 2], "share": 0.4}]
    torch.testing.assert_close(again(**batches[0]).logits, model(**batches[0]).logits)


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"layers": 2}, "layers of language_model from 0 to 1"),
        ({"layers": []}, "layers of language_model from 0 to 1"),
        ({"share": 1.5}, "between 0 and 1"),
        ({"shares": 0.5}, "'shares'"),
        ({"of": "vision_tower"}, "works in the language model"),
        ({"part": "dyvte", "of": "vision_tower"}, "works in the language model"),
        ({"part": "dyvte", "middle": 0}, "middle=0"),
        ({"part": "atp", "rates": [0.5, 2.0]}, "at most 1"),
        ({"part": "atp", "temperature": 0.0}, "must be above 0"),
        ({"part": "yopo", "window": 4}, "must be odd"),
        ({"part": "yopo", "drop_from": 1, "layers": 1}, "drop_from=1"),
        ({"part": "yopo", "heads": [[1, 1, 1, 1]]}, "one of equal length a layer, 2"),
    ],
)
def test_options_that_cannot_be_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(connector_config={"layer_ops": [{"part": "keep_after", **spec}]})


@pytest.mark.parametrize(
    "options, message",
    [({"cache_implementation": "paged"}, "reads no images"), ({"assistant_early_exit": 1}, "assistant_early_exit=1")],
)
def test_modes_of_generate_that_cannot_be_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        generate("llama", (0,), **options)


@torch.no_grad()
def test_what_a_caller_tells_layer_ops_is_known_or_refused():
    model, processor = build("llama+dyvte")
    batch = make_batch(processor, ROWS)
    lengths = [
        [layer.get_seq_length() for layer in model(**batch, use_cache=True, layer_options=told)[CACHE].layers]
        for told in ({"exit_after": None}, {"exit_after": 2})
    ]
    assert len(set(lengths[0])) == 1 and lengths[1][:3] == lengths[0][:3] and lengths[1][3] < lengths[0][3]
    stay, go = (
        model.generate(**batch, layer_options=told, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        for told in ({"exit_after": None}, {"exit_after": 2})
    )
    assert go[CACHE].layers[3].get_seq_length() < stay[CACHE].layers[3].get_seq_length()
    for told, message in (
        ({"exit_aft": 1}, "No layer op reads 'exit_aft'"),
        ({"exit_after": True}, "exit_after=True"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**batch, layer_options=told)


@torch.no_grad()
def test_a_calibration_call_says_what_heads_attend_to_and_the_vote_is_set():
    spec = {"part": "yopo", "window": None, "neurons": 1.0}
    config = tiny_config(text=tiny_text_config("llama", **DEEP), connector_config={"layer_ops": [spec]})
    model, processor = tiny_model(config), tiny_processor(config)
    batch = make_batch(processor, ROWS)
    aux = model(**batch, layer_options={"head_ratios": True}).aux
    ratios = torch.stack([aux[f"head_ratios/{layer}"] for layer in range(4)], dim=1)
    for row in (0, 2):
        weights = []
        stand_in = masked_model(model, lambda *args, own=weights: own.append(args[2]) or [], prompts_of([[(True, 1)]]))
        stand_in.model.language_model(reference.prompt_embeds(model, processor, *ROWS[row], select=select_all))
        visual = batch["input_ids"][row][batch["attention_mask"][row].bool()] == config.image_token_id
        given = torch.stack(weights).sum(dim=2)
        wanted = given[..., visual].sum(-1) / given[..., ~visual].sum(-1)
        torch.testing.assert_close(ratios[row], wanted, atol=1e-4, rtol=1e-4)
    heads = vote_heads(ratios[:1], float(ratios[0].median()), first=1)
    assert heads[0] == [1] * 4 and {0, 1} <= {head for row in heads for head in row}
    before = model(**batch).logits
    set_options(model, {"connector.layer_ops.0.heads": heads})
    assert model.config.connector_config.layer_ops[0]["heads"] == heads
    assert (model(**batch).logits - before).abs().max() > 1e-2


def test_attention_that_cannot_be_masked_is_refused_by_name(monkeypatch):
    model, processor = build("llama", seed=3)
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setitem(interface._global_mapping, "other", interface._global_mapping["sdpa"])
    monkeypatch.setattr(model.config.text_config, "_attn_implementation_internal", "other")
    with pytest.raises(ValueError, match="this model has 'other'"):
        model.model(**make_batch(processor, ROWS[:2]))
    text = tiny_text_config("llama", layer_types=["full_attention", "chunked_attention"])
    config = tiny_config(text=text, connector_config={"layer_ops": [{"part": "keep_after", "layers": 0}]})
    with pytest.raises(ValueError, match="layer 1 has chunked_attention"):
        tiny_model(config)


# --- training ------------------------------------------------------------------------------------------------------
def learned(name, rows=(0, 2)):
    """A batch with labels on the words behind each prompt, and what it gives without cache, padding and driver."""
    model, processor = build(name)
    answers = [" A red boat.", " Two cats on it."]
    batch = make_batch(
        processor, [(ROWS[row][0] + answer, ROWS[row][1]) for row, answer in zip(rows, answers, strict=True)]
    )
    labels, logits, stand_ins = torch.full_like(batch["input_ids"], -100), [], []
    for place, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        ids = torch.tensor(processor.tokenizer(answer, add_special_tokens=False).input_ids)
        end = int(batch["attention_mask"][place].nonzero().max()) + 1
        labels[place, end - len(ids) : end] = ids
        stand_in, embeds = expectation(name, row)
        words = stand_in.model.language_model.get_input_embeddings()(ids)[None]
        hidden = stand_in.model.language_model(torch.cat([embeds, words], 1)).last_hidden_state
        logits.append(model.lm_head(hidden)[0, -len(ids) - 1 : -1])
        stand_ins.append(stand_in.model.language_model.plain)
    loss = nn.functional.cross_entropy(torch.cat(logits), labels[labels != -100])
    loss.backward()
    gradients = {
        key: sum(own.get_parameter(key).grad for own in stand_ins)
        for key, _ in stand_ins[0].named_parameters()
        if "embed" not in key
    }
    return model, {**batch, "labels": labels}, loss.detach(), gradients


@pytest.mark.parametrize("name", ["llama", "mixed", "llama+dyvte", "llama+yopo"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("prompt_mask", [False, True])
def test_loss_and_gradients_are_those_of_masking(name, checkpointing, prompt_mask):
    """Also with two passes before one step back, as preference losses do; answers choose nothing."""
    model, batch, loss, gradients = learned(name)
    labels = batch["labels"]
    if prompt_mask:
        batch = {**batch, "prompt_mask": (labels == -100) & batch["attention_mask"].bool()}
    model.zero_grad()
    model.train()
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # renamed in 5.23
    if checkpointing:
        getattr(model, f"{kind}_checkpointing_enable")()
    try:
        if prompt_mask:  # nobody but the head sees the labels, as in trainers that have a loss of their own
            hidden = [
                model.model(**{key: value for key, value in batch.items() if key != "labels"}).last_hidden_state
                for _ in range(2)
            ]
            losses = [
                nn.functional.cross_entropy(model.lm_head(part[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())
                for part in hidden
            ]
        else:
            losses = [model(**batch).loss for _ in range(2)]
        (sum(losses) / 2).backward()
    finally:
        model.eval()
        getattr(model, f"{kind}_checkpointing_disable")()
    torch.testing.assert_close(losses[1].detach(), loss, atol=1e-5, rtol=0)
    for key, wanted in gradients.items():
        torch.testing.assert_close(model.model.language_model.get_parameter(key).grad, wanted, atol=1e-5, rtol=1e-3)
    model.zero_grad()

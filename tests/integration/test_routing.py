"""An image is routed by the question of its turn: never by answers, later turns, drafts or padding."""

import functools

import pytest
import torch

import reference_routing as routing
from builders import plain_tokenizer, random_image, tiny_config, tiny_model, tiny_processor
from hires_lmm.processing.chat_templates_hires_lmm import answer_prefix_ids, question_prefix_ids


TEMPLATES = ["llama3", "vicuna", "chatml", "plain"]
MARKED = TEMPLATES[:3]  # templates that open an answer with ids of their own
RULES = {
    "cosine": routing.Rule("cosine"),
    "mean": routing.Rule("cosine", reduce="mean", temperature=0.1),
    "attention": routing.Rule("attention"),
    "budget": routing.Rule("cosine", "budget"),
}
BUDGET = 45
IMAGES = [random_image(100, 180, seed=1), random_image(130, 70, seed=2)]
QUESTION, OTHER_QUESTION = "How many cats are on the table?", "Describe the small red boat."
ANSWERS = ["Two.", "There is a small red boat on a lake: USER says so.\n\nNo cat.", "assistant"]


@functools.cache
def build(template: str, rule: str = "cosine", scope: str = "turn", has_prefixes: bool = True):
    """Model and processor of a chat template, with the ids that the template writes."""
    base = tiny_config("slime")
    processor = tiny_processor(base, template)
    ids = {}
    if has_prefixes:
        ids = {
            "answer_prefix_ids": answer_prefix_ids(processor),
            "question_prefix_ids": question_prefix_ids(processor),
        }
    connector = {**routing.SMALL_CONNECTORS["slime"], "token_ops": RULES[rule].token_ops(), "adapter": {"part": "mlp"}}
    config = tiny_config("slime", connector_config=connector, question_scope=scope, **ids)
    model, processor = tiny_model(config), tiny_processor(config, template)
    if not has_prefixes:  # as in checkpoints that were built without a processor
        model.config.answer_prefix_ids = model.config.question_prefix_ids = None
    return model, processor


def chat(*turns: tuple[str, str | None], image_turn: int = 0, system: str | None = None) -> list[dict]:
    """Messages of `(question, answer)` pairs, with an image before one of the questions."""
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    for number, (question, answer) in enumerate(turns):
        content = [{"type": "text", "text": question}]
        if number == image_turn:
            content = [{"type": "image", "image": IMAGES[0]}, *content]
        messages.append({"role": "user", "content": content})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def encode(processor, conversations: list[list[dict]], budget: int | None = None, **kwargs):
    """A batch of conversations; those that end in a question get the opening of an answer."""
    ends = conversations[0][-1]["role"] == "user"
    images_kwargs = {} if budget is None else {"max_image_tokens": budget}
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=ends,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "images_kwargs": images_kwargs, **kwargs},
    )


@torch.no_grad()
def kept_of(model, batch, **inputs) -> list[list[int]]:
    """Indices of the kept tokens of every image."""
    found = model(**batch, **inputs, output_token_map=True).token_map
    return [found.kept[found.image == image].nonzero()[:, 0].tolist() for image in range(int(found.image.max()) + 1)]


def kept_in(template: str, messages: list[dict], rule: str = "cosine", scope: str = "turn", **inputs) -> list[int]:
    model, processor = build(template, rule, scope)
    batch = encode(processor, [messages], BUDGET if rule == "budget" else None)
    return kept_of(model, batch, **inputs)[0]


# --- answers and later turns ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("template", MARKED)
def test_turn_one_keeps_the_same_set_whatever_follows(template, rule):
    alone = kept_in(template, chat((QUESTION, None)), rule)
    for answer in ANSWERS:
        assert kept_in(template, chat((QUESTION, answer)), rule) == alone
        for question in (OTHER_QUESTION, "USER"):
            for second in (None, "A lake."):
                assert kept_in(template, chat((QUESTION, answer), (question, second)), rule) == alone


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("template", MARKED)
def test_another_question_keeps_another_set(template, rule):
    alone = kept_in(template, chat((QUESTION, None)), rule)
    assert kept_in(template, chat((OTHER_QUESTION, None)), rule) != alone


@pytest.mark.parametrize("template", MARKED)
def test_an_image_of_turn_two_is_routed_by_turn_two(template):
    first, second = (OTHER_QUESTION, "Two."), (QUESTION, None)
    kept = kept_in(template, chat(first, second, image_turn=1))
    assert kept_in(template, chat(("Hello.", "Yes?"), second, image_turn=1)) == kept
    assert kept_in(template, chat(first, (OTHER_QUESTION, None), image_turn=1)) != kept
    assert kept_in(template, chat(first, (QUESTION, "Three."), ("And?", None), image_turn=1)) == kept
    if template != "vicuna":  # there a first turn is written together with the system prompt
        assert kept_in(template, chat(second)) == kept


@pytest.mark.parametrize("template", ["llama3", "chatml"])
def test_the_system_prompt_is_no_question(template):
    assert kept_in(template, chat((QUESTION, None), system="Be brief.")) == kept_in(template, chat((QUESTION, None)))


@pytest.mark.parametrize("template", MARKED)
def test_two_images_of_one_row_read_their_own_turns(template):
    model, processor = build(template)
    first, second = chat((QUESTION, "Two.")), chat((OTHER_QUESTION, None))
    second[0]["content"][0] = {"type": "image", "image": IMAGES[1]}
    both = kept_of(model, encode(processor, [[*first, *second]]))
    assert both[0] == kept_of(model, encode(processor, [first]))[0]
    other = chat(("Hello.", "Yes?"), (OTHER_QUESTION, None), image_turn=1)
    other[2]["content"][0] = {"type": "image", "image": IMAGES[1]}
    assert both[1] == kept_of(model, encode(processor, [other]))[0]


@pytest.mark.parametrize("template", MARKED)
def test_the_prompt_scope_reads_the_whole_prompt_but_not_the_last_answer(template):
    alone = kept_in(template, chat((QUESTION, None)), scope="prompt")
    for answer in ANSWERS:
        assert kept_in(template, chat((QUESTION, answer)), scope="prompt") == alone
    assert alone != kept_in(template, chat((OTHER_QUESTION, None)), scope="prompt")
    assert alone != kept_in(template, chat((QUESTION, "Two."), (OTHER_QUESTION, None)), scope="prompt")
    two = [chat((QUESTION, "Two."), (OTHER_QUESTION, answer)) for answer in (None, *ANSWERS)]
    sets = [kept_in(template, messages, scope="prompt") for messages in two]
    assert all(kept == sets[0] for kept in sets)


# --- masks and labels ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("template", MARKED)
def test_a_prompt_mask_goes_before_ids_and_labels(template):
    model, processor = build(template)
    batch = encode(processor, [chat((f"{OTHER_QUESTION} {QUESTION}", "Two."))])
    ids = batch["input_ids"]
    words = plain_tokenizer()(QUESTION.split(" ", 1)[1]).input_ids[-6:]
    starts = [i for i in range(ids.shape[1] - 6) if ids[0, i : i + 6].tolist() == words]
    mask = torch.zeros_like(ids)
    mask[0, starts[0] : starts[0] + 6] = 1
    narrow, wide = kept_of(model, batch, prompt_mask=mask)[0], kept_of(model, batch)[0]
    assert narrow != wide
    for labels in (ids, torch.full_like(ids, -100)):
        assert kept_of(model, batch, prompt_mask=mask, labels=labels)[0] == narrow
        assert kept_of(model, batch, labels=labels)[0] == wide  # the template goes before labels
    unknown, _ = build(template, has_prefixes=False)
    unknown.load_state_dict(model.state_dict())
    assert kept_of(unknown, batch, prompt_mask=mask)[0] == narrow
    answer = torch.where(mask.bool(), -100, ids)  # everything but the masked words is learned
    assert kept_of(unknown, batch, labels=answer)[0] == narrow


@pytest.mark.parametrize("rule", ["cosine", "attention"])
def test_scores_are_noisy_in_training_only(rule):
    model, processor = build("chatml", rule)
    batch = encode(processor, [chat((QUESTION, None))])

    def scores():
        with torch.no_grad():
            found = model(**batch, output_token_map=True).token_map
        return found.score[found.kind == 1]

    calm = scores()
    assert torch.equal(scores(), calm)
    try:
        model.train()
        noise = torch.stack([scores() for _ in range(40)]) - calm
    finally:
        model.eval()
    assert 0.09 < float(noise.std()) < 0.11 and abs(float(noise.mean())) < 0.02
    assert torch.equal(scores(), calm)


def test_training_gradients_reach_the_attention_score_only_through_scores():
    """The selection is hard: the loss has no gradient for it, but for the kept tokens."""
    model, processor = build("chatml", "attention")
    batch = encode(processor, [chat((QUESTION, "Two."))])
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    connector = model.model.connector
    assert all(weight.grad is None for weight in connector.token_ops.parameters())
    assert all(weight.grad is not None for weight in connector.adapter.parameters())
    model.zero_grad()


# --- generation ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scope", ["turn", "prompt"])
@pytest.mark.parametrize("template", TEMPLATES)
@torch.no_grad()
def test_generated_text_does_not_change_the_selection(template, scope):
    """Without a cache the whole row runs again at each step; the kept set stays that of the prompt."""
    model, processor = build(template, "cosine", scope)
    batch = encode(processor, [chat((QUESTION, None)), chat((OTHER_QUESTION, None))], padding_side="left")
    expected, seen = kept_of(model, batch), []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"].sum(1)), with_kwargs=True
    )
    try:
        model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=False)
    finally:
        handle.remove()
    text = (batch["attention_mask"].bool() & (batch["input_ids"] != model.config.image_token_id)).sum(1)
    counts = torch.tensor([len(kept) for kept in expected])
    assert len(seen) == 5
    for step, lengths in enumerate(seen):
        assert lengths.tolist() == (text + counts + step).tolist()


# --- TRL -----------------------------------------------------------------------------------------------------------
def collator_of(processor, **options):
    """TRL's own collator. TRL is part of the extra `train`, not of `dev`: these tests skip without it."""
    pytest.importorskip("trl")
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    return DataCollatorForVisionLanguageModeling(processor, **options)


def plain_chat(question: str, answer: str, second: str | None = None) -> list[dict]:
    """A conversation as TRL's users write it: strings, images in a column of their own."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if second is not None:
        messages += [{"role": "user", "content": second}, {"role": "assistant", "content": "No."}]
    return messages


@pytest.mark.parametrize("assistant_only", [False, True], ids=["all", "assistant"])
@pytest.mark.parametrize("scope", ["turn", "prompt"])
@pytest.mark.parametrize("template", MARKED)
def test_under_the_collator_of_trl(template, scope, assistant_only):
    """The same set as at inference, as TRL's fused head calls it (the base model, no labels) and with labels."""
    model, processor = build(template, scope=scope)
    collate = collator_of(processor, assistant_only_loss=assistant_only)
    second = OTHER_QUESTION if scope == "turn" else None
    examples = [
        {"images": [IMAGES[0]], "messages": plain_chat(QUESTION, ANSWERS[0], second)},
        {"images": [IMAGES[0]], "messages": plain_chat(QUESTION, ANSWERS[1])},
        {"images": [IMAGES[0]], "messages": plain_chat(OTHER_QUESTION, ANSWERS[0])},
    ]
    batch = dict(collate(examples))
    labels = batch.pop("labels")
    wanted = [kept_in(template, chat((text, None)), scope=scope) for text in (QUESTION, QUESTION, OTHER_QUESTION)]
    assert wanted[0] != wanted[2]
    assert kept_of(model.model, batch) == wanted
    assert kept_of(model, batch, labels=labels) == wanted


def test_plain_text_under_the_collator_of_trl_must_tell_answers_from_questions():
    model, processor = build("plain")
    examples = [{"images": [IMAGES[0]], "messages": plain_chat(QUESTION, answer)} for answer in ANSWERS[:2]]
    batch = dict(collator_of(processor, assistant_only_loss=True)(examples))
    alone = kept_in("plain", chat((QUESTION, None)))
    assert kept_of(model, batch) == [alone, alone]
    labels = batch.pop("labels")
    try:
        model.train()
        with pytest.raises(ValueError, match="answer_prefix_ids"):
            model.model(**batch)
    finally:
        model.eval()
    assert (labels == -100).any()

"""A row of a mixed batch gives the logits and the text that it gives alone, and those of a reference."""

import functools

import pytest
import torch

import reference_generation as reference
import reference_routing as routing
from builders.tiny import make_batch, plain_tokenizer, random_image, tiny_config, tiny_model, tiny_processor


TOLERANCE = 1e-4
NEW_TOKENS = 8
# six images of six sizes: four rows of one, one row of two, and a row of text
ROWS = [
    ("USER: <image>\nWhat is in the picture? ASSISTANT:", [(100, 180)]),
    ("USER: How many cats are on the table? ASSISTANT:", []),
    ("<image>Describe the image.", [(57, 55)]),
    ("A chat. USER: <image>\n and <image> How many cats? ASSISTANT:", [(300, 90), (64, 400)]),
    ("USER: What is in the picture?<image>", [(200, 200)]),
    ("USER: <image> A small red boat on a lake, a curious user and an assistant. ASSISTANT:", [(31, 47)]),
]
CASES = [
    ("llava_next", "clip", "llama", None),
    ("llava_hd", "siglip", "qwen2", None),
    ("llava_next", "siglip", "gemma2", None),
    ("slime", "clip", "llama", routing.Rule("cosine")),
    ("slime", "siglip", "qwen2", routing.Rule("attention", gamma=0.6)),
    ("llava_next", "clip", "gemma2", routing.Rule("saliency", gamma=0.3)),
    ("vlsa", "siglip", "llama", None),
]
BUDGETS = [None, 30]


@functools.cache
def build(case):
    preset, vision, text, rule = case
    connector = dict(routing.SMALL_CONNECTORS.get(preset, {}))
    if rule is not None:
        connector["token_ops"] = rule.token_ops()
    config = tiny_config(preset, vision, text, connector_config=connector)
    return tiny_model(config, seed=4), tiny_processor(config)


@functools.cache
def samples():
    seeds = iter(range(100))
    return [(text, [random_image(*size, seed=next(seeds)) for size in sizes]) for text, sizes in ROWS]


def batch_of(processor, rows, budget, **kwargs):
    extra = {} if budget is None else {"max_image_tokens": budget}
    return make_batch(processor, [samples()[row] for row in rows], **extra, **kwargs)


@functools.cache
@torch.no_grad()
def alone(case, row, budget):
    """Logits and greedy ids of one row by itself."""
    model, processor = build(case)
    batch = batch_of(processor, [row], budget)
    length = batch["input_ids"].shape[1]
    logits = model(**batch).logits[0]
    if case[3] is not None and "pixel_values" in batch:
        assert_dropped_repeat(model, batch, logits)
    ids = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)[0, length:].tolist()
    return batch["input_ids"][0].tolist(), logits, ids


def kept_positions(model, batch) -> torch.Tensor:
    """Positions of a single row that enter the language model."""
    mask = torch.ones_like(batch["input_ids"][0], dtype=torch.bool)
    if "pixel_values" in batch:
        found = model(**batch, output_token_map=True).token_map
        counts = batch["view_positions"][batch["view_positions"][:, 8] == 1, 5].tolist()
        kept = []
        for image, count in enumerate(counts):
            mine = found.kept[found.image == image]
            kept.append(mine if len(mine) == count else mine[mine])
        mask[batch["input_ids"][0] == model.config.image_token_id] = torch.cat(kept)
    return mask


def assert_dropped_repeat(model, batch, logits) -> None:
    """A dropped position repeats the logits of the kept one before it."""
    kept = kept_positions(model, batch)
    for place in (~kept).nonzero()[:, 0].tolist():
        source = max(kept[:place].nonzero()[:, 0].tolist(), default=int(kept.nonzero()[0]))
        assert torch.equal(logits[place], logits[source])


def select_by(case, text: str):
    """The reference's selection for one row; None: saliency under a budget."""
    if case[3] is None:
        return None, "all"
    model, processor = build(case)
    ids = [id for piece in text.split(processor.image_token) for id in plain_tokenizer()(piece).input_ids]
    words = model.model.language_model.get_input_embeddings()(torch.tensor(ids)).detach()
    return routing.selection(model, case[3], words), case[3].on


@pytest.mark.parametrize("budget", BUDGETS, ids=["full", "budget"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@torch.no_grad()
def test_a_row_alone_gives_the_reference(case, budget):
    model, processor = build(case)
    for row, (text, images) in enumerate(samples()):
        select, on = select_by(case, text)
        embeds = reference.prompt_embeds(model, processor, text, images, budget, on, select)
        input_ids, logits, ids = alone(case, row, budget)
        kept = kept_positions(model, batch_of(processor, [row], budget))
        assert int(kept.sum()) == embeds.shape[1]
        torch.testing.assert_close(logits[kept], reference.run_logits(model, embeds), atol=TOLERANCE, rtol=0)
        assert ids == reference.greedy(model, embeds, NEW_TOKENS)
        if budget is not None:
            counts = [len(kinds) for kinds in reference.full_visual_tokens(model, processor, images)[1]]
            assert input_ids.count(model.config.image_token_id) == sum(min(budget, count) for count in counts)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("budget", BUDGETS, ids=["full", "budget"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@torch.no_grad()
def test_each_row_of_a_batch_gives_its_logits_alone(case, budget, padding_side):
    model, processor = build(case)
    rows = range(len(ROWS))
    batch = batch_of(processor, rows, budget, padding_side=padding_side)
    assert (batch["attention_mask"].sum(1) < batch["attention_mask"].shape[1]).sum() == len(ROWS) - 1
    logits = model(**batch).logits
    assert logits.shape[:2] == batch["input_ids"].shape
    for row in rows:
        mask = batch["attention_mask"][row].bool()
        input_ids, expected, _ = alone(case, row, budget)
        assert batch["input_ids"][row][mask].tolist() == input_ids
        torch.testing.assert_close(
            logits[row][mask], expected, atol=TOLERANCE, rtol=0, msg=functools.partial("row {}: {}".format, row)
        )


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("budget", BUDGETS, ids=["full", "budget"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@torch.no_grad()
def test_each_row_of_a_batch_gives_its_greedy_text_alone(case, budget, padding_side):
    model, processor = build(case)
    batch = batch_of(processor, range(len(ROWS)), budget, padding_side=padding_side)
    length = batch["input_ids"].shape[1]
    sequences = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert sequences[:, :length].tolist() == batch["input_ids"].tolist()
    for row, ids in enumerate(reference.new_tokens(sequences, length)):
        assert ids == alone(case, row, budget)[2], f"row {row}"


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["no_cache", "static", "beams"],
)
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[4]], ids=lambda case: "-".join(map(str, case)))
@torch.no_grad()
def test_right_padding_holds_in_other_modes(case, options):
    model, processor = build(case)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    budget = 30 if case[3] is None else None
    batch = batch_of(processor, range(len(ROWS)), budget, padding_side="right")
    got = reference.new_tokens(model.generate(**batch, **options), batch["input_ids"].shape[1])
    expected = []
    for row in range(len(ROWS)):
        single = batch_of(processor, [row], budget)
        expected += reference.new_tokens(model.generate(**single, **options), single["input_ids"].shape[1])
    assert got == expected


@torch.no_grad()
def test_a_batch_of_text_alone_needs_no_image():
    model, processor = build(CASES[0])
    texts = [ROWS[1][0], "Describe the image."]
    batch = make_batch(processor, [(text, []) for text in texts], padding_side="left")
    assert "pixel_values" not in batch
    logits = model(**batch).logits
    for row, text in enumerate(texts):
        expected = reference.run_logits(model, reference.prompt_embeds(model, processor, text, []))
        torch.testing.assert_close(logits[row][batch["attention_mask"][row].bool()], expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_right_padding_leaves_the_labels_loss_of_the_rows():
    """The mean loss over a padded batch is the token-weighted mean of the rows' losses."""
    case = CASES[0]
    model, processor = build(case)
    batch = batch_of(processor, range(len(ROWS)), 30, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == model.config.image_token_id, -100)
    total, count = 0.0, 0
    for row in range(len(ROWS)):
        input_ids, logits, _ = alone(case, row, 30)
        targets = torch.tensor(input_ids[1:])
        real = targets != model.config.image_token_id
        log_probs = logits[:-1].log_softmax(-1).gather(1, targets[:, None])[:, 0]
        total, count = total - float(log_probs[real].sum()), count + int(real.sum())
    assert abs(float(model(**batch, labels=labels).loss) - total / count) < 1e-4

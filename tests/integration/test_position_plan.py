"""Positions and masks that a part decides, with the plan of TC-LLaVA: in every way to read and to generate."""

import pytest
import torch

from builders import make_batch, random_image, tiny_config, tiny_model, tiny_processor
from builders.registry import register
from hires_lmm.modeling.bases_hires_lmm import HiResLmmPositionPlan, RowTokens
from hires_lmm.modeling.compat_hires_lmm import CACHE
from hires_lmm.modeling.outputs_hires_lmm import HiResLmmImageFeatures
from hires_lmm.modeling.parts_hires_lmm import POSITION_PLANS
from hires_lmm.modeling.temporal_hires_lmm import HiResLmmTemporal
from hires_lmm.training import set_options


LAYOUT = {"order": ["global", "frames"], "crop_order": "views"}
THRESHOLD = {"part": "router", "on": "frames", "score": "cosine", "keep": {"rule": "threshold", "gamma": 0.6}}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    register(monkeypatch)


def build(gamma=0.5, text="llama", plan=True, **connector):
    connector = {"layout": LAYOUT, **connector}
    if plan:
        connector["position_plan"] = {"part": "temporal", "gamma": gamma}
    changes = {"answer_prefix_ids": [5, 6]} if "token_ops" in connector else {}
    planner = {"name": "every_kind", "kinds": ["global", "frames"]}
    config = tiny_config("llava_next", text=text, connector_config=connector, planner=planner, **changes)
    return tiny_model(config), tiny_processor(config)


def ask(processor, *samples):
    """A batch of samples, each a text and the sizes of its images."""
    drawn = [(text, [random_image(*size, number) for number, size in enumerate(sizes)]) for text, sizes in samples]
    batch = make_batch(processor, drawn)
    batch["prompt_mask"] = batch["attention_mask"].bool()
    return batch


ONE = ("<image>What is it?", [(90, 60)])
TWO = ("See <image>and<image>now. Which?", [(40, 200), (90, 60)])
NONE = ("No image at all, is there one?", [])


def frames_of(batch, model, kept=None):
    """Of each row the tokens that reach the language model: -1 for text, else a number for each view."""
    spans = batch["view_spans"].tolist() if "view_spans" in batch else []
    sizes = [(bottom - top) * (right - left) for top, bottom, left, right in spans]
    views = iter([view for view, size in enumerate(sizes) for _ in range(size)])
    rows = []
    for row, ids in enumerate(batch["input_ids"]):
        frames = [next(views) if token == model.config.image_token_id else -1 for token in ids.tolist()]
        real = [
            bool(mark) and (kept is None or bool(kept[row, i])) for i, mark in enumerate(batch["attention_mask"][row])
        ]
        rows.append([frame for frame, is_real in zip(frames, real, strict=True) if is_real])
    return rows


def reference(frames, gamma):
    """Positions and mask of one row, token by token."""
    positions, temporal = [], -1
    for place, frame in enumerate(frames):
        last = frames[place - 1] if place else None
        if frame != last if frame >= 0 else last is None or last < 0:
            temporal += 1
        positions.append(place + gamma * temporal)
    seen = [[j <= i or (a >= 0 and a == b) for j, b in enumerate(frames)] for i, a in enumerate(frames)]
    return positions, seen


def listen(model):
    """What the language model gets."""
    calls = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    return calls


def without_cache(model, batch, steps=6):
    """Greedy tokens, each from a call on all ids before it."""
    batch = dict(batch)
    for _ in range(steps):
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[:, -1:]
            logits[..., model.config.image_token_id] = float("-inf")
            token = logits.argmax(dim=-1)
        batch["input_ids"] = torch.cat([batch["input_ids"], token], dim=1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(token)], dim=1)
        batch["prompt_mask"] = torch.nn.functional.pad(batch["prompt_mask"], (0, 1))
    return batch["input_ids"][:, -steps:].tolist()


def generated(model, batch, steps=6, **options):
    options["suppress_tokens"] = [model.config.image_token_id]
    output = model.generate(**batch, max_new_tokens=steps, do_sample=False, **options)
    return output[:, -steps:].tolist()


@pytest.mark.parametrize("text, attention", [("llama", "sdpa"), ("qwen2", "eager"), ("gemma3_text", "sdpa")])
@pytest.mark.parametrize("samples", [[ONE], [TWO], [ONE, TWO, NONE], [NONE]], ids=["one", "two", "padded", "text"])
def test_each_token_stands_and_sees_as_a_plain_loop_says(samples, text, attention):
    (model, processor), plain = build(text=text), build(text=text, plan=False)[0]
    model.set_attn_implementation(attention)
    batch = ask(processor, *samples)
    calls, length = listen(model), batch["input_ids"].shape[1]
    with torch.no_grad():
        found = model(**batch).logits
    for row, frames in enumerate(frames_of(batch, model)):
        positions, seen = reference(frames, 0.5)
        assert calls[0]["position_ids"][row, length - len(frames) :].tolist() == positions
        with torch.no_grad():
            mask = torch.where(torch.tensor(seen), 0.0, torch.finfo(torch.float32).min)[None, None]
            masks = {"full_attention": mask, "sliding_attention": mask}
            embeds = torch.cat([h["inputs_embeds"][row : row + 1, length - len(frames) :] for h in calls[:1]], dim=1)
            hidden = plain.model.language_model(
                inputs_embeds=embeds,
                position_ids=torch.tensor([positions]),
                attention_mask=masks if text != "llama" else mask,
            ).last_hidden_state
            wanted = plain.lm_head(hidden)
        torch.testing.assert_close(found[row, length - len(frames) :], wanted[0], atol=1e-4, rtol=1e-4)


def test_tokens_that_a_threshold_drops_are_not_counted():
    model, processor = build(token_ops=[THRESHOLD])
    batch = ask(processor, ONE, TWO)
    calls = listen(model)
    with torch.no_grad():
        outputs = model(**batch)
    assert not outputs.kept_mask.all()
    for row, frames in enumerate(frames_of(batch, model, outputs.kept_mask)):
        positions, seen = reference(frames, 0.5)
        assert calls[0]["position_ids"][row, -len(frames) :].tolist() == positions
        found = calls[0]["attention_mask"][row, 0, -len(frames) :, -len(frames) :]
        assert torch.equal(found.bool(), torch.tensor(seen))


@pytest.mark.parametrize("samples", [[ONE], [TWO], [NONE], [ONE, TWO]], ids=["one", "two", "text", "padded"])
@pytest.mark.parametrize("drops", [False, True])
def test_generation_on_a_cache_equals_none(samples, drops):
    model, processor = build(**({"token_ops": [THRESHOLD]} if drops else {}))
    batch = ask(processor, *samples)
    wanted = without_cache(model, batch)
    assert generated(model, batch) == wanted
    assert wanted == [without_cache(model, ask(processor, sample))[0] for sample in samples]


@pytest.mark.parametrize("text", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 3}, {"prefill_chunk_size": 7}],
    ids=["static", "lookup", "beams", "chunks"],
)
def test_other_ways_to_generate_equal_none(options, text):
    model, processor = build(text=text)
    batch = ask(processor, ONE) if "prompt_lookup_num_tokens" in options else ask(processor, ONE, TWO, NONE)
    beams = {"num_beams": 3} if "num_beams" in options else {}
    assert generated(model, batch, **options) == generated(model, batch, use_cache=False, **beams)


@torch.no_grad()
def test_a_frame_is_read_whole_where_prompts_are_read_in_pieces():
    model, processor = build()
    batch = ask(processor, ONE, NONE)
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    wanted, found = (model.generate(**batch, **options, **more).logits[0] for more in ({}, {"prefill_chunk_size": 7}))
    torch.testing.assert_close(found, wanted)


FRAMES = ([-1, 0, 0, 1, 1, 2, 2, -1, -1], 3, [0, 1, 1, 2, 2, 3, 3, 3, 4], [0, 1, 1, 2, 2, 3, 3, 4, 5])
STITCHED = ([-1, 0, 1, 0, 1, 2, 2, -1, -1], 3, [0, 1, 2, 1, 2, 3, 3, 3, 4], [0, 1, 2, 1, 2, 3, 3, 4, 5])
CROPS = ([-1, 0, 0, 1, 1, 2, 2, -1, -1], 1, [0, 1, 1, 1, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1, 2, 3])
SLOW = ([-1, 0, 1, 2, 3, 0, 2, -1, -1], [3] * 5 + [4] * 4, [0, 1, 2, 3, 4, 1, 3, 4, 5], [0, 1, 2, 3, 4, 1, 3, 5, 6])
SEPARATED = ([-1, 0, -1, 1, -1, 2, -1, -1, -1], 3, FRAMES[2], FRAMES[3])  # a separator behind each frame


@pytest.mark.parametrize(
    "view, kind, shared, following",
    [FRAMES, STITCHED, CROPS, SLOW, SEPARATED],
    ids=["frames", "rows", "crops", "slow", "marks"],
)
def test_the_index_of_frames(view, kind, shared, following):
    """One text token, six tokens of an image, two text tokens, with padding in front."""
    for way, wanted in (("shared", shared), ("next", following)):
        part = HiResLmmTemporal(None, HiResLmmTemporal.Options(gamma=2, text_after=way))
        image = torch.tensor([[-1] * 3 + [0] * 6 + [-1] * 2])
        of_views = kind if isinstance(kind, list) else [kind] * len(view)
        kinds = [own if each >= 0 else -1 for own, each in zip(of_views, view, strict=True)]
        views = (torch.tensor([[-1, -1, *each]]) for each in (view, kinds))
        positions, seen = part(RowTokens(torch.tensor([[False] * 2 + [True] * 9]), image, *views, has_images=True))
        assert positions.dtype == torch.long
        assert positions[0, 2:].tolist() == [place + 2 * index for place, index in enumerate(wanted)]
        same = torch.tensor(shared)[:, None] == torch.tensor(shared)
        visual = torch.tensor([0] + [1] * 6 + [0] * 2).bool()
        blocks = (same & visual & visual[:, None]) | torch.ones(9, 9).bool().tril()
        assert torch.equal(seen[0, 2:, 2:], blocks)


@torch.no_grad()
def test_a_plan_joins_a_live_model_and_leaves_it(tmp_path):
    (planned, processor), model = build(), build(plan=False)[0]
    batch = ask(processor, ONE)
    before = model(**batch).logits
    set_options(model, {"position_plan": planned.config.connector_config.position_plan})
    assert torch.equal(model(**batch).logits, planned(**batch).logits)
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(**batch).logits, planned(**batch).logits)
    set_options(model, {"position_plan": None})
    assert torch.equal(model(**batch).logits, before)
    with pytest.raises(ValueError, match="must be a part, such as"):
        set_options(model, {"position_plan": [{"part": "temporal"}]})


def test_options_of_the_plan_are_checked():
    for gamma in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be 0 or a positive number"):
            tiny_config(connector_config={"position_plan": {"part": "temporal", "gamma": gamma}})


def test_an_attention_function_whose_masks_are_not_known_is_refused():
    model, processor = build()
    model.model.language_model.config._attn_implementation = "of_a_server"
    with pytest.raises(ValueError, match="which of_a_server cannot take"):
        model(**ask(processor, ONE))


def test_a_second_turn_goes_on_where_the_first_ended():
    model, processor = build()
    batch = ask(processor, ONE)
    first = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    more = ask(processor, TWO)
    ids = torch.cat([first.sequences, more["input_ids"]], dim=1)
    whole = {name: torch.cat([batch[name], more[name]]) for name in ("pixel_values", "view_positions", "view_spans")}
    whole |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "prompt_mask": torch.ones_like(ids)}
    wanted = without_cache(model, whole)
    assert generated(model, {**whole, CACHE: first[CACHE]}) == wanted
    cache = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)[CACHE]
    cache.crop(-5)  # into the question
    assert generated(model, {**whole, CACHE: cache}) == wanted


def test_training_reads_the_plan():
    model, processor = build()
    model.train()
    for sample in (ONE, NONE):
        batch = ask(processor, sample)
        model.zero_grad()
        loss = model(**batch, labels=batch["input_ids"].clone()).loss
        loss.backward()
        with torch.no_grad():
            model.eval()
            logits = model(**batch).logits
            model.train()
        wanted = torch.nn.functional.cross_entropy(logits[0, :-1], batch["input_ids"][0, 1:])
        torch.testing.assert_close(loss.detach(), wanted)


@torch.no_grad()
def test_gaps_between_positions_are_no_packed_texts():
    model, processor = build()
    batch = ask(processor, NONE)
    wanted = model(**batch).logits
    torch.testing.assert_close(model(input_ids=batch["input_ids"], use_cache=False).logits, wanted)


def test_what_does_not_go_together_is_refused():
    model, processor = build()
    batch = ask(processor, ONE)
    features = model.model.get_image_features(
        **{name: batch[name] for name in ("pixel_values", "view_positions", "view_spans")}
    )
    bare = HiResLmmImageFeatures(pooler_output=features.pooler_output)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="pass what get_image_features returned"):
        model(**text, mm_encoder_outputs={"image": bare})
    length = batch["input_ids"].shape[1]
    with pytest.raises(ValueError, match="needs a two-dimensional attention_mask"):
        model(
            **{**batch, "attention_mask": torch.zeros(1, 1, length, length)}, position_ids=torch.arange(length)[None]
        )
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match='load the model with attn_implementation="sdpa"'):
        model(**batch)
    model, processor = build(layer_ops=[{"part": "keep_after"}])
    with pytest.raises(ValueError, match="leave one of the two out"):
        model(**batch)
    with pytest.raises(ValueError, match="unknown part 'spatial'; known parts of this slot: temporal"):
        tiny_config(connector_config={"position_plan": {"part": "spatial"}})


class NotingPlan(HiResLmmPositionPlan):
    """One position after the other; notes what it is told."""

    def __init__(self, context, options):
        super().__init__(context, options)
        self.told = []

    def forward(self, tokens):
        self.told.append(tokens)
        return tokens.number, None


@torch.no_grad()
def test_a_plan_is_told_of_all_tokens_of_a_row(monkeypatch):
    """Those of earlier calls too, after rows were repeated and the cache was cropped."""
    monkeypatch.setitem(POSITION_PLANS, "noting", NotingPlan)
    config = tiny_config("llava_next", connector_config={"position_plan": {"part": "noting"}})
    model, processor = tiny_model(config), tiny_processor(config)
    plan, batch, more = model.model.connector.position_plan, ask(processor, ONE, TWO), ask(processor, TWO)
    cache = model(**batch, use_cache=True)[CACHE]
    length = batch["input_ids"].shape[1]
    told = plan.told[-1]
    assert torch.equal(told.real, batch["attention_mask"].bool()) and told.num_cached == 0 and told.has_images
    is_image = batch["input_ids"] == config.image_token_id
    assert torch.equal(told.image >= 0, is_image) and told.image.amax(dim=1).tolist() == [0, 1]
    kinds = batch["view_positions"][:, 0].tolist()
    starts = batch["view_positions"][:, 8].bool().nonzero()[:, 0].tolist()
    for row, number, image in ((0, 0, 0), (1, 0, 1), (1, 1, 2)):
        mine, first = told.image[row] == number, starts[image]
        last = (*starts, len(kinds))[image + 1]
        views = told.view[row][mine]
        assert views[views >= 0].unique().tolist() == list(range(last - first))
        assert told.kind[row][mine][views >= 0].tolist() == [
            kinds[first + view] for view in views[views >= 0].tolist()
        ]
        assert (told.kind[row][mine][views < 0] == -1).all()
    cache.batch_repeat_interleave(2)
    cache.crop(-3)
    ids = more["input_ids"].expand(4, -1)
    geometry = {name: torch.cat([more[name]] * 4) for name in ("pixel_values", "view_positions", "view_spans")}
    mask = torch.cat([batch["attention_mask"].repeat_interleave(2, dim=0)[:, :-3], torch.ones_like(ids)], dim=1)
    model(input_ids=ids, attention_mask=mask, **{CACHE: cache}, **geometry)
    again = plan.told[-1]
    assert again.num_cached == length - 3 and again.real.shape == mask.shape and torch.equal(again.real, mask.bool())
    for name in ("image", "view", "kind"):
        old = getattr(told, name)[:, :-3].repeat_interleave(2, dim=0)
        assert torch.equal(getattr(again, name)[:, : length - 3], old)
    assert again.image.amax(dim=1).tolist() == [2, 2, 3, 3]
    new = again.image[:, length - 3 :]
    assert [sorted(set(row.tolist())) for row in new] == [[-1, 1, 2], [-1, 1, 2], [-1, 2, 3], [-1, 2, 3]]

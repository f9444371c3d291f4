"""The router as a part: which tokens it scores, by what, and how many it keeps; references in plain loops."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.carriers_hires_lmm import Question, VisualTokens
from hires_lmm.modeling.geometry_hires_lmm import Grid
from hires_lmm.modeling.routers_hires_lmm import HiResLmmRouter, saliency_scores


WIDTH = 8
KINDS = [[0, 0, -1, 1, 1, 1, -1], [1, 1, 1, 1, 0, -1], [0, -1]]  # global 0, crop 1, separator -1


def router(width: int = WIDTH, **options) -> HiResLmmRouter:
    config = SimpleNamespace(_attn_implementation="eager")
    context = PartContext(
        config, width, width, {(0, "vision_tower"): Grid(1, 2), (1, "vision_tower"): Grid(1, 3)}, (2, 2)
    )
    part = HiResLmmRouter(context, HiResLmmRouter.Options(**options)).eval()
    part.context = context
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.5)
    return part


def tokens(surplus=(0, 0, 0), width: int = WIDTH) -> VisualTokens:
    kind = torch.tensor([kind for kinds in KINDS for kind in kinds])
    lengths = [len(kinds) for kinds in KINDS]
    return VisualTokens(
        features=torch.randn(len(kind), width),
        lengths=lengths,
        num_tokens=[length + more for length, more in zip(lengths, surplus, strict=True)],
        view=torch.zeros_like(kind),
        cell=torch.zeros(len(kind), 2, dtype=torch.long),
        kind=kind,
        grids={},
        images=[None] * 3,
        scores={"other": torch.ones(len(kind))},
    )


def question(width: int = WIDTH) -> Question:
    """Image 0 belongs to row 1, image 1 to row 0 (turn 2), image 2 to row 1."""
    turn = torch.tensor([[1, 1, 0, 2, 2, 2], [0, 1, 1, 0, 1, 0]])
    rows, turns = torch.tensor([1, 0, 1]), torch.tensor([1, 2, 1])
    return Question(torch.randn(2, 6, width), None, turn, rows, turns)


READ = [(1, [1, 2, 4]), (0, [3, 4, 5]), (1, [1, 2, 4])]
"""Row and positions of the text that each image may read."""

SCORED = {"crops": [[3, 4, 5], [7, 8, 9, 10], []], "global": [[0, 1], [11], [13]], "all": None}
SCORED["all"] = [sorted(a + b) for a, b in zip(SCORED["crops"], SCORED["global"], strict=True)]


def cosines(found: VisualTokens, asked: Question, on: str, mean: bool) -> dict[int, float]:
    scores = {}
    for image, places in enumerate(SCORED[on]):
        row, positions = READ[image]
        for place in places:
            text = asked.embeds[row, positions]
            total = sum(float(torch.cosine_similarity(found.features[place], word, dim=0)) for word in text)
            scores[place] = total / (len(positions) if mean else 1)
    return scores


def assert_scores(found: VisualTokens, wanted: dict[int, float]) -> None:
    scores = found.scores["router"]
    assert scores.dtype == torch.float32
    assert scores.isfinite().nonzero()[:, 0].tolist() == sorted(wanted)
    for place, value in wanted.items():
        assert float(scores[place]) == pytest.approx(value, abs=1e-5)


def best(scores: dict[int, float], places: list[int], count: int) -> set[int]:
    return set(sorted(places, key=lambda place: -scores[place])[:count])


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("on", ["crops", "global", "all"])
def test_each_image_is_scored_by_its_own_question(on, reduce):
    given, asked = tokens(), question()
    found, passed = router(on=on, reduce=reduce)(given, asked)
    assert passed is asked
    assert_scores(found, cosines(given, asked, on, reduce == "mean"))
    assert set(found.scores) == {"other", "router"}
    assert found.kept.all() and found.kept.dtype == torch.bool


@pytest.mark.parametrize("on, surplus", [("crops", (-2, -3, 0)), ("global", (-1, 0, 0)), ("all", (-4, -4, 0))])
def test_a_budget_drops_exactly_the_lowest_scores(on, surplus):
    given, asked = tokens(surplus), question()
    found, _ = router(on=on)(given, asked)
    scores = cosines(given, asked, on, False)
    dropped = set()
    for places, less in zip(SCORED[on], surplus, strict=True):
        dropped |= set(places) - best(scores, places, len(places) + less)
    assert set((~found.kept).nonzero()[:, 0].tolist()) == dropped
    assert len(dropped) == -sum(surplus)


def threshold_set(scores: dict[int, float], places: list[int], gamma: float, temperature: float) -> set[int]:
    values = torch.tensor([scores[place] for place in places], dtype=torch.float64)
    mass = torch.softmax(values / temperature, 0)
    kept, total = set(), 0.0
    for number in sorted(range(len(places)), key=lambda number: -float(mass[number])):
        kept.add(places[number])
        total += float(mass[number])
        if total > gamma:
            break
    return kept


@pytest.mark.parametrize("gamma, temperature", [(0.5, 1.0), (0.75, 0.3), (0.3, 2.0)])
def test_the_threshold_works_an_image_at_a_time(gamma, temperature):
    given, asked = tokens(), question()
    keep = {"rule": "threshold", "gamma": gamma, "temperature": temperature}
    found, _ = router(keep=keep)(given, asked)
    scores = cosines(given, asked, "crops", False)
    wanted = set()
    for places in SCORED["crops"][:2]:
        wanted |= threshold_set(scores, places, gamma, temperature)
    crops = set(SCORED["crops"][0] + SCORED["crops"][1])
    kept = set(found.kept.nonzero()[:, 0].tolist())
    assert kept & crops == wanted and kept - crops == set(range(15)) - crops and wanted != crops


def test_a_budget_goes_before_the_threshold():
    given, asked = tokens((-1, -2, 0)), question()
    found, _ = router(keep={"rule": "threshold", "gamma": 0.01})(given, asked)
    assert [int(part.sum()) for part in given.per_image(found.kept)] == [6, 4, 2]


def test_saliency_needs_no_question():
    given = tokens((-2, 0, 0))
    found, passed = router(score="saliency")(given, None)
    assert passed is None
    scores = {}
    for places in SCORED["crops"][:2]:
        scores |= dict(zip(places, saliency_scores(given.features[places]).tolist(), strict=True))
    assert_scores(found, scores)
    assert set((~found.kept).nonzero()[:, 0].tolist()) == {3, 4, 5} - best(scores, [3, 4, 5], 1)
    with_text, _ = router(score="saliency")(tokens(), question())
    assert with_text.kept.all()


@pytest.mark.parametrize("score", ["cosine", "attention"])
def test_a_score_that_reads_must_get_a_question(score):
    with pytest.raises(ValueError, match=f"The score '{score}' reads the question, but none was passed"):
        router(score=score)(tokens(), None)


def attention_by_hand(part: HiResLmmRouter, features: torch.Tensor, text: torch.Tensor, heads: int) -> torch.Tensor:
    module, width = part.attention_score, features.shape[1]
    image, words = (
        nn.functional.layer_norm(states, (width,), norm.weight, norm.bias)
        for states, norm in ((features, module.image_norm), (text, module.text_norm))
    )
    pairs = zip((image, words, words), "qkv", strict=True)
    linears = [(states, getattr(module.attention, f"{name}_proj")) for states, name in pairs]
    q, k, v = (states @ linear.weight.T + linear.bias for states, linear in linears)
    size = width // heads
    parts = []
    for head in range(heads):
        here = slice(head * size, (head + 1) * size)
        parts.append(torch.softmax(q[:, here] @ k[:, here].T / size**0.5, dim=1) @ v[:, here])
    states = torch.cat(parts, 1) @ module.attention.o_proj.weight.T + module.attention.o_proj.bias
    states = nn.functional.layer_norm(states, (width,), module.output_norm.weight, module.output_norm.bias)
    hidden = (states @ module.linear_1.weight.T + module.linear_1.bias).clamp(min=0)
    return (hidden @ module.linear_2.weight.T + module.linear_2.bias)[:, 0]


@pytest.mark.parametrize("width, num_heads, heads", [(32, None, 1), (32, 4, 4), (256, None, 2)])
@torch.no_grad()
def test_the_attention_score(width, num_heads, heads):
    given, asked = tokens(width=width), question(width)
    part = router(width, score="attention", num_heads=num_heads)
    assert (part.attention_score.linear_1.out_features, part.attention_score.linear_2.out_features) == (width // 4, 1)
    found, _ = part(given, asked)
    wanted = {}
    for image, places in enumerate(SCORED["crops"][:2]):
        row, positions = READ[image]
        scores = attention_by_hand(part, given.features[places], asked.embeds[row, positions], heads)
        wanted |= dict(zip(places, scores.tolist(), strict=True))
    assert_scores(found, wanted)


@torch.no_grad()
def test_double_softmax_passes_probabilities_on():
    given, asked = tokens(width=32), question(32)
    keep = {"rule": "threshold", "gamma": 0.6, "temperature": 0.25}
    part = router(32, score="attention", double_softmax=True, keep=keep)
    found, _ = part(given, asked)
    for image, places in enumerate(SCORED["crops"][:2]):
        row, positions = READ[image]
        logits = attention_by_hand(part, given.features[places], asked.embeds[row, positions], 1)
        probabilities = torch.softmax(logits / 0.25, 0)
        torch.testing.assert_close(found.scores["router"][places], probabilities, atol=1e-5, rtol=0)
        assert len(set(probabilities.tolist())) > 1
        scores = dict(zip(places, probabilities.tolist(), strict=True))
        kept = {place for place in places if found.kept[place]}
        assert kept == threshold_set(scores, places, 0.6, 0.25)


@pytest.mark.parametrize("options", [{}, {"reduce": "mean"}, {"score": "attention"}])
def test_an_empty_question_scores_every_token_alike(options):
    given, asked = tokens((-2, 0, 0)), question()
    asked.turn[1] = 0
    found, _ = router(**options)(given, asked)
    assert found.scores["router"][[3, 4, 5]].tolist() == [0, 0, 0]
    assert found.kept[[3, 4, 5]].tolist() == [True, False, False]
    assert found.scores["router"][7:11].abs().min() > 0


def test_an_image_before_all_turns_reads_nothing():
    given, asked = tokens(), question()
    asked.image_turn[0] = 0
    found, _ = router()(given, asked)
    assert found.scores["router"][[3, 4, 5]].tolist() == [0, 0, 0]

"""GlobalCom²: which tokens the released selection keeps, in which order, and the class token's scores that it reads.

The features of a case are position codes: token i of view v is (v, row, column).
"""

from math import ceil, gcd
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from builders import randomise
from hires_lmm.modeling.bases_hires_lmm import Needs, PartContext
from hires_lmm.modeling.carriers_hires_lmm import ImageGeometry, ViewFeatures, ViewGroup, VisualTokens, drop
from hires_lmm.modeling.geometry_hires_lmm import MAIN_TOWER, Grid, Kind
from hires_lmm.modeling.globalcom2_hires_lmm import (
    HiResLmmGlobalCom2,
    crop_sums,
    crop_weights,
    find_crops,
    stretch,
    strip_edges,
)
from hires_lmm.modeling.layout_hires_lmm import HiResLmmLayout
from hires_lmm.modeling.sequence_hires_lmm import LayoutOptions
from hires_lmm.modeling.towers_hires_lmm import run_tower
from hires_lmm.processing.image_processing_hires_lmm import HiResLmmImageProcessor

from .base import GoldenSet, write_set


NAME = "globalcom2"
GOLDEN = GoldenSet(NAME)
BREAK = {"place": "token_row_end", "on": "crops"}
OTHERS = [(0.1, 10.0), (0.5, 10.0), (0.25, 1.0), (0.9, 1.0)]  # of a set made anew


def ratios(sums: torch.Tensor, ratio: float, temperature: float) -> list[float]:
    return (ratio * crop_weights(sums, temperature)).clamp(max=1).tolist()


def geometry_of(case: dict, settings: dict) -> ImageGeometry:
    """The views of an image, by our planner."""
    pinpoints = settings["pinpoints"][case["pinpoints"]]
    side = gcd(*(number for pair in pinpoints for number in pair))
    width, height = case["image_size_wh"]
    processor = HiResLmmImageProcessor(
        view_size=side, patch_size=side // settings["patches_per_side"], planner="llava_next", pinpoints=pinpoints
    )
    views = tuple(tuple(view.shape) for view in processor.plan(height, width).views)
    return ImageGeometry(0, views, 0)


def tokens_of(case: dict, settings: dict, scores: torch.Tensor, name: str) -> VisualTokens:
    """Position codes of all tokens in the order of LLaVA-NeXT, with their scores."""
    side, geometry = settings["patches_per_side"], geometry_of(case, settings)
    view, cell = (
        each.flatten() for each in torch.meshgrid(torch.arange(len(scores)), torch.arange(side**2), indexing="ij")
    )
    codes = torch.stack([view, cell // side, cell % side], dim=-1).float().view(len(scores), side**2, 3)
    grid = (side, side)
    crops = tuple(range(1, len(scores)))
    groups = [
        ViewGroup(int(Kind.GLOBAL), codes[:1], grid, (0,), scores={name: scores[:1]}),
        ViewGroup(int(Kind.CROP), codes[1:], grid, crops, scores={name: scores[1:]}),
    ]
    grids = {int(Kind.GLOBAL): Grid(*grid), int(Kind.CROP): Grid(*grid)}
    layout = HiResLmmLayout(LayoutOptions(separators={"newline": BREAK}), grids, (), 3)
    layout.separators.newline.data.copy_(torch.tensor(settings["image_newline"]))
    tokens = layout(ViewFeatures(groups, [geometry]), embed=lambda ids: ids)
    tokens.num_tokens = list(tokens.lengths)
    return tokens


def part_of(settings: dict, kind: str, **options) -> HiResLmmGlobalCom2:
    grid = Grid(settings["patches_per_side"], settings["patches_per_side"])
    grids = {(int(kind), MAIN_TOWER): grid for kind in (Kind.GLOBAL, Kind.CROP)}
    score = {"logits": "logits", "probs": "probabilities"}[kind]
    context = PartContext(None, 3, 3, grids, grid.size)
    made = HiResLmmGlobalCom2.Options(score=score, temperature=settings["temperature"], **options)
    assert HiResLmmGlobalCom2.describe(made, context).needs.scores == (f"cls_{score}",)
    return HiResLmmGlobalCom2(context, made)


def run(case: dict, scores: torch.Tensor, settings: dict, budget: int | None = None, **options) -> SimpleNamespace:
    """What our part makes of a case, and the numbers on its way."""
    part = part_of(settings, case["score_kind"], **options)
    tokens = tokens_of(case, settings, scores, part.score)
    if budget is not None:
        tokens.num_tokens = [budget]
    found, _ = part(tokens, None)
    crops, whole = find_crops(tokens, 0), part._map(tokens, 0, tokens.scores[part.score][tokens.rows("global")[0]])
    edges = [strip_edges(edges, settings["patches_per_side"], True) for edges in (crops.tops, crops.lefts)]
    return SimpleNamespace(
        kept=drop(found)[0] if budget is not None else found.features[found.kept],
        crops=crops,
        sums=torch.stack([crop_sums(whole.double(), *edges)[cell] for cell in crops.cells]),
        stretched=torch.cat([stretch(whole, crops)[crops.crop == own] for own in range(len(crops.sizes))]),
        num_breaks=int((tokens.kind == Kind.SEPARATOR).sum()),
    )


def without_padding_rows(sequence: torch.Tensor, heights: list[int], side: int) -> torch.Tensor:
    """Leave out the line breaks of rows that hold padding alone, which have none in our layout."""
    ends = (sequence[:, 0] == -1).long()
    line = ends.cumsum(0) - 1
    rows = torch.tensor([row < height for height in heights for row in range(side)])
    return sequence[(ends == 0) | rows[line.clamp(min=0)]]


CASES = pytest.mark.parametrize("case", GOLDEN.cases["cases"], ids=lambda case: case["name"])


@CASES
def test_the_released_selection(case):
    settings, name = GOLDEN.cases["settings"], case["name"]
    side = settings["patches_per_side"]
    found = run(
        case, GOLDEN[f"input.{name}.scores"], settings, compat="release", ratio=float(settings["retention_ratio"])
    )
    assert found.crops.sizes == case["valid_per_crop"]
    assert ratios(found.sums, settings["retention_ratio"], settings["temperature"]) == pytest.approx(case["scales"])
    for setting, wanted in case["budgets_at_other_settings"].items():
        ratio, temperature = (float(part.partition("=")[2]) for part in setting.split(","))
        assert ratios(found.sums, ratio, temperature) == pytest.approx(wanted), setting
    upsampled = GOLDEN[f"output.{name}.upsampled_thumbnail_scores"]
    GOLDEN.close(
        found.stretched[:: ceil(len(found.stretched) / len(upsampled))],
        f"output.{name}.upsampled_thumbnail_scores",
    )
    count = case["thumbnail_kept"]
    codes = found.kept.int()
    assert (codes[:count, 1] * side + codes[:count, 2]).tolist() == GOLDEN[f"output.{name}.thumbnail_indices"].tolist()
    heights = [stop - start for start, stop in zip(found.crops.tops, found.crops.tops[1:], strict=False)]
    wanted = without_padding_rows(GOLDEN[f"output.{name}.crop_tokens"], heights, side)
    assert codes[count:].tolist() == wanted.tolist()
    if f"output.{name}.sequence" in GOLDEN.tensors and heights == [side] * len(heights):
        whole = GOLDEN[f"output.{name}.sequence"].int()
        at = next(at for at in range(len(whole)) if whole[at : at + len(codes)].tolist() == codes.tolist())
        assert len(whole) - len(codes) - at >= 0


@CASES
def test_the_exact_budget_keeps_the_same_share_in_raster_order(case):
    settings = GOLDEN.cases["settings"]
    scores, side = GOLDEN[f"input.{case['name']}.scores"], settings["patches_per_side"]
    full = run(case, scores, settings)
    num_views = full.kept.shape[0] - full.num_breaks
    for share in (0.07, settings["retention_ratio"], 0.5, 0.93, 1.0):
        budget = full.num_breaks + max(int(share * num_views), 1)
        codes = run(case, scores, settings, budget).kept.int()
        assert len(codes) == budget and int((codes[:, 0] == -1).sum()) == full.num_breaks
        whole = codes[codes[:, 0] == 0]
        order = whole[:, 1] * side + whole[:, 2]
        assert order.tolist() == sorted(order.tolist())
        assert len(whole) == pytest.approx(share * side**2, abs=2)  # two roundings
        best = scores[0].topk(len(whole)).indices
        assert set(order.tolist()) == set(best.tolist())


def is_even(case: dict, side: int) -> bool:
    """Whether crops have no padding and cut the global view into equal strips."""
    whole = set(case["valid_per_crop"]) == {side**2} and not any(side % number for number in case["grid_cols_rows"])
    return whole and case["score_kind"] == "logits"


EVEN = [case for case in GOLDEN.cases["cases"] if is_even(case, GOLDEN.cases["settings"]["patches_per_side"])]


@pytest.mark.parametrize("case", EVEN, ids=lambda case: case["name"])
def test_without_padding_crops_get_what_the_release_gives_them_but_for_rounding(case):
    settings, scores = GOLDEN.cases["settings"], GOLDEN[f"input.{case['name']}.scores"]
    kept = sum(case["kept_per_crop"]) + case["thumbnail_kept"]
    budget = kept + run(case, scores, settings).num_breaks
    codes = run(case, scores, settings, budget).kept.int()
    found = torch.bincount(codes[codes[:, 0] > 0][:, 0], minlength=case["num_crops"] + 1)[1:]
    torch.testing.assert_close(found, torch.tensor(case["kept_per_crop"]), atol=case["num_crops"], rtol=0)


def load_tower(cases: dict, tensors: dict[str, torch.Tensor]) -> CLIPVisionModel:
    """The small CLIP of a set; its names may say where it stood."""
    clip = cases["clip"]
    config = CLIPVisionConfig(
        hidden_size=clip["width"],
        intermediate_size=next(value.shape[0] for key, value in tensors.items() if key.endswith("fc1.weight")),
        num_attention_heads=clip["heads"],
        num_hidden_layers=clip["layers"],
        image_size=clip["image"],
        patch_size=clip["patch"],
    )
    tower = CLIPVisionModel(config).eval()
    own = tower.state_dict()
    prefix = "weight.vision_tower."
    loaded = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            loaded[name if name in own else name.removeprefix("vision_model.")] = value
    tower.load_state_dict({**own, **loaded})
    assert {key for key in own if "position_ids" not in key} <= loaded.keys()
    return tower


@torch.no_grad()
def test_the_scores_of_the_class_token():
    tower = load_tower(GOLDEN.cases, GOLDEN.tensors)
    found = run_tower(tower, GOLDEN["input.clip.pixels"], -2, Needs(scores=("cls_logits", "cls_probabilities")))
    GOLDEN.close(found.scores["cls_logits"], "output.clip.cls_scores_last")
    GOLDEN.close(found.features, "output.clip.features_layer_-2")
    tower.set_attn_implementation("eager")
    attentions = tower(GOLDEN["input.clip.pixels"], output_attentions=True).attentions[-1]
    torch.testing.assert_close(
        found.scores["cls_probabilities"], attentions[:, :, 0, 1:].mean(1), atol=1e-5, rtol=1e-4
    )


# ---- a set at other sizes


def remake(folder: Path, seed: int) -> None:
    side, pixels = 12, 84
    settings = {
        "retention_ratio": 0.4,
        "temperature": 5.0,
        "patches_per_side": side,
        "image_newline": [-1, -1, -1],
        "pinpoints": {"some": [[a * pixels, b * pixels] for a, b in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 5))]},
    }
    tensors: dict[str, torch.Tensor] = {}
    cases = []
    sizes = [(168, 168), (150, 120), (84, 252), (420, 60), (410, 84)]
    for number, size in enumerate(sizes):
        name, kind = f"case{number}", "probs" if number == 1 else "logits"
        case = {"name": name, "image_size_wh": size, "pinpoints": "some", "score_kind": kind}
        scores = 2 * torch.randn(len(geometry_of(case, settings).views), side**2)
        scores = scores.softmax(dim=-1) if kind == "probs" else scores
        found = run(case, scores, settings, compat="release", ratio=settings["retention_ratio"])
        codes = found.kept.int()
        first = codes[codes[:, 0] == 0]
        crops, grid = codes[len(first) :], len(found.crops.tops) - 1
        heights = [stop - start for start, stop in zip(found.crops.tops, found.crops.tops[1:], strict=False)]
        lines = torch.tensor_split(crops, (crops[:, 0] == -1).nonzero()[:, 0] + 1)[:-1]
        bands = torch.tensor(heights).cumsum(0).tolist()
        rows = []
        for stop, height in zip(bands, heights, strict=True):
            rows += [*lines[stop - height : stop], crops.new_full((side - height, 3), -1)]
        scales = ratios(found.sums, settings["retention_ratio"], settings["temperature"])
        kept = torch.bincount(crops[crops[:, 0] > 0][:, 0].long(), minlength=len(scores))[1:].tolist()
        cases.append(
            case
            | {
                "num_crops": len(scores) - 1,
                "grid_cols_rows": [len(found.crops.lefts) - 1, grid],
                "valid_per_crop": found.crops.sizes,
                "kept_per_crop": kept,
                "scales": scales,
                "thumbnail_kept": len(first),
                "budgets_at_other_settings": {f"r={r},tau={t}": ratios(found.sums, r, t) for r, t in OTHERS},
            }
        )
        tensors |= {
            f"input.{name}.scores": scores,
            f"output.{name}.thumbnail_indices": (first[:, 1] * side + first[:, 2]).int(),
            f"output.{name}.crop_tokens": torch.cat(rows),
            f"output.{name}.upsampled_thumbnail_scores": found.stretched[::2],
        }
    clip = {"width": 24, "heads": 3, "layers": 2, "image": 42, "patch": 14}
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_attention_heads=3, num_hidden_layers=2, image_size=42, patch_size=14
    )
    tower = randomise(CLIPVisionModel(config), seed).eval()
    pictures = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        seen = run_tower(tower, pictures, -2, Needs(scores=("cls_logits",)))
    tensors |= {f"weight.vision_tower.{name}": value for name, value in tower.state_dict().items()}
    tensors |= {
        "input.clip.pixels": pictures,
        "output.clip.cls_scores_last": seen.scores["cls_logits"],
        "output.clip.features_layer_-2": seen.features,
    }
    write_set(folder, {"seed": seed, "settings": settings, "cases": cases, "clip": clip}, tensors)

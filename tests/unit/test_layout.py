"""Features of views land where the arrangement says: each carries its own address, so a wrong gather shows."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from hires_lmm.modeling.carriers_hires_lmm import ImageGeometry, ViewFeatures, ViewGroup, index_tensor, read_geometry
from hires_lmm.modeling.geometry_hires_lmm import Grid
from hires_lmm.modeling.layout_hires_lmm import HiResLmmLayout, token_plan, view_limits
from hires_lmm.modeling.sequence_hires_lmm import LayoutOptions


NEWLINE = {"place": "token_row_end", "on": "crops"}
BETWEEN = {"place": "between_views", "value": [1]}


def image(rows: int, cols: int, first_view: int = 0, num_tokens: int = 0) -> ImageGeometry:
    cells = [(0, 0, 0)] + [(1, r, c) for r in range(rows) for c in range(cols)]
    return ImageGeometry(first_view, tuple((k, rows, cols, r, c, 2, 2, 0, 2, 0, 2) for k, r, c in cells), num_tokens)


def make_layout(separators: dict, width: int = 2, glob=(2, 2), crop=(2, 2), **options) -> HiResLmmLayout:
    grids = {0: Grid(*glob, None), 1: Grid(*crop, None)}
    return HiResLmmLayout(LayoutOptions(separators=separators, **options), grids, (), width)


def groups_of(glob: torch.Tensor, crops: torch.Tensor, images: list, grids=((2, 2), (2, 2))) -> ViewFeatures:
    rows = [tuple(row for each in images for row in each.rows(kind)) for kind in (0, 1)]
    parts = [ViewGroup(kind, (glob, crops)[kind], grids[kind], rows[kind]) for kind in (0, 1)]
    return ViewFeatures(parts, images)


def test_features_of_a_batch_land_where_the_layout_says():
    images = [image(1, 2, 0, 13), image(0, 0, 3, 4), image(1, 1, 4)]
    glob = torch.tensor([[[float(v), float(c)] for c in range(4)] for v in (0, 3, 4)])
    crops = torch.tensor([[[float(v), float(c)] for c in range(4)] for v in (1, 2, 5)])
    layout = make_layout({"between": BETWEEN, "newline": NEWLINE})
    with torch.no_grad():
        layout.separators.newline.fill_(-5.0)
    embeddings = nn.Embedding(3, 2)
    tokens = layout(groups_of(glob, crops, images), embeddings)
    assert tokens.lengths == [4 + 1 + 8 + 2, 4, 4 + 1 + 4 + 2] and tokens.num_tokens == [13, 4, 0]
    for feature, view, cell, kind in zip(tokens.features, tokens.view, tokens.cell, tokens.kind, strict=True):
        if kind >= 0:
            assert feature.tolist() == [view, cell[0] * 2 + cell[1]]
        else:
            assert view == -1 and feature.tolist() in ([-5.0, -5.0], embeddings.weight[1].tolist())
    picked = tokens.select_images([2, 0, 2])
    assert picked.lengths == [11, 15, 11] and picked.num_tokens == [0, 13, 0]
    parts = tokens.per_image(tokens.features)
    torch.testing.assert_close(picked.features, torch.cat([parts[2], parts[0], parts[2]]), rtol=0, atol=0)
    assert [index.tolist() for index in picked.rows("global")] == [[0, 1, 2, 3], [11, 12, 13, 14], [26, 27, 28, 29]]


def test_views_of_different_grids_and_scores():
    """2 x 3 tokens a global view, 1 x 2 a crop; scores travel with their tokens."""
    images = [image(2, 1, 0, 9), image(1, 1, 3, 8)]
    glob = torch.tensor([[[float(i), float(t)] for t in range(6)] for i in (10, 20)])
    crops = torch.tensor([[[float(k), float(t)] for t in range(2)] for k in (11, 12, 21)])
    layout = make_layout({"newline": {**NEWLINE, "value": [0]}, "between": BETWEEN}, glob=(2, 3), crop=(1, 2))
    marks = nn.Embedding.from_pretrained(torch.tensor([[-1.0, -1.0], [-2.0, -2.0]]))
    views = groups_of(glob, crops, images, ((2, 3), (1, 2)))
    views.groups[0].scores["s"], views.aux = glob.sum(-1), {"loss": 1}
    tokens = layout(views, marks)
    row, between = [-1, -1], [-2, -2]
    assert tokens.features.tolist() == [
        *([10, t] for t in range(6)),
        *(between, [11, 0], [11, 1], row, [12, 0], [12, 1], row),
        *([20, t] for t in range(6)),
        *(between, [21, 0], [21, 1], row),
    ]
    assert tokens.view.tolist() == [*[0] * 6, -1, 1, 1, -1, 2, 2, -1, *[3] * 6, -1, 4, 4, -1]
    assert tokens.kind.tolist() == [*[0] * 6, -1, 1, 1, -1, 1, 1, -1, *[0] * 6, -1, 1, 1, -1]
    assert (tokens.lengths, tokens.num_tokens, tokens.aux) == ([13, 10], [9, 8], {"loss": 1})
    assert [index.tolist() for index in tokens.rows("crops")] == [[7, 8, 10, 11], [20, 21]]
    assert [index.tolist() for index in tokens.rows(["global", "crops"])] == [i.tolist() for i in tokens.rows("all")]
    assert [len(index) for index in tokens.rows("strided")] == [0, 0]
    scored = tokens.scores["s"]
    torch.testing.assert_close(scored[tokens.rows("global")[1]], glob[1].sum(-1))
    assert scored.isnan().tolist() == (tokens.kind != 0).tolist()


def test_views_of_unequal_size_are_padded_and_only_what_counts_enters():
    """Crops of 2 x 1 and 1 x 2 patches in groups of 2 x 2; boxes divide each view's own box."""
    views = ((1, 1, 2, 0, 0, 2, 1, 0, 2, 0, 1), (1, 1, 2, 0, 1, 1, 2, 0, 1, 0, 2))
    images = [ImageGeometry(0, views, 4)]
    features = torch.tensor([[[float(v), float(c)] for c in range(4)] for v in (0, 1)])
    options = LayoutOptions(crop_order="views")
    layout = HiResLmmLayout(options, {1: Grid(2, 2)}, (), 2)
    tokens = layout(ViewFeatures([ViewGroup(1, features, (2, 2), (0, 1))], images), nn.Embedding(1, 2))
    assert tokens.features.tolist() == [[0, 0], [0, 2], [1, 0], [1, 1]]
    boxes = tokens.boxes(torch.tensor([[0, 0, 512, 256], [0, 256, 256, 768]]))
    assert boxes.tolist() == [[0, 0, 1, 1], [1, 0, 2, 1], [0, 1, 1, 2], [0, 2, 1, 3]]


def test_boxes_divide_the_view_box():
    layout = make_layout({"between": {**BETWEEN, "value": [0]}}, width=1)
    images = [image(1, 1, num_tokens=8)]
    tokens = layout(groups_of(torch.zeros(1, 4, 1), torch.zeros(1, 4, 1), images), nn.Embedding(1, 1))
    boxes = tokens.boxes(torch.tensor([[0, 0, 2560, 5120], [256, 512, 768, 1024]]))
    assert boxes[1].tolist() == [0, 10, 5, 20] and boxes[-1].tolist() == [2, 3, 3, 4] and np.isnan(boxes[4]).all()


def test_geometry_is_grouped_by_image():
    """An image starts where its row says so, whatever its kind."""
    rows = [[1, 1, 1, 0, 0, 8, 2, 2, 1], [0, 1, 1, 0, 0, 8, 2, 2, 0], [0, 0, 0, 0, 0, 4, 2, 2, 1]]
    images = read_geometry(rows, [[0, 2, 0, 2]] * 3)
    assert [(i.first_view, len(i.views), i.num_tokens) for i in images] == [(0, 2, 8), (2, 1, 4)]
    assert images[0].rows(1) == [0] and images[0].rows(0) == [1] and images[1].rows(0) == [2]
    assert images[0].grid(1) == (1, 1) and images[1].grid(1) == (0, 0)
    with pytest.raises(ValueError, match="does not open an image"):
        read_geometry(rows[1:], [[0, 2, 0, 2]] * 2)
    with pytest.raises(ValueError, match="3 rows and view_spans has 2"):
        read_geometry(rows, [[0, 2, 0, 2]] * 2)
    assert read_geometry([], []) == []


def test_vectors_of_separators():
    layout = make_layout({"a": {**BETWEEN, "value": [2, 0]}, "end": {"place": "view_end"}}, width=3)
    assert [name for name, _ in layout.named_parameters()] == ["separators.end"]
    embeddings = nn.Embedding(4, 3)
    with torch.no_grad():
        layout.separators.end.copy_(torch.tensor([1.0, 2.0, 3.0]))
    vectors = layout.separators(torch.zeros(1, 3, dtype=torch.float64), embeddings)
    wanted = torch.stack([embeddings.weight[2], embeddings.weight[0], torch.tensor([1.0, 2.0, 3.0])])
    torch.testing.assert_close(vectors, wanted.double(), rtol=0, atol=0)


def test_learned_separators_start_with_norm_one():
    layout = make_layout({"end": {"place": "view_end"}}, width=4096)
    layout.separators.init_weights()
    vector = layout.separators.end.detach()
    assert 0.95 < float(vector.norm()) < 1.05 and abs(float(vector.mean())) < 1e-3


def plan_of(images: list[ImageGeometry], device: str = "cpu"):
    counts = [sum(len(each.rows(kind)) for each in images) for kind in (0, 1)]
    groups = tuple((kind, (2, 2), (counts[kind], 4)) for kind in (0, 1))
    spec = make_layout({"newline": {**NEWLINE, "value": [1]}}).spec
    return token_plan(tuple((i.first_view, i.views, i.num_tokens) for i in images), groups, spec, device)


def test_a_plan_is_kept_for_batches_of_the_same_geometry():
    images = [image(1, 2, num_tokens=13), image(1, 1, first_view=3)]
    plan = plan_of(images)
    other_counts = [image(1, 2, num_tokens=7), image(1, 1, first_view=3, num_tokens=2)]
    assert plan_of(other_counts) is plan and plan_of(images[:1]) is not plan
    assert {plan.view.dtype, plan.cell.dtype, plan.kind.dtype, plan.index.dtype} == {torch.int64}
    assert plan_of([]).index.shape == (0,) and plan_of([]).cell.shape == (0, 2) and plan_of([]).lengths == ()


def test_fewer_views_than_images_need_are_refused():
    spec = make_layout({}).spec
    with pytest.raises(ValueError, match="Images have 2 views of kind 1, but a part made 1"):
        token_plan(((0, image(1, 2).views, 0),), ((0, (2, 2), (1, 4)), (1, (2, 2), (1, 4))), spec, "cpu")


def test_limits_of_views_under_a_budget():
    layout = HiResLmmLayout(LayoutOptions(crop_order="views"), {0: Grid(2, 2), 1: Grid(2, 2, None)}, (1,), 2)
    assert view_limits(((image(1, 2).views, 9), (image(1, 1).views, 99)), layout.spec) == {1: [3, 2, 4]}


class Faked(torch.Tensor):
    """Stands for the tensors of a compiler that traces."""


def test_a_plan_made_of_faked_tensors_is_made_again(monkeypatch):
    images = [image(2, 3)]
    module = sys.modules[HiResLmmLayout.__module__]
    with monkeypatch.context() as patch:
        patch.setattr(module, "index_tensor", lambda index, to: index_tensor(index, to).as_subclass(Faked))
        assert type(plan_of(images).index) is Faked
    assert type(plan_of(images).index) is torch.Tensor
    assert plan_of(images).index[:5].tolist() == [0, 1, 2, 3, 4]

"""The order of tokens and marks, written out by hand for small grids."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from hires_lmm.modeling.layout_hires_lmm import HiResLmmLayout, LayoutOptions, image_key, image_layout, token_plan
from hires_lmm.modeling.views_hires_lmm import (
    ImageGeometry,
    ViewFeatures,
    cell_boxes,
    index_tensor,
    read_geometry,
    span_to_cells,
)


FULL = (0, 2, 0, 2)
BETWEEN, ROW_END, VIEW_END = "between", "row", "view"
MARKS = {-1: BETWEEN, -2: ROW_END, -3: VIEW_END}


def image(rows: int, cols: int, spans=None, first_view=0, num_tokens=0) -> ImageGeometry:
    cells = [(0, 0)] + [(r, c) for r in range(rows) for c in range(cols)]
    spans = spans or [FULL] * len(cells)
    kinds = (0,) + (1,) * (rows * cols)
    return ImageGeometry(first_view, kinds, (rows, cols), tuple(cells), tuple(spans), num_tokens)


def sequence(geometry: ImageGeometry, crop_grid=(2, 2), **options) -> list:
    """Tokens as `view.row.col`, marks by name."""
    layout = image_layout(geometry, LayoutOptions(**options), (2, 2), (2, 2), crop_grid)
    names = []
    for source, view, cell in zip(layout.source, layout.view, layout.cell, strict=True):
        names.append(MARKS[int(source)] if source < 0 else f"{view}.{cell[0]}.{cell[1]}")
    return names


GLOBAL = ["0.0.0", "0.0.1", "0.1.0", "0.1.1"]


def test_raster_reads_the_stitched_map_row_by_row():
    top = ["1.0.0", "1.0.1", "2.0.0", "2.0.1"]
    bottom = ["1.1.0", "1.1.1", "2.1.0", "2.1.1"]
    assert sequence(image(1, 2)) == GLOBAL + top + bottom
    assert sequence(image(1, 2), row_end="learned") == [*GLOBAL, *top, ROW_END, *bottom, ROW_END]
    assert sequence(image(1, 2), between_views=7) == [*GLOBAL, BETWEEN, *top, *bottom]


def test_two_grid_rows():
    left, right = [f"1.{r}.{c}" for r in (0, 1) for c in (0, 1)], [f"2.{r}.{c}" for r in (0, 1) for c in (0, 1)]
    assert sequence(image(2, 1)) == GLOBAL + left + right


def test_views_come_one_after_another_with_marks():
    first = [f"1.{r}.{c}" for r in (0, 1) for c in (0, 1)]
    second = [f"2.{r}.{c}" for r in (0, 1) for c in (0, 1)]
    found = sequence(image(1, 2), crop_order="views", between_views="learned", view_end="learned")
    assert found == [*GLOBAL, VIEW_END, BETWEEN, *first, VIEW_END, BETWEEN, *second, VIEW_END]
    found = sequence(image(1, 2), crop_order="views", row_end="learned", global_position="last")
    assert found[:6] == ["1.0.0", "1.0.1", ROW_END, "1.1.0", "1.1.1", ROW_END] and found[-4:] == GLOBAL


def test_spans_cut_views_and_empty_ones_vanish():
    spans = [FULL, (1, 2, 0, 2), (1, 2, 0, 1)]
    assert sequence(image(1, 2, spans), row_end="learned") == [*GLOBAL, "1.1.0", "1.1.1", "2.1.0", ROW_END]
    off = [(0, 0, 0, 0), FULL, FULL]
    assert sequence(image(1, 2, off), between_views="learned")[:2] == ["1.0.0", "1.0.1"]
    assert BETWEEN not in sequence(image(1, 2, off), between_views="learned")
    assert sequence(image(0, 0), between_views="learned", row_end="learned") == GLOBAL


def test_rows_without_columns_keep_their_marks():
    """As LLaVA-NeXT does for images so narrow that unpadding cuts every column."""
    narrow = [FULL, (0, 2, 1, 1), (0, 1, 1, 1)]
    assert sequence(image(2, 1, narrow), row_end="learned") == [*GLOBAL, ROW_END, ROW_END, ROW_END]
    assert sequence(image(2, 1, narrow), between_views=1) == GLOBAL
    assert sequence(image(2, 1, narrow), crop_order="views", view_end=1, row_end=1) == [*GLOBAL, VIEW_END]


def test_an_axis_without_cells_makes_no_block():
    assert sequence(image(1, 1, [(0, 0, 0, 2), FULL]), between_views=1, view_end=2)[0] == "1.0.0"
    crop = ["1.0.0", "1.0.1", "1.1.0", "1.1.1"]
    assert sequence(image(1, 2, [FULL, FULL, (0, 2, 0, 0)])) == GLOBAL + crop


def test_absorbed_crops_give_no_tokens():
    assert sequence(image(2, 2), crop_grid=(0, 0), row_end="learned", between_views=3) == GLOBAL


def test_disagreeing_rows_cannot_be_stitched():
    with pytest.raises(ValueError, match="Crops of one grid row differ"):
        sequence(image(1, 2, [FULL, (0, 2, 0, 2), (0, 1, 0, 2)]))


@pytest.mark.parametrize(
    "span, grid, cells",
    [
        ((0, 24, 0, 24), (12, 12), (0, 12, 0, 12)),
        ((1, 5, 3, 4), (12, 12), (0, 3, 1, 2)),
        ((3, 3, 0, 24), (12, 12), (0, 0, 0, 12)),
        ((0, 24, 0, 24), (0, 0), (0, 0, 0, 0)),
    ],
)
def test_spans_round_outwards(span, grid, cells):
    assert span_to_cells(span, (24, 24), grid) == cells


def test_features_of_a_batch_land_where_the_layout_says():
    """Every feature carries its own address, so any wrong gather shows."""
    images = [
        image(1, 2, first_view=0, num_tokens=13),
        image(0, 0, first_view=3, num_tokens=4),
        image(1, 1, first_view=4),
    ]
    glob = torch.zeros(3, 4, 2)
    crops = torch.zeros(3, 4, 2)
    for number in range(3):
        for cell in range(4):
            glob[number, cell] = torch.tensor([[0.0, 3.0, 4.0][number], cell])
            crops[number, cell] = torch.tensor([[1.0, 2.0, 5.0][number], cell])
    layout = HiResLmmLayout(LayoutOptions(between_views=1, row_end="learned"), (2, 2), 2)
    with torch.no_grad():
        layout.row_end.fill_(-5.0)
    embeddings = nn.Embedding(3, 2)
    tokens = layout(ViewFeatures(glob, crops, (2, 2), (2, 2), images), embeddings)
    assert tokens.lengths == [4 + 1 + 8 + 2, 4, 4 + 1 + 4 + 2]
    assert tokens.num_tokens == [13, 4, 0]
    for feature, view, cell, kind in zip(tokens.features, tokens.view, tokens.cell, tokens.kind, strict=True):
        if kind < 2:
            assert feature.tolist() == [view, cell[0] * 2 + cell[1]]
        else:
            assert view == -1
            assert feature.tolist() in ([-5.0, -5.0], embeddings.weight[1].tolist())
    picked = tokens.select_images([2, 0, 2])
    assert picked.lengths == [11, 15, 11] and picked.num_tokens == [0, 13, 0]
    parts = tokens.per_image(tokens.features)
    torch.testing.assert_close(picked.features, torch.cat([parts[2], parts[0], parts[2]]), rtol=0, atol=0)


def test_cell_boxes_divide_the_view_box():
    images = [image(1, 1, num_tokens=8)]
    layout = HiResLmmLayout(LayoutOptions(between_views=0), (2, 2), 1)
    views = ViewFeatures(torch.zeros(1, 4, 1), torch.zeros(1, 4, 1), (2, 2), (2, 2), images)
    tokens = layout(views, nn.Embedding(1, 1))
    boxes = cell_boxes(tokens, torch.tensor([[0, 0, 2560, 5120], [256, 512, 768, 1024]]))
    assert boxes[1].tolist() == [0, 10, 5, 20]
    assert boxes[-1].tolist() == [2, 3, 3, 4]
    assert np.isnan(boxes[4]).all()


def test_geometry_is_grouped_by_image():
    rows = [[0, 1, 1, 0, 0, 8], [1, 1, 1, 0, 0, 8], [0, 0, 0, 0, 0, 4]]
    images = read_geometry(rows, [[0, 2, 0, 2]] * 3)
    assert [(i.first_view, i.num_crops, i.num_tokens) for i in images] == [(0, 1, 8), (2, 0, 4)]
    with pytest.raises(ValueError, match="opens with a global view"):
        read_geometry(rows[1:], [[0, 2, 0, 2]] * 2)
    with pytest.raises(ValueError, match="3 rows and view_spans has 2"):
        read_geometry(rows, [[0, 2, 0, 2]] * 2)
    assert read_geometry([], []) == []


@pytest.mark.parametrize("name", ["between_views", "row_end", "view_end"])
def test_marks_are_learned_or_ids(name):
    with pytest.raises(ValueError, match=f"layout.{name} is 'newline'"):
        LayoutOptions(**{name: "newline"})


def test_source_and_kind_of_every_token():
    """Global views of 2 x 3 tokens come first, then crops of 1 x 2; marks count backwards from -1."""
    options = LayoutOptions(between_views=1, row_end=2, view_end=3)
    layout = image_layout(image(2, 1), options, (2, 2), (2, 3), (1, 2))
    assert layout.source.tolist() == [0, 1, 2, 3, 4, 5, -3, -1, 6, 7, -2, 8, 9, -2, -3]
    assert layout.kind.tolist() == [0] * 6 + [2, 2, 1, 1, 2, 1, 1, 2, 2]
    assert layout.view.tolist() == [0] * 6 + [-1, -1, 1, 1, -1, 2, 2, -1, -1]
    assert layout.cell.tolist() == [
        *([0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [0, 0], [0, 0]),
        *([0, 0], [0, 1], [0, 0], [0, 0], [0, 1], [0, 0], [0, 0]),
    ]
    nothing = image_layout(image(0, 0, [(0, 0, 0, 0)]), options, (2, 2), (2, 3), (1, 2))
    assert [part.shape for part in (nothing.source, nothing.view, nothing.cell, nothing.kind)] == [
        *((0,), (0,), (0, 2), (0,)),
    ]


def test_crops_are_stitched_by_their_place():
    """Views 1 to 4 stand in the grid as 4 3 / 2 1; columns may be cut differently, rows of a grid row may not."""
    cells = ((0, 0), (1, 1), (1, 0), (0, 1), (0, 0))
    spans = (FULL, (0, 2, 0, 2), (0, 2, 1, 2), (0, 1, 0, 2), (0, 1, 1, 2))
    shuffled = ImageGeometry(0, (0, 1, 1, 1, 1), (2, 2), cells, spans, 0)
    found = sequence(shuffled, row_end=5)
    assert found == [
        *GLOBAL,
        *("4.0.1", "3.0.0", "3.0.1", ROW_END),
        *("2.0.1", "1.0.0", "1.0.1", ROW_END, "2.1.1", "1.1.0", "1.1.1", ROW_END),
    ]
    assert sequence(shuffled) == [name for name in found if name != ROW_END]


def test_the_global_view_may_come_last():
    found = sequence(image(1, 1), global_position="last", between_views=1, view_end=2)
    assert found == ["1.0.0", "1.0.1", "1.1.0", "1.1.1", VIEW_END, BETWEEN, *GLOBAL, VIEW_END]


def test_options_and_their_defaults():
    options = LayoutOptions()
    assert (options.global_position, options.crop_order, options.active_marks()) == ("first", "raster", {})
    chosen = LayoutOptions(between_views=0, view_end="learned")
    assert chosen.active_marks() == {"between_views": 0, "view_end": "learned"}
    assert hash(LayoutOptions(row_end=3)) == hash(LayoutOptions(row_end=3)) != hash(LayoutOptions(row_end=4))


def test_vectors_of_marks():
    layout = HiResLmmLayout(LayoutOptions(between_views=2, view_end="learned"), (2, 2), 3)
    assert [name for name, _ in layout.named_parameters()] == ["view_end"]
    embeddings = nn.Embedding(4, 3)
    with torch.no_grad():
        layout.view_end.copy_(torch.tensor([1.0, 2.0, 3.0]))
    vectors = layout.mark_vectors(torch.zeros(1, 3, dtype=torch.float64), embeddings)
    assert vectors.dtype == torch.float64
    wanted = torch.stack([embeddings.weight[2], torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])])
    torch.testing.assert_close(vectors, wanted.double(), rtol=0, atol=0)


def test_learned_marks_start_with_norm_one():
    layout = HiResLmmLayout(LayoutOptions(row_end="learned"), (2, 2), 4096)
    layout.init_weights()
    vector = layout.row_end.detach()
    assert 0.95 < float(vector.norm()) < 1.05 and abs(float(vector.mean())) < 1e-3


def test_global_views_and_crops_of_different_sizes():
    """2 x 3 tokens a global view, 1 x 2 a crop; each feature is its own address (image or crop, token)."""
    images = [image(2, 1, first_view=0, num_tokens=9), image(1, 1, first_view=3, num_tokens=8)]
    glob = torch.tensor([[[float(i), float(t)] for t in range(6)] for i in (10, 20)])
    crops = torch.tensor([[[float(k), float(t)] for t in range(2)] for k in (11, 12, 21)])
    layout = HiResLmmLayout(LayoutOptions(row_end=0, between_views=1), (2, 2), 2)
    marks = nn.Embedding.from_pretrained(torch.tensor([[-1.0, -1.0], [-2.0, -2.0]]))
    tokens = layout(ViewFeatures(glob, crops, (2, 3), (1, 2), images, {"loss": 1}), marks)
    row, between = [-1, -1], [-2, -2]
    assert tokens.features.tolist() == [
        *([10, t] for t in range(6)),
        *(between, [11, 0], [11, 1], row, [12, 0], [12, 1], row),
        *([20, t] for t in range(6)),
        *(between, [21, 0], [21, 1], row),
    ]
    assert tokens.view.tolist() == [*[0] * 6, -1, 1, 1, -1, 2, 2, -1, *[3] * 6, -1, 4, 4, -1]
    assert (tokens.lengths, tokens.num_tokens, tokens.aux) == ([13, 10], [9, 8], {"loss": 1})
    assert tokens.grids == {0: (2, 3), 1: (1, 2)}
    assert [index.tolist() for index in tokens.rows("crops")] == [[7, 8, 10, 11], [20, 21]]
    assert [index.tolist() for index in tokens.rows("global")] == [[0, 1, 2, 3, 4, 5], [13, 14, 15, 16, 17, 18]]


def plan_of(images: list[ImageGeometry], device: str = "cpu"):
    options = ("first", "raster", None, 1, None)
    grids, shapes = ((2, 2), (2, 2), (2, 2)), (len(images), 4, sum(i.num_crops for i in images), 4)
    return token_plan(tuple((i.first_view, *image_key(i)) for i in images), options, grids, shapes, device)


def test_a_plan_is_kept_for_batches_of_the_same_geometry():
    images = [image(1, 2, num_tokens=13), image(1, 1, first_view=3)]
    plan = plan_of(images)
    other_counts = [image(1, 2, num_tokens=7), image(1, 1, first_view=3, num_tokens=2)]
    assert plan_of(other_counts) is plan and plan_of(images[:1]) is not plan
    assert {plan.view.dtype, plan.cell.dtype, plan.kind.dtype, plan.index.dtype} == {torch.int64}
    assert plan_of([]).index.shape == (0,) and plan_of([]).cell.shape == (0, 2) and plan_of([]).lengths == ()


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

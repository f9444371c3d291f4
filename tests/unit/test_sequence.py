"""The order of tokens and separators: by hand for small grids, and against a walk written here for random layouts."""

import random

import pytest
import torch

from hires_lmm.modeling.layout_hires_lmm import HiResLmmLayout, token_plan
from hires_lmm.processing.geometry_hires_lmm import KINDS, Grid, Kind, ViewShape, spread_evenly
from hires_lmm.processing.sequence_hires_lmm import PLACES, Arrangement, LayoutOptions, Run, split_budget


FULL = (0, 2, 0, 2)
GRIDS = {0: Grid(2, 2), 1: Grid(2, 2)}
GLOBAL = ["0.0.0", "0.0.1", "0.1.0", "0.1.1"]
NEWLINE, BETWEEN, END = (
    {"newline": {"place": "token_row_end", "on": "crops"}},
    {"between": {"place": "between_views"}},
    {"end": {"place": "view_end"}},
)


def image(rows: int, cols: int, spans=None) -> list[ViewShape]:
    """A global view and crops in raster order."""
    cells = [(0, 0, 0)] + [(1, r, c) for r in range(rows) for c in range(cols)]
    spans = spans or [FULL] * len(cells)
    return [ViewShape(k, rows, cols, r, c, 2, 2, *span) for (k, r, c), span in zip(cells, spans, strict=True)]


def sequence(views, grids=None, num_tokens=None, elastic=(), **options) -> list[str]:
    """Tokens as `view.row.col`, the view counted over the image; separators by name."""
    arrangement = Arrangement(LayoutOptions(**options), GRIDS if grids is None else grids, elastic)
    names = list(options.get("separators", {}))
    words = []
    for piece in arrangement.walk(views, num_tokens):
        if isinstance(piece, Run):
            number = [n for n, view in enumerate(views) if view.kind == piece.kind][piece.view]
            words += [f"{number}.{piece.row}.{col}" for col in range(piece.start, piece.stop)]
        else:
            words += [names[piece.separator]] * arrangement.separators[piece.separator].num_tokens
    return words


def test_raster_reads_the_stitched_map_row_by_row():
    top, bottom = ["1.0.0", "1.0.1", "2.0.0", "2.0.1"], ["1.1.0", "1.1.1", "2.1.0", "2.1.1"]
    assert sequence(image(1, 2)) == GLOBAL + top + bottom
    assert sequence(image(1, 2), separators=NEWLINE) == [*GLOBAL, *top, "newline", *bottom, "newline"]
    assert sequence(image(1, 2), separators=BETWEEN) == [*GLOBAL, "between", *top, *bottom]


def test_views_come_one_after_another():
    first, second = ([f"{view}.{r}.{c}" for r in (0, 1) for c in (0, 1)] for view in (1, 2))
    found = sequence(image(1, 2), crop_order="views", separators={**BETWEEN, **END})
    assert found == [*GLOBAL, "end", "between", *first, "end", "between", *second, "end"]
    found = sequence(image(1, 2), crop_order="views", separators=NEWLINE, order=["crops", "global"])
    assert found[:6] == ["1.0.0", "1.0.1", "newline", "1.1.0", "1.1.1", "newline"] and found[-4:] == GLOBAL


def test_llava_uhd_writes_commas_between_columns_and_a_newline_after_each_row():
    separators = {"comma": {"place": "crop_column"}, "newline": {"place": "crop_row_end"}}
    grids = {0: Grid(1, 1, None, whole=True), 1: Grid(1, 1, None, whole=True)}
    options = {"crop_order": "views", "order": ["crops", "global"], "separators": separators}
    found = sequence(image(2, 2), grids=grids, **options)
    assert found == ["1.0.0", "comma", "2.0.0", "newline", "3.0.0", "comma", "4.0.0", "newline", "0.0.0"]


def test_spans_cut_views_and_empty_ones_vanish():
    spans = [FULL, (1, 2, 0, 2), (1, 2, 0, 1)]
    assert sequence(image(1, 2, spans), separators=NEWLINE) == [*GLOBAL, "1.1.0", "1.1.1", "2.1.0", "newline"]
    off = [(0, 0, 0, 0), FULL, FULL]
    assert sequence(image(1, 2, off), separators=BETWEEN)[:2] == ["1.0.0", "1.0.1"]
    assert "between" not in sequence(image(1, 2, off), separators=BETWEEN)
    assert sequence(image(0, 0), separators={**BETWEEN, **NEWLINE}) == GLOBAL


def test_rows_without_columns_keep_their_separators():
    """As LLaVA-NeXT does for images so narrow that unpadding cuts every column."""
    narrow = [FULL, (0, 2, 1, 1), (0, 1, 1, 1)]
    assert sequence(image(2, 1, narrow), separators=NEWLINE) == [*GLOBAL, "newline", "newline", "newline"]
    assert sequence(image(2, 1, narrow), separators=BETWEEN) == GLOBAL
    assert sequence(image(2, 1, narrow), crop_order="views", separators={**END, **NEWLINE}) == [*GLOBAL, "end"]


def test_crops_are_stitched_by_their_place():
    """Views 1 to 4 stand in the grid as 4 3 / 2 1; columns may be cut differently, rows of a grid row may not."""
    cells = ((0, 0), (1, 1), (1, 0), (0, 1), (0, 0))
    spans = (FULL, (0, 2, 0, 2), (0, 2, 1, 2), (0, 1, 0, 2), (0, 1, 1, 2))
    views = [ViewShape(int(n > 0), 2, 2, *cells[n], 2, 2, *spans[n]) for n in range(5)]
    assert sequence(views, separators=NEWLINE) == [
        *GLOBAL,
        *("4.0.1", "3.0.0", "3.0.1", "newline"),
        *("2.0.1", "1.0.0", "1.0.1", "newline", "2.1.1", "1.1.0", "1.1.1", "newline"),
    ]
    with pytest.raises(ValueError, match="Views of one grid row differ"):
        sequence(image(1, 2, [FULL, FULL, (0, 1, 0, 2)]))


def test_strided_views_are_interleaved():
    """Two views of 1 x 2 tokens, each of every second column: neighbours come from different views."""
    views = [ViewShape(2, 1, 2, 0, col, 2, 2, 0, 2, 0, 2) for col in (1, 0)]
    found = sequence(views, {2: Grid(2, 2)}, order=["strided"], separators={"end": {"place": "token_row_end"}})
    assert found == ["1.0.0", "0.0.0", "1.0.1", "0.0.1", "end", "1.1.0", "0.1.0", "1.1.1", "0.1.1", "end"]
    with pytest.raises(ValueError, match=r'cannot be interleaved; use layout\.crop_order="views"'):
        sequence([views[0], views[1]._replace(right=1)], {2: Grid(2, 2)}, order=["strided"])


def test_grids_round_spans_outwards_and_follow_the_size_of_a_view():
    view = ViewShape(1, 1, 1, 0, 0, 24, 24, 1, 5, 3, 4)
    assert Grid(12, 12, (2, 2)).cells(view) == Grid(12, 12, None).cells(view) == (0, 3, 1, 2)
    assert Grid(12, 12, None).cells(view._replace(top=3, bottom=3)) == (0, 0, 1, 2)
    small = ViewShape(1, 1, 1, 0, 0, 5, 4, 0, 5, 0, 4)  # a view of its own size
    assert Grid(12, 12, (2, 2)).cells(small) == (0, 3, 0, 2) and Grid(6, 6, None).cells(small) == (0, 6, 0, 6)
    assert Grid(6, 6, None, whole=True).cells(view) == (0, 6, 0, 6)
    assert Grid(6, 6, None, whole=True).cells(view._replace(top=5)) == (0, 0, 0, 0)
    for grid in (Grid(2, 3), Grid(4, 4, None, True, (0, 3), 7, 5, 9)):
        assert Grid.from_dict(grid.to_dict()) == grid


def test_views_that_an_operation_makes_stand_for_others():
    """Four pooled frames whatever the number of frames, and a second tower's view of each global view."""
    frames = [ViewShape(3, 9, 1, n, 0, 2, 2, *FULL) for n in range(9)]
    pooled = Arrangement(LayoutOptions(order=["frames"]), {3: Grid(1, 2, None, num_views=4)})
    assert pooled.walk(frames) == [Run(3, n, 0, 0, 2) for n in range(4)] and pooled.count(frames)[3] == 8
    detail = Arrangement(LayoutOptions(order=["global", "detail"]), {**GRIDS, 4: Grid(1, 3, None, source=(0,))})
    assert detail.walk(image(0, 0))[-1] == Run(4, 0, 0, 0, 3)


def frames_of(rows: int, cols: int) -> list[ViewShape]:
    return [ViewShape(3, rows, cols, n // cols, n % cols, 2, 2, *FULL) for n in range(rows * cols)]


def test_two_sets_of_tokens_of_one_video():
    """One view for every five frames, and a small one for each; a picture has one of both."""
    grids = {3: Grid(2, 2, None, source=(0, 3), view_stride=5), 4: Grid(1, 1, None, source=(0, 3))}
    both = Arrangement(LayoutOptions(order=["frames", "detail"]), grids)
    assert both.count(frames_of(11, 1)) == {-1: 0, 3: 3 * 4, 4: 11}
    assert both.count(image(0, 0)) == {-1: 0, 3: 4, 4: 1}
    spec = HiResLmmLayout(LayoutOptions(order=["frames", "detail"]), grids, (), 4).spec
    plan = token_plan(
        ((0, tuple(image(0, 0)), 5), (1, tuple(frames_of(6, 1)), 14)),
        ((3, (2, 2), (3, 4)), (4, (1, 1), (7, 1))),
        spec,
        "cpu",
    )
    assert plan.lengths == (5, 14) and sorted(plan.index.tolist()) == list(range(3 * 4 + 7))
    assert plan.view.tolist() == [0] * 5 + [1] * 4 + [6] * 4 + [1, 2, 3, 4, 5, 6]  # frames 0 and 5 open a view each


def test_frames_in_several_columns_are_read_as_one_map():
    order = {"order": ["frames"]}
    rows = sequence(frames_of(1, 2), {3: Grid(2, 1, None)}, **order)
    assert rows == ["0.0.0", "1.0.0", "0.1.0", "1.1.0"]
    assert sequence(frames_of(1, 2), {3: Grid(2, 1, None)}, crop_order="views", **order) == sorted(rows)


def test_a_sample_of_the_tokens_of_all_frames():
    """torch.linspace(0, 11, 5) is 0, 2.75, 5.5, 8.25, 11; halves go to the even number."""
    found = sequence(frames_of(3, 1), {3: Grid(2, 2, None, sample=5)}, order=["frames"])
    assert found == ["0.0.0", "0.1.1", "1.1.0", "2.0.0", "2.1.1"]
    every = sequence(frames_of(3, 1), {3: Grid(2, 2, None)}, order=["frames"])
    assert sequence(frames_of(3, 1), {3: Grid(2, 2, None, sample=12)}, order=["frames"]) == every
    assert sequence(frames_of(3, 1), {3: Grid(2, 2, None, sample=99)}, order=["frames"]) == every


def test_spread_evenly_is_linspace_of_single_precision():
    for total in (*range(2, 40), 3600, 28800, 46227):
        for number in {1, 2, 3, total // 3, total - 1, 2880} & set(range(1, total)):
            assert spread_evenly(total, number) == torch.linspace(0, total - 1, number).round().int().tolist()


def test_a_table_of_ids_by_place():
    table = {"at": {"place": "view_start", "on": "crops", "value": [[[10, 11], [20, 21]], [[30, 31], [40, 41]]]}}
    arrangement = Arrangement(LayoutOptions(crop_order="views", separators=table), GRIDS)
    separator, marks = arrangement.separators[0], [p for p in arrangement.walk(image(2, 2)) if not isinstance(p, Run)]
    assert [separator.flat()[separator.entry(m.row, m.col)] for m in marks] == [[10, 11], [20, 21], [30, 31], [40, 41]]
    with pytest.raises(ValueError, match="ids for 2 x 2 views, but the grid reaches row 0, column 2"):
        separator.entry(0, 2)


def test_an_elastic_kind_gives_as_many_tokens_as_the_budget_leaves():
    grids, options = {0: Grid(2, 2, None), 1: Grid(2, 2, None)}, {"crop_order": "views", "separators": END}
    found = sequence(image(1, 2), grids, num_tokens=10, elastic=(1,), **options)
    assert found == [*GLOBAL, "end", "1.0.0", "1.0.1", "end", "2.0.0", "end"]  # 3 of 8 crop tokens, 3 separators
    assert sequence(image(1, 2), grids, num_tokens=99, elastic=(1,), **options) == sequence(
        image(1, 2), grids, **options
    )


def test_budgets_are_shared_by_largest_remainder():
    assert split_budget(10, [5, 5, 5]) == [4, 3, 3] and split_budget(99, [5, 1]) == [5, 1]
    for total in range(1, 40):
        shares = split_budget(total, [7, 11, 13, 9])
        assert sum(shares) == min(total, 40) and all(s <= n for s, n in zip(shares, [7, 11, 13, 9], strict=True))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"separators": {"a": {"place": "nowhere"}}}, "place='nowhere' is unknown"),
        ({"separators": {"a": {"place": "view_end", "value": "newline"}}}, "value='newline' must be"),
        ({"separators": {"a": {"place": "view_end", "value": [[[1], [2, 3]]]}}}, "equally long"),
        ({"separators": {"a": {"place": "view_end", "on": "crop"}}}, "on='crop' names no views"),
        ({"separators": {"a": {"place": "crop_column"}}}, 'needs crop_order="views"'),
        ({"separators": {"a": "learned"}}, "must be a name and a dict"),
        ({"separators": {"a.b": {"place": "view_end"}}}, "must be a name and a dict"),
        ({"order": ["global", "global"]}, "names views twice"),
        ({"order": ["images"]}, "names no views"),
    ],
)
def test_wrong_layouts_are_refused_by_name(options, message):
    with pytest.raises(Exception, match=message):
        LayoutOptions(**options)


# ---- random layouts -----------------------------------------------------------------------------------------------
def lay_out(views: dict, order: list, is_raster: bool, separators: list) -> list[str]:
    """The sequence by its rules: views `{kind: [((row, col), (rows, cols))]}`, separators (name, place, kinds, n)."""
    words: list[str] = []

    def put(place: str, kind=None) -> None:
        for name, where, on, number in separators:
            if where == place and (kind is None or kind in on):
                words.extend([name] * number)

    put("image_start")
    blocks = 0
    for kind in order:
        bands: dict = {}
        for view in views.get(kind, []):
            bands.setdefault(view[0][0], []).append(view)
        if not bands:
            continue
        in_grid = kind in ("crops", "strided")
        if is_raster and (in_grid or any(col for (_, col), _ in views[kind])):
            if blocks:
                put("between_views")
            blocks += 1
            put("view_start", kind)
            lines = [sum(v[1][1] for v in band) for band in bands.values() for _ in range(band[0][1][0])]
            for number, length in enumerate(lines):
                if number:
                    put("between_token_rows", kind)
                words.extend([kind] * length)
                put("token_row_end", kind)
            put("view_end", kind)
            continue
        for which, band in enumerate(bands.values()):
            for place, (_, (rows, cols)) in enumerate(band):
                if in_grid and (place or which):
                    put("crop_column" if place else "between_crop_rows", kind)
                if kind == "frames" and (which or place):
                    put("between_frames", kind)
                elif blocks:
                    put("between_views")
                blocks += 1
                put("view_start", kind)
                for row in range(rows):
                    if row:
                        put("between_token_rows", kind)
                    words.extend([kind] * cols)
                    put("token_row_end", kind)
                put("view_end", kind)
            if in_grid:
                put("crop_row_end", kind)
    put("image_end")
    return words


@pytest.mark.parametrize("seed", range(200))
def test_random_layouts_equal_the_walk_and_are_counted_right(seed):
    draw = random.Random(seed)
    is_raster = draw.random() < 0.5
    places = [place for place in PLACES if not (is_raster and place.startswith(("crop", "between_crop")))]
    separators = [
        (f"s{number}", draw.choice(places), draw.sample(list(KINDS), draw.randint(1, 5)), draw.randint(1, 3))
        for number in range(draw.randint(0, 6))
    ]
    order = draw.sample(["global", "crops", "frames", "strided"], 4)
    rows, cols = ([draw.randint(1, 5) for _ in range(draw.randint(1, 4))] for _ in range(2))
    views = {
        "global": [((0, 0), (draw.randint(1, 5), draw.randint(1, 5)))],
        "crops": [((r, c), (rows[r], cols[c])) for r in range(len(rows)) for c in range(len(cols))],
        "frames": [((n, 0), (draw.randint(1, 5), draw.randint(1, 5))) for n in range(draw.randint(0, 4))],
        "strided": [((r, c), (rows[0], cols[0])) for r in range(len(rows)) for c in range(len(cols))],
    }
    if draw.random() < 0.2:
        views["crops"] = []
    columns = draw.choice([1, 1, 2, 3])
    if columns > 1:  # frames that lie in a map, the last row of it not full
        size = (draw.randint(1, 5), draw.randint(1, 5))
        views["frames"] = [((n // columns, n % columns), size) for n in range(draw.randint(2, 5))]
    shapes = []
    for kind, own in views.items():  # views have more patches than enter, each another number
        for place, (high, wide) in own:
            top, left = draw.randint(0, 2), draw.randint(0, 2)
            if is_raster and (kind in ("crops", "strided") or columns > 1):
                top = left = 0
            patches = (top + high + draw.randint(0, 2), left + wide + draw.randint(0, 2))
            span = (top, top + high, left, left + wide)
            wide = columns if kind == "frames" else len(cols)
            shapes.append(ViewShape(int(KINDS[kind]), len(rows), wide, *place, *patches, *span))
    values = {name: {"place": place, "on": on, "value": [7] * number} for name, place, on, number in separators}
    options = LayoutOptions(order=order, crop_order="raster" if is_raster else "views", separators=values)
    grids = {int(KINDS[kind]): Grid(9, 9) for kind in order}
    arrangement = Arrangement(options, grids)
    names = {int(number): name for name, number in KINDS.items()}
    found = []
    for piece in arrangement.walk(shapes):
        if isinstance(piece, Run):
            found += [names[piece.kind]] * (piece.stop - piece.start)
        else:
            found += [separators[piece.separator][0]] * separators[piece.separator][3]
    wanted = lay_out(views, order, is_raster, separators)
    assert found == wanted
    counts = arrangement.count(shapes)
    assert sum(counts.values()) == len(wanted)
    assert all(counts[int(KINDS[kind])] == wanted.count(kind) for kind in order)
    groups = tuple((kind, (9, 9), (len(views[names[kind]]), 81)) for kind in grids)
    layout = HiResLmmLayout(options, grids, (), 1)
    plan = token_plan(((0, tuple(map(tuple, shapes)), 0),), groups, layout.spec, "cpu")
    assert [names.get(kind, "mark") for kind in plan.kind.tolist()] == [w if w in KINDS else "mark" for w in wanted]
    first = {kind: next((n for n, shape in enumerate(shapes) if shape.kind == kind), 0) for kind in grids}
    bank, start = {}, 0
    for kind, _, (number, size) in groups:
        bank[kind], start = start, start + number * size
    for at, kind, view, (row, col) in zip(
        *(part.tolist() for part in (plan.index, plan.kind, plan.view, plan.cell)), strict=True
    ):
        assert kind == Kind.SEPARATOR or at == bank[kind] + 81 * (view - first[kind]) + 9 * row + col
    places = [
        (row * len(rows) + shapes[view].row, col * len(cols) + shapes[view].col)
        for kind, view, (row, col) in zip(*(part.tolist() for part in (plan.kind, plan.view, plan.cell)), strict=True)
        if kind == Kind.STRIDED
    ]
    assert not is_raster or places == sorted(places)

"""The picture of kept tokens: cells lie where they belong, kept is bright, dropped is dim, nothing is lost."""

import numpy as np
import pytest
import torch
from PIL import Image

from hires_lmm.modeling.outputs_hires_lmm import TokenMap
from hires_lmm.visualize import count_kept, draw_token_map, heat_colors


ORANGE, BLUE = (230, 140, 40), (40, 120, 230)
NAN = float("nan")


def make_map(cells: int = 4, grid=(2, 3), size=(200, 300), kept=None, scored=True, marks=2, padding=0) -> TokenMap:
    """A map of one image: a global view of `cells` x `cells` and crops of the same, over `size` plus padding."""
    views = [(0, (0, 0, *size))]
    height, width = size[0] / max(grid[0], 1), (size[1] + 2 * padding) / grid[1]
    for row in range(grid[0]):
        for col in range(grid[1]):
            left = col * width - padding
            views.append((1, (row * height, left, (row + 1) * height, left + width)))
    rows = []
    for view, (kind, (top, left, bottom, right)) in enumerate(views):
        for i in range(cells):
            for j in range(cells):
                h, w = (bottom - top) / cells, (right - left) / cells
                box = (top + i * h, left + j * w, top + (i + 1) * h, left + (j + 1) * w)
                rows.append((view, (i, j), kind, box, 0.1 * i if kind and scored else NAN))
    rows += [(-1, (0, 0), -1, (NAN,) * 4, NAN)] * marks
    number = len(rows)
    return TokenMap(
        image=torch.zeros(number, dtype=torch.long),
        view=torch.tensor([row[0] for row in rows]),
        cell=torch.tensor([row[1] for row in rows]),
        kind=torch.tensor([row[2] for row in rows]),
        box=torch.tensor([row[3] for row in rows]),
        score=torch.tensor([row[4] for row in rows]),
        kept=torch.ones(number, dtype=torch.bool) if kept is None else kept(rows),
        left_at=torch.full((number,), -1),
    )


def plain(size=(200, 300)) -> Image.Image:
    """Left half orange, right half blue."""
    image = Image.new("RGB", (size[1], size[0]), ORANGE)
    image.paste(BLUE, (size[1] // 2, 0, size[1], size[0]))
    return image


def pixels_near(picture: Image.Image, color, tolerance: int = 12) -> int:
    """Number of pixels of about that colour."""
    return int((np.abs(np.asarray(picture, dtype=int) - color).max(axis=-1) <= tolerance).sum())


def test_all_kept_shows_the_whole_image_bright_and_no_legend_of_dropped():
    picture = draw_token_map(plain(), make_map(), width=1000)
    assert picture.mode == "RGB"
    assert picture.width == pytest.approx(1000, abs=4)
    assert pixels_near(picture, ORANGE) == pytest.approx(pixels_near(picture, BLUE), rel=0.1)
    dim = draw_token_map(plain(), make_map(kept=lambda rows: torch.zeros(len(rows), dtype=torch.bool)), width=1000)
    assert pixels_near(dim, ORANGE) < 0.02 * pixels_near(picture, ORANGE)


def test_cells_lie_over_the_part_of_the_image_they_stand_for():
    """Only tokens over the left half are kept: orange stays, blue goes."""

    def left_half(rows):
        return torch.tensor([kind == -1 or box[3] <= 151 for _, _, kind, box, _ in rows])

    bright = draw_token_map(plain(), make_map(), width=1000)
    picture = draw_token_map(plain(), make_map(kept=left_half), width=1000)
    assert pixels_near(picture, ORANGE) > 0.85 * pixels_near(bright, ORANGE)
    assert pixels_near(picture, BLUE) < 0.02 * pixels_near(bright, BLUE)


def test_padding_is_drawn_around_the_image_and_named_in_the_legend():
    without, padded = (draw_token_map(plain(), make_map(padding=padding), width=1000) for padding in (0, 60))
    grey = (207, 207, 203)
    assert pixels_near(padded, grey, 1) > 20 * max(pixels_near(without, grey, 1), 1)
    swatch = padded.crop((0, padded.height - 75, padded.width, padded.height))
    assert pixels_near(swatch, grey, 1) == 30 * 22


def test_tokens_of_no_place_are_counted_and_nothing_is_drawn():
    """Queries that have read the whole image, as those of fusion."""
    whole = make_map(marks=256)
    queries = TokenMap(**{name: value[-256:] for name, value in vars(whole).items()})
    picture = draw_token_map(plain(), queries, title="Where?", width=1000)
    assert count_kept(queries) == (256, 256) and picture.width == 1000
    assert pixels_near(picture, ORANGE) == 0 and picture.height < 250


def legend_of(picture: Image.Image) -> Image.Image:
    """The last row of a picture."""
    return picture.crop((0, picture.height - 32 - 17 - 24, picture.width, picture.height))


@pytest.mark.parametrize("kept", ["all", "left", "none"])
def test_the_legend_shows_the_colours_of_the_picture_and_no_others(kept):
    """Swatches are pieces of the picture: orange where the orange half was kept, its dim form where it was dropped."""
    chosen = {"all": lambda left: True, "left": lambda left: left, "none": lambda left: False}[kept]

    def keep(rows):
        return torch.tensor([kind == -1 or chosen(box[3] <= 151) for _, _, kind, box, _ in rows])

    legend = legend_of(draw_token_map(plain(), make_map(grid=(0, 1), kept=keep, scored=False), width=1000))
    dim_blue, dim_orange, edge = (51, 59, 75), (68, 62, 62), (255, 196, 0)
    swatch = 0.9 * 30 * 22
    assert (pixels_near(legend, ORANGE) > swatch) == (kept != "none")
    assert (pixels_near(legend, dim_blue, 3) > swatch) == (kept == "left")
    assert (pixels_near(legend, dim_orange, 3) > swatch) == (kept == "none")
    assert (pixels_near(legend, edge) > 0) == (kept == "left")
    assert pixels_near(legend, BLUE) == 0


def test_kept_tokens_are_counted_with_marks_and_by_image():
    def left_half(rows):
        return torch.tensor([kind == -1 or box[3] <= 151 for _, _, kind, box, _ in rows])

    one, two = (
        make_map(kept=left_half),
        make_map(marks=5),
    )  # 7 views of 16 tokens; half of the crops and half of the rest
    fields = {name: torch.cat([getattr(one, name), getattr(two, name)]) for name in vars(one)}
    fields["image"] = torch.cat([one.image, two.image + 1])
    both = TokenMap(**fields)
    assert count_kept(both) == count_kept(one) == (8 + 48 + 2, 7 * 16 + 2)
    assert count_kept(both, 1) == (7 * 16 + 5, 7 * 16 + 5)
    with pytest.raises(ValueError, match="holds 2 images"):
        count_kept(both, 2)


@pytest.mark.parametrize("size", [(1, 1), (30, 3000), (3000, 30), (700, 500)])
def test_any_shape_gives_a_picture_of_reasonable_size(size):
    picture = draw_token_map(plain(size), make_map(size=size), title="A question " * 60, width=900)
    assert 890 <= picture.width <= 1400
    assert picture.height < 4000


def test_the_source_may_be_a_path_with_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    plain((300, 200)).save(tmp_path / "turned.jpg", exif=exif)
    picture = draw_token_map(tmp_path / "turned.jpg", make_map(size=(200, 300)), width=1000)
    assert pixels_near(picture, (207, 207, 203), 1) < 300  # the upright size is that of the map: no padding


@pytest.mark.parametrize("width", [599, True, 800.0, "800"])
def test_a_bad_width_is_named(width):
    with pytest.raises(ValueError, match="width="):
        draw_token_map(plain(), make_map(), width=width)


def test_layers_are_drawn_in_place_of_scores():
    """The upper half left behind layer 3, the lower behind 20; the right one stayed and keeps its colour."""
    token_map = make_map(grid=(1, 1), scored=False)
    crop = token_map.kind == 1
    token_map.left_at[crop] = torch.where(token_map.cell[crop][:, 0] < 2, 3, 20)
    token_map.left_at[crop & (token_map.cell[:, 1] >= 2)] = -1
    plainly = draw_token_map(plain(), token_map, width=1000)
    drawn = draw_token_map(plain(), token_map, width=1000, layers=True)
    grey = np.mean(ORANGE)
    for value in (0, 1):
        color = 0.28 * grey + 0.72 * heat_colors(np.array([value]))[0]
        assert pixels_near(drawn, color, 6) > 5000 > pixels_near(plainly, color, 6)
    assert pixels_near(drawn, BLUE) > 1.5 * pixels_near(drawn, ORANGE)
    assert pixels_near(plainly, BLUE) < 1.1 * pixels_near(plainly, ORANGE)

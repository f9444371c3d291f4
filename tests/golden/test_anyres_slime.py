"""Grids of SliME's slicing, by the released rule and by the paper's."""

import json
import random
from pathlib import Path

import pytest

from hires_lmm.processing.planners_hires_lmm import PLANNERS, PinpointLimits

from .base import GoldenSet


NAME = "anyres_slime"
GOLDEN = GoldenSet(NAME)
COLUMNS = {"released": "slime_release", "paper": "slime"}


def row_of(planner: str, size: tuple[int, int], tile: int) -> dict:
    """What the set says of one image, width before height."""
    plan = PLANNERS[planner](size[1], size[0], PinpointLimits(view_size=tile, patch_size=tile))
    assert len(plan.views) == 1 + plan.grid[0] * plan.grid[1]
    return {
        "resolution": list(plan.canvas[::-1]),
        "grid_cols_rows": list(plan.grid[::-1]),
        "resized": list(plan.resized[::-1]),
        "paste": list(plan.paste[::-1]),
    }


@pytest.mark.parametrize("column", COLUMNS)
def test_grids_sizes_and_offsets(column):
    rows = GOLDEN.cases["rows"]
    assert rows
    for row in rows:
        assert row_of(COLUMNS[column], row["size"], GOLDEN.cases["tile"]) == row[column], row["size"]


def remake(folder: Path, seed: int) -> None:
    generator, tile = random.Random(seed), 224
    sizes = [(generator.randint(1, 2000), generator.randint(1, 2000)) for _ in range(40)]
    rows = [
        {"size": list(size), **{column: row_of(planner, size, tile) for column, planner in COLUMNS.items()}}
        for size in sizes
    ]
    (folder / "cases.json").write_text(json.dumps({"tile": tile, "rows": rows}))

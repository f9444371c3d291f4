"""The table of docs/towers.md, and towers in two processes."""

import json

import pytest
import torch

import tower_table
from builders.towers import TIMM_TOWERS, TOWERS, tiny_tower
from launching import TESTS, run_launcher


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TOWERS, *TIMM_TOWERS])
def test_every_row_of_the_table_is_what_is_found(name):
    tiny_tower(name)
    assert tower_table.read_rows()[name] == tower_table.row(name)
    assert set(tower_table.row(name)[4:]) == {"yes"}

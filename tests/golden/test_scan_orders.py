"""The orders of VMamba's scan, and the sum of what four scans give."""

from pathlib import Path

import pytest
import torch
from torch import nn

from hires_lmm import HiResLmmConnectorConfig
from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.geometry_hires_lmm import MAIN_TOWER, Grid, Kind
from hires_lmm.modeling.scan_hires_lmm import HiResLmmScanMixer, merge_scans, scan_indices, scan_orders

from .base import GoldenSet, write_set


NAME = "scan_orders"
GOLDEN = GoldenSet(NAME)
CASES = [(case["case"], case["rows"], case["columns"]) for case in GOLDEN.cases["cases"]]
SCANS = GOLDEN.cases["settings"]["orders"]


def merged(given: torch.Tensor, rows: int, cols: int, scan: str) -> torch.Tensor:
    """The sum of four sequences `(B, 4, C, rows, cols)`: `(B, C, L)`."""
    back = scan_indices(rows, cols, scan, "cpu")[4:]
    return merge_scans(list(given.flatten(3).transpose(2, 3).unbind(1)), back).transpose(1, 2)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("case", "rows", "cols"), CASES)
def test_orders_and_their_sum(case, rows, cols, scan):
    assert torch.equal(torch.tensor(scan_orders(rows, cols, scan)), GOLDEN[f"{case}.{scan}"].long())
    if f"{case}.merge_{scan}" in GOLDEN.tensors:
        GOLDEN.close(merged(GOLDEN[f"{case}.merge_input"], rows, cols, scan), f"{case}.merge_{scan}", atol=1e-6)


def mixer(width: int, grid: tuple[int, int], scan: str) -> HiResLmmScanMixer:
    context = PartContext(HiResLmmConnectorConfig(), width, width, {(int(Kind.GLOBAL), MAIN_TOWER): Grid(*grid)}, grid)
    return HiResLmmScanMixer(context, HiResLmmScanMixer.Options(scan=scan, state_size=4, head_dim=width)).eval()


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("case", "rows", "cols"), CASES)
@torch.no_grad()
def test_the_part_reads_a_view_in_these_orders(case, rows, cols, scan):
    """Its block in each order by itself, patch by patch put back where the set says."""
    part, views = mixer(6, (rows, cols), scan), torch.randn(2, rows * cols, 6)
    nn.init.normal_(part.norm.weight)
    wanted, entering = views.clone(), part.norm(views)
    for order in GOLDEN[f"{case}.{scan}"].tolist():
        read = part.mixer(torch.stack([entering[:, place] for place in order], dim=1))
        for step, place in enumerate(order):
            wanted[:, place] += read[:, step]
    torch.testing.assert_close(part.forward_group(views, (rows, cols)), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(wanted, views, atol=1e-2)


def remake(folder: Path, seed: int) -> None:
    """Other grids, by our own functions."""
    cases, tensors = [], {}
    for number, (rows, cols) in enumerate([(2, 3), (5, 1)]):
        name = f"grid{number}"
        cases.append({"case": name, "rows": rows, "columns": cols})
        tensors[f"{name}.merge_input"] = given = torch.randn(2, 4, 3, rows, cols)
        for scan in SCANS:
            tensors[f"{name}.{scan}"] = torch.tensor(scan_orders(rows, cols, scan), dtype=torch.int32)
            tensors[f"{name}.merge_{scan}"] = merged(given, rows, cols, scan).contiguous()
    write_set(folder, {**GOLDEN.cases, "seed": seed, "cases": cases}, tensors)

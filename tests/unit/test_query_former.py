"""The query former against torch's own multi-head attention, and its position table against the formula."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hires_lmm.modeling.attention_hires_lmm import (
    HiResLmmCrossAttention,
    HiResLmmQueryFormer,
    resize_positions,
    sincos_positions,
)


CONFIG = SimpleNamespace(_attn_implementation="eager")


def torch_attention(ours: HiResLmmCrossAttention, width: int, heads: int) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(width, heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]))
        theirs.out_proj.weight.copy_(ours.o_proj.weight)
        theirs.out_proj.bias.copy_(ours.o_proj.bias)
    return theirs


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_cross_attention_equals_torchs_own(backend):
    ours = HiResLmmCrossAttention(SimpleNamespace(_attn_implementation=backend), 24, 3)
    queries, keys, values = torch.randn(2, 5, 24), torch.randn(2, 7, 24), torch.randn(2, 7, 24)
    wanted = torch_attention(ours, 24, 3)(queries, keys, values)[0]
    torch.testing.assert_close(ours(queries, keys, values), wanted, atol=1e-5, rtol=0)


def test_one_row_of_queries_serves_the_batch():
    ours = HiResLmmCrossAttention(CONFIG, 24, 3)
    queries, keys = torch.randn(1, 5, 24), torch.randn(4, 7, 24)
    torch.testing.assert_close(ours(queries, keys, keys), ours(queries.expand(4, -1, -1), keys, keys))


def test_positions_follow_the_formula():
    table = sincos_positions(16, 3)
    for row in range(3):
        for column in range(3):
            for k in range(4):
                frequency = 10000 ** (-k / 4)
                wanted = [math.sin(column * frequency), math.cos(column * frequency)]
                wanted += [math.sin(row * frequency), math.cos(row * frequency)]
                found = table[row * 3 + column, [k, 4 + k, 8 + k, 12 + k]]
                torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-3, rtol=0)


def test_positions_are_rounded_to_half_precision():
    table = sincos_positions(64, 5)
    torch.testing.assert_close(table, table.half().float(), rtol=0, atol=0)


def test_resizing_is_bicubic_in_row_major_order():
    table = torch.randn(16, 2)
    image = table.reshape(1, 4, 4, 2).permute(0, 3, 1, 2)
    wanted = nn.functional.interpolate(image, size=(2, 6), mode="bicubic").permute(0, 2, 3, 1).reshape(12, 2)
    torch.testing.assert_close(resize_positions(table, (2, 6)), wanted)


def test_query_former_step_by_step():
    torch.manual_seed(0)
    former = HiResLmmQueryFormer(CONFIG, 16, 4, (3, 3), num_heads=2)
    former.init_weights()
    for norm in (former.query_norm, former.key_norm, former.output_norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    features = torch.randn(2, 9, 16)
    positions = sincos_positions(16, 2)
    image = positions.reshape(1, 2, 2, 16).permute(0, 3, 1, 2)
    key_positions = nn.functional.interpolate(image, size=(3, 3), mode="bicubic").permute(0, 2, 3, 1).reshape(9, 16)
    values = former.key_norm(features)
    queries = (former.query_norm(former.queries) + positions).expand(2, -1, -1)
    attended = torch_attention(former.attention, 16, 2)(queries, values + key_positions, values)[0]
    torch.testing.assert_close(former(features), former.output_norm(attended), atol=1e-5, rtol=0)


def test_no_views_give_no_tokens():
    former = HiResLmmQueryFormer(CONFIG, 16, 4, (3, 3))
    assert former(torch.zeros(0, 9, 16)).shape == (0, 4, 16)

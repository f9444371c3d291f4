"""Rules of key tables in both directions, and what is reported; whole tables are in `convert/` and `golden/`."""

import pytest
import torch

from hires_lmm.conversion.keys import (
    Constant,
    Rename,
    SplitRows,
    Squeeze,
    TakeRows,
    Transpose,
    Unsqueeze,
    Unused,
    match_sources,
    match_targets,
)
from hires_lmm.conversion.mapping import cast, grow_rows, map_backward, map_forward
from hires_lmm.conversion.slime import key_table
from hires_lmm.conversion.tensors import Entry, entry_of


def forward(rules, keys) -> dict[str, tuple]:
    matches, unknown = match_sources(rules, keys)
    assert unknown == []
    return {match.source: match.targets for match in matches}


# ---- SliME


def test_constants_of_the_gated_adapter():
    mapped = map_backward(key_table("gated"), {})
    constants = {name: entry.read() for name, entry in mapped.entries.items()}
    assert {name: value.tolist() for name, value in constants.items()} == {
        "model.mm_projector.mean": [0.0],
        "model.mm_projector.std": [1.0],
    }
    assert {value.dtype for value in constants.values()} == {torch.bfloat16}


# ---- matching


def test_wildcards():
    rules = [Rename("a.{}.b.{}", "x.{}.y.{}"), Rename("c.**", "z.**"), Rename("plain", "other")]
    assert forward(rules, ["a.1.b.w", "c.1.2", "plain"]) == {
        "a.1.b.w": ("x.1.y.w",),
        "c.1.2": ("z.1.2",),
        "plain": ("other",),
    }
    misfits = ["a.1.2.b.w", "a.1.b", "a.1.b.", "c.", "c", "xplain", "plainx", "plain\n", "aX1.b.w", "cX1"]
    assert match_sources(rules, misfits) == ([], misfits)


def test_the_first_rule_that_fits_wins():
    rules = [Unused("a.skip"), Rename("a.**", "b.**"), Rename("a.{}", "c.{}")]
    matches, unknown = match_sources(rules, ["a.1", "q", "a.skip", "r"])
    assert [(match.source, match.targets, match.rule) for match in matches] == [
        ("a.1", ("b.1",), rules[1]),
        ("a.skip", (), rules[0]),
    ]
    assert unknown == ["q", "r"]
    back, unknown = match_targets([Rename("one.{}", "b.{}"), Rename("two.{}", "b.{}")], ["q", "b.1", "r"])
    assert ([match.source for match in back], unknown) == (["one.1"], ["q", "r"])


def test_parts_of_one_tensor_lead_back_to_it_once():
    rules = [SplitRows("{}.qkv", ("{}.q", "{}.k", "{}.v")), Rename("**", "rest.**")]
    matches, unknown = match_targets(rules, ["1.k", "rest.x", "2.v", "1.q"])
    found = [(match.source, match.targets) for match in matches]
    assert found == [("1.qkv", ("1.q", "1.k", "1.v")), ("x", ("rest.x",)), ("2.qkv", ("2.q", "2.k", "2.v"))]
    assert unknown == []


# ---- rules


def test_split_rows():
    tensor, rule = torch.arange(12.0).reshape(6, 2), SplitRows("a", ("q", "k", "v"))
    parts = rule.forward(tensor)
    assert [part.tolist() for part in parts] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    assert torch.equal(rule.backward(parts), tensor)
    for wrong, rows in ((torch.ones(7, 2), 7), (torch.ones(0, 2), 0), (torch.tensor(1.0), 0)):
        with pytest.raises(ValueError, match=f"a has {rows} rows, which 3 does not divide"):
            rule.forward(wrong)


def test_squeeze():
    tensor, rule = torch.arange(6.0).reshape(1, 1, 2, 3), Squeeze("a", "b", axes=2)
    (found,) = rule.forward(tensor)
    assert rule.targets == ("b",) and found.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(rule.backward([found]), tensor)
    assert rule.forward(torch.ones(1, 1))[0].shape == ()
    for shape in ((2, 1, 3), (1, 2, 3), (1,)):
        with pytest.raises(ValueError, match="its first 2 must be 1"):
            rule.forward(torch.ones(shape))


def test_unsqueeze():
    tensor, rule = torch.arange(6.0).reshape(2, 3), Unsqueeze("a", "b", axes=2)
    (found,) = rule.forward(tensor)
    assert rule.targets == ("b",) and found.shape == (2, 3, 1, 1) and found.flatten().tolist() == list(range(6))
    assert torch.equal(rule.backward([found]), tensor)


def test_transpose():
    tensor, rule = torch.arange(6.0).reshape(2, 3), Transpose("a", "b")
    (found,) = rule.forward(tensor)
    assert rule.targets == ("b",) and found.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert torch.equal(rule.backward([found]), tensor)
    with pytest.raises(ValueError, match=r"a has the shape \(2,\), but a matrix is expected"):
        rule.forward(torch.ones(2))


def test_take_rows():
    tensor, rule = torch.arange(8.0).reshape(4, 2), TakeRows("a", ("table", "rows"), (3, 0))
    table, rows = rule.forward(tensor)
    assert torch.equal(table, tensor) and rows.tolist() == [[6, 7], [0, 1]]
    back = rule.backward([table, torch.tensor([[-1.0, -2], [-3, -4]])])
    assert back.tolist() == [[-3, -4], [2, 3], [4, 5], [-1, -2]]
    assert table.tolist() == tensor.tolist()  # the table itself is unchanged
    for wrong, count in ((tensor[:3], 3), (torch.tensor(1.0), 0)):
        with pytest.raises(ValueError, match=f"a has {count} rows, so no row 3"):
            rule.forward(wrong)


# ---- tables applied to entries


def unread(shape, dtype=torch.float32, note="") -> Entry:
    def read():
        raise AssertionError("a tensor was read while keys were mapped")

    return Entry(shape, dtype, read, "file.bin", note)


RULES = [
    SplitRows("qkv", ("q", "k", "v")),
    Rename("norm", "our_norm"),
    Squeeze("line", "mark", axes=1),
    TakeRows("words", ("table", "chosen"), (1,)),
    Constant("std", (1.0,), torch.float32),
    Unused("unused"),
]


def test_entries_are_mapped_without_being_read():
    source = {
        "qkv": unread((6, 2), torch.bfloat16),
        "norm": unread((2,), note="merged"),
        "line": unread((1, 2)),
        "words": unread((4, 2)),
        "std": entry_of(torch.ones(1), "file.bin"),
        "unused": unread((9,)),
    }
    mapped = map_forward(RULES, source)
    assert mapped.problems == []
    assert {name: (entry.shape, entry.dtype) for name, entry in mapped.entries.items()} == {
        **dict.fromkeys(("q", "k", "v"), ((2, 2), torch.bfloat16)),
        "our_norm": ((2,), torch.float32),
        "mark": ((2,), torch.float32),
        "table": ((4, 2), torch.float32),
        "chosen": ((1, 2), torch.float32),
    }
    assert list(mapped.unused) == ["unused"] and mapped.unused["unused"] is source["unused"]
    assert {entry.origin for entry in mapped.entries.values()} == {"file.bin"}
    assert mapped.entries["our_norm"].note == "merged"
    assert mapped.records[0] == {
        "source": "qkv",
        "file": "file.bin",
        "shape": [6, 2],
        "dtype": "bfloat16",
        "targets": ["q", "k", "v"],
        "transformation": "split rows",
    }
    assert [record["transformation"] for record in mapped.records[1:]] == [
        *("rename; merged", "leading axes removed", "table and chosen rows", "constant", "not used"),
    ]


def test_what_does_not_fit_becomes_a_problem_each():
    source = {
        "extra": Entry((), torch.float16, lambda: None, "a.bin"),
        "qkv": entry_of(torch.ones(7), ""),
        "std": entry_of(torch.zeros(1), ""),
        "line": entry_of(torch.ones(1, 2), ""),
    }
    mapped = map_forward([*RULES, Rename("other", "x")], source)
    assert mapped.problems == [
        ("unexpected", "extra", "scalar float16 in a.bin"),
        ("unfit", "qkv", "qkv has 7 rows, which 3 does not divide."),
        ("unfit", "std", "std holds [0.0], expected [1.0]."),
    ]
    assert list(mapped.entries) == ["mark"] and [record["source"] for record in mapped.records] == ["line"]
    rules = [Rename("a", "x"), Rename("b", "x")]
    twice = map_forward(rules, {"a": entry_of(torch.ones(1), ""), "b": entry_of(torch.zeros(1), "")})
    assert twice.problems == [("twice", "b", "x has a source already")]


def test_the_way_back():
    entries = {name: entry_of(torch.full((2, 2), float(n)), "ours", "kept") for n, name in enumerate("qkv")}
    mapped = map_backward(RULES, {**entries, "our_norm": unread((3,)), "stray": entry_of(torch.ones(2, 3), "")})
    assert mapped.problems == [("unexpected", "stray", "2 x 3 float32")]
    assert list(mapped.entries) == ["qkv", "norm", "std"]
    assert mapped.entries["qkv"].read().tolist() == [[0, 0]] * 2 + [[1, 1]] * 2 + [[2, 2]] * 2
    assert mapped.entries["std"].read().tolist() == [1.0]
    assert (mapped.entries["qkv"].shape, mapped.entries["norm"].shape) == ((6, 2), (3,))
    found = [(entry.origin, entry.note, entry.dtype) for entry in mapped.entries.values()]
    assert found == [("ours", "kept", torch.float32), ("file.bin", "", torch.float32), ("", "", torch.float32)]
    assert mapped.records[0] == {
        "source": "qkv",
        "file": "ours",
        "shape": [6, 2],
        "dtype": "float32",
        "targets": ["q", "k", "v"],
        "transformation": "split rows; kept",
    }


def test_the_way_back_names_absent_parts():
    mapped = map_backward(RULES[:2], {"k": entry_of(torch.ones(2), ""), "our_norm": entry_of(torch.ones(1), "")})
    assert mapped.problems == [("missing", "q", "needed for qkv"), ("missing", "v", "needed for qkv")]
    assert list(mapped.entries) == ["norm"]


# ---- changes of entries


def test_cast():
    single, whole = torch.tensor([1.0, 1 / 3]), torch.tensor([3])
    entries = {"a": entry_of(single), "b": entry_of(whole)}
    half = cast(entries, torch.float16)
    assert half["b"] is entries["b"] and half["a"].dtype == half["a"].read().dtype == torch.float16
    assert half["a"].read().tolist() == [1.0, single[1].half().item()]
    assert cast(entries, None)["a"] is entries["a"] and cast(entries, torch.float32)["a"] is entries["a"]


@pytest.mark.parametrize("rows", [3, 5000])
def test_new_rows_are_the_mean(rows):
    table = torch.randn(rows, 2, dtype=torch.float64).to(torch.bfloat16)
    grown = grow_rows(entry_of(table, "f", "merged"), rows + 2)
    assert (grown.shape, grown.note) == ((rows + 2, 2), "merged; 2 row(s) added for the image token")
    old, new = grown.read().split([rows, 2])
    assert torch.equal(old, table) and new.shape == (2, 2) and new.dtype == torch.bfloat16
    torch.testing.assert_close(new.double(), table.double().mean(0).expand(2, 2), atol=1e-3, rtol=1e-2)
    assert grow_rows(entry_of(table, "f"), rows + 1).note == "1 row(s) added for the image token"


def test_no_new_rows():
    entry, scalar = entry_of(torch.ones(3, 2), ""), entry_of(torch.tensor(1.0), "")
    assert grow_rows(entry, 3) is entry and grow_rows(entry, 2) is entry and grow_rows(scalar, 5) is scalar

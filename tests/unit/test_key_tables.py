"""Key tables: pairs of names written out by hand, each rule in both directions, and what is reported of misfits."""

from types import SimpleNamespace

import pytest
import torch

from hires_lmm.conversion.compose import RULES as COMPOSE
from hires_lmm.conversion.compose import VISION
from hires_lmm.conversion.fusion import key_table as fusion_table
from hires_lmm.conversion.keys import (
    Constant,
    Rename,
    SplitRows,
    Squeeze,
    TakeRows,
    Unused,
    match_sources,
    match_targets,
)
from hires_lmm.conversion.llava_next import RULES as LLAVA_NEXT
from hires_lmm.conversion.llava_next import tie_rules
from hires_lmm.conversion.mapping import cast, grow_rows, map_backward, map_forward
from hires_lmm.conversion.slime import key_table
from hires_lmm.conversion.tensors import Entry, entry_of


def forward(rules, keys) -> dict[str, tuple]:
    matches, unknown = match_sources(rules, keys)
    assert unknown == []
    return {match.source: match.targets for match in matches}


def assert_pairs(rules, pairs: dict[str, tuple], one_way: tuple = ()) -> None:
    """Every key becomes its targets, and all targets together lead back to the same keys."""
    assert forward(rules, pairs) == pairs
    keys = [target for source, targets in pairs.items() for target in targets if source not in one_way]
    matches, unknown = match_targets(rules, keys)
    assert unknown == []
    assert {match.source: match.targets for match in matches} == {
        source: targets for source, targets in pairs.items() if targets and source not in one_way
    }


# ---- SliME

TOWER = "model.vision_tower.vision_tower.vision_model."
HALVES = {
    "model.layers.11.self_attn.rotary_emb.inv_freq": (),
    f"{TOWER}embeddings.position_ids": (),
    "model.embed_tokens.weight": ("model.language_model.embed_tokens.weight",),
    "model.layers.11.mlp.up_proj.weight": ("model.language_model.layers.11.mlp.up_proj.weight",),
    "model.layers.0.input_layernorm.weight": ("model.language_model.layers.0.input_layernorm.weight",),
    "model.norm.weight": ("model.language_model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
    f"{TOWER}encoder.layers.3.mlp.fc1.bias": ("model.vision_tower.encoder.layers.3.mlp.fc1.bias",),
}


def attention_pairs(source: str, target: str) -> dict:
    projections = [f"{target}.q_proj", f"{target}.k_proj", f"{target}.v_proj"]
    return {
        f"{source}.in_proj_weight": tuple(f"{name}.weight" for name in projections),
        f"{source}.in_proj_bias": tuple(f"{name}.bias" for name in projections),
        f"{source}.out_proj.weight": (f"{target}.o_proj.weight",),
        f"{source}.out_proj.bias": (f"{target}.o_proj.bias",),
    }


def resampler_pairs(source: str, target: str) -> dict:
    return {
        f"{source}.query": (f"{target}.queries",),
        f"{source}.pos_embed": (f"{target}.positions",),
        f"{source}.ln_q.weight": (f"{target}.query_norm.weight",),
        f"{source}.ln_kv.bias": (f"{target}.key_norm.bias",),
        f"{source}.ln_post.weight": (f"{target}.output_norm.weight",),
        **attention_pairs(f"{source}.attn", f"{target}.attention"),
    }


GATED = {
    **resampler_pairs("model.mm_projector.attn", "model.connector.adapter.query_former"),
    "model.mm_projector.projection.0.weight": ("model.connector.adapter.mlp.linear_1.weight",),
    "model.mm_projector.projection.2.bias": ("model.connector.adapter.mlp.linear_2.bias",),
    "model.mm_projector.w_gate": ("model.connector.adapter.gate.gate_weight",),
    "model.mm_projector.w_noise": ("model.connector.adapter.gate.noise_weight",),
    "model.mm_projector.mean": (),
    "model.mm_projector.std": (),
}
COMPRESSOR = resampler_pairs("model.sampler.post_qformer", "model.connector.view_ops.0.query_former")
ROUTER = "model.connector.token_ops.0.attention_score"
SELECTOR = {
    "model.sampler.selector.query": (),
    "model.sampler.selector.self_attn.in_proj_weight": (),
    "model.sampler.selector.self_attn.out_proj.bias": (),
    **attention_pairs("model.sampler.selector.cross_attn", f"{ROUTER}.attention"),
    "model.sampler.selector.ln_q.weight": (f"{ROUTER}.image_norm.weight",),
    "model.sampler.selector.ln_kv.bias": (f"{ROUTER}.text_norm.bias",),
    "model.sampler.selector.ln_post.weight": (f"{ROUTER}.output_norm.weight",),
    "model.sampler.selector.prob_proj.0.weight": (f"{ROUTER}.linear_1.weight",),
    "model.sampler.selector.prob_proj.2.bias": (f"{ROUTER}.linear_2.bias",),
}


def test_the_table_of_slime():
    assert_pairs(key_table("gated"), {**HALVES, **GATED, **COMPRESSOR})
    assert_pairs(key_table("gated", "qformer"), {**HALVES, **GATED, **COMPRESSOR, **SELECTOR})
    for resampler in (None, "identity"):
        assert_pairs(key_table("gated", resampler), {**HALVES, **GATED})
        assert match_sources(key_table("gated", resampler), COMPRESSOR)[1] == list(COMPRESSOR)
    assert match_sources(key_table("gated"), SELECTOR)[1] == list(SELECTOR)


@pytest.mark.parametrize(
    "adapter, pairs",
    [
        ("identity", {}),
        ("linear", {"model.mm_projector.bias": ("model.connector.adapter.linear.bias",)}),
        ("mlp1x_gelu", {"model.mm_projector.0.weight": ("model.connector.adapter.linear.weight",)}),
        (
            "mlp2x_gelu",
            {
                "model.mm_projector.0.weight": ("model.connector.adapter.mlp.linear_1.weight",),
                "model.mm_projector.2.bias": ("model.connector.adapter.mlp.linear_2.bias",),
            },
        ),
    ],
)
def test_the_other_adapters_of_slime(adapter, pairs):
    assert_pairs(key_table(adapter), {**HALVES, **COMPRESSOR, **pairs})
    foreign = [key for key in GATED if adapter != "linear" or key.count(".") > 2]
    assert match_sources(key_table(adapter), foreign)[1] == foreign


def test_constants_of_the_gated_adapter():
    mapped = map_backward(key_table("gated"), {})
    constants = {name: entry.read() for name, entry in mapped.entries.items()}
    assert {name: value.tolist() for name, value in constants.items()} == {
        "model.mm_projector.mean": [0.0],
        "model.mm_projector.std": [1.0],
    }
    assert {value.dtype for value in constants.values()} == {torch.bfloat16}


# ---- the other tables

CONNECTOR = "model.connector"
LLAVA_NEW = {
    "model.vision_tower.vision_model.embeddings.position_ids": (),
    "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": (),
    "model.image_newline": (f"{CONNECTOR}.layout.separators.newline",),
    "model.vision_tower.encoder.layers.0.mlp.fc1.bias": ("model.vision_tower.encoder.layers.0.mlp.fc1.bias",),
    "model.multi_modal_projector.linear_1.weight": (f"{CONNECTOR}.adapter.mlp.linear_1.weight",),
    "model.multi_modal_projector.linear_2.bias": (f"{CONNECTOR}.adapter.mlp.linear_2.bias",),
    "model.language_model.layers.0.mlp.up_proj.weight": ("model.language_model.layers.0.mlp.up_proj.weight",),
    "lm_head.weight": ("lm_head.weight",),
}
LLAVA_OLD = {
    "vision_tower.vision_model.embeddings.position_ids": (),
    "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": (),
    "image_newline": (f"{CONNECTOR}.layout.separators.newline",),
    "vision_tower.vision_model.post_layernorm.bias": ("model.vision_tower.post_layernorm.bias",),
    "multi_modal_projector.linear_1.bias": (f"{CONNECTOR}.adapter.mlp.linear_1.bias",),
    "multi_modal_projector.linear_2.weight": (f"{CONNECTOR}.adapter.mlp.linear_2.weight",),
    "language_model.model.norm.weight": ("model.language_model.norm.weight",),
    "language_model.lm_head.weight": ("lm_head.weight",),
}


def test_both_layouts_of_llava_next():
    doubled = {"model.vision_tower.vision_model.post_layernorm.bias": ("model.vision_tower.post_layernorm.bias",)}
    plain = {"vision_tower.encoder.layers.0.mlp.fc1.bias": ("model.vision_tower.encoder.layers.0.mlp.fc1.bias",)}
    pairs = {**LLAVA_NEW, **LLAVA_OLD, **doubled, **plain}
    assert forward(LLAVA_NEXT, pairs) == pairs
    assert match_sources(LLAVA_NEXT, ["projector.weight", "xlm_head.weight"])[1] == [
        "projector.weight",
        "xlm_head.weight",
    ]


@pytest.mark.parametrize("head", [None, "lm_head.weight", "language_model.lm_head.weight"])
@pytest.mark.parametrize("model_tied", [False, True])
@pytest.mark.parametrize("text_tied", [False, True])
def test_a_head_that_is_the_table_of_embeddings(model_tied, text_tied, head):
    theirs = SimpleNamespace(
        tie_word_embeddings=model_tied, text_config=SimpleNamespace(tie_word_embeddings=text_tied)
    )
    entries = {head: None} if head else {}
    rules = tie_rules(theirs, entries)
    tied = model_tied or (text_tied and head is None)
    assert theirs.text_config.tie_word_embeddings is tied
    for name in ("lm_head.weight", "language_model.lm_head.weight"):
        assert forward(rules, [name]) == {name: () if tied else ("lm_head.weight",)}
    body = {name: targets for name, targets in LLAVA_OLD.items() if "lm_head" not in name}
    assert forward(rules, body) == body


def test_the_table_of_fusion():
    vision, fusion = "imgque_backbone.clip_model.vision_model", "imgque_backbone.imgque_model"
    part = f"{CONNECTOR}.token_ops.0"
    pairs = {
        f"{vision}.embeddings.position_ids": (),
        "llm_backbone.model.layers.1.self_attn.rotary_emb.inv_freq": (),
        f"{fusion}.layers.1.self_attn.rotary_emb.inv_freq": (),
        f"{vision}.token_LF": (f"{CONNECTOR}.layout.separators.view_end",),
        f"{vision}.pos_layrnorm.weight": (f"{CONNECTOR}.view_ops.0.norm.weight",),
        f"{vision}.vision_embed_merge.weight": (f"{CONNECTOR}.view_ops.0.conv.weight",),
        f"{vision}.encoder.layers.0.mlp.fc1.bias": ("model.vision_tower.encoder.layers.0.mlp.fc1.bias",),
        f"{fusion}.embed_tokens.weight": (f"{part}.model.embed_tokens.weight", f"{part}.queries"),
        f"{fusion}.layers.1.mlp.up_proj.weight": (f"{part}.model.layers.1.mlp.up_proj.weight",),
        f"{fusion}.norm.weight": (f"{part}.model.norm.weight",),
        "fusion_backbone.imgque_proj.weight": (f"{part}.output.weight",),
        "llm_backbone.model.embed_tokens.weight": ("model.language_model.embed_tokens.weight",),
        "llm_backbone.lm_head.weight": ("lm_head.weight",),
    }
    rules = fusion_table([5, 2])
    assert_pairs(rules, pairs)
    words = torch.arange(12.0).reshape(6, 2)
    mapped = map_forward(rules, {key: entry_of(words, "") for key in (f"{fusion}.embed_tokens.weight",)})
    assert mapped.entries[f"{part}.queries"].read().tolist() == [[10, 11], [4, 5]]
    line = map_forward(rules, {f"{vision}.token_LF": entry_of(torch.ones(1, 1, 3), "")})
    assert line.entries[f"{CONNECTOR}.layout.separators.view_end"].shape == (3,)


def test_the_table_of_compose():
    pairs = {
        "model.layers.1.self_attn.rotary_emb.inv_freq": (),
        "model.layers.1.mlp.up_proj.weight": ("model.language_model.layers.1.mlp.up_proj.weight",),
        "lm_head.weight": ("lm_head.weight",),
        "vision.encoder.layers.0.mlp.fc1.bias": ("model.vision_tower.encoder.layers.0.mlp.fc1.bias",),
    }
    assert_pairs(COMPOSE, pairs)
    assert VISION == "vision."


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

"""What every family of vision towers can do, tried on tiny random models: the table of docs/towers.md.

    python tests/tower_table.py            writes it; rows of timm stay as they are where timm is missing
"""

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.image_utils import PILImageResampling

from builders import make_batch, random_image, tiny_config, tiny_model, tiny_processor
from builders.towers import TIMM_TOWERS, TOWERS, has_timm, tiny_tower
from hires_lmm import HiResLmmForConditionalGeneration
from hires_lmm.modeling.tower_table_hires_lmm import known_stats, patch_side, prefix_tokens, tower_family
from hires_lmm.training import Stage


PAGE = Path(__file__).parents[1] / "docs" / "towers.md"
MARKS = ("<!-- towers: tests/tower_table.py -->", "<!-- end of towers -->")
HEAD = ["tower", "`model_type`", "mean, filter", "prefix", "batch = single", "chunked", "dropped", "train", "reload"]
BUDGET = 14
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def tower_model(name: str, preset: str = "llava_hd", **changes: Any) -> Any:
    """A tiny model with a tower of the tables of `builders.towers`."""
    tower = tiny_tower(name)
    changes.setdefault("planner", {"name": "slime", "max_crops": 4, "unpad": True})
    changes.setdefault("connector_config", {"layout": {}})
    changes.setdefault("vision_feature_layer", -2 if tower_family(tower).has_layers else -1)
    return tiny_model(tiny_config(preset, vision=tower, **changes))


def samples() -> list:
    """Two images of different shape with a question each."""
    return [("<image>What is it?", [random_image(90, 130)]), ("<image>Who?", [random_image(150, 70, 1)])]


@torch.no_grad()
def is_single(model: Any, **options: Any) -> bool:
    """Whether the logits of a batch are those of its samples alone."""
    processor = tiny_processor(model.config)
    batch = make_batch(processor, samples(), **options)
    together = model(**batch).logits
    for row, sample in enumerate(samples()):
        alone = model(**make_batch(processor, [sample], **options)).logits[0]
        own = together[row][batch["attention_mask"][row].bool()]
        if not torch.allclose(own, alone, **CLOSE):
            return False
    return True


@torch.no_grad()
def is_same_in_chunks(model: Any) -> bool:
    """Whether two views at a time give what all at once give."""
    batch = make_batch(tiny_processor(model.config), samples())
    whole = model(**batch).logits
    model.config.vision_chunk_size = 2
    chunked = model(**batch).logits
    model.config.vision_chunk_size = None
    return len(batch["pixel_values"]) > 2 and torch.allclose(whole, chunked, **CLOSE)


def drops(model: Any) -> bool:
    """Whether a budget is kept to the token, in a batch as alone."""
    batch = make_batch(tiny_processor(model.config), samples(), max_image_tokens=BUDGET)
    counts = (batch["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
    return counts == [BUDGET, BUDGET] and is_single(model, max_image_tokens=BUDGET)


def trains(model: Any) -> bool:
    """Whether a step changes just what a stage on the tower trains, each of which gets a gradient."""
    batch = make_batch(tiny_processor(model.config), samples())
    stage = Stage("tower", {"vision_tower": 1e-2})
    stage.apply(model)
    model.train()
    chosen = {name: value for name, value in model.named_parameters() if value.requires_grad}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(**batch, labels=batch["input_ids"]).loss.backward()
    if any(value.grad is None or not value.grad.abs().sum() for value in chosen.values()):
        return False
    torch.optim.SGD(chosen.values(), lr=0.01).step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    model.zero_grad()
    model.eval()
    return changed == set(chosen)


@torch.no_grad()
def reloads(model: Any) -> bool:
    """Whether a saved model gives the same logits to the bit."""
    batch = make_batch(tiny_processor(model.config), samples())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = HiResLmmForConditionalGeneration.from_pretrained(folder)
    return torch.equal(again.eval()(**batch).logits, model(**batch).logits)


CHECKS: dict[str, Callable[[Any], bool]] = {
    "batch = single": is_single,
    "chunked": is_same_in_chunks,
    "dropped": drops,
    "train": trains,
    "reload": reloads,
}


def row(name: str) -> list[str]:
    """The cells of a tower."""
    model = tower_model(name)
    tower = model.config.vision_config
    stats: dict = known_stats(tower) or {}
    mean = ", ".join(f"{value:.3g}" for value in stats["image_mean"])
    said = "its own" if "pretrained_cfg" in tower.to_dict() else f"{mean}"
    filtered = PILImageResampling(stats["resample"]).name.lower()
    cells = ["yes" if check(model) else "no" for check in CHECKS.values()]
    stats_cell = said if said == "its own" else f"{said}, {filtered}"
    return [name, f"`{tower.model_type}`", stats_cell, str(prefix_tokens(tower)), *cells]


def write(text: str, rows: dict[str, list[str]]) -> str:
    """The page with these rows; others stay."""
    start, end = (text.index(mark) for mark in MARKS)
    found = re.findall(r"^\| ([^|]+?) \|.*$", text[start:end], re.MULTILINE)
    old = {name: line for name, line in zip(found, re.findall(r"^\| .*$", text[start:end], re.MULTILINE), strict=True)}
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for name in (*TOWERS, *TIMM_TOWERS):
        lines.append("| " + " | ".join(rows[name]) + " |" if name in rows else old[name])
    return text[:start] + MARKS[0] + "\n" + "\n".join(lines) + "\n" + text[end:]


def main() -> None:
    """Write the table."""
    names = [*TOWERS, *(TIMM_TOWERS if has_timm() else ())]
    torch.manual_seed(0)
    rows = {name: row(name) for name in names}
    PAGE.write_text(write(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    sys.stdout.write(f"written: {len(rows)} rows\n")


if __name__ == "__main__":
    main()

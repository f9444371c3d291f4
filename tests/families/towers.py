"""What every family of vision towers can do, tried on tiny random models: the table of docs/towers.md.

python tests/families/towers.py        writes it; rows of timm stay as they are where timm is missing
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.image_utils import PILImageResampling


sys.path.insert(0, str(Path(__file__).parents[1]))

from builders import make_batch, random_image, tiny_config, tiny_model, tiny_processor
from builders.towers import TIMM_TOWERS, TOWERS, has_timm, tiny_tower
from hires_lmm import HiResLmmForConditionalGeneration
from hires_lmm.modeling.tower_table_hires_lmm import known_stats, prefix_tokens, tower_family
from hires_lmm.training import Stage


PAGE = Path(__file__).parents[2] / "docs" / "towers.md"
MARKS = ("<!-- towers: tests/families/towers.py -->", "<!-- end of towers -->")
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


def samples(model: Any) -> list:
    """Two images of different shape, some views each, with a question each."""
    side = model.config.view_size
    return [
        ("<image>What is it?", [random_image(8 * side // 5, 9 * side // 4)]),
        ("<image>Who?", [random_image(8 * side // 3, 5 * side // 4, 1)]),
    ]


@torch.no_grad()
def is_single(model: Any, **options: Any) -> bool:
    """Whether the logits of a batch are those of its samples alone."""
    processor = tiny_processor(model.config)
    batch = make_batch(processor, samples(model), **options)
    together = model(**batch).logits
    for row, sample in enumerate(samples(model)):
        alone = model(**make_batch(processor, [sample], **options)).logits[0]
        own = together[row][batch["attention_mask"][row].bool()]
        if not torch.allclose(own, alone, **CLOSE):
            return False
    return True


@torch.no_grad()
def is_same_in_chunks(model: Any) -> bool:
    """Whether two views at a time give what all at once give."""
    batch = make_batch(tiny_processor(model.config), samples(model))
    whole = model(**batch).logits
    model.config.vision_chunk_size = 2
    chunked = model(**batch).logits
    model.config.vision_chunk_size = None
    return len(batch["pixel_values"]) > 2 and torch.allclose(whole, chunked, **CLOSE)


def drops(model: Any) -> bool:
    """Whether a budget is kept to the token, in a batch as alone."""
    batch = make_batch(tiny_processor(model.config), samples(model), max_image_tokens=BUDGET)
    counts = (batch["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
    return counts == [BUDGET, BUDGET] and is_single(model, max_image_tokens=BUDGET)


def trains(model: Any) -> bool:
    """Whether a step changes just what a stage on the tower trains, each of which gets a gradient."""
    batch = make_batch(tiny_processor(model.config), samples(model))
    stage = Stage("tower", {"vision_tower": 1e-2})
    stage.apply(model)
    model.train()
    chosen = {name: value for name, value in model.named_parameters() if value.requires_grad}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(**batch, labels=batch["input_ids"]).loss.backward()
    has_gradients = all(value.grad is not None for value in chosen.values())
    torch.optim.Adam(chosen.values(), lr=1e-3).step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    model.zero_grad()
    model.eval()
    return has_gradients and changed <= set(chosen) and len(changed) > 0.8 * len(chosen)  # keys have no use for biases


@torch.no_grad()
def reloads(model: Any) -> bool:
    """Whether a saved model gives the same logits to the bit."""
    batch = make_batch(tiny_processor(model.config), samples(model))
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


def read_rows() -> dict[str, list[str]]:
    """The rows that the page has."""
    text = PAGE.read_text(encoding="utf-8")
    lines = text[text.index(MARKS[0]) : text.index(MARKS[1])].splitlines()[3:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {each[0]: each for each in cells}


def write(rows: dict[str, list[str]]) -> None:
    """Put rows into the page; others stay."""
    rows = {**read_rows(), **rows}
    lines = [HEAD, ["---"] * len(HEAD), *(rows[name] for name in (*TOWERS, *TIMM_TOWERS) if name in rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    text = PAGE.read_text(encoding="utf-8")
    text = text[: text.index(MARKS[0])] + f"{MARKS[0]}\n{table}\n" + text[text.index(MARKS[1]) :]
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    """Write the table."""
    names = [*TOWERS, *(TIMM_TOWERS if has_timm() else ())]
    torch.manual_seed(0)
    rows = {name: row(name) for name in names}
    write(rows)
    sys.stdout.write(f"written: {len(rows)} rows\n")


if __name__ == "__main__":
    main()

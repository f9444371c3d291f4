"""What every language model and every tower must do, the columns of the tables in the docs, and how these are written.

A check takes a model, its processor and a folder; it returns nothing, or fails with a sentence.
"""

import copy
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from builders.tiny import make_batch, random_image
from hires_lmm.modeling.compat_hires_lmm import CACHE


ROOT = Path(__file__).parents[2]
CLOSE = 1e-4  # of the largest logit
ONE, LONG, TEXT, TWO = (
    ("USER: <image> What is in the picture? ASSISTANT:", [random_image(60, 130)]),
    ("USER: How many red cats are on <image> the table of the curious user? ASSISTANT: A", [random_image(100, 70, 1)]),
    ("USER: How many? ASSISTANT:", []),
    ("<image> Describe <image> ASSISTANT:", [random_image(50, 50, 2), random_image(130, 60, 3)]),
)
SAMPLES = [ONE, TEXT, LONG, TWO]


def close(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    """Compare two tensors, relative to the larger one's largest value."""
    assert found.shape == wanted.shape, f"{what}: shapes {tuple(found.shape)}, {tuple(wanted.shape)}"
    assert wanted.isfinite().all(), f"{what}: not finite"
    error = float(((found - wanted).abs().max() / wanted.abs().max()).detach())
    assert error < CLOSE, f"{what}: {error:.1e}"


@torch.no_grad()
def compare_rows(model, processor, side: str, what: str, **limits) -> None:
    """The logits of each row of a batch with padding are those of the row alone."""
    processor.tokenizer.padding_side = side
    together = make_batch(processor, SAMPLES, **limits)
    logits, mask = model(**together).logits, together["attention_mask"].bool()
    for row, sample in enumerate(SAMPLES):
        alone = model(**make_batch(processor, [sample], **limits)).logits[0]
        close(logits[row][mask[row]], alone, f"{what}, row {row}, padding {side}")
    processor.tokenizer.padding_side = "left"


def batch_equals_single(model, processor, folder: Path) -> None:
    """Padding at either side, rows without and with several images; also what is generated."""
    for side in ("left", "right"):
        compare_rows(model, processor, side, "logits")
    new = model.generate(**make_batch(processor, SAMPLES), max_new_tokens=6)[:, -6:]
    for row, sample in enumerate(SAMPLES):
        alone = model.generate(**make_batch(processor, [sample]), max_new_tokens=6)[:, -6:]
        assert torch.equal(new[row : row + 1], alone), f"generated, row {row}"


@torch.no_grad()
def with_cache_as_without(model, processor, folder: Path) -> None:
    """Token by token behind a cache as in one piece; greedy search and beams too."""
    batch = make_batch(processor, [LONG])
    whole, ids = model(**batch, use_cache=False).logits, batch["input_ids"]
    begin = ids.shape[1] - 5
    short = {**batch, "input_ids": ids[:, :begin], "attention_mask": batch["attention_mask"][:, :begin]}
    outputs = model(**short, use_cache=True)
    pieces, cache = [outputs.logits], outputs[CACHE]
    for position in range(begin, ids.shape[1]):
        mask = torch.ones(1, position + 1, dtype=torch.long)
        outputs = model(input_ids=ids[:, position : position + 1], attention_mask=mask, cache=cache, use_cache=True)
        pieces.append(outputs.logits)
    close(torch.cat(pieces, dim=1), whole, "logits")
    batch = make_batch(processor, SAMPLES)
    for beams in (1, 3):
        found = [model.generate(**batch, max_new_tokens=6, num_beams=beams, use_cache=use) for use in (True, False)]
        assert torch.equal(*found), f"{beams} beams"


@torch.no_grad()
def dropped_tokens(model, processor, folder: Path) -> None:
    """A threshold and a budget: rows of a batch as alone, and as if what left had never been there."""
    from hires_lmm.training.settings import set_options

    for rule, limits in (({"rule": "threshold", "gamma": 0.5}, {}), ({"rule": "budget"}, {"max_image_tokens": 40})):
        op = {"part": "router", "score": "cosine", "keep": rule}
        own = copy.deepcopy(model)
        set_options(own, {"token_ops": [op]})
        counted = type(processor).from_config(own.config, processor.tokenizer)
        compare_rows(own, counted, "left", rule["rule"], **limits)
        batch = make_batch(counted, [LONG], **limits)
        outputs = own(**batch)
        embeds = own.get_input_embeddings()(batch["input_ids"])
        placed = torch.cat(outputs.image_outputs.pooler_output)
        embeds = embeds.masked_scatter((batch["input_ids"] == own.config.image_token_id)[..., None], placed)
        if rule["rule"] == "threshold":
            assert not outputs.kept_mask.all(), "nothing was dropped"
        kept = own(inputs_embeds=embeds[outputs.kept_mask][None]).logits
        close(outputs.logits[outputs.kept_mask][None], kept, f"{rule['rule']}, without what left")
        new = own.generate(**make_batch(counted, SAMPLES, **limits), max_new_tokens=4)[:, -4:]
        for row, sample in enumerate(SAMPLES):
            alone = own.generate(**make_batch(counted, [sample], **limits), max_new_tokens=4)[:, -4:]
            assert torch.equal(new[row : row + 1], alone), f"{rule['rule']}, generated, row {row}"


def one_training_step(model, processor, folder: Path) -> None:
    """Every weight of the language model gets a gradient, and a step along it lowers the loss."""
    own = copy.deepcopy(model).train()
    batch = make_batch(processor, SAMPLES)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = own(**batch).loss
    loss.backward()
    still = [name for name, part in own.model.language_model.named_parameters() if part.grad is None]
    assert not still, f"without gradient: {still}"
    grads = [part for part in own.parameters() if part.grad is not None]
    norm = torch.stack([part.grad.norm() for part in grads]).norm()
    assert norm.isfinite() and norm > 0
    with torch.no_grad():
        for part in grads:
            part -= 1e-3 * part.grad / norm
    assert own(**batch).loss < loss, "the loss did not fall"


@torch.no_grad()
def saved_and_reloaded(model, processor, folder: Path) -> None:
    """The logits of a saved and loaded model are those before, to the bit."""
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).eval()
    batch = make_batch(processor, SAMPLES)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


COLUMNS: dict[str, Callable] = {
    "batch = single": batch_equals_single,
    "cache": with_cache_as_without,
    "dropped": dropped_tokens,
    "train": one_training_step,
    "reload": saved_and_reloaded,
}


def run_checks(model, processor, folder: Path, checks: dict[str, Callable] = COLUMNS) -> list[str]:
    """One row of a table: "yes", or what failed, a cell a check."""
    cells = []
    for name, check in checks.items():
        try:
            check(model, processor, folder / re.sub(r"\W", "", name))
            cells.append("yes")
        except Exception as error:
            cells.append(f"{type(error).__name__}: {error}".splitlines()[0][:160].replace("|", "/"))
    return cells


def write_table(page: Path, name: str, head: Iterable[str], rows: list[list[str]]) -> None:
    """Write rows between the two comment lines of a page that bear a name."""
    lines = ["| " + " | ".join(row) + " |" for row in ([*head], ["---"] * len(list(head)), *rows)]
    pattern, text = rf"(?s)(<!-- {name}[^>]*-->\n).*(<!-- end of {name} -->)", page.read_text(encoding="utf-8")
    assert re.search(pattern, text), f"{page} has no table {name}"
    page.write_text(re.sub(pattern, lambda found: found[1] + "\n".join(lines) + "\n" + found[2], text), "utf-8")


def read_table(page: Path, name: str) -> dict[str, list[str]]:
    """The rows of such a table by their first cell."""
    text = page.read_text(encoding="utf-8")
    found = re.search(rf"(?s)<!-- {name}[^>]*-->\n(.*)<!-- end of {name} -->", text)
    lines = [line.strip("| ").split(" | ") for line in found[1].splitlines()[2:] if line] if found else []
    return {cells[0].strip("`"): cells[1:] for cells in lines}

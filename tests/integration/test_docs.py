"""What README and docs show runs, and the numbers in their tables are current."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

from builders.docs import ROOT, read_blocks, run_page
from hires_lmm import PRESETS
from hires_lmm.accounting import PRESET_SETTINGS
from hires_lmm.modeling.parts_hires_lmm import (
    ADAPTERS,
    HEADS,
    LAYER_OPS,
    MAP_OPS,
    POSITION_PLANS,
    TOKEN_OPS,
    VIEW_OPS,
)
from hires_lmm.processing.planners_hires_lmm import PLANNERS, VIDEO_PLANNERS


PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {  # page -> modules of the extras `train` and `reconstruction`
    "preference.md": ("trl",),
    "training.md": ("peft",),
    "trl.md": ("trl",),
    "vlsa.md": ("diffusers",),
}
SCRIPT = ROOT / "scripts" / "doc_tables.py"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A working folder that looks like a clone."""
    for name in ("examples", "checkpoints"):
        os.symlink(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # files that a page writes
    yield tmp_path
    sys.modules.pop("my_parts", None)


@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",  # by PEFT and TRL
    "ignore::UserWarning:trl",
)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_of_the_page_runs(page: Path, clone):
    for module in NEEDS.get(page.name, ()):
        pytest.importorskip(module)
    run_page(page.read_text(encoding="utf-8"), page.name)


def test_the_first_example_prints_the_right_answer(clone, capsys):
    block = next(block for block in read_blocks((ROOT / "README.md").read_text()) if block.info == "python")
    assert "checkpoints/needle-slime" in block.text and block.text.endswith("# 3\n")
    run_page(f"```python\n{block.text}```\n", "README.md")
    assert capsys.readouterr().out == "3\n"


def test_the_counts_of_presets_are_those_of_their_processors(monkeypatch):
    """`hires-lmm tokens` reads them from a file, to do without torch."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    settings_of = importlib.import_module("preset_settings").settings_of
    wanted = {preset: settings_of(preset) for preset in PRESETS}
    assert wanted == PRESET_SETTINGS, "run: python scripts/preset_settings.py"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("doc_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_current(tables, capsys):
    assert tables.main(["--check"]) == 0, f"run: python scripts/doc_tables.py ({capsys.readouterr().out})"


def test_the_api_reference_shows_every_part():
    page = (ROOT / "docs" / "api" / "parts.md").read_text(encoding="utf-8")
    tables = (VIEW_OPS, ADAPTERS, MAP_OPS, TOKEN_OPS, LAYER_OPS, POSITION_PLANS, HEADS)
    parts = [part for table in tables for part in table.values()]
    assert [part for part in parts if f"::: {part.__module__}\n" not in page] == []


def test_every_part_has_a_row_in_the_docs():
    pages = ("parts.md", "presets.md", "video.md", "where-and-when.md")
    text = "\n".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in pages)
    rows = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    parts = {*VIEW_OPS, *ADAPTERS, *MAP_OPS, *TOKEN_OPS, *LAYER_OPS, *POSITION_PLANS}
    names = {*PRESETS, *PLANNERS, *VIDEO_PLANNERS, *parts}
    heads = (ROOT / "docs" / "heads.md").read_text(encoding="utf-8")
    assert all(f"## `{name}`" in heads for name in HEADS)
    assert names <= rows, f"docs/parts.md and docs/presets.md have no row for {sorted(names - rows)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}

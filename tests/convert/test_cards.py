"""Model cards are true where they lie: their code runs in the folder, nothing points out of it."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from convert_tools import GOLDEN, convert_slime
from PIL import Image
from test_llava_next import save_source, their_model
from typer.testing import CliRunner

from hires_lmm.cli import app
from hires_lmm.conversion import compose_random, export
from hires_lmm.conversion.cards import carry_card


ROOT = Path(__file__).parents[2]
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

CARD = """---
license: mit
widget:
- text: which digit is blue ?
---

# Mine

Trained as [the page](../../docs/page.md) says; see [a site](https://example.com/a), [below](#use)
and [the log](log.txt).

![Scores](plots/scores.png)

## Use

My own words.

```python
import hires_lmm

folder = "checkpoints/mine"
```

More words.

## Versions

* torch 0.1
"""

FRESH = """# Title

## Use

```python
folder = "."
```

Pin it.

## Versions

* torch 9.9
"""


def test_a_card_is_carried_with_the_code_the_versions_and_the_links_of_its_new_folder(tmp_path):
    (tmp_path / "log.txt").write_text("")
    carried = carry_card(CARD, FRESH, tmp_path)
    expected = CARD.replace('import hires_lmm\n\nfolder = "checkpoints/mine"\n', 'folder = "."\n')
    expected = expected.replace("* torch 0.1", "* torch 9.9").replace("[the page](../../docs/page.md)", "the page")
    assert carried == expected.replace("![Scores](plots/scores.png)", "Scores")


def test_a_card_of_somebody_else_without_our_sections_stays_as_it_is(tmp_path):
    assert carry_card("mine, all of it\n", FRESH, tmp_path) == "mine, all of it\n"


def test_the_card_of_the_shipped_checkpoint_answers_in_its_exported_folder_without_the_package(tmp_path):
    folder = export(ROOT / "checkpoints" / "needle-slime", tmp_path / "exported")
    card = (folder / "README.md").read_text()
    for stranger in ("import hires_lmm", "checkpoints/", "](..", "docs/", "make demo"):
        assert stranger not in card, stranger
    code = CODE.search(card)[1]
    assert "which digit is blue ?" in code
    (folder / "run_card.py").write_text(code)
    Image.open(ROOT / "examples" / "images" / "needle_1.jpg").save(folder / "picture.png")
    block = "import sys; sys.modules['hires_lmm'] = None; import runpy; runpy.run_path('run_card.py')"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", block], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3\n"


def test_the_source_card_of_the_shipped_checkpoint_runs_where_it_lies(monkeypatch, tmp_path):
    card = (ROOT / "checkpoints" / "needle-slime" / "README.md").read_text()
    (tmp_path / "card.py").write_text(CODE.search(card)[1])
    monkeypatch.chdir(ROOT)
    assert runpy.run_path(str(tmp_path / "card.py"))["answer"] == "3"


def test_an_export_of_a_conversion_has_the_versions_of_its_own_code(tmp_path):
    compose_random(tmp_path / "source", "monkey")
    stale = (tmp_path / "source" / "README.md").read_text()
    stale = re.sub(r"folder: `\w{64}`", "folder: `stale`", stale).replace("* torch ", "* torch 0.1, not ")
    (tmp_path / "source" / "README.md").write_text(stale)
    card = (export(tmp_path / "source", tmp_path / "out") / "README.md").read_text()
    assert "stale" not in card and "torch 0.1" not in card and re.search(r"folder: `\w{64}`", card)
    assert "# source\n" in card and "its answers mean nothing" in card


def test_the_card_names_what_was_chosen(tmp_path):
    compose_random(tmp_path / "out", "fusion")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "* chat template: `chatml`\n" in card
    assert "* layer of the vision tower: -1\n" in card
    assert (
        "* pixels: mean [0.4815, 0.4578, 0.4082], deviation [0.2686, 0.2613, 0.2758], the planner's filters\n" in card
    )
    convert_slime(GOLDEN, tmp_path / "silent")
    card = (tmp_path / "silent" / "README.md").read_text()
    assert (
        "* chat template: none\n" in card and "put the\ntokenizer files of its language model into the source" in card
    )


@pytest.mark.parametrize("budget", [30, 40])
def test_a_llava_next_checkpoint_takes_an_exact_budget(tmp_path, budget):
    """The first thing the README promises, by its commands."""
    save_source(tmp_path / "theirs", their_model("llama"))
    picture = tmp_path / "picture.png"
    Image.effect_noise((250, 100), 90).convert("RGB").save(picture)
    run = CliRunner().invoke
    converted = run(app, ["convert", "llava-next", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    assert converted.exit_code == 0, converted.output
    asked = ["ask", str(tmp_path / "ours"), str(picture), "-q", "How many cats?", "--max-new-tokens", "3", "--json"]
    free = json.loads(run(app, asked).stdout)["images"][0]
    assert free["kept_tokens"] == free["visual_tokens"] > 40
    kept = json.loads(run(app, [*asked, "--max-image-tokens", str(budget)]).stdout)["images"][0]
    assert kept["kept_tokens"] == budget and kept["visual_tokens"] == free["visual_tokens"]
    shutil.rmtree(tmp_path / "ours")

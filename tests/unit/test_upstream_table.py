"""The page of skipped upstream tests shows the table as it is; the tests themselves run with `make test-upstream`."""

import sys
from pathlib import Path


FOLDER = Path(__file__).parents[1] / "upstream"


def test_the_page_shows_the_table(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    import skips

    text = skips.README.read_text(encoding="utf-8")
    assert text == skips.with_table(text), "run: python tests/upstream/skips.py"
    assert all(f"`{pattern}`" in text and row.reason in text for row in skips.ROWS for pattern in row.tests.split())

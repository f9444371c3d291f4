"""Every row of the table speaks of tests that exist, and no two of the same."""

from fnmatch import filter as matching

from skips import README, ROWS, rows_of, with_table


def test_every_pattern_matches_a_test(collected):
    assert collected
    for row in (row for row in ROWS if row.applies):
        for preset in row.presets:
            names = [name for name, where in collected if where == preset]
            dead = [pattern for pattern in row.tests.split() if not matching(names, pattern)]
            assert not dead, f"{preset} has no test {dead}: {row}"


def test_no_test_has_two_rows(collected):
    assert not [test for test in collected if len(rows_of(*test)) > 1]


def test_the_page_shows_the_table():
    text = README.read_text(encoding="utf-8")
    assert text == with_table(text), "run: python tests/upstream/skips.py"

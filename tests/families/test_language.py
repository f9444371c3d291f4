"""Every family of language models does what the table of docs/language-models.md says."""

import pytest
from transformers import AutoConfig

from builders.tiny import tiny_config
from families.checks import read_table
from families.language import CHECKS, FAMILIES, PAGE, family_row


QUICK = ("mixtral", "mamba2", "jamba")


def test_the_table_has_every_family():
    assert list(read_table(PAGE, "language models")) == list(FAMILIES)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_does_what_the_table_says(family):
    row = family_row(family)
    assert row == ["yes"] * len(CHECKS)
    assert row == read_table(PAGE, "language models")[family]


@pytest.mark.parametrize("family, why", [("recurrent_gemma", "padding"), ("rwkv", "padding"), ("minimax", "cache")])
def test_a_family_that_fails_them_is_refused(family, why):
    with pytest.raises(ValueError, match=f"of type '{family}': .*{why}.* use another language model"):
        tiny_config("llava_next", text=AutoConfig.for_model(family))

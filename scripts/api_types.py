"""For the API reference: types of docstrings without the marks that transformers' style puts around them."""

import re
from typing import Any

import griffe


ARGUMENT = re.compile(r"^( +[\w, ]+ \()(.*)(\): )", re.MULTILINE)


class PlainTypes(griffe.Extension):
    """Writes "(int, optional)" where a docstring says "(`int`, *optional*)"."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class and function once it is read."""
        if obj.docstring is not None:
            obj.docstring.value = ARGUMENT.sub(_plain, obj.docstring.value)


def _plain(found: re.Match) -> str:
    return found[1] + found[2].replace("`", "").replace("*", "") + found[3]

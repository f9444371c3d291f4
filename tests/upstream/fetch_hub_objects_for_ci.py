"""Why: the processing tests take their pictures from the hub through it. Here each name is a picture that we draw."""

import tempfile
from functools import cache
from pathlib import Path

from builders.tiny import random_image


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="hires_lmm_upstream_")


def url_to_local_path(url: str) -> str:
    """A picture file for the address of a picture; other addresses stay."""
    path = Path(_folder().name) / url.rsplit("/", 1)[-1]
    if path.suffix not in (".png", ".jpg"):
        return url
    if not path.exists():
        random_image(90, 130).save(path)
    return str(path)

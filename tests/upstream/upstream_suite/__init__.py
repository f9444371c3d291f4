"""The tests of the installed transformers as a package: its own files from the cache, ours where it has none."""

import sys

import transformers
import transformers.testing_utils
import transformers.utils

import hires_lmm

from .fetch import SITE, suite_folder


if not suite_folder().is_dir():
    raise ImportError(f"{suite_folder()} is missing; run: make test-upstream")
__path__ = [*__path__, str(suite_folder())]
sys.path.append(str(SITE))


class _Library:
    """Stands for the second copy of the library that some tests load from its source tree, and knows our classes."""

    def __getattr__(self, name: str):
        return getattr(hires_lmm if name.startswith("HiRes") else transformers, name)


# two test files import the library a second time from `src/`, which is not there
transformers.utils.direct_transformers_import = lambda path, file="__init__.py": _Library()
# FSDP tests build every model through this class, also in the processes they start
transformers.AutoModelForCausalLM.register(
    hires_lmm.HiResLmmConfig, hires_lmm.HiResLmmForConditionalGeneration, exist_ok=True
)

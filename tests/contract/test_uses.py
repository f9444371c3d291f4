"""The names of transformers that we use beyond its documented surface exist, with the signatures that we rely on.

When one is gone or changed, the failure names it and what rests on it. The table is complete: imports, overridden
methods and private names of `src` that it lacks fail as well.
"""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import transformers
from contract_uses import MENTIONS, USES, Mention, Use

import hires_lmm


SOURCE = Path(hires_lmm.__file__).parent
LIBRARIES = ("transformers", "huggingface_hub", "accelerate", "peft", "trl")
DOCUMENTED = {  # modules with a page of their own
    "accelerate", "huggingface_hub", "huggingface_hub.errors", "huggingface_hub.utils", "peft",
    "transformers.image_utils", "transformers.modeling_outputs",
}  # fmt: skip
DOCUMENTED_NAMES = {
    "ModelOutput", "apply_chat_template", "from_pretrained", "generate", "get", "logging", "save_pretrained",
}  # fmt: skip
EVENTS = {name for name in dir(transformers.TrainerCallback) if name.startswith("on_")}
SET_BY_DECORATORS = {"_auto_class", "config_class", "validate"}
MODULES = {"transformers.initialization"}  # imported as a whole
NOT_THEIRS = {  # of torch; of named tuples; of ours, on a model; of lmms-eval
    "_modules", "_replace", "_weights_info", "_resolve_system_prompt",
}  # fmt: skip
NOT_HERE = ("kernels", "vllm", "evaluation.lmms_eval", "evaluation.vlmeval")  # need triton, vLLM or a harness
if find_spec("trl") is None:
    NOT_HERE += ("image_masked",)


def find(place: str) -> Any:
    """What stands at a place; an `AttributeError` or `ImportError` names the part that is gone."""
    module, _, name = place.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def parameters_of(thing: Any) -> str:
    """Names of the parameters in order, with their stars."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return ", ".join(stars.get(each.kind, "") + each.name for each in inspect.signature(thing).parameters.values())


def fault_of(use: Use | Mention) -> str | None:
    """What is wrong with a row at the installed versions."""
    try:
        found = find(use.place)
    except (AttributeError, ImportError) as error:
        return f"{use.place} is gone ({error}); we need it for: {use.reason}"
    if isinstance(use, Mention):
        holds = use.text in inspect.getsource(found)
        return None if holds else f"{use.place} no longer speaks of {use.text}; we need it for: {use.reason}"
    given = None if use.parameters is None else parameters_of(found)
    if given != use.parameters:
        return f"{use.place} takes ({given}), expected ({use.parameters}); we need it for: {use.reason}"
    return None


@pytest.mark.parametrize("use", [*USES, *MENTIONS], ids=lambda use: use.place.partition(":")[2])
def test_the_name_is_there_with_its_signature(use: Use | Mention):
    if use.place.startswith("trl"):
        pytest.importorskip("trl")  # not for Python 3.10
    assert fault_of(use) is None, fault_of(use)


# ---- the table is complete


def taken_beyond(tree: ast.AST) -> set[str]:
    """Places that a file imports, and functions of imported modules that it calls, outside the documented surface."""
    places, modules = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] in LIBRARIES:
            for alias in node.names:
                if f"{node.module}.{alias.name}" in MODULES:
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                elif node.module not in DOCUMENTED and alias.name not in {*transformers.__all__, *DOCUMENTED_NAMES}:
                    places.add(f"{node.module}:{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            places.add(f"{modules[node.value.id]}:{node.attr}")
    return places


def own_classes() -> Iterator[type]:
    """Classes of this package that have a base in one of the libraries."""
    for found in pkgutil.walk_packages(hires_lmm.__path__, "hires_lmm."):
        if not any(name in found.name for name in NOT_HERE):
            for thing in vars(importlib.import_module(found.name)).values():
                if inspect.isclass(thing) and thing.__module__ == found.name and _library_bases(thing):
                    yield thing


def _library_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if base.__module__.split(".")[0] in LIBRARIES]


def overridden(cls: type) -> set[str]:
    """Names that a class, or a mix-in of ours in it, defines anew: methods, and whatever is private."""
    names = set()
    for own in cls.__mro__:
        if own.__module__.startswith("hires_lmm"):
            for name, value in vars(own).items():
                counts = inspect.isroutine(value) or isinstance(value, property) or name.startswith("_")
                is_known = any(name in vars(base) for base in _library_bases(cls))
                if counts and is_known and not name.startswith("__"):
                    names.add(name)
    return names - EVENTS - DOCUMENTED_NAMES - SET_BY_DECORATORS


def private_names(trees: list[ast.AST]) -> set[str]:
    """Private attributes that are read or set and stand in no class or module of ours."""
    own, used = set(), set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                is_new = (
                    isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"
                )
                (own if is_new else used).add(node.attr)
    return used - own - NOT_THEIRS


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
PLACES = {use.place for use in USES}
NAMES = {place.rpartition(":")[2].rpartition(".")[2] for place in PLACES}


def test_every_import_beyond_the_documented_surface_is_in_the_table():
    assert set().union(*map(taken_beyond, TREES.values())) - PLACES == set()


def test_every_overridden_name_is_in_the_table():
    missing = {f"{cls.__qualname__}.{name}" for cls in own_classes() for name in overridden(cls) - NAMES}
    assert missing == set()


def test_every_private_name_is_in_the_table():
    spoken = " ".join(mention.text for mention in MENTIONS)
    assert {name for name in private_names(list(TREES.values())) - NAMES if name not in spoken} == set()


def test_no_place_stands_twice_and_every_row_has_a_reason():
    assert len(PLACES) == len(USES) and all(use.reason for use in [*USES, *MENTIONS])


def test_every_row_is_needed():
    text = "".join(path.read_text(encoding="utf-8") for path in TREES)
    assert {name for name in NAMES if name not in text} == {"ForCausalLMLoss"}  # `loss_function` of the model

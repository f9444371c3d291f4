"""Check what ruff and mypy do not: docstrings of public names, no print, no assert, no soft config reads, sizes.

Plain AST over the source tree; the package is not imported. Prints one line a fault and exits 1 if there is any.

Usage: python scripts/check_docstrings.py [folder or file ...]   (default: src/hires_lmm)
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path


MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
FOREIGN_CONFIGS = ("text_config", "vision_config")
"""Configs of backbones: classes of other people, whose fields differ by family, so a default may be needed there."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Fault = tuple[int, str]


def public_definitions(tree: ast.Module) -> Iterator[Function | ast.ClassDef]:
    """Module-level functions and classes without a leading underscore, also under a module-level `if` or `try`."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.If | ast.Try):
            waiting = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)] + waiting
        elif isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def has_arguments(node: Function) -> bool:
    """Whether a function takes anything."""
    arguments = node.args
    named = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
    return bool(named or arguments.vararg or arguments.kwarg)


def docstring_faults(tree: ast.Module) -> Iterator[Fault]:
    """Public names without a docstring, and public functions with arguments whose docstring has no `Args:`."""
    if tree.body and not ast.get_docstring(tree):
        yield 1, "the module has no docstring"
    for node in public_definitions(tree):
        text = ast.get_docstring(node)
        if not text:
            yield node.lineno, f"`{node.name}` has no docstring"
        elif isinstance(node, Function) and has_arguments(node) and not re.search(r"^Args:$", text, re.MULTILINE):
            yield node.lineno, f"the docstring of `{node.name}` has no `Args:`"


def last_name(node: ast.expr) -> str:
    """`self.model.config` -> `config`; an expression without a name -> its source."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ast.unparse(node)


def statement_faults(tree: ast.Module) -> Iterator[Fault]:
    """`print(...)`, `assert`, and `getattr(config, name, default)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node.lineno, "`assert` in library code; raise ValueError with the value and the remedy"
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        if node.func.id == "print":
            yield node.lineno, "`print` in library code; use logging"
        if node.func.id == "getattr" and len(node.args) == 3:
            name = last_name(node.args[0])
            if "config" in name.lower() and not name.endswith(FOREIGN_CONFIGS):
                yield node.lineno, f"`getattr` with a default on `{name}`; declare the field in the config class"


def function_length(node: Function) -> int:
    """Lines from `def` to the end, decorators and docstring left out."""
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is not None:
        length -= (first.end_lineno or first.lineno) - first.lineno + 1
    return length


def size_faults(tree: ast.Module, source: str) -> Iterator[Fault]:
    """Files and functions over the caps."""
    lines = len(source.splitlines())
    if lines > MAX_FILE_LINES:
        yield 1, f"{lines} lines; the cap of a file is {MAX_FILE_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, Function) and function_length(node) > MAX_FUNCTION_LINES:
            yield node.lineno, f"`{node.name}` has {function_length(node)} lines; the cap is {MAX_FUNCTION_LINES}"


def find_faults(source: str) -> list[Fault]:
    """All faults of one file as (line, text), by line."""
    tree = ast.parse(source)
    return sorted([*docstring_faults(tree), *statement_faults(tree), *size_faults(tree, source)])


def main(arguments: list[str]) -> int:
    """Check the given folders and files; returns the exit status."""
    roots = [Path(argument) for argument in arguments] or [Path(__file__).parents[1] / "src" / "hires_lmm"]
    files = sorted({file for root in roots for file in (root.rglob("*.py") if root.is_dir() else [root])})
    if not files:
        print(f"no Python file under {', '.join(map(str, roots))}")
        return 1
    count = 0
    for file in files:
        for line, text in find_faults(file.read_text(encoding="utf-8")):
            count += 1
            print(f"{file}:{line}: {text}")
    print(f"{len(files)} files checked, {count} faults")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

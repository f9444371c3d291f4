"""Nothing that outlives a crash is written in place: all writers of training and sweeps move whole files."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
FOLDERS = ("src/hires_lmm/training", "src/hires_lmm/evaluation", "src/hires_lmm/scaling", "benchmarks/needle/src")
WRITERS = {"write_text", "write_bytes", "save_file", "save", "dump", "savez", "tofile", "to_json", "open"}
IN_PLACE = {
    "src/hires_lmm/evaluation/store.py": "appends lines; `begin` cuts off the last one where it is torn",
    "src/hires_lmm/training/data/smr.py": "pictures beside a list that is moved to its place behind them",
    "src/hires_lmm/training/objectives/painting.py": "pictures to look at",
    "benchmarks/needle/src/needle/demo_clips.py": "committed clips, compared with what the script draws",
    "benchmarks/needle/src/needle/demo_scenes.py": "committed pictures, compared with what the script draws",
    "benchmarks/needle/src/needle/halves/files.py": "weights whose record, the mark of a whole folder, comes last",
    "benchmarks/needle/src/needle/halves/loop.py": "a log of lines that nothing reads back",
}
"""Files that write in place, and why a piece of theirs is never taken for a whole."""


def name_of(call: ast.Call) -> str:
    """The last name of what is called."""
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def opens_for_reading(call: ast.Call) -> bool:
    """Whether `open` is given no mode, or one that does not write."""
    modes = [
        arg.value for arg in [*call.args, *(word.value for word in call.keywords)] if isinstance(arg, ast.Constant)
    ]
    return not any(isinstance(mode, str) and set(mode) & set("wax+") and len(mode) <= 3 for mode in modes)


def writes_in_place(tree: ast.Module) -> list[int]:
    """Lines that write, outside of a `with replacing(...)` block and of `write_text` of `hires_lmm.files`."""
    safe: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and any(
            isinstance(item.context_expr, ast.Call) and name_of(item.context_expr) == "replacing"
            for item in node.items
        ):
            safe |= set(ast.walk(node))
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or name_of(node) not in WRITERS or node in safe:
            continue
        is_ours = name_of(node) == "write_text" and isinstance(node.func, ast.Name)
        is_read = name_of(node) == "open" and opens_for_reading(node)
        if not is_ours and not is_read:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_are_moved_to_their_place(folder):
    found = {}
    for file in sorted((ROOT / folder).rglob("*.py")):
        lines = writes_in_place(ast.parse(file.read_text(encoding="utf-8")))
        if lines:
            found[str(file.relative_to(ROOT))] = lines
    allowed = {name for name in IN_PLACE if name.startswith(folder)}
    assert found.keys() - allowed == set(), found
    assert allowed - found.keys() == set(), "no longer needed in IN_PLACE"

"""Static rules for the files that travel with a checkpoint: `modeling/` and `processing/`.

The Hub loader scans text for relative imports, copies the siblings it finds into one flat folder and demands every
other imported package on the user's machine, wherever the import stands. Each rule below is a function
`(path, source) -> faults`, so it is tried on bad snippets as well as on the real files.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[2] / "src" / "hires_lmm"
FOLDERS = [PACKAGE / "modeling", PACKAGE / "processing"]
SHIPPED = sorted(file for folder in FOLDERS for file in folder.glob("*.py") if file.name != "__init__.py")
ALLOWED = sys.stdlib_module_names | {"torch", "numpy", "PIL", "transformers", "huggingface_hub"}
KERNEL = "silu_kernel_hires_lmm"
KERNEL_PACKAGES = {"triton"}  # the kernel file alone may import it: that file is imported by a function, never at load
LOADER_PATTERNS = (r"^\s*import\s+(\.\S+)\s*$", r"^\s*from\s+(\.\S+)\s+import")


# ---- rules on one file


def absolute_imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, top package) of every absolute import, at any depth of the code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, (node.module or "").split(".")[0]


def relative_imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """Every `from .x import y`, at any depth of the code."""
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 0)


def rule_only_allowed_packages(path: Path, source: str) -> list[str]:
    """Only the standard library, torch, numpy, PIL, transformers and huggingface_hub, also inside functions."""
    allowed = ALLOWED | KERNEL_PACKAGES if path.stem == KERNEL else ALLOWED
    found = [(line, package) for line, package in absolute_imports(source) if package != "hires_lmm"]
    return [f"line {line}: imports {package}" for line, package in found if package not in allowed]


def rule_nothing_of_the_package(path: Path, source: str) -> list[str]:
    """No absolute import of this package and no import of a folder above: neither exists beside a checkpoint."""
    faults = [
        f"line {line}: imports {package}" for line, package in absolute_imports(source) if package == "hires_lmm"
    ]
    above = [node for node in relative_imports(ast.parse(source)) if node.level > 1]
    return faults + [f"line {node.lineno}: imports from {'.' * node.level}{node.module or ''}" for node in above]


def rule_siblings_only(path: Path, source: str) -> list[str]:
    """A relative import names one file of the same folder, `*_hires_lmm`, and the names wanted from it."""
    faults = []
    for node in relative_imports(ast.parse(source)):
        module = node.module or ""
        if not re.fullmatch(r"\w+_hires_lmm", module):
            faults.append(f"line {node.lineno}: `from .{module}` is not a sibling *_hires_lmm file")
        elif not path.with_name(f"{module}.py").is_file():
            faults.append(f"line {node.lineno}: there is no {module}.py in {path.parent.name}/")
        if any(alias.name == "*" for alias in node.names):
            faults.append(f"line {node.lineno}: star import")
    return faults


def rule_kernel_is_imported_late(path: Path, source: str) -> list[str]:
    """The file that needs triton is imported only inside a function."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = {node for function in functions for node in relative_imports(function)}
    early = [node for node in relative_imports(tree) if node.module == KERNEL and node not in late]
    return [f"line {node.lineno}: imports {KERNEL} at load" for node in early]


def rule_loader_sees_the_real_imports(path: Path, source: str) -> list[str]:
    """What the loader's text scan finds is exactly what Python imports: no look-alike line, no hidden import."""
    real = {(node.lineno, f".{node.module or ''}") for node in relative_imports(ast.parse(source)) if node.level == 1}
    seen = set()
    for pattern in LOADER_PATTERNS:
        for match in re.finditer(pattern, source, flags=re.MULTILINE):
            start = match.start() + len(match.group()) - len(match.group().lstrip())
            seen.add((source.count("\n", 0, start) + 1, match.group(1)))
    faults = [f"line {line}: text that looks like an import of {name}" for line, name in sorted(seen - real)]
    return faults + [f"line {line}: import of {name} that the loader misses" for line, name in sorted(real - seen)]


def rule_no_future_annotations(path: Path, source: str) -> list[str]:
    """Annotations stay objects: as strings they break the config class of a model."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return [f"line {node.lineno}: from __future__" for node in nodes if node.module == "__future__"]


def rule_no_files_beside_the_code(path: Path, source: str) -> list[str]:
    """Only .py files travel, so code may not look for others beside itself, nor import by a computed name."""
    banned = {"__file__", "__import__", "import_module", "get_data", "importlib.resources", "pkg_resources"}
    faults = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [alias.name for alias in node.names]
            names.append(node.module or "")
        faults += [f"line {node.lineno}: {name}" for name in sorted(banned.intersection(names))]
    return faults


def rule_file_name(path: Path, source: str) -> list[str]:
    """Names end in `_hires_lmm.py`: in the loader's folder they lie beside files of nobody's choosing."""
    return (
        [] if re.fullmatch(r"[a-z0-9_]+_hires_lmm\.py", path.name) else [f"{path.name} does not end in _hires_lmm.py"]
    )


RULES: list[Callable[[Path, str], list[str]]] = [
    rule_only_allowed_packages,
    rule_nothing_of_the_package,
    rule_siblings_only,
    rule_kernel_is_imported_late,
    rule_loader_sees_the_real_imports,
    rule_no_future_annotations,
    rule_no_files_beside_the_code,
    rule_file_name,
]


# ---- rules on the folders


def rule_flat(folder: Path) -> list[str]:
    """Nothing but Python files: no folder, no data file."""
    return [
        f"{folder.name}/{entry.name}"
        for entry in sorted(folder.iterdir())
        if entry.name != "__pycache__" and (entry.is_dir() or entry.suffix != ".py")
    ]


def rule_unique_names(folders: list[Path]) -> list[str]:
    """No file name twice: all of them end up in one folder."""
    names = [file.name for folder in folders for file in folder.glob("*.py") if file.name != "__init__.py"]
    return sorted({name for name in names if names.count(name) > 1})


# ---- the real files


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_folder_ships_files_and_is_flat(folder: Path):
    assert any(file.parent == folder for file in SHIPPED), f"no file to check in {folder}"
    assert rule_flat(folder) == []


def test_names_are_unique_across_the_folders():
    assert rule_unique_names(FOLDERS) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_file_keeps_the_rule(path: Path, rule: Callable[[Path, str], list[str]]):
    assert rule(path, path.read_text(encoding="utf-8")) == [], rule.__doc__


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_loader_of_transformers_agrees(path: Path):
    """The installed transformers finds only files that exist and packages that every user has."""
    from transformers.dynamic_module_utils import get_imports, get_relative_import_files

    needed = [Path(file) for file in get_relative_import_files(path)]
    assert [file for file in needed if not file.is_file()] == []
    for file in [path, *needed]:
        allowed = ALLOWED | KERNEL_PACKAGES if file.stem == KERNEL else ALLOWED
        assert set(get_imports(file)) <= allowed


# ---- the rules can fail

BAD = [
    (rule_only_allowed_packages, "import torchvision"),
    (rule_only_allowed_packages, "import numpy, einops"),
    (rule_only_allowed_packages, "from flash_attn import flash_attn_func"),
    (rule_only_allowed_packages, "def f():\n    import triton"),
    (rule_only_allowed_packages, "try:\n    import diffusers\nexcept ImportError:\n    diffusers = None"),
    (rule_only_allowed_packages, "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import peft"),
    (rule_nothing_of_the_package, "from hires_lmm.scaling import table"),
    (rule_nothing_of_the_package, "def f():\n    import hires_lmm.training"),
    (rule_nothing_of_the_package, "from ..processing.planners_hires_lmm import plan"),
    (rule_nothing_of_the_package, "from .. import scaling"),
    (rule_siblings_only, "from . import good_hires_lmm"),
    (rule_siblings_only, "from .good import X"),
    (rule_siblings_only, "from .deep.good_hires_lmm import X"),
    (rule_siblings_only, "from .absent_hires_lmm import X"),
    (rule_siblings_only, "from .good_hires_lmm import *"),
    (rule_kernel_is_imported_late, f"from .{KERNEL} import silu"),
    (rule_kernel_is_imported_late, f"if True:\n    from .{KERNEL} import silu"),
    (rule_kernel_is_imported_late, f"class A:\n    from .{KERNEL} import silu"),
    (rule_loader_sees_the_real_imports, '"""Use it so:\n\n    from .good_hires_lmm import X\n"""'),
    (rule_loader_sees_the_real_imports, "# a comment\n'''\nfrom .other import\n'''"),
    (rule_loader_sees_the_real_imports, "'''\nimport .other\n'''"),
    (rule_loader_sees_the_real_imports, "x = 1; from .good_hires_lmm import X"),
    (rule_loader_sees_the_real_imports, "from . import good_hires_lmm"),
    (rule_no_future_annotations, "from __future__ import annotations"),
    (rule_no_files_beside_the_code, "from pathlib import Path\ntable = Path(__file__).with_name('t.json')"),
    (rule_no_files_beside_the_code, "import importlib.resources"),
    (rule_no_files_beside_the_code, "from importlib import resources"),
    (rule_no_files_beside_the_code, "import importlib\nimportlib.import_module('x')"),
    (rule_no_files_beside_the_code, "import pkgutil\npkgutil.get_data('x', 'y')"),
    (rule_no_files_beside_the_code, "m = __import__('x')"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two siblings to import from."""
    for name in ("good_hires_lmm", KERNEL):
        (tmp_path / f"{name}.py").write_text("")
    return tmp_path


@pytest.mark.parametrize(("rule", "source"), BAD)
def test_rule_fires(folder: Path, rule: Callable[[Path, str], list[str]], source: str):
    assert rule(folder / "bad_hires_lmm.py", source)


GOOD = [
    "import math\nfrom dataclasses import dataclass\nimport torch.nn.functional as F\nfrom PIL import Image\n",
    "from transformers.modeling_utils import PreTrainedModel\nfrom huggingface_hub.dataclasses import strict\n",
    "from .good_hires_lmm import X\nfrom .good_hires_lmm import (\n    Y,\n    Z,\n)\n",
    f"def launch():\n    from .{KERNEL} import silu\n\n    return silu\n",
    '"""The text `from .good_hires_lmm import X` inside a line is harmless."""\n',
    "\n\n\nfrom .good_hires_lmm import X\n",
]


@pytest.mark.parametrize("source", GOOD)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts_good_code(folder: Path, rule: Callable[[Path, str], list[str]], source: str):
    assert rule(folder / "code_hires_lmm.py", source) == []


def test_only_the_kernel_file_may_import_triton(folder: Path):
    source = "import triton\nimport triton.language as tl\n"
    assert rule_only_allowed_packages(folder / f"{KERNEL}.py", source) == []
    assert rule_only_allowed_packages(folder / "attention_hires_lmm.py", source)


@pytest.mark.parametrize("name", ["attention.py", "Attention_hires_lmm.py", "hires_lmm.py"])
def test_file_name_rule_fires(folder: Path, name: str):
    assert rule_file_name(folder / name, "")


def test_folder_rules_fire(tmp_path: Path):
    first, second = tmp_path / "modeling", tmp_path / "processing"
    for directory in (first, second):
        directory.mkdir()
        (directory / "same_hires_lmm.py").write_text("")
    assert rule_flat(first) == []
    assert rule_unique_names([first, second]) == ["same_hires_lmm.py"]
    (first / "table.json").write_text("{}")
    (first / "deep").mkdir()
    assert rule_flat(first) == ["modeling/deep", "modeling/table.json"]

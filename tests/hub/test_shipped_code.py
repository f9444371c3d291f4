"""Static rules for the files that travel with a checkpoint: `modeling/` and `processing/`.

The Hub loader scans text for relative imports, copies the siblings it finds into one flat folder and demands every
other imported package on the user's machine, wherever the import stands. What it then runs is inert: no file but the
image that a user names, no socket but the URL that a user names, no code made from text, and nothing but definitions
while it is imported. One file, `own_parts_hires_lmm.py`, may do more: it saves and loads the files of a user's own
parts. Each rule below is a function `(path, source) -> faults`, so it is tried on bad snippets as well as on the real
files.
"""

import ast
import importlib
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[2] / "src" / "hires_lmm"
FOLDERS = [PACKAGE / "modeling", PACKAGE / "processing"]
FILES = sorted(file for folder in FOLDERS for file in folder.glob("*.py") if file.name != "__init__.py")
SHIPPED = [file for file in FILES if not file.is_symlink()]
LINKS = [file for file in FILES if file.is_symlink()]  # files that both folders need; a checkpoint gets them once
STANDARD = {  # module -> names that may be taken from it; None: the module itself, with all it has
    "base64": None,
    "binascii": None,
    "collections.abc": {"Callable", "Iterable", "Iterator", "Mapping", "Sequence"},
    "concurrent.futures": {"ThreadPoolExecutor"},
    "contextlib": {"contextmanager"},
    "contextvars": {"ContextVar"},
    "copy": {"deepcopy", None},
    "dataclasses": {"asdict", "dataclass", "field", "fields", "replace"},
    "enum": {"IntEnum"},
    "functools": {"cached_property", "lru_cache", "partial", "wraps"},
    "inspect": {"signature"},
    "io": {"BytesIO"},
    "itertools": {"accumulate", "pairwise", "product"},
    "json": None,
    "math": None,
    "os": {"PathLike", "getpid", "path"},
    "re": None,
    "threading": {"Lock", "RLock"},
    "typing": {"Any", "Literal", "NamedTuple", "cast"},
    "warnings": None,
}
OWN = "own_parts_hires_lmm"
OWN_STANDARD = {  # for that file alone; of importlib only what asks whether a distribution is installed
    "ast": None,
    "importlib.metadata": {"PackageNotFoundError", "distribution"},
    "pathlib": {"Path"},
    "sys": None,
}
OWN_PACKAGES = {name.partition(".")[0] for name in OWN_STANDARD}
ALLOWED = {name.split(".")[0] for name in STANDARD} | {"torch", "numpy", "PIL", "transformers", "huggingface_hub"}
LOOKS = {"os.listdir", "os.scandir"}  # the import system searches folders
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
    found = [(line, package) for line, package in absolute_imports(source) if package != "hires_lmm"]
    allowed = ALLOWED | (OWN_PACKAGES if path.stem == OWN else set())
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


def rule_own_config_is_read_without_defaults(path: Path, source: str) -> list[str]:
    """Fields of our config are declared; a default would hide a slip. Configs of backbones differ by family."""
    found = re.finditer(r"getattr\(\s*(?:\w+\.)*(\w*config)\s*,[^,()]+,", source)
    return [
        f"getattr with a default on {read[1]}" for read in found if read[1] not in ("text_config", "vision_config")
    ]


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
        found = sorted(banned.intersection(names))
        faults += [f"line {node.lineno}: {name}" for name in found if (path.stem, name) not in EXCEPTIONS]
    return faults


def rule_file_name(path: Path, source: str) -> list[str]:
    """Names end in `_hires_lmm.py`: in the loader's folder they lie beside files of nobody's choosing."""
    return (
        [] if re.fullmatch(r"[a-z0-9_]+_hires_lmm\.py", path.name) else [f"{path.name} does not end in _hires_lmm.py"]
    )


# ---- rules that keep the code inert

INPUT = "image_input_hires_lmm"
CODE_NAMES = {"eval", "exec", "compile", "__import__", "globals", "locals", "breakpoint", "input", "delattr"}
CODE_NAMES |= {
    "pickle",
    "cPickle",
    "marshal",
    "shelve",
    "dill",
    "joblib",
    "cloudpickle",
    "ctypes",
    "subprocess",
    "socket",
}
CODE_NAMES |= {"get_class_from_dynamic_module", "get_cached_module_file", "get_class_in_module"}
CODE_NAMES |= {"importlib", "runpy", "code", "codeop", "pty", "multiprocessing", "urllib", "http", "requests", "httpx"}
INSIDES = {
    "__class__",
    "__base__",
    "__bases__",
    "__mro__",
    "__subclasses__",
    "__globals__",
    "__builtins__",
    "__code__",
}
INSIDES |= {"__closure__", "__reduce__", "__reduce_ex__", "__loader__", "__spec__"}
FILE_NAMES = {
    "open",
    "fdopen",
    "system",
    "popen",
    "get_session",
    "snapshot_download",
    "hf_hub_download",
    "cached_file",
}
FILE_ATTRIBUTES = {
    "open", "load", "save", "read_text", "read_bytes", "write_text", "write_bytes", "unlink", "mkdir",
    "makedirs", "rmdir", "remove", "rename", "touch", "symlink_to", "chmod", "tofile", "fromfile", "memmap",
    "loadtxt", "genfromtxt", "savez", "savetxt", "from_file", "load_library", "load_inline", "hub", "jit",
    "cpp_extension", "load_state_dict_from_url", "stream", "connect", "urlopen", "system", "popen", "spawn",
    "fork", "load_url", "savefig", "load_module", "_load",
}  # fmt: skip
EXCEPTIONS = {  # (file, text): images that a user names, the name of a number format, files of a user's own parts
    (INPUT, "Image.open"),
    (INPUT, "open"),
    (INPUT, "image.load"),
    (INPUT, "get_session"),
    ("configuration_hires_lmm", "getattr(torch, dtype, None)"),
    (OWN, "__file__"),
    (OWN, "get_class_from_dynamic_module"),
    (OWN, "get_cached_module_file"),
    (OWN, "Path(folder).mkdir"),
    (OWN, "target.write_text"),
    (OWN, "file.read_text"),
}
AT_IMPORT_CALLS = {
    "Planner",
    "TowerFamily",
    "logging.get_logger",
    "field",
    "SubConfigSpec",
    "re.compile",
    "ContextVar",
}
AT_IMPORT_METHODS = {"strip", "replace"}  # of texts
DECORATORS = {
    "cached_property", "can_return_tuple", "classmethod", "contextmanager", "dataclass", "lru_cache",
    "merge_with_config_defaults", "property", "size.setter", "staticmethod", "strict",
    "takes_cache", "torch.compiler.assume_constant_result", "torch.no_grad", "wraps",
}  # fmt: skip
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


def rule_only_named_parts_of_the_standard_library(path: Path, source: str) -> list[str]:
    """From the standard library only what `STANDARD` names: no os, no socket, no subprocess."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            wanted = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            wanted = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in wanted:
            if module.split(".")[0] in sys.stdlib_module_names:
                table = {**STANDARD, **OWN_STANDARD} if path.stem == OWN else STANDARD
                known = table.get(module, set())
                allowed = name is None if known is None else name in known
                if module not in table or not allowed:
                    faults.append(f"line {node.lineno}: takes {name or 'all'} of {module}")
    return faults


def rule_no_code_from_text(path: Path, source: str) -> list[str]:
    """No `eval`, `exec`, `compile`, no pickle, no process, no import by name; not even the word as a name."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in CODE_NAMES and (path.stem, node.id) not in EXCEPTIONS:
            faults.append(f"line {node.lineno}: {node.id}")
        elif isinstance(node, ast.Attribute) and node.attr in CODE_NAMES - {"compile"} | INSIDES:
            faults.append(f"line {node.lineno}: .{node.attr}")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            found = sorted(names & CODE_NAMES)
            faults += [f"line {node.lineno}: imports {name}" for name in found if (path.stem, name) not in EXCEPTIONS]
    return faults


def rule_no_files_and_sockets(path: Path, source: str) -> list[str]:
    """Nothing opens, reads, writes or removes a file, and nothing connects, but the reader of images."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        text = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
        found = (isinstance(node, ast.Name) and node.id in FILE_NAMES) or (
            isinstance(node, ast.Attribute) and node.attr in FILE_ATTRIBUTES | FILE_NAMES
        )
        if found and (path.stem, text) not in EXCEPTIONS:
            faults.append(f"line {node.lineno}: {text}")
        if isinstance(node, ast.ImportFrom):
            taken = {alias.name for alias in node.names} & (FILE_NAMES | FILE_ATTRIBUTES)
            faults += [f"line {node.lineno}: {name}" for name in sorted(taken) if (path.stem, name) not in EXCEPTIONS]
    return faults


def rule_no_attribute_of_a_module_by_name(path: Path, source: str) -> list[str]:
    """`getattr(module, name)` and `vars(module)` could reach what the other rules forbid."""
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    faults = []
    for call in calls:
        first = ast.unparse(call.args[0]).split(".")[0]
        named = isinstance(call.func, ast.Name) and call.func.id in ("getattr", "setattr", "vars")
        if named and first in modules and (path.stem, ast.unparse(call)) not in EXCEPTIONS:
            faults.append(f"line {call.lineno}: {ast.unparse(call)}")
    tables = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "__dict__"]
    owners = [(node.lineno, ast.unparse(node.value).split(".")[0]) for node in tables]
    return faults + [f"line {line}: {owner}.__dict__" for line, owner in owners if owner in modules]


def rule_definitions_only(path: Path, source: str) -> list[str]:
    """Importing a file defines and does nothing else: no statement beside definitions, no call beside a few."""
    return _at_import(ast.parse(source).body)


def _at_import(body: list[ast.stmt]) -> list[str]:
    faults = []
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if not isinstance(node, DEFINITIONS):
            faults.append(f"line {node.lineno}: {type(node).__name__} while importing")
            continue
        parts: list[ast.AST] = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [ast.unparse(each.func if isinstance(each, ast.Call) else each) for each in node.decorator_list]
            faults += [f"line {node.lineno}: @{name}" for name in names if name not in DECORATORS]
            parts = [value for each in node.decorator_list if isinstance(each, ast.Call) for value in each.args]
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            parts += [*arguments.defaults, *(value for value in arguments.kw_defaults if value)]
            parts += [each.annotation for each in ast.walk(arguments) if isinstance(each, ast.arg) and each.annotation]
        elif isinstance(node, ast.ClassDef):
            parts += [*node.bases, *(keyword.value for keyword in node.keywords)]
            faults += _at_import(node.body)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            parts.append(node)
        calls = [call for part in parts for call in ast.walk(part) if isinstance(call, ast.Call)]
        faults += [f"line {call.lineno}: calls {ast.unparse(call)[:60]}" for call in calls if not _is_harmless(call)]
    return faults


def _is_harmless(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Attribute) and call.func.attr in AT_IMPORT_METHODS:
        return isinstance(call.func.value, ast.Constant | ast.Name | ast.BinOp | ast.Call)
    return ast.unparse(call.func) in AT_IMPORT_CALLS


RULES: list[Callable[[Path, str], list[str]]] = [
    rule_only_allowed_packages,
    rule_nothing_of_the_package,
    rule_siblings_only,
    rule_loader_sees_the_real_imports,
    rule_no_future_annotations,
    rule_own_config_is_read_without_defaults,
    rule_no_files_beside_the_code,
    rule_file_name,
    rule_only_named_parts_of_the_standard_library,
    rule_no_code_from_text,
    rule_no_files_and_sockets,
    rule_no_attribute_of_a_module_by_name,
    rule_definitions_only,
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
    """No file name twice, beside links: all of them end up in one folder."""
    files = [file for folder in folders for file in folder.glob("*.py") if not file.is_symlink()]
    names = [file.name for file in files if file.name != "__init__.py"]
    return sorted({name for name in names if names.count(name) > 1})


# ---- the real files


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_folder_ships_files_and_is_flat(folder: Path):
    assert any(file.parent == folder for file in SHIPPED), f"no file to check in {folder}"
    assert rule_flat(folder) == []


def test_names_are_unique_across_the_folders():
    assert rule_unique_names(FOLDERS) == []


@pytest.mark.parametrize("link", LINKS, ids=lambda path: path.stem)
def test_a_link_leads_to_the_file_of_that_name_in_processing(link: Path):
    assert link.readlink().as_posix() == f"../processing/{link.name}"
    assert link.resolve() in SHIPPED and link.parent.name == "modeling"


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
        assert set(get_imports(file)) <= ALLOWED | OWN_PACKAGES


def test_every_permission_is_needed():
    """What is allowed is used somewhere; a permission that nobody needs any more is taken back."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in SHIPPED}
    taken = set()
    for source in sources.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                taken |= {(alias.name, None) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                taken |= {(node.module, alias.name) for alias in node.names}
    permitted = {(module, name) for module, names in {**STANDARD, **OWN_STANDARD}.items() for name in names or {None}}
    assert permitted <= taken, permitted - taken
    assert {(stem, text) for stem, text in EXCEPTIONS if text not in sources[stem]} == set()
    decorators = {name for name in DECORATORS if not any(f"@{name}" in source for source in sources.values())}
    calls = {name for name in AT_IMPORT_CALLS if not any(f"{name}(" in source for source in sources.values())}
    assert decorators | calls == set()


def test_importing_touches_nothing(tmp_path, monkeypatch):
    """All shipped files are imported once more, from the flat folder a loader makes: no file is written, no process
    started, no address looked up."""
    import hires_lmm.modeling.modeling_hires_lmm  # noqa: F401  (libraries are loaded before the watch begins)

    package, heard, is_open = types.ModuleType("inert_copy"), [], True
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "inert_copy", package)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def hear(event: str, args: tuple) -> None:
        writes = event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if is_open and (writes or (event.startswith(("os.", "socket.", "subprocess.")) and event not in LOOKS)):
            heard.append((event, args))

    for path in SHIPPED:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    sys.addaudithook(hear)  # cannot be taken out again
    for path in SHIPPED:
        importlib.import_module(f"inert_copy.{path.stem}")
    is_open = False
    assert heard == []
    loaded = [name for name in sys.modules if name.startswith("inert_copy.")]
    assert len(loaded) == len(SHIPPED)
    for name in loaded:
        monkeypatch.delitem(sys.modules, name)


# ---- the rules can fail

BAD = [
    (rule_only_named_parts_of_the_standard_library, "def f():\n    import subprocess"),
    (rule_only_named_parts_of_the_standard_library, "from os import path, environ"),
    (rule_only_named_parts_of_the_standard_library, "from importlib import import_module"),
    (rule_no_code_from_text, "from transformers.dynamic_module_utils import get_class_from_dynamic_module"),
    (rule_no_code_from_text, "def f(text):\n    exec(text)"),
    (rule_no_code_from_text, "import torch\ntorch.serialization.pickle.loads(b'')"),
    (rule_no_code_from_text, "f = (lambda: 0).__globals__['os']"),
    (rule_no_files_and_sockets, "def f(path):\n    return path.read_text()"),
    (rule_no_files_and_sockets, "from torch import load as f"),
    (rule_no_files_and_sockets, "from huggingface_hub import get_session\nget_session()"),
    (rule_no_attribute_of_a_module_by_name, "import torch\nload = getattr(torch, 'lo' + 'ad')"),
    (rule_no_attribute_of_a_module_by_name, "import torch\nload = torch.__dict__['load']"),
    (rule_definitions_only, "import torch\ntorch.manual_seed(0)"),
    (rule_definitions_only, "class A(metaclass=f()):\n    pass"),
    (rule_definitions_only, "def g(*, x=f()):\n    pass"),
    (rule_only_allowed_packages, "try:\n    import diffusers\nexcept ImportError:\n    diffusers = None"),
    (rule_nothing_of_the_package, "def f():\n    import hires_lmm.training"),
    (rule_nothing_of_the_package, "from ..processing.planners_hires_lmm import plan"),
    (rule_siblings_only, "from . import good_hires_lmm"),
    (rule_siblings_only, "from .absent_hires_lmm import X"),
    (rule_loader_sees_the_real_imports, '"""Use it so:\n\n    from .good_hires_lmm import X\n"""'),
    (rule_no_future_annotations, "from __future__ import annotations"),
    (rule_own_config_is_read_without_defaults, "x = getattr(self.config, 'planner', None)"),
    (rule_no_files_beside_the_code, "from pathlib import Path\ntable = Path(__file__).with_name('t.json')"),
]


@pytest.mark.parametrize(("rule", "source"), BAD)
def test_rule_fires(tmp_path: Path, rule: Callable[[Path, str], list[str]], source: str):
    (tmp_path / "good_hires_lmm.py").write_text("")
    assert rule(tmp_path / "bad_hires_lmm.py", source)

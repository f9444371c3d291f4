"""A user's own parts: classes outside of the package, `"my_parts.AveragePool"` in a configuration.

The one shipped file that looks into `sys.modules`, and that reads and writes files.
"""

import ast
import re
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any


NAME = re.compile(r"[^\W\d]\w*\.[^\W\d]\w*")
BASES = ("HiResLmmPart", "Planner")
SHIPPED = "_hires_lmm"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "code_revision", "token")
IMPORT = re.compile(r"^([ \t]*from[ \t]+)((?:\w+\.)*)(\w+)(?=[ \t]+import\b)", re.MULTILINE)
SIBLING = re.compile(r"^[ \t]*from[ \t]+\.(\w+)[ \t]+import\b", re.MULTILINE)


class PartName(str):
    """The name of an own part that knows its class, wherever it is copied to; JSON sees a text."""

    part: type


class HiResLmmOwnPartsMixin:
    """Saving of what names parts: the files of the user's own lie beside it."""

    def part_names(self) -> list[Any]:
        """The names of all parts."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a part that cannot be saved is refused before anything is written."""
        collect_files(self.part_names(), save_directory)
        saver: Any = super()
        return saver.save_pretrained(save_directory, *args, **kwargs)

    def to_json_file(self, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, and the files of the parts beside it."""
        folder = Path(json_file_path).parent
        write_files(collect_files(self.part_names(), folder), folder)
        writer: Any = super()
        writer.to_json_file(json_file_path, *args, **kwargs)


def is_own(name: Any) -> bool:
    """Whether a name means a class in a file, not an entry of a registry."""
    return isinstance(name, str) and "." in name


def map_names(setting: Any, change: Callable[[Any], Any], key: str = "part") -> Any:
    """A setting with each name of a part changed, at any depth of lists and dicts."""
    if isinstance(setting, dict):
        if key in setting and not isinstance(setting[key], dict):
            return {**setting, key: change(setting[key])}
        return {place: map_names(each, change, key) for place, each in setting.items()}
    return [map_names(each, change, key) for each in setting] if isinstance(setting, list) else setting


def map_planner(planner: Any, change: Callable[[Any], Any]) -> Any:
    """A planner, given alone or as a dict with its options, with its name changed."""
    return map_names(planner, change, "name") if isinstance(planner, dict) else change(planner)


def list_names(setting: Any, key: str = "part") -> list[Any]:
    """The names of parts in a setting, in their order."""
    names: list[Any] = []
    map_names(setting, names.append, key)
    return names


def as_name(part: Any) -> Any:
    """What a configuration holds for a part: for a class its name, which knows the class; names stay."""
    if is_own(part) and part.count(".") > 1:
        part = find_imported(part) or part
    if isinstance(part, type):
        part = _named(f"{part.__module__.rpartition('.')[2]}.{part.__name__}", part)
    if is_own(part) and (NAME.fullmatch(part) is None or part.partition(".")[0].endswith(SHIPPED)):
        raise ValueError(
            f"{part!r} names no part of your own: give the class, or the name of its file and class, as "
            f'"my_parts.AveragePool", once it is imported; the name of the file does not end in {SHIPPED}.'
        )
    return part


def own_class(name: Any, base: str) -> Any:
    """The class of an own part that was given, loaded, or imported by the user; None where it is not known."""
    part = _known_class(name)
    if part is not None and not _is_part(part, (base,)):
        raise ValueError(f"The part {name} does not fit here: derive it from {base}, or move it to its own slot.")
    return part


def is_known(name: Any) -> bool:
    """Whether a name is one of the registry, or of an own part whose class is there."""
    return not is_own(name) or _known_class(name) is not None


def find_imported(name: str) -> Any:
    """The part of that name in a module that the user has imported; nothing is imported here."""
    file, _, class_name = name.rpartition(".")
    modules = [sys.modules[file]] if file in sys.modules else _modules_named(file)
    found = {part for module in modules if _is_part(part := getattr(module, "__dict__", {}).get(class_name))}
    return found.pop() if len(found) == 1 else None


def part_loader(source: Any, is_trusted: bool, module: str, options: dict[str, Any]) -> Callable[[Any], Any]:
    """What turns the name of a part into one that knows its class."""
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    return partial(_load_part, source=str(source or ""), is_trusted=is_trusted, module=module, hub=hub)


def _load_part(name: Any, source: str, is_trusted: bool, module: str, hub: dict[str, Any]) -> Any:
    """Takes the class of the checkpoint's file if it is trusted, else of the user's import; ValueError if neither."""
    if not is_own(name) or hasattr(name, "part"):
        return name
    part, reason = None, ""
    if source and (is_trusted or _runs_code_of(module, source, hub)):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        try:
            part = get_class_from_dynamic_module(str(name), source, **hub)
        except OSError as error:
            reason = f" There is no such file: {error}"
        except AttributeError as error:
            raise ValueError(f"The part {name} cannot be read from {source!r}: {error}; correct the file.") from error
    part = part or find_imported(name)
    if part is None:
        raise ValueError(refusal(name, source) + reason)
    return _named(name, part)


def refusal(name: str, source: str = "") -> str:
    """Why a part cannot be used, and what to do."""
    file = name.partition(".")[0]
    return (
        f"The part {name} is no part of hires_lmm but code in {file}.py{f' of {source!r}' if source else ''}. Read "
        "it, then load the model or AutoProcessor with from_pretrained(..., trust_remote_code=True), on the command "
        f"line with --trust-remote-code; or import {file} first to use your own."
    )


def _runs_code_of(module: str, source: str, hub: dict[str, Any]) -> bool:
    """Whether a running module came out of this very checkpoint: who trusted that, trusts the file beside it."""
    if not module.startswith("transformers_modules."):
        return False
    from transformers.dynamic_module_utils import get_cached_module_file

    hub = {"revision" if key == "code_revision" else key: value for key, value in hub.items()}
    try:
        file = get_cached_module_file(source, f"{module.rpartition('.')[2]}.py", **hub)
    except OSError:
        return False
    return ".".join(Path(file).with_suffix("").parts) == module


def collect_files(names: list[Any], folder: str | Path) -> dict[str, str]:
    """The files that belong beside a configuration with these parts, by name; nothing is written yet."""
    files: dict[str, str] = {}
    for name in filter(is_own, names):
        part = _known_class(name)
        if part is None and not (Path(folder) / f"{name.partition('.')[0]}.py").is_file():
            raise ValueError(refusal(name))
        if part is None:
            continue  # saved where it came from
        module = sys.modules.get(part.__module__)
        file = getattr(module, "__file__", None)
        is_found = part.__qualname__ == part.__name__ and hasattr(module, part.__name__)
        if part.__module__ == "__main__" or file is None or not is_found:
            raise ValueError(
                f"The part {name} cannot be saved: its class stands in no file under its name. Move it to the top of "
                "a file of its own, such as my_parts.py, and import it from there."
            )
        if Path(file).name != f"{name.partition('.')[0]}.py":
            raise ValueError(
                f"The part {name} cannot be saved: its class stands in {Path(file).name}, but its name asks for "
                f"{name.partition('.')[0]}.py. Move it to a file of its own, such as my_parts.py, and import that."
            )
        try:
            _gather(Path(file), part.__module__.rpartition(".")[0], files)
        except ValueError as error:
            raise ValueError(f"The part {name} cannot be saved: {error}") from error
    return files


def write_files(files: dict[str, str], folder: str | Path) -> None:
    """Write what `collect_files` found; files of the package that are there stay."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        target = Path(folder) / name
        if not (name.endswith(f"{SHIPPED}.py") and target.exists()):
            target.write_text(text, encoding="utf-8")


def _gather(file: Path, package: str, files: dict[str, str]) -> None:
    """Add a file, with its imports as a flat folder has them, and all that it imports from beside it."""
    prefixes = {"hires_lmm.modeling.", "hires_lmm.processing.", f"{package}."}

    def flatten(found: re.Match) -> str:
        is_beside = found[2] in prefixes or (not found[2] and file.with_name(f"{found[3]}.py").is_file())
        return f"{found[1]}.{found[3]}" if is_beside else found[0]

    text = IMPORT.sub(flatten, file.read_text(encoding="utf-8"))
    if files.setdefault(file.name, text) != text:
        raise ValueError(f"two different files would be saved as {file.name}; rename one.")
    for node in ast.walk(ast.parse(text)) if not file.stem.endswith(SHIPPED) else ():
        remedy = _fault(node, file)
        if remedy:
            raise ValueError(f"line {node.lineno} of {file.name} has `{ast.unparse(node)}`; {remedy}.")  # type: ignore[attr-defined]
    for sibling in SIBLING.findall(text):
        found = _find_file(file, sibling)
        if not found.is_file():
            raise ValueError(
                f"{file.name} has a line `from .{sibling} import`, but there is no {sibling}.py beside it."
            )
        if found.name not in files:
            _gather(found, package, files)


def _fault(node: ast.AST, file: Path) -> str:
    """What to write in place of an import that a flat folder cannot have; empty if it can."""
    level = node.level if isinstance(node, ast.ImportFrom) else 0
    modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if level > 1 or (level and not modules[0].isidentifier()):
        return "a checkpoint is one flat folder, write `from .file import name` for a file beside this one"
    if not level and any(module.partition(".")[0] == "hires_lmm" for module in modules):
        return "write `from hires_lmm.modeling.file import name`, or hires_lmm.processing, on a line of its own"
    if not level and any(file.with_name(f"{module}.py").is_file() for module in modules):
        return "write `from file import name` on a line of its own for a file beside this one"
    local = [] if level else [top for module in modules if _is_local(top := module.partition(".")[0])]
    if local:
        return (
            f"{local[0]!r} is no installed package, so it is missing elsewhere: write `from .file import name` for a "
            "file in the same folder, or install it as a package"
        )
    return ""


def _is_local(package: str) -> bool:
    """Whether a package was imported from files that belong neither to Python nor to an installed distribution."""
    module = sys.modules.get(package)
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    parts = {part for place in filter(None, places) for part in Path(place).parts}
    if not parts or package in sys.stdlib_module_names or {"site-packages", "dist-packages"} & parts:
        return False
    try:
        return distribution(package) is None  # installed from its sources, which stay where they are
    except PackageNotFoundError:
        return True


def _find_file(file: Path, sibling: str) -> Path:
    """A file of the package, or beside another."""
    package = sys.modules.get("hires_lmm")
    root = Path(str(package.__file__)).parent if package is not None else file.parent
    found = [path for part in ("modeling", "processing") if (path := root / part / f"{sibling}.py").is_file()]
    return found[0] if found else file.with_name(f"{sibling}.py")


def _known_class(name: Any) -> Any:
    return (getattr(name, "part", None) or find_imported(name)) if is_own(name) else None


def _named(name: str, part: Any) -> PartName:
    if not _is_part(part):
        raise ValueError(f"{name} is no part: derive it from HiResLmmViewOp or the base of another slot.")
    known = PartName(name)
    known.part = part
    return known


def _is_part(value: Any, bases: tuple[str, ...] = BASES) -> bool:
    """By name: code of a checkpoint brings bases of its own."""
    return isinstance(value, type) and bool({base.__name__ for base in value.mro()} & set(bases))


def _modules_named(file: str) -> list[Any]:
    """Modules `....file` of the user."""
    others = ("transformers_modules.", "hires_lmm.", "transformers.", "torch.")
    modules = list(sys.modules.items())
    return [module for place, module in modules if place.endswith(f".{file}") and not place.startswith(others)]

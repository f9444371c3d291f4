"""The mutants of a source file: small faults put in with cosmic-ray's operators and four of ours.

Not mutated: docstrings, annotations, imports, `raise` statements (the texts of errors), arguments of decorators (sizes
of caches), `strict=` of zip (a check of our own invariants), aliases of types and `__all__`.
"""

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.number_replacer import NumberReplacer
from cosmic_ray.operators.operator import Operator
from cosmic_ray.operators.provider import OperatorProvider


Position = tuple[int, int]
Zone = tuple[Position, Position]

NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "ceil": "floor", "cat": "stack"}
BINARY = ("Add_Sub", "Sub_Add", "Mul_FloorDiv", "FloorDiv_Mul", "Div_Mul", "Mod_FloorDiv", "Pow_Mul")
BITS = ("BitAnd_BitOr", "BitOr_BitAnd")
ORDER = ("Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt")
EQUAL = ("Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is")
CORE = (
    *(f"ReplaceBinaryOperator_{name}" for name in (*BINARY, *BITS)),
    *(f"ReplaceComparisonOperator_{name}" for name in (*ORDER, *EQUAL)),
    *("ReplaceUnaryOperator_USub_UAdd", "ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_Delete_Invert"),
    *("ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd", "AddNot"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ZeroIterationForLoop"),
)
"""One or two replacements an operator out of cosmic-ray's 213, so that no fault is counted many times."""


class StringReplacer(Operator):
    """Another string: `"a"` becomes `"XXa"`; the text of f-strings too."""

    def mutation_positions(self, node):
        if node.type in ("string", "fstring_string"):
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        if node.type == "fstring_string":
            node.value = "XX" + node.value
        else:
            opening = next(place for place, sign in enumerate(node.value) if sign in "\"'")
            width = 3 if node.value[opening : opening + 3] in ('"""', "'''") else 1
            node.value = node.value[: opening + width] + "XX" + node.value[opening + width :]
        return node

    @classmethod
    def examples(cls):
        return ()


class NumberIncreaser(NumberReplacer):
    """A number one larger; cosmic-ray also makes it one smaller, which is left out to save time."""

    def mutation_positions(self, node):
        return list(super().mutation_positions(node))[:1]


class NameSwapper(Operator):
    """The opposite function: `min` and `max`, `any` and `all`, and others of `NAMES`, where they are called."""

    def mutation_positions(self, node):
        following = node.get_next_leaf() if node.type == "name" and node.value in NAMES else None
        if following is not None and following.value == "(":
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        node.value = NAMES[node.value]
        return node

    @classmethod
    def examples(cls):
        return ()


class ItemRemover(Operator):
    """A table that lacks an element: each item of a list that stands in several lines."""

    def mutation_positions(self, node):
        if node.type == "testlist_comp" and node.parent.children[0].value == "[" and len(node.children) > 3:
            for item in node.children[::2]:
                if node.start_pos[0] != node.end_pos[0] and item.type != "sync_comp_for":
                    yield item.start_pos, item.end_pos

    def mutate(self, node, index):
        code = "".join(child.get_code() for number, child in enumerate(node.children) if number // 2 != index)
        return parso.parse(" " + code)

    @classmethod
    def examples(cls):
        return ()


OPERATORS = {
    **{name: OperatorProvider()[name] for name in CORE},
    **{operator.__name__: operator for operator in (NumberIncreaser, StringReplacer, NameSwapper, ItemRemover)},
}


@dataclass(frozen=True)
class Mutant:
    """One fault: occurrence number `occurrence` of `operator` in the statement of a module from `first` to `last`.

    Args:
        operator (`str`): A name in `OPERATORS`.
        occurrence (`int`): Its number among the places of that operator in the statement.
        line, column (`int`): Place in the file.
        first, last (`int`): Lines of the statement, from 1, both included.
        statement (`str`): Their text.
    """

    operator: str
    occurrence: int
    line: int
    column: int
    first: int
    last: int
    statement: str

    @property
    def key(self) -> str:
        """Unique in its file, and the same as long as the statement is."""
        return f"{self.operator}:{self.occurrence}:{hashlib.sha256(self.statement.encode()).hexdigest()[:12]}"

    def change(self) -> str | None:
        """The statement with this fault."""
        return mutate_code(self.statement, OPERATORS[self.operator](), self.occurrence)

    def apply(self, source: str) -> str:
        """The module with this fault."""
        lines = source.splitlines(keepends=True)
        return "".join([*lines[: self.first - 1], self.change() or "", *lines[self.last :]])


def find_mutants(source: str, names: tuple[str, ...] = ()) -> list[Mutant]:
    """All mutants of a module whose code differs from the original and can be compiled.

    Args:
        source (`str`): The module.
        names (`tuple[str]`): Only these functions, classes and variables of it; all of them if empty.
    """
    tree, lines = ast.parse(source), source.splitlines(keepends=True)
    quiet = list(_quiet_zones(tree))
    found = []
    for node in tree.body:
        (first, _), (last, _) = _zone(node)
        if names and not _defines(node) & set(names):
            continue
        statement = "".join(lines[first - 1 : last])
        for mutant in _candidates(statement, first, last):
            place = (mutant.line, mutant.column)
            if not any(start <= place < end for start, end in quiet) and _is_new(mutant):
                found.append(mutant)
    return found


def _candidates(statement: str, first: int, last: int) -> Iterator[Mutant]:
    counts = dict.fromkeys(OPERATORS, 0)
    operators = [(name, operator()) for name, operator in OPERATORS.items()]
    for node in ast_nodes(get_ast(statement)):
        for name, operator in operators:
            for (line, column), _ in operator.mutation_positions(node):
                yield Mutant(name, counts[name], line + first - 1, column, first, last, statement)
                counts[name] += 1


def _is_new(mutant: Mutant) -> bool:
    """Whether the fault can be compiled and changes more than the layout."""
    changed = mutant.change()
    try:
        return changed is not None and ast.dump(ast.parse(changed)) != ast.dump(ast.parse(mutant.statement))
    except SyntaxError:
        return False


def _zone(node: ast.AST) -> Zone:
    start = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", []))])
    return (start, node.col_offset), (node.end_lineno, node.end_col_offset)


def _defines(node: ast.stmt) -> set[str]:
    """Names that a statement of a module gives."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _is_union(node: ast.expr) -> bool:
    """`A | B` of names: an alias of types."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _is_union(node.left) and _is_union(node.right)
    return isinstance(node, ast.Name) and node.id[0].isupper()


def _quiet_zones(tree: ast.Module) -> Iterator[Zone]:
    """Where a fault would say nothing about the tests."""
    for node in ast.walk(tree):
        quiet = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        quiet += getattr(node, "decorator_list", [])
        if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom):
            quiet.append(node)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            quiet.append(node)
        if isinstance(node, ast.keyword) and node.arg == "strict":
            quiet.append(node)
        if isinstance(node, ast.Assign) and ("__all__" in _defines(node) or _is_union(node.value)):
            quiet.append(node)
        yield from (_zone(part) for part in quiet if part is not None)

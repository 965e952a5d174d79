"""The small changes of one expression: each returns the new text."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from typing import Final

_COMPARED: Final[dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_COMPUTED: Final[dict[type[ast.operator], type[ast.operator]]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_NAMES: Final = {"min": "max", "max": "min", "any": "all", "all": "any"}
_SYMMETRIC: Final = frozenset({"min", "max"})
_SMALL: Final = 2
"""A larger number is changed in one direction only: one more and one less test a limit equally well."""


def changes_of(node: ast.expr) -> Iterator[str]:
    """Every replacement of the expression."""
    match node:
        case ast.Compare():
            yield from _compare(node)
        case ast.BoolOp():
            yield from _bool(node)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _COMPUTED:
            yield ast.unparse(ast.BinOp(left, _COMPUTED[type(op)](), right))
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield f"({ast.unparse(operand)})"
        case ast.Constant(value=value):
            yield from _constant(value)
        case ast.IfExp(test=test) if needs_negation(test):
            yield f"({ast.unparse(ast.IfExp(_not(test), node.body, node.orelse))})"
        case ast.Call():
            yield from _call(node)


def negated(test: ast.expr) -> str:
    """The negated condition."""
    return ast.unparse(_not(test))


def needs_negation(test: ast.expr) -> bool:
    """Whether no other change is equivalent or nearly so; for `not x`, `a < b` and `a and b` there is one."""
    is_not = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
    is_single_compare = isinstance(test, ast.Compare) and len(test.ops) == 1
    return not (is_not or is_single_compare or isinstance(test, ast.Constant | ast.BoolOp))


def returns_instead(value: ast.expr, annotation: ast.expr | None) -> Iterator[str]:
    """Another constant that the function returns instead of its value."""
    kind = ast.unparse(annotation) if annotation is not None else ""
    if kind == "bool":
        yield from (other for other in ("True", "False") if ast.unparse(value) != other)
    elif kind != "None" and not (isinstance(value, ast.Constant) and value.value is None):
        yield "None"


def _not(test: ast.expr) -> ast.UnaryOp:
    return ast.UnaryOp(ast.Not(), test)


def _compare(node: ast.Compare) -> Iterator[str]:
    for at, op in enumerate(node.ops):
        for other in _COMPARED[type(op)]:
            changed = copy.copy(node)
            changed.ops = [*node.ops[:at], other(), *node.ops[at + 1 :]]
            yield ast.unparse(changed)


def _bool(node: ast.BoolOp) -> Iterator[str]:
    """The other operator, and each operand left out."""
    other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    yield f"({ast.unparse(ast.BoolOp(other, node.values))})"
    for left_out in range(len(node.values)):
        rest = [value for at, value in enumerate(node.values) if at != left_out]
        yield f"({ast.unparse(rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest))})"


def _constant(value: object) -> Iterator[str]:
    match value:
        case bool():
            yield str(not value)
        case int() | float() if value == 0:
            yield str(value + 1)
        case int() | float():
            yield str(value + 1)
            if value <= _SMALL:
                yield str(value - 1)


def _call(node: ast.Call) -> Iterator[str]:
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name in _NAMES:
        yield ast.unparse(ast.Call(ast.Name(_NAMES[name]), node.args, node.keywords))
    if name in _SYMMETRIC:
        return
    for at, (one, two) in enumerate(zip(node.args, node.args[1:], strict=False)):
        is_plain = not isinstance(one, ast.Starred) and not isinstance(two, ast.Starred)
        if is_plain and ast.unparse(one) != ast.unparse(two):
            swapped = [*node.args[:at], two, one, *node.args[at + 2 :]]
            yield ast.unparse(ast.Call(node.func, swapped, node.keywords))

"""The possible changes of a module, in the order of its source.

Code without effect at run time is left out: annotations, decorators, docstrings, protocols, assertions (they are for
the type checker), and the text of sentences.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final

from proof.mutation.changes import changes_of, needs_negation, negated, returns_instead

ROOT: Final = Path(__file__).parents[2]
FOLDERS: Final = ("workflows", "activities")
CONTRACTS: Final = "comfyui_temporal/contracts"
REMOVED: Final = "removed: "


@dataclass(frozen=True)
class Mutation:
    """One change. `was` and `becomes` are whole lines of source, their white space folded."""

    module: str
    """Its file, e.g. `workflows/stop.py`."""
    function: str
    """`Stop.ask`; empty at module level."""
    line: int
    block: int
    """The first line of the innermost block of statements around it (reach.py)."""
    was: str
    becomes: str
    """The changed line, or `removed: ` and the line."""
    start: int
    end: int
    text: str
    """What replaces the file's bytes from `start` to `end`."""
    ordinal: int = 0
    """Counts changes of one function that read alike."""

    @property
    def key(self) -> str:
        return f"{self.module}::{self.function}::{self.becomes}::{self.ordinal}"

    def applied(self) -> bytes:
        """The module's source with this change."""
        return self.applied_to(source_of(self.module))

    def applied_to(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]


def modules(names: list[str]) -> list[str]:
    """The modules that can be mutated, or those of them that one of `names` begins or names."""
    paths = (path.relative_to(ROOT) for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py")))
    found = [str(path) for path in paths if path.name != "__init__.py"]
    return [module for module in found if not names or any(module.startswith(name) for name in names)]


@cache
def source_of(module: str) -> bytes:
    """The module's source as this process first read it: positions are valid for this text only."""
    return (ROOT / module).read_bytes()


def mutations_of(module: str) -> list[Mutation]:
    """Every mutation of a module, in the order of its source."""
    return mutations_in(module, source_of(module))


def mutations_in(module: str, source: bytes) -> list[Mutation]:
    """... of a module with this source."""
    found = _Finder(module, source)
    found.visit(ast.parse(source))
    seen, numbered = Counter[str](), list[Mutation]()
    for mutation in sorted(found.mutations, key=lambda each: (each.start, each.end)):
        numbered.append(replace(mutation, ordinal=seen[mutation.key]))
        seen[mutation.key] += 1
    return numbered


def folded(text: str) -> str:
    return " ".join(text.split())


class _Finder(ast.NodeVisitor):
    """Walks a module and keeps what can be changed."""

    def __init__(self, module: str, source: bytes) -> None:
        self.mutations: list[Mutation] = []
        self._module = module
        self._source = source
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._scope: list[str] = []
        self._functions: list[ast.FunctionDef | ast.AsyncFunctionDef] = []
        self._blocks = [0]

    # Places in the file

    def _at(self, line: int, column: int) -> int:
        return self._starts[line - 1] + column

    def _add(self, node: ast.expr | ast.stmt, text: str, *, is_removal: bool = False) -> None:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start, end = self._at(node.lineno, node.col_offset), self._at(node.end_lineno, node.end_col_offset)
        first, last = self._starts[node.lineno - 1], self._starts[node.end_lineno]
        was = self._source[first:last].decode()
        becomes = (self._source[first:start] + text.encode() + self._source[end:last]).decode()
        self.mutations.append(
            Mutation(
                module=self._module,
                function=".".join(self._scope),
                line=node.lineno,
                block=self._blocks[-1],
                was=folded(was),
                becomes=REMOVED + folded(was) if is_removal else folded(becomes),
                start=start,
                end=end,
                text=text,
            )
        )

    # Scopes and blocks

    def _block(self, statements: list[ast.stmt]) -> None:
        if not statements:
            return
        self._blocks.append(statements[0].lineno)
        for statement in statements:
            self.visit(statement)
        self._blocks.pop()

    def visit_Module(self, node: ast.Module) -> None:
        for statement in _without_docstring(node.body):
            self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        if any(ast.unparse(base).startswith("Protocol") for base in node.bases):
            return
        self._scope.append(node.name)
        for statement in _without_docstring(node.body):
            self.visit(statement)
        self._scope.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(default)
        self._scope.append(node.name)
        self._functions.append(node)
        self._block(_without_docstring(node.body))
        self._functions.pop()
        self._scope.pop()

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.visit_FunctionDef(node)

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) == "TYPE_CHECKING":
            return
        self._condition(node.test)
        self._block(node.body)
        self._block(node.orelse)

    def visit_While(self, node: ast.While) -> None:
        self._condition(node.test)
        self._block(node.body)

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        self.visit(node.iter)
        self._block(node.body)
        self._block(node.orelse)

    def visit_AsyncFor(self, node: ast.AsyncFor) -> None:
        self.visit_For(node)

    def visit_With(self, node: ast.With | ast.AsyncWith) -> None:
        for item in node.items:
            self.visit(item.context_expr)
        self._block(node.body)

    def visit_AsyncWith(self, node: ast.AsyncWith) -> None:
        self.visit_With(node)

    def visit_Try(self, node: ast.Try) -> None:
        for statements in (node.body, *(handler.body for handler in node.handlers), node.orelse, node.finalbody):
            self._block(statements)

    def visit_match_case(self, node: ast.match_case) -> None:
        if node.guard is not None:
            self._condition(node.guard)
        self._block(node.body)

    def _condition(self, test: ast.expr) -> None:
        if needs_negation(test):
            self._add(test, negated(test))
        self.visit(test)

    # Statements

    def visit_Assert(self, node: ast.Assert) -> None:
        return

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._assignment(node, [node.target])
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._assignment(node, node.targets)
        self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._assignment(node, [node.target])
        self.visit(node.value)

    def _assignment(self, node: ast.Assign | ast.AnnAssign | ast.AugAssign, targets: list[ast.expr]) -> None:
        """Remove it, unless that leaves a name without any value: every test would notice."""
        if self._functions and all(map(self._keeps_a_value, _parts(targets))):
            self._add(node, "pass", is_removal=True)

    def _keeps_a_value(self, target: ast.expr) -> bool:
        if not isinstance(target, ast.Name):
            return True
        arguments = self._functions[-1].args
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        stored = [
            each.id
            for each in ast.walk(self._functions[-1])
            if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
        ]
        return [*names, *stored].count(target.id) > 1

    def visit_Expr(self, node: ast.Expr) -> None:
        if self._functions and isinstance(node.value, ast.Call | ast.Await):
            self._add(node, "pass", is_removal=True)
        self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        self._add(node, "pass", is_removal=True)
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is None:
            self._add(node, "pass", is_removal=True)
            return
        for text in returns_instead(node.value, self._functions[-1].returns):
            self._add(node.value, text)
        self.visit(node.value)

    def visit_Delete(self, node: ast.Delete) -> None:
        self._add(node, "pass", is_removal=True)
        self.generic_visit(node)

    def visit_Continue(self, node: ast.Continue) -> None:
        self._add(node, "pass", is_removal=True)

    def visit_Break(self, node: ast.Break) -> None:
        self._add(node, "pass", is_removal=True)

    # Expressions

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Skipped: it is text, and Python 3.11 does not give the positions of its parts."""

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.visit(node.iter)
        for test in node.ifs:
            self._condition(test)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.body)

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.expr):
            for text in changes_of(node):
                self._add(node, text)
        super().generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func) not in ("TypeVar", "cast", "isinstance", "issubclass"):
            for text in changes_of(node):
                self._add(node, text)
        for part in (node.func, *node.args, *(keyword.value for keyword in node.keywords)):
            self.visit(part)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """`Answer[JobState]`, `dict[str, int]`: a type where its index holds no number."""
        self.visit(node.value)
        if any(isinstance(each, ast.Constant | ast.Call) for each in ast.walk(node.slice)):
            self.visit(node.slice)


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return body[1:] if is_text else body


def _parts(targets: list[ast.expr]) -> Iterator[ast.expr]:
    for target in targets:
        if isinstance(target, ast.Tuple | ast.List):
            yield from _parts(target.elts)
        else:
            yield target

"""Which mutations are made of a source, and which are not."""

from __future__ import annotations

import ast
from textwrap import dedent

import pytest

from proof.mutation.mutations import Mutation, modules, mutations_in, mutations_of, source_of

MODULE = "workflows/example.py"
CHAINED = ("0 < a < b", "0 > a < b", "0 <= a <= b", "0 <= a >= b", "1 <= a < b")


def of(source: str) -> list[Mutation]:
    return mutations_in(MODULE, dedent(source).encode())


def of_statement(statement: str) -> set[str]:
    """The mutations of one statement in a function that assigns a name twice."""
    lines = ["def f(self, a, b, x):", "    x = a", *(f"    {line}" for line in statement.splitlines())]
    return {mutation.becomes for mutation in mutations_in(MODULE, "\n".join(lines).encode()) if mutation.line > 2}


@pytest.mark.parametrize(
    ("statement", "becomes"),
    [
        ("g(a < b)", {"removed: g(a < b)", "g(a <= b)", "g(a >= b)"}),
        ("g(a is None)", {"removed: g(a is None)", "g(a is not None)"}),
        ("x = 0 <= a < b", {"removed: x = 0 <= a < b"} | {f"x = {each}" for each in CHAINED}),
        ("x = a and b", {"removed: x = a and b", "x = (a or b)", "x = (a)", "x = (b)"}),
        ("x = not a", {"removed: x = not a", "x = (a)"}),
        ("x = a + b", {"removed: x = a + b", "x = a - b"}),
        ("x = min(a, b)", {"removed: x = min(a, b)", "x = max(a, b)"}),
        ("x = a.g(b, x)", {"removed: x = a.g(b, x)", "x = a.g(x, b)"}),
        ("x = 30", {"removed: x = 30", "x = 31"}),
        ("x = 1", {"removed: x = 1", "x = 2", "x = 0"}),
        ("x = True", {"removed: x = True", "x = False"}),
        ("x += a", {"removed: x += a"}),
        ("y = a", set()),
        ("self.y = a", {"removed: self.y = a"}),
        ("await a.g()", {"removed: await a.g()"}),
        ("raise a", {"removed: raise a"}),
        ("return", {"removed: return"}),
        ("return a", {"return None"}),
        ("return None", set()),
        ("del a[b]", {"removed: del a[b]"}),
        ("if a:\n    g()", {"if not a:", "removed: g()"}),
        ("if a == b:\n    g()", {"if a != b:", "removed: g()"}),
        ("while a:\n    break", {"while not a:", "removed: break"}),
        ("x = [y for y in a if y]", {"removed: x = [y for y in a if y]", "x = [y for y in a if not y]"}),
        ("x = a if b else 0", {"removed: x = a if b else 0", "x = (a if not b else 0)", "x = a if b else 1"}),
        ("assert a < b", set()),
        ('x: "int | None" = None', {'removed: x: "int | None" = None'}),
        ('g(f"{a + 1}")', {'removed: g(f"{a + 1}")'}),
    ],
)
def test_a_statement_becomes(statement: str, becomes: set[str]) -> None:
    assert of_statement(statement) == becomes


def test_a_bool_function_is_mutated_to_constant_true_and_false() -> None:
    changed = of("def f(a) -> bool:\n    return a.b\n")

    assert {mutation.becomes for mutation in changed} == {"return True", "return False"}


def test_code_without_effect_at_run_time_is_not_mutated() -> None:
    source = '''
        """Text of 3 lines."""
        from typing import Protocol, TypeVar

        T = TypeVar("T", bound=1)

        class P(Protocol):
            def f(self) -> int:
                return 1

        @decorated(1, 2)
        def f(a: "Literal[1, 2]") -> "Literal[1]":
            """Text."""
    '''
    assert [mutation.becomes for mutation in of(source)] == ['T = TypeVar("T", bound=2)', 'T = TypeVar("T", bound=0)']


def test_a_change_is_named_by_function_and_line_of_source_not_by_its_number() -> None:
    source = "class C:\n    def f(self):\n        if self.a < 1:\n            self.g()\n            self.g()\n"

    keys = [mutation.key for mutation in of(source)]

    assert f"{MODULE}::C.f::if self.a <= 1:::0" in keys
    assert f"{MODULE}::C.f::removed: self.g()::1" in keys
    assert [mutation.key for mutation in of(f"# a comment\n\n{source}")] == keys
    assert len(set(keys)) == len(keys)


def test_a_mutation_knows_its_block() -> None:
    source = "def f(a):\n    b()\n    if a:\n        c()\n        d()\n    else:\n        e()\n"

    blocks = {mutation.was: mutation.block for mutation in of(source)}

    assert blocks == {"b()": 2, "if a:": 2, "c()": 4, "d()": 4, "e()": 7}


def test_non_ascii_text_shifts_no_column() -> None:
    [change] = of('def f():\n    return {"→ é": 0}["→"] - g("é", 30)\n')[:1]

    assert change.becomes == "return None"


@pytest.mark.parametrize("module", ["workflows/stop.py", "workflows/job_watch.py", "activities/replies.py"])
def test_each_mutation_of_a_module_is_another_program_that_compiles(module: str) -> None:
    original = ast.dump(ast.parse(source_of(module)))

    for mutation in mutations_of(module):
        assert ast.dump(ast.parse(mutation.applied())) != original, mutation


def test_modules_are_chosen_by_how_their_path_begins() -> None:
    assert modules(["workflows/stop"]) == ["workflows/stop.py"]
    assert set(modules(["activities/", "workflows/"])) == set(modules([]))
    assert modules(["store/"]) == []

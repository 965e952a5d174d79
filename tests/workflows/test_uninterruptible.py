"""Every wait of the workflows can be interrupted, or is in the one table with its reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from workflows.uninterruptible import UNINTERRUPTIBLE

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "workflows"
UNINTERRUPTED = frozenset(
    {
        *("until_answered", "in_background", "write_store", "read_store", "visible"),
        *("wait_for", "wait_unless_stopped", "suspend", "_local_try"),
    }
)
"""Our own coroutines that wait for nothing but their answer: each place that calls one is checked."""
PASSED = frozenset({"request", "back", "step", "_continue_as_new", "_clean_up"})
"""Coroutines that are passed as arguments: each is a function of this folder, and is checked there."""
Waits = dict[str, set[str]]


def functions_that_wait(sources: dict[str, str]) -> Waits:
    """Function, by its module and class, → what it awaits that cannot be interrupted."""
    trees = {module: ast.parse(source) for module, source in sources.items()}
    own = {node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef)}
    waits: Waits = {}
    for module, tree in trees.items():
        for place, awaited in _awaits(tree, module):
            if awaited in UNINTERRUPTED or awaited not in own | PASSED:
                waits.setdefault(place, set()).add(awaited)
    return waits


def _awaits(node: ast.AST, place: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        inner = f"{place}.{child.name}" if named else place  # type: ignore[attr-defined]
        if isinstance(child, ast.Await):
            yield from ((place, awaited) for awaited in _names(child.value))
        elif isinstance(child, ast.AsyncFor | ast.AsyncWith):
            yield place, ast.unparse(child).splitlines()[0]
        yield from _awaits(child, inner)


def _names(value: ast.expr) -> list[str]:
    if isinstance(value, ast.IfExp):
        return _names(value.body) + _names(value.orelse)
    if isinstance(value, ast.Call):
        called = value.func
        return [called.attr if isinstance(called, ast.Attribute) else ast.unparse(called)]
    return [ast.unparse(value)]


def sources() -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.py"))}


def test_every_wait_can_be_interrupted_or_is_in_the_table() -> None:
    waits = functions_that_wait(sources())
    listed = [place for row in UNINTERRUPTIBLE for place in row.places]
    assert len(listed) == len(set(listed)), "each place has one reason"
    unlisted = {place: awaited for place, awaited in waits.items() if place not in listed}
    assert not unlisted, (
        f"nothing interrupts these waits: use `InterruptibleWaits`, or give their reason in the table: {unlisted}"
    )
    assert not set(listed) - set(waits), "the table names functions that do not wait any more"


def test_a_wait_that_nothing_interrupts_is_found() -> None:
    """In a method, in a function within one, behind a condition, and by the name of a handle."""
    code = """
class Step:
    async def one(self):
        await workflow.sleep(3)
    async def two(self):
        async def inner():
            await self._outside.until_answered(1)
        await inner()
    async def three(self):
        return await (self.two() if self.is_so else handle)
    async def four(self):
        await self.three()
"""
    assert functions_that_wait({"step": code}) == {
        "step.Step.one": {"sleep"},
        "step.Step.two.inner": {"until_answered"},
        "step.Step.three": {"handle"},
    }


def test_the_table_is_in_the_documents() -> None:
    document = " ".join((ROOT / "docs" / "reliability.md").read_text().split())
    for row in UNINTERRUPTIBLE:
        assert f"| {row.what} | {row.reason} |" in document, row.what

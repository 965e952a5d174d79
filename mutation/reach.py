"""Which seeds and which tests reach which block of statements, so that a mutant is judged by those alone.

The mutable modules are compiled with a call at the beginning of every block: it notes that the block was reached.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from mutation.in_memory import InMemory
from mutation.mutations import ROOT, modules, source_of

NOTED: Final = "__reached__"
Block = str
"""`workflows/stop.py:33`: a module, and the line on which a block's first statement begins."""

EVERYWHERE: Final[Block] = ""
"""All seeds reach it: what a module does when it is imported."""


@dataclass
class Reach:
    """What reaches each block, in the order in which it was played or collected."""

    seeds: dict[Block, list[tuple[str, int]]] = field(default_factory=dict)
    """Block → (kind, seed)."""
    tests: dict[Block, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Test → how long it took."""


def noting_sources() -> dict[str, bytes | ast.Module]:
    """All mutable modules, each block of which notes that it was reached."""
    return {module: _noting(module) for module in modules([])}


def note_into(reached: set[Block]) -> None:
    """Have every block that is reached in this process added to `reached`."""
    InMemory(noting_sources(), {NOTED: reached.add}).install()


def _noting(module: str) -> ast.Module:
    tree = ast.parse(source_of(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef):
            continue
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and block:
                _note(module, block)
    return ast.fix_missing_locations(tree)


def _note(module: str, block: list[ast.stmt]) -> None:
    first = block[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    if is_docstring and len(block) == 1:
        return
    begins = block[1] if is_docstring else first
    name, argument = ast.Name(NOTED, ast.Load()), ast.Constant(f"{module}:{begins.lineno}")
    noted = ast.Expr(ast.Call(name, [argument], []))
    block.insert(1 if is_docstring else 0, ast.copy_location(noted, begins))


# Seeds


def seeds_that_reach(seeds: dict[str, int]) -> dict[Block, list[tuple[str, int]]]:
    """Play the first `seeds[kind]` of each kind. For a process of its own. Raises AssertionError where one fails."""
    reached = set[Block]()
    note_into(reached)
    play = simulation()
    at_import = {EVERYWHERE, *reached}
    found: dict[Block, list[tuple[str, int]]] = {}
    for kind, count in seeds.items():
        for seed in range(count):
            reached.clear()
            problem = play(seed, kind).problem
            assert problem is None, f"the seed fails without any mutant: {kind} {seed}: {problem}"
            for block in reached | at_import:
                found.setdefault(block, []).append((kind, seed))
    return found


def simulation() -> Callable[[int, str], Any]:
    """The simulation's `play`, imported now, with whatever the modules' sources are now."""
    logging.disable(logging.CRITICAL)
    from simulation.schedule import play

    return play


# What is kept between runs


def fingerprint(*folders: str) -> str:
    """One hash over all Python files of these folders, and of the tree's top."""
    digest = hashlib.sha256()
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    for path in (*sorted(ROOT.glob("*.py")), *paths):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def kept(file: Path, of: str, make: Callable[[], Any]) -> Any:
    """What `make` gave when everything was as it is now (`of`); made where that is not in the file."""
    if file.exists():
        stored = json.loads(file.read_text())
        if stored["of"] == of:
            return stored["value"]
    value = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"of": of, "value": value}))
    return value

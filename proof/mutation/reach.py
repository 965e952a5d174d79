"""Which seeds and tests reach which block of statements, so that only those judge a mutant.

The mutable modules are compiled with a call at the beginning of every block, which records that it was reached.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from proof.mutation.in_memory import InMemory
from proof.mutation.mutations import ROOT, modules, source_of

NOTED: Final = "__reached__"
Block = str
"""`workflows/stop.py:33`: a module, and the line on which a block's first statement begins."""

EVERYWHERE: Final[Block] = ""
"""The block of import-time code, which all seeds reach."""


class Seed(NamedTuple):
    """One schedule of the simulation."""

    kind: str
    profile: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind} {self.profile} {self.number}"


SHARES: Final = {
    ("image", "contract"): 0.4,
    ("image", "field"): 0.2,
    ("training", "contract"): 0.25,
    ("training", "field"): 0.15,
}
"""Of all schedules."""


@dataclass
class Reach:
    """What reaches each block, in the order in which it was played or collected."""

    seeds: dict[Block, list[Seed]] = field(default_factory=dict)
    tests: dict[Block, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Test → how long it took."""


def noting_sources() -> dict[str, bytes | ast.Module]:
    """All mutable modules, each block of which records that it was reached."""
    return {module: _noting(module) for module in modules([])}


def note_into(reached: set[Block]) -> None:
    """Add every block that this process reaches to `reached`."""
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
    record = ast.Expr(ast.Call(name, [argument], []))
    block.insert(1 if is_docstring else 0, ast.copy_location(record, begins))


# Seeds


def seeds_that_reach(count: int) -> dict[Block, list[Seed]]:
    """Play this many schedules in a process of its own. Those that fail without a mutant are left out."""
    reached = set[Block]()
    note_into(reached)
    play = simulation()
    at_import = {EVERYWHERE, *reached}
    found: dict[Block, list[Seed]] = {}
    for (kind, profile), share in SHARES.items():
        for number in range(round(share * count)):
            seed = Seed(kind, profile, number)
            reached.clear()
            if play(seed) is None:
                for block in reached | at_import:
                    found.setdefault(block, []).append(seed)
    return found


def simulation() -> Callable[[Seed], str | None]:
    """Plays a schedule and returns its problem, or None; with the modules' present sources."""
    logging.disable(logging.CRITICAL)
    from proof.simulation.schedule import play

    return lambda seed: play(seed.number, seed.kind, profile=seed.profile).problem


# What is kept between runs


def fingerprint(*folders: str) -> str:
    """One hash over all Python files of these folders, and of the tree's top."""
    digest = hashlib.sha256()
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    for path in (*sorted(ROOT.glob("*.py")), *paths):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def kept(file: Path, of: str, make: Callable[[], Any]) -> Any:
    """The result of `make` for this state of everything (`of`), from the file; computed if it is not there."""
    if file.exists():
        stored = json.loads(file.read_text())
        if stored["of"] == of:
            return stored["value"]
    value = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"of": of, "value": value}))
    return value

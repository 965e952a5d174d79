"""Only `proof/simulation/sdk.py` imports the SDK's private modules, and it names the version that is locked."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from proof.simulation import sdk

PROJECT = Path(__file__).parents[2]
ALLOWED = (PROJECT / "proof" / "simulation" / "sdk.py", PROJECT / "tests" / "command_fingerprints.py")
"""The second reads a command's fields for the files of fingerprints."""
PRIVATE_ATTRIBUTES = frozenset({"_Definition", "_new_payload_converter"})


def own_modules() -> Iterator[Path]:
    """Every Python file of the project; not what lies in hidden folders or is built."""
    for folder in PROJECT.iterdir():
        if folder.is_dir() and folder.name != "build" and not folder.name.startswith("."):
            yield from folder.rglob("*.py")
    yield from PROJECT.glob("*.py")


def is_private(module: str) -> bool:
    package, *rest = module.split(".")
    return package == "temporalio" and ("bridge" in rest or any(name.startswith("_") for name in rest))


def private_uses(source: str) -> list[str]:
    """Private modules of temporalio that a module imports, and private attributes of it that it reads."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and node.attr in PRIVATE_ATTRIBUTES:
            found.append(f"temporalio.{node.attr}")
    return [name for name in found if is_private(name)]


def test_no_other_module_imports_private_modules_of_the_sdk() -> None:
    uses = {path: private_uses(path.read_text()) for path in own_modules() if path not in ALLOWED}
    assert {path: found for path, found in uses.items() if found} == {}


def test_a_private_import_is_found_however_it_is_written() -> None:
    assert private_uses("import temporalio.bridge.proto.common")
    assert private_uses("from temporalio.bridge import runtime")
    assert private_uses("from temporalio import bridge")
    assert private_uses("from temporalio.worker._workflow import _WorkflowWorker")
    assert private_uses("workflow._Definition.from_class(Flow)")
    assert not private_uses("from temporalio.worker import Worker\nself._temporal.client = 1")


def test_the_version_is_the_locked_one() -> None:
    locked = re.findall(r"^temporalio(?:\[[^]]*\])?==(\S+)", "\n".join(_locks()), flags=re.MULTILINE)
    assert set(locked) == {sdk.VERSION}


def _locks() -> list[str]:
    return [path.read_text() for path in PROJECT.glob("requirements*.lock")]

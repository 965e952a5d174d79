"""`make audit` says that it checked the locks only where a database answered. A script stands for pip-audit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from proof.lock_audit import LOCKS, NO_DATABASE, VULNERABLE, main

SAFE: dict[str, Any] = {"name": "a", "version": "1", "vulns": []}
FAULTY: dict[str, Any] = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
SKIPPED: dict[str, Any] = {"name": "c", "skip_reason": "not found"}


def pip_audit(folder: Path, of_known: list[Any] | None, of_locks: list[Any] | None) -> str:
    """Answers for the version that is known to be vulnerable, and for locks; None: it fails without a report."""
    script = folder / "pip-audit"
    script.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        "given = sys.argv[1:]\n"
        "is_lock = given[given.index('--requirement') + 1].endswith('.lock')\n"
        f"answer = json.loads({json.dumps([of_known, of_locks])!r})[is_lock]\n"
        "if answer is None: sys.exit(1)\n"
        "open(given[given.index('--output') + 1], 'w').write(json.dumps({'dependencies': answer}))\n"
    )
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("of_known", "of_locks", "code"),
    [
        ([FAULTY], [SAFE, SKIPPED], 0),
        ([FAULTY], [SAFE, FAULTY], VULNERABLE),
        ([SAFE], [SAFE], NO_DATABASE),
        ([SKIPPED], [SKIPPED], NO_DATABASE),
        (None, None, NO_DATABASE),
        ([FAULTY], None, NO_DATABASE),
    ],
    ids=["safe", "vulnerable", "a database without data", "an index alone", "away", "away meanwhile"],
)
def test_only_a_database_that_knows_vulnerabilities_clears_the_locks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], of_known: Any, of_locks: Any, code: int
) -> None:
    assert main(pip_audit(tmp_path, of_known, of_locks)) == code
    told = capsys.readouterr()
    assert ("not checked" in told.err) is (code == NO_DATABASE)
    assert ("b 2: CVE-1, fixed in 3" in told.out) is (code == VULNERABLE)
    if code != NO_DATABASE:
        assert all(lock in told.out for lock in LOCKS)

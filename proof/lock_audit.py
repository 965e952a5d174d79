"""`python -m proof.lock_audit PIP_AUDIT [OPTION…]`: whether the locks have known vulnerabilities (`make audit`).

Exit code 0: none is known; 1: some are; 3: no vulnerability database answers. An index without vulnerability data
answers "none" for everything. So a version that is known to be vulnerable is looked up first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

LOCKS: Final = ("requirements.lock", "requirements-otel.lock", "requirements-dev.lock", "requirements-bench.lock")
KNOWN_VULNERABLE: Final = "jinja2==2.10"
VULNERABLE: Final = 1
NO_DATABASE: Final = 3


def findings(pip_audit: str, requirements: Path, options: Sequence[str]) -> list[dict[str, Any]] | None:
    """What pip-audit says of each package; None if it could not ask."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [pip_audit, "--requirement", str(requirements), "--disable-pip", "--no-deps", *options]
        command += ["--format", "json", "--output", str(report), "--progress-spinner", "off", "--timeout", "15"]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)  # noqa: S603
        if not report.exists():
            return None
        found: list[dict[str, Any]] = json.loads(report.read_text())["dependencies"]
        return found


def main(pip_audit: str, *options: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder) / "requirements.txt"
        known.write_text(KNOWN_VULNERABLE + "\n")
        answers = any(package.get("vulns") for package in findings(pip_audit, known, options) or ())
    if not answers:
        sys.stderr.write(
            f"The locks were not checked: no vulnerability database answers (it must know {KNOWN_VULNERABLE}). Run it "
            'where pypi.org or api.osv.dev is reached, or name one: make audit SERVICE="--service osv --osv-url …".\n'
        )
        return NO_DATABASE
    is_vulnerable = False
    for lock in LOCKS:
        found = findings(pip_audit, Path(lock), options)
        if found is None:
            sys.stderr.write(f"{lock} was not checked: the vulnerability database does not answer any more.\n")
            return NO_DATABASE
        skipped = [package["name"] for package in found if "skip_reason" in package]
        sys.stdout.write(f"{lock}: {len(found)} packages")
        sys.stdout.write(f", not in the database: {', '.join(skipped)}\n" if skipped else "\n")
        for package in found:
            for vulnerability in package.get("vulns", ()):
                is_vulnerable = True
                fixed = ", ".join(vulnerability["fix_versions"]) or "no version yet"
                sys.stdout.write(f"  {package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}\n")
    return VULNERABLE if is_vulnerable else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))

"""The committed `docs/openapi.json` is what the gateway serves, and drift is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway import openapi_export
from gateway.openapi_export import FILE, is_current, main, rendered

PROJECT = Path(__file__).parents[2]


def test_the_committed_document_is_what_the_gateway_serves() -> None:
    assert is_current(PROJECT / FILE), "run python -m gateway.openapi_export and commit docs/openapi.json"


def test_two_exports_are_the_same_bytes() -> None:
    assert rendered() == rendered()


def test_drift_ends_with_one_and_says_how_to_fix_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "openapi.json"
    monkeypatch.setattr(openapi_export, "FILE", file)
    assert main(["--check"]) == 1
    assert "python -m gateway.openapi_export" in capsys.readouterr().err
    assert main([]) == 0
    assert main(["--check"]) == 0
    assert json.loads(file.read_text())["paths"]
    file.write_text(file.read_text().replace("/cancel", "/abort"))
    assert main(["--check"]) == 1
    assert main(["--wrong"]) == 2

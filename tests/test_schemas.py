"""The exported JSON Schemas are what the models say, and drift names its file."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from comfyui_temporal.contracts import schemas
from comfyui_temporal.contracts.schemas import FOLDER, SCHEMAS, drifted, main, rendered, write

PROJECT = Path(__file__).parents[1]


def test_the_committed_schemas_are_what_the_models_say() -> None:
    assert drifted(PROJECT / FOLDER) == []


def test_every_schema_is_one(tmp_path: Path) -> None:
    import json

    write(tmp_path)
    for schema in SCHEMAS:
        Draft202012Validator.check_schema(json.loads((tmp_path / f"{schema.name}.json").read_text()))
    assert len({schema.name for schema in SCHEMAS}) == len(SCHEMAS)


def test_two_exports_are_the_same_bytes() -> None:
    assert rendered() == rendered()


def test_drift_is_named_and_ends_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schemas, "FOLDER", tmp_path)
    assert main([]) == 0
    assert main(["--check"]) == 0
    (tmp_path / "image-task.json").write_text("{}")
    (tmp_path / "ledger.json").unlink()
    (tmp_path / "forgotten.json").write_text("{}")
    assert main(["--check"]) == 1
    printed = capsys.readouterr().err
    assert all(name in printed for name in ("image-task.json", "ledger.json", "forgotten.json"))
    assert main([]) == 0
    assert main(["--check"]) == 0
    assert main(["--wrong"]) == 2

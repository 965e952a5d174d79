"""Which program reads which secrets, by its code; and that the local stack gives it no others."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

from local_stack.folder import RunFolder
from local_stack.parts import SECRETS_OF, SETTINGS_PREFIX, LocalParts
from local_stack.ports import any_free_port
from runtime.settings import SECRETS
from tests.local_stack.folders import new_run_folder

PROJECT = Path(__file__).parents[1]
SHARED = ("runtime/required_settings.py", "runtime/temporal_connection.py", "bridge/required_settings.py")
PROGRAMS = {
    "tables": ("store/__main__.py", "migrate_command"),
    "worker": ("worker.py", "serve"),
    "gateway": ("gateway/__main__.py", "serve"),
    "bridge": ("bridge/__main__.py", "serve"),
    "gpu-worker": ("bridge/gpu_worker.py", "serve"),
    "comfyui-simulator": ("proof/simulators/__main__.py", "_comfyui"),
    "credits-simulator": ("proof/simulators/__main__.py", "_credits"),
    "codec-server": ("codec_server.py", "app_by"),
}
"""Program → the file and the function from which its settings are read."""
READS = {**{name: name for name in SECRETS}, "signing_secret": "callback_secrets"}


def read_by(file: str, function: str) -> set[str]:
    """The secrets that the function, and what it calls in its file and in `SHARED`, read of `settings`."""
    reads: defaultdict[str, set[str]] = defaultdict(set)
    calls: defaultdict[str, set[str]] = defaultdict(set)
    for path in (file, *SHARED):
        for top in ast.parse((PROJECT / path).read_text()).body:
            if not isinstance(top, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            for node in ast.walk(top):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("settings", "self._settings"):
                    reads[top.name] |= {READS[node.attr]} & SECRETS if node.attr in READS else set()
                if isinstance(node, ast.Call):
                    calls[top.name].add(ast.unparse(node.func).rpartition(".")[2])
    found: set[str] = set()
    seen: set[str] = set()
    waiting = [function]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            found |= reads[name]
            waiting += calls[name]
    return {name.upper() for name in found}


def test_every_program_has_its_row() -> None:
    assert set(PROGRAMS) == set(SECRETS_OF)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_reads_the_secrets_of_its_row(program: str) -> None:
    assert read_by(*PROGRAMS[program]) == SECRETS_OF[program]


@pytest.mark.parametrize("comfyui", [(), ("http://127.0.0.1:1",)], ids=["simulated", "by the bridge"])
def test_a_part_of_the_local_stack_gets_its_own_secrets(
    comfyui: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SECRETS:
        if name != "database_dsn":
            monkeypatch.setenv(SETTINGS_PREFIX + name.upper(), "of the user's shell, and long enough for any")
    folder: RunFolder = new_run_folder(tmp_path / "run")
    names = ("temporal", "temporal_ui", "postgres", "comfyui", "credits", "gateway", "worker")
    parts = LocalParts(folder, {name: any_free_port() for name in names}, 1.0, comfyui)
    all_secrets = {SETTINGS_PREFIX + name.upper() for name in SECRETS}
    given = {
        part.name: {name.removeprefix(SETTINGS_PREFIX) for name in part.environment if name in all_secrets}
        for part in parts.processes()
    }
    programs = {"worker": "worker", "gateway": "gateway", "credits": "credits-simulator"}
    programs |= {"comfyui": "bridge", "gpu-1": "gpu-worker"} if comfyui else {"comfyui": "comfyui-simulator"}
    assert given.pop("temporal") == set()
    assert given.pop("postgres") == set()
    assert set(given) == set(programs)
    for name, program in programs.items():
        assert given[name] <= SECRETS_OF[program], name
        assert given[name] >= SECRETS_OF[program] - {"SERVICE_TOKEN", "STREAM_TOKEN_SECRET"}, name

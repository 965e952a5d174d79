"""Which server the command line uses: environment before `.env`, both before Temporal's own, all before the stack."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from comfyui_temporal.command_line.failures import BadInput
from comfyui_temporal.command_line.server import BY_STACK, find_server
from comfyui_temporal.command_line.settings import CommandSettings, read_settings, use_flags
from comfyui_temporal.contracts.stack import StackDescription

STACK = StackDescription(
    temporal_address="stack:7233",
    namespace="stack-namespace",
    task_queue="comfyui",
    ui_url="http://127.0.0.1:8233",
    comfyui_url="http://127.0.0.1:1",
    credits_url="http://127.0.0.1:1",
    gateway_url="http://127.0.0.1:1",
    database_dsn="",
    callback_secret="",
    admin_token="",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with nothing set."""
    for name in [name for name in os.environ if name.startswith(("COMFYUI_TEMPORAL_", "TEMPORAL_"))]:
        monkeypatch.delenv(name)
    use_flags()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("comfyui_temporal.command_line.server._folders", [Path()])
    return tmp_path


def address() -> str:
    return find_server(read_settings(CommandSettings)).address


def test_the_more_particular_setting_wins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert address() == "localhost:7233"
    (folder / ".run").mkdir()
    (folder / ".run" / "stack.json").write_text(STACK.model_dump_json())
    assert address() == "stack:7233"
    monkeypatch.setenv("TEMPORAL_ADDRESS", "temporals-own:7233")
    assert address() == "temporals-own:7233"
    (folder / ".env").write_text(
        "COMFYUI_TEMPORAL_TEMPORAL_ADDRESS=dotenv:7233\nCOMFYUI_TEMPORAL_DATABASE_DSN=unused\n"
    )
    assert address() == "dotenv:7233"
    monkeypatch.setenv("COMFYUI_TEMPORAL_TEMPORAL_ADDRESS", "environment:7233")
    assert address() == "environment:7233"


def test_the_stack_brings_its_namespace_and_interface(folder: Path) -> None:
    (folder / ".run").mkdir()
    (folder / ".run" / "stack.json").write_text(STACK.model_dump_json())
    server = find_server(read_settings(CommandSettings))
    assert (server.namespace, server.ui_url) == ("stack-namespace", "http://127.0.0.1:8233")


def test_what_is_set_wins_over_a_running_stack(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack that runs gives only what nobody has set, and each value says what named it."""
    (folder / ".run").mkdir()
    (folder / ".run" / "stack.json").write_text(STACK.model_dump_json())
    monkeypatch.setenv("TEMPORAL_NAMESPACE", "mine")
    (folder / ".env").write_text("COMFYUI_TEMPORAL_TASK_QUEUE=my-queue\n")
    server = find_server(read_settings(CommandSettings))
    assert (server.address, server.named_by) == ("stack:7233", BY_STACK)
    assert (server.namespace, server.namespace_named_by) == ("mine", "TEMPORAL_NAMESPACE")
    assert (server.task_queue, server.task_queue_named_by) == ("my-queue", "COMFYUI_TEMPORAL_TASK_QUEUE in .env")
    assert server.stack is None, "its gateway and its store know another namespace's tasks"
    monkeypatch.setenv("COMFYUI_TEMPORAL_TASK_QUEUE", "environment")
    monkeypatch.setenv("COMFYUI_TEMPORAL_TEMPORAL_NAMESPACE", "ours")
    server = find_server(read_settings(CommandSettings))
    assert (server.namespace, server.task_queue) == ("ours", "environment")
    use_flags(temporal_namespace="flag", task_queue="flags-queue", temporal_address="flags:7233")
    server = find_server(read_settings(CommandSettings))
    assert [*server.lines()] == [
        "Temporal at flags:7233 (--address)",
        "namespace flag (--namespace)",
        "task queue flags-queue (--task-queue)",
    ]
    use_flags()


def test_a_bad_setting_is_named_and_its_value_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_TEMPORAL_GATEWAY_URL", "gateway-without-scheme")
    with pytest.raises(BadInput) as raised:
        read_settings(CommandSettings)
    assert list(raised.value.fields) == ["COMFYUI_TEMPORAL_GATEWAY_URL"]
    assert "gateway-without-scheme" not in str(raised.value) + str(raised.value.fields)

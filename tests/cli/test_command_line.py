"""The command line as scripts see it: its own process, piped, judged by exit code and output."""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
from pathlib import Path

import jwt
import pytest
from rich.console import Console
from typer.testing import CliRunner

from comfyui_temporal.client.models import TaskSummary
from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.command_line.failures import ExitCode
from comfyui_temporal.command_line.glances import glances
from comfyui_temporal.command_line.reports import print_table
from comfyui_temporal.contracts.tasks import workflow_id_of
from starter import app
from tests.cli.conftest import image_task, run_command, run_process, start_process
from tests.conftest import unique
from tests.package.test_settings import STACK
from tests.waiting import until

WHO = ("--tenant", "tenant-a", "--user", "ann")


async def test_bad_input_is_reported_field_by_field_and_nothing_is_started() -> None:
    image = await run_command("generate", "a cat", *WHO, "--resolution", "8k", "--max-credits", "0", "--task-id", "a b")
    training = await run_command("train", "--tenant", "tenant-a", "--epochs", "0", "--set", "optimizer=adam")
    script = await run_command("generate", "secret words", "--user", "ann", "--json")
    assert (image.exit_code, training.exit_code, script.exit_code) == (2, 2, 2)
    assert "resolution: must be 'sd', 'hd' or '4k' (given: '8k')" in image.err
    assert "max_credits: must be greater than or equal to 1" in image.err
    assert "task_id: must be 1 to 64 of the characters A-Z a-z 0-9 _ - (given: 'a b')" in image.err
    assert "dataset: is missing: name its folder or address with --dataset" in training.err
    assert "user_id: is missing: no local stack runs" in training.err and "`make up`" in training.err
    assert "hyperparameters.epochs: must be greater than or equal to 1 (given: 0)" in training.err
    refused = json.loads(script.out)["error"]
    assert (refused["code"], list(refused["fields"])) == ("input_invalid", ["tenant_id"])


async def test_an_unreachable_server_is_named_within_three_seconds(unused_tcp_port: int) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    began = time.monotonic()
    configured = await run_command("show", "cat-1", environment={"TEMPORAL_ADDRESS": address})
    assert time.monotonic() - began < 3
    script = await run_process("watch", "cat-1", "--json", environment={"COMFYUI_TEMPORAL_TEMPORAL_ADDRESS": address})
    assert (configured.exit_code, script.exit_code) == (ExitCode.CANNOT_REACH, ExitCode.CANNOT_REACH)
    assert f"Cannot reach Temporal at {address} (named by TEMPORAL_ADDRESS)" in configured.err
    assert address in json.loads(script.out)["error"]["message"]


async def test_a_server_that_stays_silent_is_given_up_within_three_seconds() -> None:
    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await held.wait()
        writer.close()

    held = asyncio.Event()
    async with await asyncio.start_server(silent, "127.0.0.1", 0) as listening:
        address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        began = time.monotonic()
        ended = await run_command("list", environment={"COMFYUI_TEMPORAL_TEMPORAL_ADDRESS": address})
        assert time.monotonic() - began < 3
        held.set()
    assert ended.exit_code == ExitCode.CANNOT_REACH
    assert (
        f"{address} (named by COMFYUI_TEMPORAL_TEMPORAL_ADDRESS), namespace 'default': no answer within 2.5 s"
        in ended.err
    )


async def test_exit_codes_follow_how_tasks_end(opened: Connection) -> None:
    done, failing, cancelled = image_task(), image_task(prompt="fail"), image_task()
    for task in (done, failing, cancelled):
        await opened.tasks.start(task)
    await opened.client.get_workflow_handle(workflow_id_of(done.task_id)).signal("deliver")

    accepted = await run_command("cancel", cancelled.task_id, "--reason", "wrong", connection=opened)
    assert accepted.exit_code == 0
    assert f"Task {cancelled.task_id} is being cancelled" in accepted.out and "given back" in accepted.out
    watched = [await run_command("watch", task.task_id, connection=opened) for task in (done, failing, cancelled)]
    assert [ended.exit_code for ended in watched] == [ExitCode.COMPLETED, ExitCode.FAILED, ExitCode.CANCELLED]
    assert "http://127.0.0.1/results/job-1/0.png" in watched[0].out
    assert "estimated 24, held 24, charged 24, returned 0" in watched[0].out
    assert "insufficient_balance" in watched[1].out
    assert "\x1b" not in watched[1].out, "text from outside cannot steer the terminal"

    late = await run_command("cancel", done.task_id, "--json", connection=opened)
    unknown = await run_command("show", unique("unknown"), connection=opened)
    taken = await run_command("generate", "a dog", *WHO, "--task-id", done.task_id, "--no-wait", connection=opened)
    assert (late.exit_code, json.loads(late.out)["outcome"]) == (ExitCode.TOO_LATE, "too_late")
    assert (unknown.exit_code, taken.exit_code) == (ExitCode.UNKNOWN_TASK, ExitCode.TASK_EXISTS)


async def test_loras_are_named_by_their_trainings_or_addresses(opened: Connection) -> None:
    task_id = unique("image")
    url, sha256 = "https://models.example.org/a,b.safetensors", "a" * 64
    loras = ("--lora", "train-cats:0.8", "--lora", "train-snow", "--lora", f"{url},{sha256},0.5")
    started = await run_command("generate", "a cat", *WHO, "--task-id", task_id, "--no-wait", *loras, connection=opened)
    assert started.exit_code == 0, started.err
    handle = opened.client.get_workflow_handle(workflow_id_of(task_id))
    first = await anext(aiter(handle.fetch_history_events()))
    given = json.loads(first.workflow_execution_started_event_attributes.input.payloads[0].data)
    assert given["loras"] == [
        {"model_id": "train-cats", "strength": 0.8},
        {"model_id": "train-snow", "strength": 1.0},
        {"model_url": url, "sha256": sha256, "strength": 0.5},
    ]
    await handle.terminate()
    for text, problem in (
        ("a:b", "loras.0: must be TASK_ID"),
        ("a:3", "loras.0.strength: must be less than"),
        (url, "loras.0: must be TASK_ID[:STRENGTH] or URL,SHA256[,STRENGTH]"),
        (f"http://models.example.org/a,{sha256}", "loras.0.model_url: must be an https:// address"),
    ):
        refused = await run_command("generate", "a cat", *WHO, "--lora", text)
        assert refused.exit_code == 2
        assert problem in refused.err


async def test_a_task_is_started_and_followed_in_plain_lines(opened: Connection) -> None:
    task_id = unique("image")
    process = await start_process("generate", "a cat", *WHO, "--task-id", task_id, connection=opened)
    assert process.stdout is not None
    handle = opened.client.get_workflow_handle(workflow_id_of(task_id))
    lines: list[str] = []
    async with asyncio.timeout(20):
        while raw := await process.stdout.readline():
            lines.append(raw.decode().rstrip())
            if "10 %" in lines[-1]:
                await handle.signal("advance", 55.0)
            if "55 %" in lines[-1]:
                await handle.signal("deliver")
        assert await process.wait() == 0
    assert lines[0] == f"Started task {task_id}"
    assert any("processing" in line and "55 %" in line for line in lines)
    assert any(line.split() == ["status", "completed"] for line in lines)


async def test_json_is_one_document_on_stdout_with_progress_on_stderr(opened: Connection) -> None:
    task_id = unique("image")
    started = await run_command(
        "generate", "a cat", *WHO, "--task-id", task_id, "--no-wait", "--json", connection=opened
    )
    result = json.loads(started.out)
    assert (result["task_id"], result["workflow_id"], result["is_new"]) == (task_id, workflow_id_of(task_id), True)
    await opened.client.get_workflow_handle(workflow_id_of(task_id)).signal("deliver")
    watched = await run_command("watch", task_id, "--json", connection=opened)
    shown = await run_command("show", task_id, "--json", connection=opened)
    listed = await run_command("list", "--tenant", "tenant-a", "--limit", "1000", "--json", connection=opened)
    outcome = json.loads(watched.out)
    assert outcome["result"]["credits"]["charged"] == 24
    assert json.loads(shown.out)["task"]["priority"] == "standard"
    assert task_id in {row["task_id"] for row in json.loads(listed.out)}


async def test_a_start_that_waits_prints_what_is_held_or_why_nothing_is(opened: Connection) -> None:
    task_id, dear = unique("image"), unique("image")
    held = await run_command("generate", "a cat", *WHO, "--task-id", task_id, "--wait-held", connection=opened)
    assert (held.exit_code, "24 points are held." in held.out) == (ExitCode.COMPLETED, True), held
    again = await run_command(
        "generate", "a cat", *WHO, "--task-id", task_id, "--wait-held", "--json", connection=opened
    )
    told = json.loads(again.out)
    assert (told["is_new"], told["reached"], told["credits"]["held"]) == (False, "held", 24)
    refused = await run_command("generate", "too dear", *WHO, "--task-id", dear, "--wait-held", connection=opened)
    assert (refused.exit_code, "The balance is 3." in refused.err) == (ExitCode.FAILED, True), refused
    for name in (task_id, dear):
        await opened.client.get_workflow_handle(workflow_id_of(name)).terminate()


async def test_the_local_stack_names_server_queue_and_user(opened: Connection, tmp_path: Path) -> None:
    token = jwt.encode({"tenant_id": "tenant-demo", "user_id": "user-demo"}, "k" * 32, algorithm="HS256")
    server = {"temporal_address": opened.server.address, "namespace": "default", "task_queue": opened.task_queue}
    stack = STACK.model_copy(update={**server, "tokens": {"tenant-demo": token}})
    (tmp_path / ".run").mkdir()
    (tmp_path / ".run" / "stack.json").write_text(stack.model_dump_json())
    task_id = unique("image")
    ended = await run_process(
        *("generate", "a cat", "--tenant", "tenant-demo", "--task-id", task_id, "--no-wait", "--json"), cwd=tmp_path
    )
    assert ended.exit_code == 0, ended.err + ended.out
    description = await opened.client.get_workflow_handle(workflow_id_of(task_id)).describe()
    attributes = {pair.key.name: pair.value for pair in description.typed_search_attributes}
    assert (attributes["UserId"], description.task_queue) == ("user-demo", opened.task_queue)
    link = f"http://127.0.0.1:8233/namespaces/default/workflows/task-{task_id}/{description.run_id}/history"
    assert json.loads(ended.out)["ui_url"] == link


@pytest.mark.parametrize("command", ["generate", "train", "watch", "show", "list", "cancel", "confirm"])
def test_every_commands_help_has_an_example(command: str) -> None:
    help_text = CliRunner().invoke(app, [command, "--help"]).output
    assert f"comfyui-tasks {command}" in help_text
    assert "Exit codes:" in help_text


async def test_a_task_may_be_named_by_its_workflows_id(opened: Connection) -> None:
    task = image_task()
    await opened.tasks.start(task)
    shown = await run_command("show", workflow_id_of(task.task_id), connection=opened)
    assert shown.exit_code == 0 and re.search(rf"^task +{task.task_id}$", shown.out, re.MULTILINE)
    odd = image_task(task_id=workflow_id_of(unique("image")))
    await opened.tasks.start(odd)
    cancelled = await run_command("cancel", odd.task_id, connection=opened)
    assert odd.task_id in cancelled.out, "an id that begins with task- itself means that task"
    assert (await opened.tasks.wait(odd.task_id)).status == "cancelled"


async def test_an_unknown_filter_value_lists_nothing(opened: Connection) -> None:
    for name, value in (("scene", "image"), ("priority", "urgent"), ("stage", "baking"), ("status", "done")):
        ended = await run_command("list", f"--{name}", value, connection=opened)
        assert (ended.exit_code, ended.out) == (ExitCode.BAD_INPUT, "")
        assert f"{name}: must be one of" in ended.err and f"(given: '{value}')" in ended.err


async def test_a_list_shows_whole_ids_age_points_and_prompt_within_80_columns(opened: Connection) -> None:
    task = image_task(task_id=unique("i" * 20), prompt="a lighthouse at dusk")
    await opened.tasks.start(task)
    await opened.tasks.wait(task.task_id)

    async def listed() -> list[TaskSummary]:
        return [row async for row in opened.tasks.list(filters={"TaskId": task.task_id}, limit=5)]

    rows = await until(listed)
    out = io.StringIO()
    print_table(Console(file=out, width=80, force_terminal=True, color_system=None), rows, await glances(opened, rows))
    [_, line] = out.getvalue().splitlines()
    assert len(line.rstrip()) <= 80 and line.startswith(task.task_id)
    assert re.search(r" \d+ s +24 +a lighthouse", line), line


async def test_the_program_has_its_own_name_a_version_and_completion() -> None:
    usage, version = await run_process("list", "--help"), await run_process("--version")
    assert usage.out.startswith("Usage: comfyui-tasks list ")
    assert re.fullmatch(r"comfyui-tasks \S.*\n", version.out) and version.exit_code == 0
    # --show-completion looks for the shell among the parent processes, which under make is sh.
    completion = await run_process(environment={"_COMFYUI_TASKS_COMPLETE": "source_bash"})
    assert "complete -o default -F _comfyui_tasks_completion comfyui-tasks" in completion.out
    assert (await run_process()).err.startswith("Usage: comfyui-tasks ")


async def test_what_is_used_is_said_on_request(opened: Connection) -> None:
    verbose = await run_command("list", "-v", "--namespace", "default", connection=opened)
    assert f"uses Temporal at {opened.server.address} (COMFYUI_TEMPORAL_TEMPORAL_ADDRESS)" in verbose.err
    assert "uses namespace default (--namespace)" in verbose.err
    assert f"uses task queue {opened.task_queue} (COMFYUI_TEMPORAL_TASK_QUEUE)" in verbose.err
    assert "uses" not in (await run_command("list", connection=opened)).err, "only where it was asked for"


async def test_open_opens_the_picture_of_a_task_that_has_one(
    opened: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    monkeypatch.setattr("typer.launch", launched.append)
    task = image_task()
    await opened.tasks.start(task)
    early = await run_command("open", task.task_id, connection=opened)
    assert early.exit_code == 1 and "has not ended" in early.err
    await opened.client.get_workflow_handle(workflow_id_of(task.task_id)).signal("deliver")
    await opened.tasks.wait(task.task_id)
    ended = await run_command("open", task.task_id, connection=opened)
    assert (ended.exit_code, launched) == (0, ["http://127.0.0.1/results/job-1/0.png"])
    failing = image_task(prompt="fail")
    await opened.tasks.start(failing)
    await opened.tasks.wait(failing.task_id)
    assert "has no picture" in (await run_command("open", failing.task_id, connection=opened)).err

"""The commands that today's code issues on each recorded history: `python -m tests.command_fingerprints [name …]`.

A replay passes where a call's time limits, queue or retries have changed, or a timer's duration: it compares types and
ids. These files show every such change for review. One line is one command; a blank line ends a workflow task. They
hold names, times and counts, and never what a payload holds.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from temporalio.bridge.proto.workflow_commands import WorkflowCommand
from temporalio.client import WorkflowHistory
from temporalio.plugin import SimplePlugin
from temporalio.worker import Replayer, WorkflowInstance, WorkflowRunner
from temporalio.workflow import ParentClosePolicy

from bridge.__main__ import WORKFLOWS as BRIDGE_WORKFLOWS
from comfyui_temporal.plugin import TasksPlugin
from worker import WORKFLOWS

TESTS: Final = Path(__file__).parent
FOLDERS: Final = {TESTS / "histories": WORKFLOWS, TESTS / "bridge" / "histories": BRIDGE_WORKFLOWS}
RECORDED: Final = sorted(path for folder in FOLDERS for path in folder.glob("*.json"))
LIMITS: Final = {
    "schedule_to_close_timeout": "in all",
    "schedule_to_start_timeout": "until started",
    "start_to_close_timeout": "each try",
    "heartbeat_timeout": "heartbeat",
    "local_retry_threshold": "local pauses below",
    "workflow_execution_timeout": "execution",
    "workflow_run_timeout": "run",
    "workflow_task_timeout": "workflow task",
}
CHANGED: Final = """\
{name}: today's code issues other commands than {file} says.

{difference}

A command more or less, or in another place: put the change behind workflow.patched, with the old branch untouched
(docs/versioning.md, "What needs a patch"). The old history must keep its old commands. Only a time limit, a retry, a
queue, a search attribute or a timer's duration: old runs go on with it. If that is meant, write the file again and let
the change be reviewed: python -m tests.command_fingerprints {name}
"""


def file_of(recorded: Path) -> Path:
    return recorded.with_suffix(".commands")


async def commands_of(recorded: Path, workflows: Iterable[type] | None = None) -> str:
    """What this code issues on a recorded history. Raises what a replay raises."""
    issued: list[list[str]] = []
    history = json.loads(recorded.read_text())  # noqa: ASYNC240
    started = history["events"][0]["workflowExecutionStartedEventAttributes"]

    def record(commands: Iterable[WorkflowCommand], own_queue: str) -> None:
        issued.append([line_of(command, own_queue) for command in commands])

    replayer = Replayer(
        workflows=list(workflows or FOLDERS[recorded.parent]),
        plugins=[TasksPlugin(), SimplePlugin("commands", workflow_runner=lambda inner: _Recording(inner, record))],
        debug_mode=True,
    )
    await replayer.replay_workflow(WorkflowHistory.from_json(started["workflowId"], history))
    return "\n\n".join("\n".join(lines) for lines in issued if lines) + "\n"


class _Recording(WorkflowRunner):
    """Runs workflows as another runner does, and shows the commands of each activation."""

    def __init__(self, inner: WorkflowRunner | None, record: Callable[[Iterable[WorkflowCommand], str], None]) -> None:
        assert inner is not None
        self._inner = inner
        self._record = record

    def prepare_workflow(self, defn: Any) -> None:
        self._inner.prepare_workflow(defn)

    def create_instance(self, det: Any) -> WorkflowInstance:
        instance = self._inner.create_instance(det)
        activate = instance.activate

        def recorded(act: Any) -> Any:
            completion = activate(act)
            self._record(completion.successful.commands, det.info.task_queue)
            return completion

        instance.activate = recorded  # type: ignore[method-assign]
        return instance


def line_of(command: WorkflowCommand, own_queue: str) -> str:
    """One command, without anything that its payloads hold."""
    kind = command.WhichOneof("variant") or "nothing"
    body = getattr(command, kind)
    said = [kind.replace("_", " ").removesuffix(" workflow execution"), *_names(body)]
    said += [f"queue {'own' if body.task_queue == own_queue else body.task_queue}"] if _has(body, "task_queue") else []
    said += [f"{named} {_seconds(getattr(body, limit))}" for limit, named in LIMITS.items() if _has(body, limit)]
    if _has(body, "start_to_fire_timeout"):
        said.append(_seconds(body.start_to_fire_timeout))
    if _has(body, "retry_policy"):
        said.append(_retries(body.retry_policy))
    if kind == "start_child_workflow_execution":
        said.append(f"on close {ParentClosePolicy(body.parent_close_policy).name}")
    count = len(getattr(body, "arguments", ())) + len(getattr(body, "input", ()))
    return " | ".join([*said, *([f"arguments {count}"] if count else [])])


def _names(body: Any) -> list[str]:
    """Types, ids of patches, and names of attributes."""
    fields = ("activity_type", "workflow_type", "patch_id", "signal_name")
    found = [str(getattr(body, name)) for name in fields if _has(body, name)]
    if _has(body, "failure"):
        found.append(body.failure.application_failure_info.type)
    if _has(body, "search_attributes"):
        found += sorted(body.search_attributes.indexed_fields)
    if _has(body, "upserted_memo"):
        found += sorted(body.upserted_memo.fields)
    if body.DESCRIPTOR.name == "UpdateResponse":
        found.append(body.WhichOneof("response") or "")
    return found


def _has(body: Message, name: str) -> bool:
    return any(field.name == name for field, _ in body.ListFields())


def _seconds(duration: Duration) -> str:
    return f"{duration.ToNanoseconds() / 1e9:.6f}".rstrip("0").rstrip(".") + "s"


def _retries(policy: Any) -> str:
    tries = f", {policy.maximum_attempts} at most" if policy.maximum_attempts else ""
    first, longest = _seconds(policy.initial_interval), _seconds(policy.maximum_interval)
    return f"retry after {first} ×{policy.backoff_coefficient:g} to {longest}{tries}"


async def main(names: list[str]) -> None:
    for recorded in RECORDED:
        if not names or recorded.stem in names:
            file_of(recorded).write_text(await commands_of(recorded), encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))

"""Replays a namespace's histories on this build: would the runs go on if it were deployed (docs/operations.md)?

It only reads. One history is in memory at a time, and no larger one than `Bounds.history_bytes`. What a bound leaves
out is counted and said.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from time import monotonic
from typing import Final, Literal

from temporalio import workflow
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import Client, WorkflowHistory
from temporalio.runtime import Runtime
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Replayer

from comfyui_temporal.encryption import KeyMissing, PayloadRejected, encryption_of
from comfyui_temporal.encryption_keys import EncryptionError
from comfyui_temporal.plugin import TasksPlugin
from comfyui_temporal.runs import RunSeen, list_runs

RPC_TIMEOUT: Final = timedelta(seconds=10)
EVENTS_A_PAGE: Final = 200
TYPES_NAMED: Final = 5
LONGEST_REASON: Final = 300
_RAISED: Final = re.compile(r'r#type: "(\w+)"')
"""The exception's name in the SDK's text of a failed replay. Its message may repeat what the history carries."""
_UNDECRYPTED: Final = frozenset({KeyMissing.__name__, PayloadRejected.__name__})
_KEYS: Final = "Give this command the workers' COMFYUI_TEMPORAL_ENCRYPTION_KEYS."
State = Literal["open", "closed"]
_OPEN: Final[dict[State, str]] = {"open": "CloseTime IS NULL", "closed": "CloseTime IS NOT NULL"}


class CouldNotLook(Exception):
    """The server did not show what must be replayed. The text is a sentence that says what to do."""


@dataclass(frozen=True)
class Bounds:
    """What one look may cost."""

    closed: int = 20
    """How many closed runs of each type, the newest ones."""
    seconds: float = 600.0
    history_bytes: int = 20 * 1024 * 1024
    """A larger history is not replayed. Ours continue as new long before."""


@dataclass
class Report:
    """What was replayed. `failures` has one sentence for each run that does not go on; `left_out` says what was not
    looked at, though it should have been; `notes` what need not have been."""

    replayed: dict[State, int] = field(default_factory=lambda: {"open": 0, "closed": 0})
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _TooLarge(Exception):
    """A history is larger than may be in memory."""


async def replay_namespace(
    client: Client, workflows: Sequence[type], bounds: Bounds, *, runtime: Runtime | None = None
) -> Report:
    """Replay the open and the newest closed runs of these workflows. Raises CouldNotLook."""
    look = _Look(client, [_name_of(each) for each in workflows], bounds)
    replayer = Replayer(
        workflows=workflows,
        plugins=[TasksPlugin(encryption_of(client))],
        namespace=client.namespace,
        runtime=runtime,
    )
    try:
        async with replayer.workflow_replay_iterator(look.histories()) as results:
            async for result in results:
                look.replayed(result.replay_failure)
        await look.count_foreign()
    except RPCError as error:
        raise CouldNotLook(_why(error, client)) from None
    return look.report


class _Look:
    """One look at a namespace: finds the histories, one after the other, and takes down what became of each."""

    def __init__(self, client: Client, names: Sequence[str], bounds: Bounds) -> None:
        self._client = client
        self._names = names
        self._bounds = bounds
        self._ends_at = monotonic() + bounds.seconds
        self._shown: tuple[RunSeen, State] | None = None
        self.report = Report()

    async def histories(self) -> AsyncIterator[WorkflowHistory]:
        """The open runs' first, because a deployment would strand those."""
        too_large: dict[State, int] = {"open": 0, "closed": 0}
        late: dict[State, int] = {"open": 0, "closed": 0}
        async for run, state in self._runs():
            if monotonic() > self._ends_at:
                late[state] += 1
                continue
            try:
                history = await self._history(run)
            except _TooLarge:
                too_large[state] += 1
                continue
            if history is not None:
                self._shown = run, state
                yield history
        self._say_what_is_left_out(too_large, late)

    def replayed(self, failure: Exception | None) -> None:
        """What became of the history that was shown last. Raises CouldNotLook where a key is missing here."""
        assert self._shown is not None
        run, state = self._shown
        if failure is not None and _raised(failure) in _UNDECRYPTED:
            raise CouldNotLook(f"The history of {run.workflow_id} cannot be decrypted here. {_KEYS}")
        self.report.replayed[state] += 1
        if failure is not None:
            self.report.failures.append(_sentence(run, state, failure))

    async def count_foreign(self) -> None:
        """Runs of types that this build does not run."""
        query = f"WorkflowType NOT IN ({self._quoted_names()})"
        count = (await self._client.count_workflows(query, rpc_timeout=RPC_TIMEOUT)).count
        if not count:
            return
        types: set[str] = set()
        async for run in list_runs(self._client, query, rpc_timeout=RPC_TIMEOUT):
            types.add(run.workflow_type)
            if len(types) > TYPES_NAMED or monotonic() > self._ends_at:
                break
        named = sorted(types)[:TYPES_NAMED] + (["…"] if len(types) > TYPES_NAMED else [])
        self.report.notes.append(f"{count} runs of other workflow types were not replayed: {', '.join(named)}.")

    async def _runs(self) -> AsyncIterator[tuple[RunSeen, State]]:
        ours = f"WorkflowType IN ({self._quoted_names()})"
        async for run in list_runs(self._client, f"{ours} AND {_OPEN['open']}", rpc_timeout=RPC_TIMEOUT):
            yield run, "open"
        for name in self._names if self._bounds.closed else ():
            query = f"WorkflowType = '{name}' AND {_OPEN['closed']}"
            count = 0
            async for run in list_runs(self._client, query, rpc_timeout=RPC_TIMEOUT):
                yield run, "closed"
                count += 1
                if count >= self._bounds.closed:
                    break

    async def _history(self, run: RunSeen) -> WorkflowHistory | None:
        """None if retention has deleted it meanwhile. Raises _TooLarge, CouldNotLook."""
        handle = self._client.get_workflow_handle(run.workflow_id, run_id=run.run_id)
        events: list[HistoryEvent] = []
        size = 0
        try:
            async for event in handle.fetch_history_events(page_size=EVENTS_A_PAGE, rpc_timeout=RPC_TIMEOUT):
                events.append(event)
                size += event.ByteSize()
                if size > self._bounds.history_bytes:
                    raise _TooLarge
            await self._check_keys(events)
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
            return None
        return WorkflowHistory(run.workflow_id, events)

    async def _check_keys(self, events: Sequence[HistoryEvent]) -> None:
        """Raise CouldNotLook where the run's input cannot be decrypted here: that says nothing of the build."""
        started = events[0].workflow_execution_started_event_attributes
        try:
            await encryption_of(self._client).decode(started.input.payloads)
        except EncryptionError as error:
            raise CouldNotLook(f"{error} {_KEYS}") from None

    def _say_what_is_left_out(self, too_large: dict[State, int], late: dict[State, int]) -> None:
        limit = self._bounds.history_bytes // 1024 // 1024
        for state, count in too_large.items():
            if count:
                self.report.left_out.append(
                    f"{count} {state} runs were not replayed: their histories are larger than {limit} MiB. Raise "
                    "--megabytes where this machine's memory allows."
                )
        for state, count in late.items():
            if count:
                self.report.left_out.append(
                    f"{count} {state} runs were not replayed within {self._bounds.seconds:g} s. Raise --seconds."
                )

    def _quoted_names(self) -> str:
        return ", ".join(f"'{name}'" for name in self._names)


def _name_of(workflow_class: type) -> str:
    return str(getattr(workflow_class, "__temporal_workflow_definition").name)


def _sentence(run: RunSeen, state: State, failure: Exception) -> str:
    """What to do about one run. A reason names commands or an exception, never what they carry."""
    which = f"{run.workflow_id} (run {run.run_id}, {run.workflow_type}, {state})"
    if isinstance(failure, workflow.NondeterminismError):
        reason = str(failure).splitlines()[0][:LONGEST_REASON].rstrip(".")
        return (
            f"{which} would be stuck: this build issues other commands than its history holds ({reason}). Put the "
            "change behind workflow.patched, with the old branch untouched (docs/versioning.md, What needs a patch)."
        )
    return (
        f"{which} would be stuck: this build cannot replay its history ({_raised(failure)}). What a run hands on must "
        "stay readable (docs/versioning.md, What crosses versions as data); mend the build before you deploy it."
    )


def _raised(failure: Exception) -> str:
    """The name of what the workflow code or the converter raised."""
    found = _RAISED.search(str(failure))
    return found[1] if found else type(failure).__name__


def _why(error: RPCError, client: Client) -> str:
    where = f"Temporal at {client.service_client.config.target_host}, namespace {client.namespace!r}"
    advice = {
        RPCStatusCode.NOT_FOUND: "Check the namespace (TEMPORAL_NAMESPACE).",
        RPCStatusCode.PERMISSION_DENIED: "Check TEMPORAL_API_KEY and TLS.",
        RPCStatusCode.UNAUTHENTICATED: "Check TEMPORAL_API_KEY and TLS.",
    }.get(error.status, "Check that the server runs and can be reached from here.")
    return f"{where}, did not show its runs: {error.message.rstrip('.')}. {advice}"

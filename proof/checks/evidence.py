"""Collects the evidence on tasks from a running stack: both simulators, the task store, Temporal, object storage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from temporalio.client import Client, WorkflowHistory
from temporalio.service import RPCError

from comfyui_temporal.contracts.give_back import give_back_id_of
from comfyui_temporal.contracts.prices import PriceTable
from comfyui_temporal.contracts.task_events import TaskEvent
from comfyui_temporal.contracts.tasks import workflow_id_of
from proof.checks.finished_task import Charges, FinishedTask
from proof.simulators.admin_client import Admin
from proof.simulators.admin_wire import EntrySeen, HoldSeen, RunSeen
from proof.simulators.credits_profile import CreditsProfile
from store import TaskStore

Seen = TypeVar("Seen", EntrySeen, HoldSeen, RunSeen)


@dataclass(frozen=True)
class Services:
    """What both simulators have recorded, by task; `problems` of the ledger as a whole."""

    entries: Mapping[str, Sequence[EntrySeen]]
    holds: Mapping[str, Sequence[HoldSeen]]
    jobs: Mapping[str, Sequence[RunSeen]]
    problems: Sequence[str]


@dataclass(frozen=True)
class Sources:
    """Where the evidence is. `objects`: the folder of temporary object storage, None where it is not read.

    `prices`: the worker's table.
    """

    profile: CreditsProfile
    admin: Admin
    store: TaskStore
    client: Client
    objects: Path | None = None
    prices: PriceTable = field(default_factory=PriceTable)

    async def services(self, task_id: str | None = None) -> Services:
        """Of one task, or of all. Raises AdminRefused, httpx.HTTPError."""
        credits, comfyui = self.admin.credits, self.admin.comfyui
        return Services(
            _by_task(await credits.ledger(task_id)),
            _by_task(await credits.holds(task_id)),
            _by_task(await comfyui.jobs(task_id)),
            (await credits.balance_check()).problems,
        )

    async def task(
        self,
        task_id: str,
        services: Services,
        *,
        result: Mapping[str, Any] | None = None,
        streamed: Sequence[TaskEvent | int] | None = None,
        histories: Sequence[WorkflowHistory] | None = None,
    ) -> FinishedTask:
        """Everything that is known of a task. Raises StoreFailure."""
        row = await self.store.task(task_id)
        return FinishedTask(
            task_id=task_id,
            profile=self.profile,
            row=row,
            has_ended=row is not None and row.ended_at is not None,
            last_seq=row.last_seq if row else None,
            events=await self.store.events(task_id),
            records=[(record.code, record.details) for record in await self.store.exceptions(task_id=task_id)],
            holds=services.holds.get(task_id, ()),
            charges=Charges.by(services.entries.get(task_id, ())),
            jobs=services.jobs.get(task_id, ()),
            prices=self.prices,
            result=result,
            streamed=streamed,
            histories=None if histories is None else [history.events for history in histories],
            snapshot_files=self._snapshot_files(task_id),
        )

    async def histories(self, task_id: str) -> list[WorkflowHistory]:
        """Of the task's runs and of those that gave it back, the newest first."""
        ids = (workflow_id_of(task_id), give_back_id_of(task_id))
        return [history for workflow_id in ids async for history in self._chain(workflow_id)]

    async def _chain(self, workflow_id: str) -> AsyncIterator[WorkflowHistory]:
        """Of the newest run, and of those that it was continued from."""
        run_id: str | None = None
        while True:
            try:
                history = await self.client.get_workflow_handle(workflow_id, run_id=run_id).fetch_history()
            except RPCError:
                return
            yield history
            run_id = history.events[0].workflow_execution_started_event_attributes.continued_execution_run_id
            if not run_id:
                return

    def _snapshot_files(self, task_id: str) -> list[str] | None:
        if self.objects is None:
            return None
        kept = self.objects / "snapshots" / task_id
        return sorted(str(path) for path in kept.rglob("*") if path.is_file())


def _by_task(seen: Iterable[Seen]) -> dict[str, list[Seen]]:
    found: dict[str, list[Seen]] = defaultdict(list)
    for each in seen:
        if each.task_id is not None:
            found[each.task_id].append(each)
    return found

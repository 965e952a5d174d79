"""Starts tasks, a limited number open at once, and waits in the task table for their ends."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from typing import Final

from comfyui_temporal.client.submission import start_task
from comfyui_temporal.contracts.scenes import SCENES
from comfyui_temporal.contracts.tasks import WORKFLOW_ID_PREFIX, TaskInput
from proof.site.recorder import Recorder
from proof.site.waiting import NotRepaired, insist
from proof.soak.plan import TENANTS, Plan
from proof.soak.site import SoakSite

LOOK_SECONDS: Final = 0.5
STARTERS: Final = 4
QUIET_SECONDS: Final = 780.0
"""If no task ends for this long, the rest counts as stuck: a ledger is searched for 10 minutes (contract §4)."""
RUNNING: Final = f"ExecutionStatus = 'Running' AND WorkflowId STARTS_WITH '{WORKFLOW_ID_PREFIX}'"
CLOSING_SECONDS: Final = 30.0
_DATASET_FILES: Final = {"0.txt": "a picture", "1.txt": "another picture"}


class Workload:
    """All tasks of a plan. Even numbers are ordered at the gateway, odd ones started at Temporal."""

    def __init__(self, site: SoakSite, plan: Plan, recorder: Recorder, recorded: Collection[str]) -> None:
        self._site = site
        self.plan = plan
        self._recorder = recorder
        self._recorded = recorded
        """Tasks whose streams were recorded to their ends before."""
        self._room = asyncio.Event()
        self.started = 0
        self.ended = 0
        self.all_started = asyncio.Event()
        """Set after the last task has been started."""
        self.faults_over = asyncio.Event()
        """Set when so few tasks are open that the rest must end without further faults."""

    @property
    def open_tasks(self) -> int:
        return len(self._site.open_tasks)

    async def run(self) -> None:
        """Returns when every task has ended, or when none has for QUIET_SECONDS. Raises NotRepaired."""
        self._make_datasets()
        known = await self._known()
        self.started = len(known)
        self.ended = sum(is_over for is_over in known.values())
        for n in range(self.plan.tasks):
            task_id = self.plan.task_id(n)
            if known.get(task_id) is False:
                self._site.open_tasks[task_id] = n
            if task_id in known and task_id not in self._recorded:
                self._recorder.follow(self.plan.tenant_id(n), task_id)
        numbers = iter([n for n in range(self.plan.tasks) if self.plan.task_id(n) not in known])
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch())
            async with asyncio.TaskGroup() as starting:
                for _ in range(STARTERS):
                    starting.create_task(self._start_each(numbers))
            self.all_started.set()
            await watching

    async def _start_each(self, numbers: Iterator[int]) -> None:
        for n in numbers:
            while len(self._site.open_tasks) >= self.plan.most_open:
                self._room.clear()
                await self._room.wait()
            self._site.open_tasks[self.plan.task_id(n)] = n
            await self._start(n)
            if self.plan.is_started_twice(n):
                await self._start(n)
            self.started += 1
            self._recorder.follow(self.plan.tenant_id(n), self.plan.task_id(n))

    async def _start(self, n: int) -> None:
        task = self.plan.task(n, self._site.folder.path / "datasets")
        order = self._order if n % 2 == 0 else self._start_at_temporal
        await insist(lambda: order(task), f"start of {task.task_id}")

    async def _order(self, task: TaskInput) -> None:
        kind = SCENES[task.scene].collection
        answer = await self._site.gateway.post(
            f"/api/v1/tasks/{kind}",
            content=task.model_dump_json(exclude_unset=True),
            headers={**self._site.bearer_of(task.tenant_id, task.user_id), "Content-Type": "application/json"},
        )
        if answer.status_code >= 500 or answer.status_code == 429:
            answer.raise_for_status()
        if answer.status_code not in (200, 202):
            raise NotRepaired(f"the gateway refused {task.task_id}: {answer.status_code} {answer.text[:300]}")

    async def _start_at_temporal(self, task: TaskInput) -> None:
        await start_task(self._site.client, task, task_queue=self._site.stack.task_queue)

    async def _watch(self) -> None:
        """Forget tasks that have ended; give up when no task ends any more."""
        last_end = asyncio.get_running_loop().time()
        while not (self.faults_over.is_set() and not self._site.open_tasks):
            await asyncio.sleep(LOOK_SECONDS)
            over = await self._site.table.rows(
                "SELECT task_id FROM tasks WHERE task_id = ANY($1::text[]) AND ended_at IS NOT NULL",
                list(self._site.open_tasks),
            )
            for row in over:
                self._site.open_tasks.pop(row["task_id"], None)
                self.ended += 1
            if self.all_started.is_set() and self.open_tasks <= self.plan.most_open // 4:
                self.faults_over.set()
            now = asyncio.get_running_loop().time()
            if over:
                last_end = now
                self._room.set()
            elif now - last_end > QUIET_SECONDS:
                self.faults_over.set()
                return

    async def _known(self) -> dict[str, bool]:
        """Tasks of this plan that were claimed before → whether they have ended."""
        rows = await self._site.table.rows(
            "SELECT task_id, ended_at IS NOT NULL AS is_over FROM tasks WHERE task_id LIKE $1",
            f"soak-{self.plan.seed}-%",
        )
        return {row["task_id"]: row["is_over"] for row in rows}

    def _make_datasets(self) -> None:
        for tenant_id in TENANTS:
            folder = self._site.folder.path / "datasets" / tenant_id / "soak"
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in _DATASET_FILES.items():
                (folder / name).write_text(text)


async def still_running(site: SoakSite) -> list[str]:
    """Workflow ids of runs that Temporal has open; the last ends may show a moment late."""

    async def running() -> list[str]:
        return [run.id async for run in site.client.list_workflows(RUNNING)]

    deadline = asyncio.get_running_loop().time() + CLOSING_SECONDS
    while found := await insist(running, "Temporal"):
        if asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(LOOK_SECONDS)
    return found

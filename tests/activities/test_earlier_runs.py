"""Reading the runs of a task that a reset has replaced, attempt by attempt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from temporalio.client import Client
from temporalio.testing import ActivityEnvironment

from activities import earlier_runs
from activities.earlier_runs import EarlierRuns
from activities.orphans import NotReadHere
from comfyui_temporal.contracts.give_back import EarlierJobs
from comfyui_temporal.contracts.task_store import TaskRow


async def test_a_run_that_this_worker_cannot_read_is_left_to_the_next_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer worker may read it. Seen: it was noted as read, and the newer one passed over its charges."""
    row = cast(TaskRow, SimpleNamespace(job_ids=[], job_id=None))

    async def left_by(_: Any, __: Any, run_id: str) -> Any:
        if run_id == "newest":
            raise NotReadHere("Run newest was not read.")
        return SimpleNamespace(charges_sent=1, cost=None, jobs=[])

    async def read() -> tuple[EarlierJobs, Any]:
        runs = EarlierRuns(cast(Client, None))
        return await runs.unanswered_jobs(row, ["newest", "oldest"]), runs.progress()

    monkeypatch.setattr(earlier_runs, "_left_by", left_by)
    found, (progress,) = await ActivityEnvironment().run(read)
    assert (found.charges, found.unread) == (1, ["Run newest was not read."])
    assert (progress.run_ids, progress.found.unread) == (["oldest"], [])

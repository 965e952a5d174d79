"""Reading the runs of a task that a reset has replaced, attempt by attempt."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest
from temporalio.client import Client
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError
from temporalio.testing import ActivityEnvironment

from activities import earlier_runs
from activities.earlier_runs import EarlierRunActivities, EarlierRuns
from activities.orphans import NotReadHere
from comfyui_temporal.contracts.give_back import EarlierJobs
from comfyui_temporal.contracts.lives import TaskRun
from comfyui_temporal.contracts.requests import RequestedJob
from comfyui_temporal.contracts.task_store import LookOrder, TaskRow
from store import TaskStore
from tests.activities.temporal_in_memory import AWAY, NO_NAMESPACE, Run, Temporal, requested
from tests.store.facts import claim_of, new_task_id
from tests.versions.fullest import DOCUMENTS, fullest

AT = datetime(2031, 1, 1, 12, tzinfo=UTC)
BODY = fullest(DOCUMENTS["submit-job"])["body"]


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


# What each run left, and what it comes to


def job(attempt: int, job_id: str | None = None, *, body: str = "a", cancelled: bool = False) -> RequestedJob:
    request = None if job_id else BODY | {"prompt": body}
    fields = {"attempt": attempt, "key": f"t:submit:{attempt}", "asked_at": AT, "request": request}
    return RequestedJob.model_validate(fields | {"job_id": job_id, "cancelled": cancelled})


def left(*jobs: RequestedJob, charges: int = 0, price: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(charges_sent=charges, cost=price, jobs=list(jobs))


class Attempts:
    """Attempts of one activity, which read the runs that it is given; each begins where the one before it stopped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *runs: SimpleNamespace) -> None:
        self._runs = {f"run-{n}": run for n, run in enumerate(runs)}
        self.read: list[str] = []
        self.details: tuple[Any, ...] = ()
        self.stops_after: int | None = None
        """How many runs the next attempt has the time for."""
        monkeypatch.setattr(earlier_runs, "_left_by", self._left_by)

    async def next(self, *, job_ids: tuple[str, ...] = (), job_id: str | None = None) -> EarlierJobs:
        row = cast(TaskRow, SimpleNamespace(job_ids=list(job_ids), job_id=job_id))
        self._env = ActivityEnvironment()
        self._env.info = replace(self._env.info, heartbeat_details=[each.model_dump() for each in self.details])
        runs: list[EarlierRuns] = []

        async def read() -> EarlierJobs:
            runs.append(EarlierRuns(cast(Client, None)))
            return await runs[0].unanswered_jobs(row, list(self._runs))

        try:
            return await self._env.run(read)
        finally:
            self.details = runs[0].progress()

    async def _left_by(self, _: Any, __: Any, run_id: str) -> Any:
        self.read.append(run_id)
        if self.stops_after is not None and len(self.read) >= self.stops_after:
            self._env.cancel()
        return self._runs[run_id]


def shown(found: EarlierJobs) -> list[tuple[str, str | None]]:
    """Key and id of each job; of one without an answer what was requested."""
    return [(each.key, each.job_id or getattr(each.request, "prompt", None)) for each in found.jobs]


async def test_an_attempt_goes_on_where_the_one_before_it_had_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = Attempts(
        monkeypatch, left(job(1), charges=1), left(job(2, "j2"), charges=3, price=5), left(job(3), charges=2, price=7)
    )
    assert attempts.details == ()
    attempts.stops_after = 2
    with pytest.raises(ApplicationError, match="next attempt") as stopped:
        await attempts.next()
    assert (stopped.value.type, stopped.value.non_retryable) == ("internal", False)
    attempts.stops_after = None
    found = await attempts.next()
    assert attempts.read == ["run-0", "run-1", "run-2"], "each once"
    assert shown(found) == [("t:submit:2", "j2"), ("t:submit:1", "a"), ("t:submit:3", "a")]
    assert (found.charges, found.price) == (3, 5), "the largest number, and the newest price"


async def test_what_an_attempt_of_another_version_had_read_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = Attempts(monkeypatch, left(charges=1))
    attempts.details = (SimpleNamespace(model_dump=lambda: {"run_ids": "another form"}),)
    assert (await attempts.next()).charges == 1


@pytest.mark.parametrize(
    ("runs", "row", "jobs"),
    [
        ([left(job(1, "j1"))], {}, [("t:submit:1", "j1")]),
        ([left(job(1, "j1"))], {"job_ids": ("j1",)}, []),
        ([left(job(1, "j1"))], {"job_id": "j1"}, []),
        ([left(job(1, "j1", cancelled=True))], {}, []),
        ([left(job(1, "j1")), left(job(1, "j1"))], {}, [("t:submit:1", "j1")]),
        ([left(job(1)), left(job(1))], {}, [("t:submit:1", "a")]),
        ([left(job(1)), left(job(1, body="b"))], {}, [("t:submit:1", "a"), ("t:submit:1", "b")]),
        ([left(job(1)), left(job(1, "j1"))], {"job_ids": ("j1",)}, []),
        ([left(job(1, "j1")), left(job(1))], {"job_ids": ("j1",)}, []),
        ([left(job(1, "j1", cancelled=True)), left(job(1))], {}, []),
    ],
    ids=[
        "answered, and not noted in the row",
        "noted",
        "noted as the current one",
        "cancelled",
        "answered twice",
        "without an answer, twice",
        "without an answer, in two forms",
        "answered in an older run",
        "answered in a newer run",
        "answered and cancelled in a newer run",
    ],
)
async def test_a_job_is_looked_for_unless_its_end_or_its_place_in_the_row_is_known(
    monkeypatch: pytest.MonkeyPatch, runs: list[SimpleNamespace], row: dict[str, Any], jobs: list[tuple[str, str]]
) -> None:
    assert shown(await Attempts(monkeypatch, *runs).next(**row)) == jobs


async def test_jobs_that_do_not_fit_are_named_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with them all could not be given back."""
    monkeypatch.setattr(earlier_runs, "MOST_BYTES", 2 * len(job(1).model_dump_json()))
    first = [job(1), job(2), job(3), job(3, body="b")]
    found = await Attempts(monkeypatch, left(*first), left(job(4), job(3))).next()
    assert shown(found) == [("t:submit:1", "a"), ("t:submit:2", "a")]
    assert found.unread == [f"The job requested under t:submit:{n} was not looked for." for n in (3, 4)]


# Asked by a run of the task


CHARGED = [requested("charge", {**fullest(DOCUMENTS["charge"]), "key": "t:charge:2", "price": 100})]


async def asked(temporal: Temporal, store: TaskStore, task_id: str, *, by: str) -> EarlierJobs:
    env = ActivityEnvironment()
    env.info = replace(env.info, workflow_run_id=by)
    order = LookOrder(task_id=task_id, first_execution_run_id="run-1")
    return await env.run(EarlierRunActivities(temporal.client, store).unanswered_jobs, order)


async def reset_task(store: TaskStore) -> str:
    task_id = new_task_id()
    for run_id in ("run-1", "reset"):
        run = TaskRun(task_id=task_id, run_id=run_id, first_execution_run_id="run-1")
        await (store.claim(claim_of(task_id), run) if run_id == "run-1" else store.register(run))
    return task_id


async def test_a_run_learns_what_the_runs_before_it_charged(task_store: TaskStore) -> None:
    task_id, temporal = await reset_task(task_store), Temporal(Run("run-1", events=CHARGED), Run("reset"))
    found = await asked(temporal, task_store, task_id, by="reset")
    assert (found.charges, found.price) == (2, 100)
    assert await asked(temporal, task_store, task_id, by="run-1") == EarlierJobs(), "its own requests it knows"
    assert await asked(temporal, task_store, new_task_id(), by="reset") == EarlierJobs()


async def test_a_run_that_temporal_has_deleted_is_left_out(task_store: TaskStore) -> None:
    task_id = await reset_task(task_store)
    assert await asked(Temporal(Run("reset")), task_store, task_id, by="reset") == EarlierJobs()


@pytest.mark.parametrize("problem", [AWAY, NO_NAMESPACE], ids=["no server", "no namespace"])
async def test_no_charge_is_forgotten_where_temporal_says_nothing_of_a_run(
    task_store: TaskStore, problem: RPCError
) -> None:
    temporal = Temporal(Run("run-1", events=CHARGED))
    temporal.problem = problem
    with pytest.raises(ApplicationError, match="does not return the earlier runs") as failed:
        await asked(temporal, task_store, await reset_task(task_store), by="reset")
    assert (failed.value.type, failed.value.non_retryable) == ("internal", False)


async def test_a_store_that_is_away_is_asked_again_for_the_runs() -> None:
    store = TaskStore("postgresql://user:word@127.0.0.1:1/tasks")
    with pytest.raises(ApplicationError, match="PostgreSQL") as failed:
        await asked(Temporal(), store, "task-1", by="reset")
    assert (failed.value.type, failed.value.non_retryable) == ("internal", False)
    await store.close()

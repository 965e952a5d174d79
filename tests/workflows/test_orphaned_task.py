"""A give-back on its own: which results a charged task hands out, and what older versions began (contract §7)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

import pytest
from temporalio import workflow

from activities.comfyui import ComfyUIActivities
from activities.credits import CreditsActivities
from activities.task_store import TaskStoreActivities
from comfyui_temporal.contracts.calls import Post
from comfyui_temporal.contracts.comfyui import JobCancelled, JobState, JobStatus, TaskPriority
from comfyui_temporal.contracts.credits import ChargeReply, ChargeRequest
from comfyui_temporal.contracts.errors import Answer, ErrorDetails, FailureCode
from comfyui_temporal.contracts.give_back import GiveBackResult, Orphans, OwnEnd
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.requests import RequestedHold, RequestedJob
from comfyui_temporal.contracts.task_store import TaskRow, TaskWrite
from comfyui_temporal.contracts.tasks import TaskStatus
from tests.workflows.holds_in_memory import Parties, refusal
from tests.workflows.test_charges_in_doubt import charge_requested
from tests.workflows.test_ledger_search import NOON
from tests.workflows.test_task_ledger import OneHold, charge_entry
from workflows.charges import COUNTED_AS_SHOWN
from workflows.give_back import LEDGER_READ_FIRST, LIVES_KNOWN, OrphanedTask
from workflows.settlement import GIVEN_BACK_BEFORE

RESULTS = ["https://results.example/1.png"]
COMMITTED = OneHold(1, 24, end="commit", cost=24)


class Left(Parties):
    """A task whose run is over. All parties answer the calls of its give-back in memory."""

    def __init__(
        self, patch: pytest.MonkeyPatch, hold: OneHold, *, shape: str = "kind", unpatched: Collection[str] = ()
    ) -> None:
        super().__init__(patch, hold, shape=shape, unpatched=unpatched)
        self.jobs: dict[str, Answer[JobState]] = {}
        self.posted: list[Post[ChargeRequest]] = []
        """Sent by the give-back."""
        self.written: list[TaskWrite] = []
        self.told_before = 0
        """Points in the events that the run had published."""
        patch.setattr(workflow, "wait_condition", self._until)
        patch.setattr(workflow, "start_activity_method", self._started)
        patch.setattr(workflow, "execute_local_activity_method", self._write)
        patch.setattr(workflow, "execute_activity_method", self._published_points)
        patch.setattr(workflow, "set_current_details", lambda _: None)
        patch.setattr(workflow, "upsert_search_attributes", lambda _: None)

    async def until_answered(self, *arguments: Any, **named: Any) -> Answer[Any]:
        method, argument = arguments
        if method is ComfyUIActivities.get_job:
            return self.jobs[argument.job_id]
        if method is ComfyUIActivities.cancel_job:
            return Answer[JobCancelled](reply=JobCancelled())
        if method is CreditsActivities.charge:
            self.posted.append(argument)
            self.shown.append(charge_entry(argument.body.amount, self._shape))
            return Answer[ChargeReply](reply=ChargeReply(ledger_id="e", change=-argument.body.amount))
        return await super().until_answered(*arguments, **named)

    async def given_back(self, hold: RequestedHold, **left: Any) -> GiveBackResult:
        lives = left.pop("lives", 0)
        row = TaskRow(
            task_id="t",
            tenant_id="a",
            user_id="b",
            scene=Scene.IMAGE_GENERATE,
            template_id="upscale",
            priority=TaskPriority.STANDARD,
            resolution="hd",
            workflow_id="w",
            first_execution_run_id="r",
            input_sha256="0" * 64,
            version=1,
            status=TaskStatus.RUNNING,
            created_at=NOON,
            updated_at=NOON,
            last_seq=1,
            lives=lives,
            hold_ids=[hold.pre_deduct_id],
        )
        return await OrphanedTask(Orphans(row=row, how="terminated", holds=[hold], **left), "").given_back()

    def _started(self, method: Any, argument: Any, **_: Any) -> asyncio.Task[Answer[Any]]:
        return asyncio.create_task(self.until_answered(method, argument))

    async def _write(self, method: Any, write: TaskWrite, **__: Any) -> None:
        assert method is TaskStoreActivities.write
        for _ in range(10):  # a store takes longer than the flow to its next call
            await asyncio.sleep(0)
        self.written.append(write)

    @property
    def told(self) -> int:
        """Points in all events that are written."""
        return self.told_before + sum(fact.credits_delta or 0 for write in self.written for fact in write.facts)

    async def _published_points(self, *_: Any, **__: Any) -> int:
        return self.told

    @staticmethod
    async def _until(happened: Callable[[], bool], **_: Any) -> None:
        while not happened():  # noqa: ASYNC110 - the condition is another task's doing
            await asyncio.sleep(0)


def job(job_id: str, attempt: int = 1) -> RequestedJob:
    return RequestedJob(attempt=attempt, key=f"t:submit:{attempt}", asked_at=NOON, job_id=job_id)


# Results


async def test_a_charged_task_hands_out_what_was_delivered_though_a_newer_job_delivered_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that was reset after its delivery had requested another job when it was terminated."""
    left = Left(monkeypatch, COMMITTED)
    delivered = JobState(job_id="job-1", job_status=JobStatus.DELIVERY, result_urls=RESULTS)
    cancelled = JobState(
        job_id="job-2", job_status=JobStatus.QUEUED, error_details=ErrorDetails(code=FailureCode.INTERNAL)
    )
    left.jobs = {"job-1": Answer(reply=delivered), "job-2": Answer(reply=cancelled)}
    jobs = [job("job-1"), job("job-2", 2)]
    result = await left.given_back(COMMITTED.requested(), jobs=jobs, cost=24, commit_of="hold-1")
    assert (result.outcome, result.credits.charged) == ("already_charged", 24)
    end = left.written[-1]
    assert (end.state.status, end.state.result_urls) == (TaskStatus.COMPLETED, RESULTS)


async def test_a_charged_task_keeps_its_results_where_its_job_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run had completed it, and its row is open again: the store was restored."""
    left = Left(monkeypatch, COMMITTED)
    left.jobs = {"job-1": Answer(refusal=refusal("job_not_found"))}
    own_end = OwnEnd(status=TaskStatus.COMPLETED, result_urls=RESULTS)
    await left.given_back(COMMITTED.requested(), jobs=[job("job-1")], cost=24, commit_of="hold-1", own_end=own_end)
    end = left.written[-1]
    assert (end.state.status, end.state.result_urls) == (TaskStatus.COMPLETED, RESULTS)


async def test_a_task_hands_its_results_out_where_a_commit_was_sent_and_the_ledger_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may have been charged. The hold of that commit was not seen to be given back."""
    left = Left(monkeypatch, COMMITTED)
    left.is_ledger_refused = True
    left.jobs = {"job-1": Answer(reply=JobState(job_id="job-1", job_status=JobStatus.DELIVERY, result_urls=RESULTS))}
    result = await left.given_back(COMMITTED.requested(), jobs=[job("job-1")], cost=24, commit_of="hold-1")
    assert (result.outcome, result.credits.charged) == ("settlement_unknown", None)
    end = left.written[-1]
    assert (end.state.status, end.state.result_urls) == (TaskStatus.COMPLETED, RESULTS)


# Points


async def test_the_points_of_the_run_and_of_its_give_back_add_up_to_what_was_charged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are added up once the store has all of them. Else what was given back would be shown twice."""
    hold = OneHold(1, 24)
    left = Left(monkeypatch, hold)
    left.told_before = -24
    result = await left.given_back(hold.requested().model_copy(update={"told": 24}))
    assert (result.outcome, result.credits.returned, left.told) == ("given_back", 24, 0)


@pytest.mark.parametrize(
    ("status", "shortfall"),
    [(TaskStatus.COMPLETED, 24), (TaskStatus.CANCELLED, 0), (TaskStatus.FAILED, 0)],
)
async def test_a_price_of_which_nothing_was_charged_is_short_only_where_the_run_had_completed_its_task(
    monkeypatch: pytest.MonkeyPatch, status: TaskStatus, shortfall: int
) -> None:
    """A run before a reset had requested the price. Who got no results owes nothing."""
    hold = OneHold(1, 24, end="cancel")
    left = Left(monkeypatch, hold)
    result = await left.given_back(hold.requested(), price_before=24, lives=1, own_end=OwnEnd(status=status))
    assert (result.credits.charged, result.credits.shortfall) == (0, shortfall)
    assert left.written[-1].state.status is status


# What older versions began: replayed with other calls or waits, such a give-back would be stuck


@pytest.mark.parametrize(
    ("unpatched", "has_read"),
    [((), True), ((LIVES_KNOWN, GIVEN_BACK_BEFORE), False)],
    ids=["today's", "an older version's"],
)
async def test_the_rest_of_a_price_is_charged_as_the_version_that_began_the_give_back_does(
    monkeypatch: pytest.MonkeyPatch, unpatched: tuple[str, ...], has_read: bool
) -> None:
    """The run had been reset, and charged the first part of 2,460 points at a service without keys."""
    hold = OneHold(1, 2_460, end="cancel")
    left = Left(monkeypatch, hold, shape="reason", unpatched=unpatched)
    left.shown.append(charge_entry(2_000, "reason"))
    result = await left.given_back(hold.requested(), charges=[charge_requested(1, 2_000)], cost=2_460, lives=1)
    assert [(post.key, post.body.amount, post.has_read_ledger) for post in left.posted] == [
        ("t:charge:2", 460, has_read)
    ]
    assert result.credits.charged == 2_460


@pytest.mark.parametrize(
    ("unpatched", "rest"), [((), 1_460), ((COUNTED_AS_SHOWN,), 460)], ids=["today's", "an older version's"]
)
async def test_a_part_that_the_ledger_shows_with_another_amount_counts_as_in_the_version_that_began_the_give_back(
    monkeypatch: pytest.MonkeyPatch, unpatched: tuple[str, ...], rest: int
) -> None:
    """An earlier life had sent it under the same key, with 1,000 points instead of 2,000."""
    hold = OneHold(1, 2_460, end="cancel")
    left = Left(monkeypatch, hold, unpatched=unpatched)
    left.shown.append(charge_entry(1_000, "kind"))
    await left.given_back(hold.requested(), charges=[charge_requested(1, 2_000)], cost=2_460, lives=1)
    assert [(post.key, post.body.amount) for post in left.posted] == [("t:charge:2", rest)]


async def test_a_give_back_that_an_older_version_began_counts_the_charges_of_its_run_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It reads the ledger last. Numbered by its key, the charge would be looked for beyond the one that is shown."""
    hold = OneHold(1, 460, end="cancel")
    left = Left(monkeypatch, hold, shape="reason", unpatched=[LEDGER_READ_FIRST])
    left.shown.append(charge_entry(460, "reason"))
    result = await left.given_back(hold.requested(), charges=[charge_requested(2, 460)], cost=460)
    assert (result.credits.charged, left.posted, left.now) == (460, [], NOON)

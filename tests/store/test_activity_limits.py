"""How the activities call the store: for which run, and how long they wait."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities.task_store import BREAK_SECONDS, TRY_SECONDS, LocalBreaker, TaskStoreActivities
from activities.unsettled import UnsettledActivities
from comfyui_temporal.contracts.lives import EarlierLife, TaskRun
from comfyui_temporal.contracts.reconcile import UnsettledLook
from comfyui_temporal.contracts.task_store import (
    Correction,
    Heard,
    HeardOrder,
    LookOrder,
    RowSeen,
    TaskException,
    TrainedModel,
    UnsettledTask,
)
from comfyui_temporal.contracts.tasks import IMAGE_WORKFLOW, CreditsSummary
from comfyui_temporal.contracts.tenant_limits import TenantLimits
from store import StartRefused, StoreUnavailable, TaskStore, TaskUnknown, WriteRefused
from store.tasks import Written
from tests.store.facts import NOON, claim_of, fact, write_of
from tests.store.test_activities import policy_of

RUN = TaskRun(task_id="t1", run_id="run-id-of-the-activity", run_number=0, first_execution_run_id="run-1")


@dataclass
class RecordingStore:
    """Records each call; `fails_with` is raised instead of an answer."""

    life: EarlierLife = field(default_factory=EarlierLife)
    is_claimed: bool = True
    fails_with: Exception | None = None
    address: str = "db"
    calls: list[tuple[str, TaskRun | None]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def _record(self, what: str, run: TaskRun | None, within_seconds: float) -> None:
        self.calls.append((what, run))
        self.seconds.append(within_seconds)
        if self.fails_with is not None:
            raise self.fails_with

    async def claim(
        self, _claim: Any, run: TaskRun | None, *, given: Any, limits: TenantLimits, within_seconds: float
    ) -> bool:
        self._record("claim", run, within_seconds)
        return self.is_claimed

    async def register(self, run: TaskRun, *, within_seconds: float) -> EarlierLife:
        self._record("register", run, within_seconds)
        return self.life

    async def write(self, _write: Any, run: TaskRun | None, *, within_seconds: float) -> Written:
        self._record("write", run, within_seconds)
        return Written(ended=False, scene="image.generate")

    async def look(self, run: TaskRun, *, within_seconds: float) -> RowSeen:
        self._record("look", run, within_seconds)
        return RowSeen(life=self.life)

    async def models(self, tenant_id: str, model_ids: list[str], *, within_seconds: float) -> list[TrainedModel]:
        self._record("models", None, within_seconds)
        return [TrainedModel(model_id=model_id, model_path=f"{tenant_id}/{model_id}") for model_id in model_ids]

    async def heard(self, order: HeardOrder, run_id: str, *, within_seconds: float) -> Heard:
        self._record("heard", RUN.model_copy(update={"run_id": run_id}), within_seconds)
        return Heard(sequence=len(order.job_id), progress=1, seconds_ago=2)

    async def take_unsettled(self, *, every: timedelta, limit: int) -> list[UnsettledTask]:
        self._record("take_unsettled", None, every.total_seconds())
        return []

    async def correct_settlement(self, _correction: Correction) -> bool:
        self._record("correct_settlement", None, 0)
        return self.is_claimed


async def run(
    store: RecordingStore,
    name: str,
    argument: Any,
    *,
    activities: TaskStoreActivities | None = None,
    workflow_type: str = IMAGE_WORKFLOW,
    local_seconds: float | None = None,
    start_to_close: float = 10.0,
) -> Any:
    """The activity's answer; `local_seconds` is the time of a local try."""
    environment = ActivityEnvironment()
    is_local = local_seconds is not None
    environment.info = replace(
        environment.info,
        workflow_type=workflow_type,
        workflow_run_id=RUN.run_id,
        is_local=is_local,
        schedule_to_close_timeout=timedelta(seconds=local_seconds) if local_seconds is not None else None,
        start_to_close_timeout=None if is_local else timedelta(seconds=start_to_close),
        scheduled_time=datetime.now(UTC),
    )
    activities = activities or TaskStoreActivities(cast(TaskStore, store), policy_of)
    return await environment.run(getattr(activities, name), argument)


CLAIM, WRITE = claim_of("t1"), write_of("t1", fact("a")).model_copy(update={"run_number": 2})
LOOK = LookOrder(task_id="t1", first_execution_run_id="run-1", run_number=2)


async def test_a_claim_is_made_for_the_run_that_the_activity_belongs_to() -> None:
    store = RecordingStore()
    outcome = await run(store, "claim", CLAIM)

    assert store.calls == [("claim", RUN), ("register", RUN)]
    assert outcome.earlier_life is None


async def test_an_earlier_life_is_reported_with_the_claim() -> None:
    store = RecordingStore(life=EarlierLife(lives=1))

    assert (await run(store, "claim", CLAIM)).earlier_life == EarlierLife(lives=1)


@pytest.mark.parametrize("is_claimed", [True, False])
async def test_a_run_without_the_claim_or_of_another_workflow_registers_nothing(is_claimed: bool) -> None:
    store = RecordingStore(is_claimed=is_claimed, life=EarlierLife(lives=1))
    outcome = await run(store, "claim", CLAIM, workflow_type="GiveBackWorkflow" if is_claimed else IMAGE_WORKFLOW)

    assert store.calls == [("claim", None if is_claimed else RUN)]
    assert (outcome.claimed, outcome.earlier_life) == (is_claimed, None)


@pytest.mark.parametrize(("name", "argument"), [("write", WRITE), ("look", LOOK)])
async def test_a_write_and_a_look_name_the_run_of_its_chain(name: str, argument: Any) -> None:
    store = RecordingStore(life=EarlierLife(lives=3))
    answer = await run(store, name, argument)

    assert store.calls == [(name, RUN.model_copy(update={"run_number": 2}))]
    assert answer == (None if name == "write" else RowSeen(life=EarlierLife(lives=3)))


@pytest.mark.parametrize("is_claimed", [True, False])
async def test_the_models_that_a_claimed_task_uses_are_its_tenants(is_claimed: bool) -> None:
    store = RecordingStore(is_claimed=is_claimed)
    outcome = await run(store, "claim", claim_of("t1", model_ids=["a", "b"]))

    assert [model.model_path for model in outcome.models] == (["tenant-a/a", "tenant-a/b"] if is_claimed else [])


async def test_a_start_beyond_a_tenants_limit_is_answered_and_opens_the_way_for_local_tries() -> None:
    store = RecordingStore(fails_with=StoreUnavailable("away"))
    activities = TaskStoreActivities(cast(TaskStore, store), policy_of)
    with pytest.raises(ApplicationError, match="away"):
        await run(store, "claim", CLAIM, activities=activities)

    store.fails_with = StartRefused("3 tasks run already")
    refused = await run(store, "claim", CLAIM, activities=activities)
    assert (refused.claimed, refused.refused, refused.models) == (False, "3 tasks run already", [])
    assert refused.policy == policy_of(CLAIM)
    assert (await run(store, "claim", CLAIM, activities=activities, local_seconds=3.0)) == refused


async def test_what_was_heard_of_a_job_is_asked_for_by_the_run_that_the_activity_belongs_to() -> None:
    store = RecordingStore()
    heard = await run(store, "heard", HeardOrder(task_id="t1", job_id="a-job"))

    assert heard == Heard(sequence=5, progress=1, seconds_ago=2)
    assert store.calls == [("heard", RUN)]


async def test_only_a_tasks_own_run_looks() -> None:
    store = RecordingStore()
    with pytest.raises(ApplicationError, match="own run") as failure:
        await run(store, "look", LOOK, workflow_type="GiveBackWorkflow")

    assert (failure.value.type, failure.value.non_retryable, store.calls) == ("internal", True, [])


@pytest.mark.parametrize(
    ("limits", "seconds"),
    [
        ({}, TRY_SECONDS),
        ({"start_to_close": 2.0}, 1.5),
        ({"local_seconds": 3.0}, TRY_SECONDS),
        ({"local_seconds": 2.0}, 1.5),
    ],
    ids=["visible", "visible, hurried", "local", "local, hurried"],
)
async def test_a_try_ends_before_its_activity_does(limits: dict[str, float], seconds: float) -> None:
    """Longer than a statement of the store may take, which is 1.5 s."""
    store = RecordingStore()
    for name, argument in (("claim", CLAIM), ("write", WRITE), ("look", LOOK)):
        await run(store, name, argument, **cast(Any, limits))

    assert TRY_SECONDS == 2.0
    assert all(math.isclose(limit, seconds, abs_tol=0.4) and limit <= seconds for limit in store.seconds), store.seconds


@pytest.mark.parametrize("failure", [None, TaskUnknown("no such task")], ids=["it answers", "it refuses"])
async def test_a_store_that_answers_a_visible_try_is_tried_locally_again(failure: Exception | None) -> None:
    store = RecordingStore(fails_with=StoreUnavailable("away"))
    activities = TaskStoreActivities(cast(TaskStore, store), policy_of)

    async def attempt(*, is_local: bool) -> None:
        local = {"local_seconds": 3.0} if is_local else {}
        await run(store, "write", WRITE, activities=activities, **cast(Any, local))

    with pytest.raises(ApplicationError, match="away"):
        await attempt(is_local=False)
    with pytest.raises(ApplicationError, match="not tried locally"):
        await attempt(is_local=True)
    store.fails_with = failure
    if failure is None:
        await attempt(is_local=False)
    else:
        with pytest.raises(ApplicationError, match="no such task"):
            await attempt(is_local=False)
    store.fails_with = None

    await attempt(is_local=True)
    assert len(store.calls) == 3


LOOK_FOR_UNSETTLED = UnsettledLook(every_seconds=60)
CORRECTION = Correction(
    task_id="t1",
    credits=CreditsSummary(),
    record=TaskException(key="found", code="settlement_corrected", message="The ledger shows it.", ts=NOON),
)


@pytest.mark.parametrize("is_corrected", [True, False])
async def test_unknown_settlements_are_taken_and_a_correction_says_whether_it_was_made(is_corrected: bool) -> None:
    store = RecordingStore(is_claimed=is_corrected)
    unsettled = UnsettledActivities(cast(TaskStore, store))

    assert await ActivityEnvironment().run(unsettled.take_unsettled, LOOK_FOR_UNSETTLED) == []
    assert store.seconds == [60]
    assert await ActivityEnvironment().run(unsettled.correct_settlement, CORRECTION) is is_corrected


@pytest.mark.parametrize(
    ("name", "failure", "is_final"),
    [
        ("take_unsettled", StoreUnavailable("away"), False),
        ("correct_settlement", StoreUnavailable("away"), False),
        ("correct_settlement", WriteRefused("a value is out of range"), True),
    ],
)
async def test_work_on_unknown_settlements_is_repeated_only_while_postgresql_is_away(
    name: str, failure: Exception, is_final: bool
) -> None:
    unsettled = UnsettledActivities(cast(TaskStore, RecordingStore(fails_with=failure)))
    with pytest.raises(ApplicationError, match=str(failure)) as raised:
        order = LOOK_FOR_UNSETTLED if name == "take_unsettled" else CORRECTION
        await ActivityEnvironment().run(getattr(unsettled, name), order)

    assert (raised.value.type, raised.value.non_retryable) == ("internal", is_final)
    assert raised.value.__cause__ is None


def test_before_anything_has_failed_every_local_try_is_made() -> None:
    breaker = LocalBreaker(lambda: 0.0)

    assert [breaker.lets_through() for _ in range(3)] == [True, True, True]


def test_a_probe_that_is_still_out_holds_the_others_back_for_as_long_again() -> None:
    now = 0.0
    clock: Callable[[], float] = lambda: now  # noqa: E731 - it reads what this test sets
    breaker = LocalBreaker(clock)
    breaker.failed()
    now = BREAK_SECONDS
    assert breaker.lets_through()
    now = 2 * BREAK_SECONDS - 0.001
    assert not breaker.lets_through()
    now = 2 * BREAK_SECONDS
    assert breaker.lets_through()

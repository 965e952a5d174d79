"""The deadlines of a task (contract §1), without the wait for them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from temporalio import workflow

from comfyui_temporal.contracts.continuation import ClockState
from comfyui_temporal.contracts.errors import ExceptionCode, FailureCode
from comfyui_temporal.contracts.task_store import TaskState
from comfyui_temporal.contracts.tasks import TaskStatus
from tests.workflows.limits import limits_of
from workflows.failures import TaskFailed
from workflows.job_clock import JobClock
from workflows.task_record import TaskRecord

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
FACTOR, DEFAULT_ETA, QUEUE_SLA = 3.0, 8.0, 5.0


class FakeRecord:
    """What the clock reports to its task's record."""

    def __init__(self) -> None:
        self.state = TaskState(version=1, status=TaskStatus.QUEUED)
        self.exceptions: list[tuple[str, str]] = []
        self.facts: list[tuple[str, str]] = []
        self.waits: list[tuple[str, datetime]] = []

    def estimated(self, minutes: float) -> None:
        self.state.estimated_time = minutes

    def record_exception(self, key: str, code: ExceptionCode, message: str) -> None:
        self.exceptions.append((code.value, message))

    def publish(self, key: str, event: Any, *, message: str) -> None:
        self.facts.append((key, message))

    def waiting_for(self, what: str, until: datetime) -> None:
        self.waits.append((what, until))


class Clock:
    """A task's job clock; the test moves its time."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        carried: ClockState | None = None,
        *,
        cap: float = 600.0,
        counts_from_processing: bool = True,
    ) -> None:
        self.now = NOON
        self.record = FakeRecord()
        patch.setattr(workflow, "now", lambda: self.now)
        patch.setattr(workflow, "patched", lambda _: True)
        self.begun: datetime | None = None
        self.unreadable = ""
        self.job = JobClock(
            cast(TaskRecord, self.record),
            carried or ClockState(),
            limits_of(
                deadline_factor=FACTOR,
                cap_minutes=cap,
                queue_sla_minutes=QUEUE_SLA,
                counts_from_processing=counts_from_processing,
            ),
            default_eta_minutes=DEFAULT_ETA,
            unreadable=lambda: self.unreadable,
            begun_at=lambda: self.begun,
        )

    def start(self, *, begins: bool = True) -> None:
        """An attempt starts, and its job begins at once or stays in the queue."""
        self.job.start()
        if begins:
            self.begin()

    def begin(self) -> None:
        self.begun = self.now

    def pass_minutes(self, minutes: float) -> None:
        self.now += timedelta(minutes=minutes)

    def in_minutes(self, at: datetime) -> float:
        return (at - NOON).total_seconds() / 60


def test_a_deadline_is_the_start_and_the_factor_times_the_latest_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.start()
    clock.pass_minutes(1)
    assert clock.in_minutes(clock.job.deadline()) == FACTOR * DEFAULT_ETA

    clock.job.estimated(10.0)
    assert clock.in_minutes(clock.job.deadline()) == 30.0
    assert clock.record.state.estimated_time == 10.0

    clock.job.estimated(4.0)
    clock.job.estimated(None)
    assert clock.in_minutes(clock.job.deadline()) == 12.0


def test_a_deadline_never_counts_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.start(begins=False)
    clock.job.estimated(10.0)
    clock.pass_minutes(100)
    clock.job.check()
    assert clock.in_minutes(clock.job.deadline()) == 130.0, "a hold is asked for as if the work began now"
    assert clock.job.latest() == NOON + timedelta(minutes=600)
    assert not clock.job.deadline_is_fixed()

    clock.begin()
    clock.pass_minutes(20)
    assert clock.in_minutes(clock.job.deadline()) == 130.0
    assert clock.job.latest() == clock.job.deadline()
    assert clock.job.deadline_is_fixed()
    clock.job.estimated(20.0)
    assert clock.in_minutes(clock.job.deadline()) == 160.0, "the cap counts from there too"


def test_the_queue_of_a_later_attempt_does_not_count_either(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.start()
    clock.job.estimated(10.0)
    clock.pass_minutes(20)
    clock.job.not_started()
    assert clock.in_minutes(clock.job.left_for_retry()) == 60.0
    clock.start(begins=False)
    clock.pass_minutes(300)
    assert clock.in_minutes(clock.job.left_for_retry()) == 360.0
    clock.begin()
    clock.pass_minutes(1)
    assert clock.in_minutes(clock.job.deadline()) == 350.0
    clock.job.not_started()
    assert clock.in_minutes(clock.job.left_for_retry()) == 360.0


def test_a_job_that_waits_in_the_queue_ends_with_the_cap_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.start(begins=False)
    clock.pass_minutes(600 - 0.001)
    clock.job.check()
    clock.pass_minutes(0.001)
    with pytest.raises(TaskFailed, match=r"waited in the queue for 10 hours") as failed:
        clock.job.check()
    assert failed.value.code is FailureCode.TIMEOUT


def test_a_run_that_began_before_counts_its_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, counts_from_processing=False)
    clock.start(begins=False)
    clock.job.estimated(10.0)
    clock.pass_minutes(7)
    assert clock.in_minutes(clock.job.deadline()) == 30.0
    assert clock.job.deadline_is_fixed()


def test_before_a_start_a_deadline_is_as_if_it_started_now(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.job.estimated(10.0)
    clock.pass_minutes(7)

    assert clock.in_minutes(clock.job.deadline()) == 7 + 30.0
    assert clock.in_minutes(clock.job.left_for_retry()) == 7 + 60.0


def test_no_deadline_of_an_earlier_attempt_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.start()
    clock.job.estimated(10.0)
    clock.pass_minutes(9)
    clock.job.not_started()

    assert clock.in_minutes(clock.job.deadline()) == 9 + 30.0
    assert clock.job.due() == clock.job.deadline()

    clock.pass_minutes(1)
    clock.start()
    clock.pass_minutes(1)
    assert clock.in_minutes(clock.job.deadline()) == 10 + 30.0


def test_the_whole_task_has_twice_its_longest_span_from_its_first_start(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.start()
    clock.job.estimated(10.0)
    clock.pass_minutes(50)
    clock.start()
    assert clock.in_minutes(clock.job.deadline()) == 60.0
    assert clock.in_minutes(clock.job.left_for_retry()) == 60.0

    clock.job.estimated(40.0)
    assert clock.in_minutes(clock.job.deadline()) == 50.0 + 120.0
    assert clock.in_minutes(clock.job.left_for_retry()) == 240.0

    clock.job.estimated(5.0)
    assert clock.in_minutes(clock.job.deadline()) == 50.0 + 15.0
    assert clock.in_minutes(clock.job.left_for_retry()) == 240.0, "the longest span counts, not the latest"

    clock.job.estimated(500.0)
    assert clock.in_minutes(clock.job.left_for_retry()) == 600.0, "and never more than the policy's cap"
    assert clock.in_minutes(clock.job.deadline()) == 600.0


def test_a_run_of_an_earlier_release_keeps_twice_its_first_span(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(workflow, "patched", lambda _: False)
    clock.start()
    clock.job.estimated(10.0)
    clock.job.estimated(100.0)

    assert clock.in_minutes(clock.job.deadline()) == 60.0
    assert clock.job.carry().longest_span_minutes is None


def test_the_cap_of_the_policy_is_never_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, cap=20.0)
    clock.start()
    clock.job.estimated(10.0)

    assert clock.in_minutes(clock.job.deadline()) == 20.0


def test_a_continued_run_goes_on_from_its_continuation(monkeypatch: pytest.MonkeyPatch) -> None:
    carried = ClockState(first_start=NOON, attempt_start=NOON, first_span_minutes=30.0, estimated_time=10.0)
    clock = Clock(monkeypatch, carried)
    clock.pass_minutes(5)

    assert clock.in_minutes(clock.job.deadline()) == 30.0
    assert clock.job.carry() == carried


def test_past_its_deadline_a_task_fails_and_says_how_long_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.start()
    clock.job.estimated(10.0)
    clock.record.state.status = TaskStatus.RUNNING
    clock.pass_minutes(30 - 0.001)
    clock.job.check()

    clock.pass_minutes(0.001)
    with pytest.raises(TaskFailed, match=r"did not end within 0:30:00 \(its deadline\)") as failed:
        clock.job.check()
    assert failed.value.code is FailureCode.TIMEOUT


def test_a_job_whose_state_cannot_be_read_fails_as_that_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.start()
    clock.unreadable = "The answer is no JSON."
    clock.job.check()

    clock.pass_minutes(FACTOR * DEFAULT_ETA)
    with pytest.raises(TaskFailed, match=r"\(its deadline\).* The answer is no JSON\.$") as failed:
        clock.job.check()
    assert failed.value.code is FailureCode.REPLY_INVALID


def test_between_two_attempts_the_whole_tasks_time_is_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.job.estimated(10.0)
    assert (clock.job.is_running(), clock.job.latest()) == (False, None)

    clock.start()
    clock.pass_minutes(5)
    assert (clock.job.is_running(), clock.job.latest()) == (True, clock.job.deadline())

    clock.job.not_started()
    assert not clock.job.is_running()
    assert clock.job.latest() == NOON + timedelta(minutes=60)


def test_one_that_waits_in_the_queue_for_too_long_is_recorded_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.start()
    clock.job.estimated(10.0)
    assert clock.in_minutes(clock.job.due()) == QUEUE_SLA
    clock.pass_minutes(QUEUE_SLA - 0.001)
    clock.job.check()
    assert clock.record.exceptions == []

    clock.pass_minutes(0.001)
    clock.job.check()
    clock.job.check()

    sentence = "Still queued after 5 minutes, longer than promised; the task goes on."
    assert clock.record.exceptions == [("queue_sla_missed", sentence)]
    assert clock.record.facts == [("queue_sla", sentence)]
    assert clock.job.due() == clock.job.deadline()


@pytest.mark.parametrize("status", [TaskStatus.RUNNING, TaskStatus.QUEUED])
def test_only_the_queue_is_measured_against_its_promise(monkeypatch: pytest.MonkeyPatch, status: TaskStatus) -> None:
    clock = Clock(monkeypatch)
    clock.start()
    clock.record.state.status = status
    clock.pass_minutes(QUEUE_SLA + 1)
    clock.job.check()

    assert bool(clock.record.exceptions) == (status is TaskStatus.QUEUED)


def test_a_deadline_before_the_promise_of_the_queue_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, cap=2.0)
    clock.start()

    assert clock.in_minutes(clock.job.due()) == 2.0


def test_an_operator_reads_what_is_waited_for_and_until_when(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.start()
    clock.job.show_wait()

    assert clock.record.waits == [("ComfyUI: callback or poll", clock.job.deadline())]
    assert not clock.job.has_update()

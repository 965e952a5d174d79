"""A job that ended badly, and the next one (contract §1): which codes, how often, under which hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
from temporalio import workflow

from comfyui_temporal.contracts.calls import CallFor, JobCall, Post
from comfyui_temporal.contracts.comfyui import JobAccepted, JobCancelled, JobRequest, Resolution, TaskPriority
from comfyui_temporal.contracts.continuation import JobUpdate
from comfyui_temporal.contracts.errors import Answer, ErrorDetails, ExceptionCode, FailureCode, UnreadableReply
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.requests import RequestedJob, RequestOutcome
from comfyui_temporal.contracts.tasks import TaskStatus
from tests.workflows.books import Ending, ended
from tests.workflows.holds_in_memory import refusal
from tests.workflows.limits import limits_of
from tests.workflows.platform import Handle, Platform, scheduled, task_id_of
from workflows.alarm import Alarm
from workflows.attempts import Attempts
from workflows.earlier_life import EarlierLives
from workflows.failures import RowEnded
from workflows.job_clock import JobClock
from workflows.job_routes import IMAGE_ROUTES
from workflows.outside_call import OutsideCall
from workflows.step_labels import STEP_LABELS
from workflows.stop import Stop
from workflows.task_record import TaskRecord

Task = dict[str, Any]
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
BODY = JobRequest(
    task_id="t1",
    tenant_id="tenant",
    user_id="user",
    template_id="upscale",
    prompt="a cat",
    resolution=Resolution.HD,
    priority=TaskPriority.STANDARD,
    callback_url="http://gateway.test/callbacks/comfyui/t1",
)
NO_POLLS = {"poll_after_seconds": 86_400.0, "poll_at_most_seconds": 86_400.0}
RETRIED = [("gpu_preempted", False), ("lost", False), ("internal", True), ("gpu_on_fire", True)]
NOT_RETRIED = [
    ("gpu_out_of_memory", True),
    ("node_error", True),
    ("workflow_invalid", True),
    ("model_missing", True),
    ("cancelled", True),
    ("timeout", True),
    ("internal", False),
    ("gpu_on_fire", False),
]


async def start_failing(platform: Platform, kind: str, *, times: int = 1, **details: Any) -> Handle:
    """A task whose first jobs fail with these `error_details`."""
    task = platform.image() if kind == "image" else platform.training()
    route = "submit_job" if kind == "image" else "create_training"
    await platform.simulators.admin.comfyui.fault(
        "job_fail", route=route, task_id=task["task_id"], times=times, **details
    )
    return await platform.start(task)


def for_both(codes: list[tuple[str, bool]]) -> pytest.MarkDecorator:
    """Each code for an image, the first and the last for a training too: the decision is the same code's."""
    cases = [("image", *case) for case in codes] + [("training", *case) for case in (codes[0], codes[-1])]
    return pytest.mark.parametrize(("kind", "code", "retryable"), cases, ids=str)


@for_both(RETRIED)
async def test_a_job_that_may_be_retried_is_retried(
    brisk_platform: Platform, kind: str, code: str, retryable: bool
) -> None:
    handle = await start_failing(brisk_platform, kind, code=code, retryable=retryable)
    ending = await ended(brisk_platform, handle)
    assert ending.status is TaskStatus.COMPLETED
    assert ending.result["attempts"] == 2
    assert ending.result["error_details"] is None
    assert len(ending.result["credits"]["pre_deduct_ids"]) == 1, "both attempts go under the same hold"
    assert any(event.error and event.error.code == code for event in ending.events)


@for_both(NOT_RETRIED)
async def test_a_job_that_may_not_be_retried_fails_the_task_immediately(
    brisk_platform: Platform, kind: str, code: str, retryable: bool
) -> None:
    handle = await start_failing(
        brisk_platform, kind, code=code, retryable=retryable, message="it broke", node="KSampler"
    )
    ending = await ended(brisk_platform, handle)
    assert ending.code == ("internal" if code == "gpu_on_fire" else code)
    assert ending.result["attempts"] == 1
    assert ending.result["error_details"] == {
        "code": code,
        "message": "it broke",
        "retryable": retryable,
        "node": "KSampler",
    }
    assert ending.result["credits"]["returned"] == ending.result["credits"]["held"] > 0


@pytest.mark.parametrize("kind", ["image", "training"])
async def test_error_details_that_are_a_text_are_internal_and_not_retried(brisk_platform: Platform, kind: str) -> None:
    handle = await start_failing(brisk_platform, kind, as_text=True, message="out of coffee")
    ending = await ended(brisk_platform, handle)
    assert ending.code == "internal"
    assert ending.result["error_details"]["message"] == "out of coffee"
    assert ending.result["attempts"] == 1


async def test_a_training_that_fails_without_details_is_internal(brisk_platform: Platform) -> None:
    task = brisk_platform.training()
    await brisk_platform.simulators.admin.comfyui.fault(
        "job_lie", route="create_training", task_id=task["task_id"], fields={"training_status": "failed"}
    )
    ending = await ended(brisk_platform, await brisk_platform.start(task))
    assert ending.code == "internal"
    assert ending.result["attempts"] == 1


@pytest.mark.slow
async def test_three_more_attempts_follow_after_30_60_and_120_seconds_under_one_hold(slow_platform: Platform) -> None:
    comfyui = slow_platform.simulators.admin.comfyui
    handle = await slow_platform.start_waiting_image()
    for number, wait in enumerate((30, 60, 120), start=1):
        await comfyui.act((await slow_platform.job(handle)).run_id, "preempt")
        await slow_platform.until_settled(handle)
        assert (await slow_platform.progress(handle))["error_details"]["code"] == "gpu_preempted"
        await slow_platform.pass_time(handle, wait - 3)
        await slow_platform.until_settled(handle)
        assert (await slow_platform.progress(handle))["attempts"] == number
        await slow_platform.pass_time(handle, 4)
        await slow_platform.until_settled(handle)
        assert (await slow_platform.progress(handle))["attempts"] == number + 1
    await comfyui.act((await slow_platform.job(handle)).run_id, "preempt")
    ending = await ended(slow_platform, handle)
    assert ending.code == "gpu_preempted"
    assert ending.result["attempts"] == len(await comfyui.jobs(task_id_of(handle))) == 4
    assert len(ending.result["credits"]["pre_deduct_ids"]) == 1
    assert await keys_of(slow_platform, handle, "cancel_job") == [
        f"{task_id_of(handle)}:cancel:{n}" for n in range(1, 5)
    ]
    messages = [event.message or "" for event in ending.events if event.error]
    assert all(
        f"the next follows in {wait} s" in message for wait, message in zip((30, 60, 120), messages, strict=False)
    )


async def keys_of(platform: Platform, handle: Handle, route: str) -> list[str | None]:
    return [seen.key for seen in await platform.simulators.admin.comfyui.requests_seen(route, task_id_of(handle))]


async def test_a_job_that_only_says_it_failed_is_cancelled_before_the_next(brisk_platform: Platform) -> None:
    """It still runs: without the cancel two jobs would run for one task."""
    task = brisk_platform.image()
    comfyui = brisk_platform.simulators.admin.comfyui
    await comfyui.fault(
        "job_lie",
        route="submit_job",
        task_id=task["task_id"],
        at=0.0,
        fields={"error_details": {"code": "gpu_preempted", "message": "gone", "retryable": True}},
    )
    await comfyui.fault("job_stall", route="submit_job", task_id=task["task_id"], at=0.5)
    ending = await ended(brisk_platform, handle := await brisk_platform.start(task))
    assert ending.status is TaskStatus.COMPLETED
    first, second = await comfyui.jobs(task["task_id"])
    assert first.phase == "over"
    assert ending.result["job_id"] == second.run_id
    assert await keys_of(brisk_platform, handle, "cancel_job") == [f"{task['task_id']}:cancel:1"]
    assert await keys_of(brisk_platform, handle, "submit_job") == [f"{task['task_id']}:submit:{n}" for n in (1, 2)]


@pytest.mark.parametrize(("balance", "covered"), [(100_000, True), (40, False)], ids=["ample", "too short for both"])
async def test_a_dearer_job_tops_the_hold_up_first(brisk_platform: Platform, balance: int, covered: bool) -> None:
    tenant, user = f"tenant-{balance}", f"user-{balance}"
    await brisk_platform.simulators.admin.credits.set_balance(balance, tenant, user)
    task = brisk_platform.image(tenant_id=tenant, user_id=user)
    comfyui = brisk_platform.simulators.admin.comfyui
    await comfyui.fault("job_preempt", route="submit_job", task_id=task["task_id"])
    await comfyui.fault(
        "job_lie",
        route="submit_job",
        task_id=task["task_id"],
        nth=2,
        reply={"estimated_cost": 30},
        fields={"actual_cost": 30},
    )
    ending = await ended(brisk_platform, await brisk_platform.start(task))
    assert ending.status is TaskStatus.COMPLETED
    assert (ending.charged, ending.result["credits"]["held"]) == (30, 30)
    kinds = [entry.kind for entry in await brisk_platform.simulators.admin.credits.ledger(task["task_id"])]
    over_it = ["pre_deduct", "pre_deduct", "cancel", "commit"]
    assert kinds == (over_it if covered else ["pre_deduct", "cancel", "pre_deduct", "commit"])
    assert ("uncovered" in ending.exceptions) is not covered


async def test_a_dearer_job_whose_hold_the_quota_refuses_gives_up_no_cover(brisk_platform: Platform) -> None:
    """The points of the old hold would not help: the next hold is not asked for again without it."""
    task = brisk_platform.image()
    admin = brisk_platform.simulators.admin
    await admin.comfyui.fault("job_preempt", route="submit_job", task_id=task["task_id"])
    await admin.comfyui.fault(
        "job_lie", route="submit_job", task_id=task["task_id"], nth=2, reply={"estimated_cost": 30}
    )
    body = {"detail": {"code": "40302", "message": "authorization_quota_exceeded"}}
    refusal = {"status": 403, "body": body}
    await admin.credits.fault("answer", route="pre_deduct", task_id=task["task_id"], nth=2, **refusal)
    ending = await ended(brisk_platform, await brisk_platform.start(task))
    assert (ending.code, ending.charged) == ("quota_exceeded", 0)
    assert "uncovered" not in ending.exceptions
    assert [entry.kind for entry in await admin.credits.ledger(task["task_id"])] == ["pre_deduct", "cancel"]


async def test_a_cheaper_job_keeps_the_hold(brisk_platform: Platform) -> None:
    task = brisk_platform.image()
    comfyui = brisk_platform.simulators.admin.comfyui
    await comfyui.fault("job_preempt", route="submit_job", task_id=task["task_id"])
    lie = {"reply": {"estimated_cost": 5}, "fields": {"actual_cost": 5}}
    await comfyui.fault("job_lie", route="submit_job", task_id=task["task_id"], nth=2, **lie)
    ending = await ended(brisk_platform, await brisk_platform.start(task))
    assert (ending.charged, ending.result["credits"]["held"], ending.result["credits"]["returned"]) == (5, 24, 19)
    assert len(ending.result["credits"]["pre_deduct_ids"]) == 1


# Lost: the server no longer knows the job


@pytest.mark.parametrize("kind", ["image", "training"])
async def test_a_forgotten_job_is_lost_after_two_404_ten_seconds_apart(slow_platform: Platform, kind: str) -> None:
    slow_platform.policy = {"poll_after_seconds": 30.0, "poll_at_most_seconds": 30.0}
    comfyui = slow_platform.simulators.admin.comfyui
    handle = await slow_platform.start(slow_platform.image() if kind == "image" else slow_platform.training())
    await slow_platform.until_held(task_id_of(handle))
    await slow_platform.until_settled(handle)
    lost = await slow_platform.job(handle)
    await comfyui.act(lost.run_id, "forget")
    await slow_platform.pass_time(handle, 31)
    await slow_platform.until_settled(handle)
    assert (await slow_platform.progress(handle))["error_details"] is None, "one 404 proves nothing"
    for seconds in (11, 31):  # the second 404; the wait before the next attempt
        await slow_platform.pass_time(handle, seconds)
        await slow_platform.until_settled(handle)
    found = await slow_platform.job(handle)
    assert found.run_id != lost.run_id
    await comfyui.act(found.run_id, "finish")
    ending = await ended(slow_platform, handle)
    assert ending.status is TaskStatus.COMPLETED
    assert ending.result["attempts"] == 2
    assert [event.error.code for event in ending.events if event.error] == ["lost"]
    get = "get_job" if kind == "image" else "get_training"
    first, second = [seen for seen in await comfyui.requests_seen(get, task_id_of(handle)) if seen.status == 404]
    polls = await scheduled(handle, get)
    assert any(10 <= later - earlier < 14 for earlier, later in pairwise(polls)), (polls, first, second)


async def test_a_job_that_is_unknown_only_once_goes_on(slow_platform: Platform) -> None:
    slow_platform.policy = {"poll_after_seconds": 30.0, "poll_at_most_seconds": 30.0}
    comfyui = slow_platform.simulators.admin.comfyui
    body = {"detail": {"code": "40401", "message": "job_not_found"}}
    await comfyui.fault("answer", route="get_job", status=404, body=body)
    handle = await slow_platform.start_waiting_image()
    for seconds in (31, 11, 31):
        await slow_platform.pass_time(handle, seconds)
        await slow_platform.until_settled(handle)
    await comfyui.act((await slow_platform.job(handle)).run_id, "finish")
    ending = await ended(slow_platform, handle)
    assert ending.status is TaskStatus.COMPLETED
    assert ending.result["attempts"] == 1
    assert [seen.status for seen in await comfyui.requests_seen("get_job", task_id_of(handle))][:2] == [404, 200]


async def test_a_job_without_news_that_was_unknown_once_is_polled_with_pauses(slow_platform: Platform) -> None:
    """Its answers show nothing new: it was polled without a pause from then on, and one more 404 lost it."""
    slow_platform.policy = {"poll_after_seconds": 30.0, "poll_at_most_seconds": 30.0}
    comfyui = slow_platform.simulators.admin.comfyui
    body = {"detail": {"code": "40401", "message": "job_not_found"}}
    await comfyui.fault("callback_withhold", times=None)
    handle = await slow_platform.start_waiting_image()
    same = {"sequence": 0, "next_eta": None, "estimated_time": 60}
    await comfyui.fault("alter", route="get_job", times=None, fields=same)
    for nth, seconds in enumerate((31, 31, 11, 31, 31, 31, 11), start=1):
        if nth in (2, 6):
            await comfyui.fault("answer", route="get_job", status=404, body=body)
        await slow_platform.pass_time(handle, seconds)
        await slow_platform.until_settled(handle)

    statuses = [seen.status for seen in await comfyui.requests_seen("get_job", task_id_of(handle))]
    assert statuses == [200, 404, 200, 200, 200, 404, 200], "seven polls in three minutes"
    await comfyui.remove_faults()
    await comfyui.act((await slow_platform.job(handle)).run_id, "finish")
    ending = await ended(slow_platform, handle)
    assert (ending.status, ending.result["attempts"]) == (TaskStatus.COMPLETED, 1)


# Work without a result is no success


async def timed_out(platform: Platform, handle: Handle, minutes: float, lie: Task) -> Ending:
    """Let a job finish without a result; the task waits until its deadline, `minutes` from now."""
    job = await platform.job(handle)
    await platform.simulators.admin.comfyui.act(job.run_id, "lie", fields=lie)
    await platform.simulators.admin.comfyui.act(job.run_id, "finish")

    async def is_heard() -> bool:
        """The deadline counts from the first report of a job at work."""
        status: str = (await platform.progress(handle))["status"]
        return status == "running"

    await platform.until(is_heard)
    for part in (minutes / 2, minutes / 2 - 1):
        await platform.pass_time(handle, part * 60)
        await platform.until_settled(handle)
        assert (await platform.progress(handle))["status"] == "running"
    await platform.pass_time(handle, 2 * 60)
    return await ended(platform, handle)


async def test_an_image_delivered_without_urls_is_no_success(slow_platform: Platform) -> None:
    slow_platform.policy = NO_POLLS
    handle = await slow_platform.start_waiting_image()
    ending = await timed_out(slow_platform, handle, 24, {"result_urls": [], "estimated_time": 8})
    assert ending.code == "timeout"
    assert "task.running delivery" in ending.kinds


async def test_a_training_completed_without_a_model_is_no_success(slow_platform: Platform) -> None:
    slow_platform.policy = NO_POLLS
    handle = await slow_platform.start_training()
    await slow_platform.until_held(task_id_of(handle))
    await slow_platform.until_settled(handle)
    output: Task = {"model_path": None, "version": "1", "metrics": {}}
    ending = await timed_out(slow_platform, handle, 30, {"output": output, "estimated_time": 10})
    assert ending.code == "timeout"
    assert "task.running publishing" in ending.kinds


# A run that becomes long between two attempts


class ContinuedAsNew(Exception):
    """What ends a run that continues as new."""


class Pause:
    """Replaces all that a pause between two attempts needs. The run is long from `long_at` on."""

    limits = limits_of(retry_after_seconds=[60.0])

    def __init__(self, patch: pytest.MonkeyPatch, *, long_at: datetime) -> None:
        self.now, self._long_at = NOON, long_at
        self.waits = self
        patch.setattr(workflow, "now", lambda: self.now)
        patch.setattr(workflow, "patched", lambda _: True)
        patch.setattr(workflow, "wait_condition", self._wait_condition)

    async def _wait_condition(self, happened: Callable[[], bool]) -> None:
        assert happened()

    async def until(self, happened: Callable[[], bool], *, at: datetime, summary: str) -> None:
        while not happened() and self.now < at:
            self.now += timedelta(seconds=1)

    def raise_if_interrupted(self) -> None:
        pass

    def is_covered(self) -> bool:
        return True

    # Its clock and record

    def not_started(self) -> None:
        pass

    def left_for_retry(self) -> datetime:
        return NOON + timedelta(days=1)

    def job_failed(self, details: ErrorDetails | None) -> None:
        pass

    def publish(self, *_: Any, **__: Any) -> None:
        pass

    # As a run that continues as new

    def is_long(self) -> bool:
        return self.now >= self._long_at

    def has_waited(self) -> bool:
        return False

    async def continue_as_new_if_long(self) -> bool:
        if self.is_long():
            raise ContinuedAsNew
        return False


async def test_a_run_that_becomes_long_between_two_attempts_continues_before_the_pause_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pause without cover may last as long as an outage, and messages fill the history meanwhile."""
    pause = Pause(monkeypatch, long_at=NOON + timedelta(seconds=10))
    outside, record, clock = cast(OutsideCall, pause), cast(TaskRecord, pause), cast(JobClock, pause)
    job = RequestedJob(attempt=1, key="t1:submit:1", asked_at=NOON, job_id="j1", cancelled=True)
    attempts = Attempts(IMAGE_ROUTES, outside, record, clock, Stop(), Alarm(), [job], long_run=pause)
    preempted = ErrorDetails(code=FailureCode.GPU_PREEMPTED)
    with pytest.raises(ContinuedAsNew):
        await attempts.wait_to_retry(JobUpdate(job_id="j1", sequence=1, status=TaskStatus.RUNNING, error=preempted))

    assert pause.now == NOON + timedelta(seconds=10)
    assert attempts.retry_at == NOON + timedelta(seconds=60), "the next run goes on with the pause"


# A job whose id cannot be learned


class Unreadable:
    """Replaces the calls of a task and its record: ComfyUI's answers stay unreadable."""

    call_for = CallFor(task_id="t1", tenant_id="tenant", user_id="user", scene=Scene.IMAGE_GENERATE)
    labels = STEP_LABELS[Scene.IMAGE_GENERATE]

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []
        """Key, and whether it is an undo that asks."""
        self.exceptions: list[tuple[str, ExceptionCode, str | None]] = []

    async def until_answered(self, method: Any, post: Post[JobRequest], *, summary: str) -> Answer[Any]:
        assert method is IMAGE_ROUTES.submit
        self.asked.append((post.key, post.is_undo))
        return Answer(refusal=UnreadableReply(sentence="The answer is no JSON."))

    def record_exception(self, key: str, code: ExceptionCode, message: str, *, job_id: str | None) -> None:
        assert message.endswith("it runs out. The answer is no JSON.")
        self.exceptions.append((key, code, job_id))


async def test_a_job_whose_id_stays_unreadable_is_recorded_once() -> None:
    """It was asked for during 15 minutes."""
    calls = Unreadable()
    job = RequestedJob(attempt=1, key="t1:submit:1", request=BODY, asked_at=NOON)
    outside, record, clock = cast(OutsideCall, calls), cast(TaskRecord, calls), cast(JobClock, None)
    attempts = Attempts(IMAGE_ROUTES, outside, record, clock, Stop(), Alarm(), [job])
    for _ in range(2):
        await attempts.cancel_all("cancelled")

    assert calls.asked == [("t1:submit:1", True)]
    assert calls.exceptions == [("undo_job:1", ExceptionCode.UNDO_UNFINISHED, None)]
    assert (job.outcome, job.request) == (RequestOutcome.REFUSED, None)


class Stopped(Unreadable):
    """The task's row ends while a job is requested. ComfyUI answers the undo: with the job, or with a refusal."""

    earlier = EarlierLives()
    waits = SimpleNamespace(is_covered=lambda: True)

    def __init__(self, answer: Answer[Any], *, is_unsent: bool = False) -> None:
        super().__init__()
        self._answer, self._is_unsent = answer, is_unsent
        self.cancelled: list[str] = []

    def may_begin(self) -> None:
        pass

    def attempted(self, number: int) -> None:
        pass

    def key(self, step: str, n: int | str) -> str:
        return f"t1:{step}:{n}"

    async def setup(self, *_: Any, **__: Any) -> Answer[Any]:
        raise RowEnded(is_unsent=self._is_unsent)

    async def until_answered(self, method: Any, post: Post[JobRequest], *, summary: str) -> Answer[Any]:
        await super().until_answered(method, post, summary=summary)
        return self._answer

    async def in_background(self, method: Any, call: JobCall, **_: Any) -> Answer[JobCancelled]:
        assert method is IMAGE_ROUTES.cancel
        self.cancelled.append(call.job_id)
        return Answer(reply=JobCancelled())

    def record_exception(self, key: str, code: ExceptionCode, _: str, *, job_id: str | None) -> None:
        self.exceptions.append((key, code, job_id))


MADE = Answer[JobAccepted](reply=JobAccepted(job_id="j1", estimated_cost=24))


async def stopped_and_undone(monkeypatch: pytest.MonkeyPatch, calls: Stopped) -> None:
    monkeypatch.setattr(workflow, "now", lambda: NOON)
    monkeypatch.setattr(workflow, "patched", lambda _: True)
    monkeypatch.setattr(workflow, "wait", asyncio.wait)
    outside, record, clock = cast(OutsideCall, calls), cast(TaskRecord, calls), cast(JobClock, None)
    attempts = Attempts(IMAGE_ROUTES, outside, record, clock, Stop(), Alarm(), [])
    with pytest.raises(RowEnded):
        await attempts.submit(BODY)
    await attempts.cancel_all("the task had ended")


@pytest.mark.parametrize(("is_unsent", "cancelled"), [(False, ["j1"]), (True, [])], ids=["sent", "never sent"])
async def test_a_job_whose_request_was_stopped_is_cancelled_where_it_may_have_been_sent(
    monkeypatch: pytest.MonkeyPatch, is_unsent: bool, cancelled: list[str]
) -> None:
    """Else it would run for nobody. One that was never sent would be made by the repeat that asks for its id."""
    calls = Stopped(MADE, is_unsent=is_unsent)
    await stopped_and_undone(monkeypatch, calls)
    assert calls.cancelled == cancelled
    assert calls.asked == [("t1:submit:1", True)] * len(cancelled)


async def test_nothing_is_recorded_of_a_job_that_turns_out_to_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was made under its key, so nothing is left running that a person should look at."""
    calls = Stopped(Answer(refusal=refusal("template_not_found")))
    await stopped_and_undone(monkeypatch, calls)
    assert (calls.cancelled, calls.exceptions) == ([], [])

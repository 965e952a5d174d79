"""The newest state of a job: what is accepted, what is applied, and when ComfyUI is polled."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError, CancelledError, RetryState

from comfyui_temporal.contracts.calls import CallFor
from comfyui_temporal.contracts.comfyui import JobState
from comfyui_temporal.contracts.continuation import JobUpdate, WatchState
from comfyui_temporal.contracts.errors import Answer, ErrorDetails, FailureCode, Refusal
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.scenes import SCENES
from comfyui_temporal.contracts.size_budget import MAX_INBOX, MAX_READ_BYTES, MAX_SIGNAL_BYTES, SMALL_SIGNAL_BYTES
from comfyui_temporal.contracts.task_store import Heard, HeardOrder
from comfyui_temporal.contracts.tasks import TaskStatus
from comfyui_temporal.contracts.ticks import digest_of
from tests.workflows.limits import limits_of
from workflows.alarm import Alarm
from workflows.following import Following
from workflows.job_clock import JobClock
from workflows.job_routes import IMAGE_ROUTES
from workflows.job_watch import JobWatch
from workflows.outside_call import OutsideCall
from workflows.stop import Stop
from workflows.task_limits import TaskLimits
from workflows.task_record import TaskRecord

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
UNKNOWN = Refusal(code=FailureCode.LOST, message="job_not_found", http_status=404, sentence="There is no such job.")


class FakeRecord:
    """What the watch reports to its task's record."""

    def __init__(self) -> None:
        self.applied: list[tuple[int, bool]] = []
        """Sequence, and whether it is the attempt's first update."""
        self.published: list[tuple[int, bool]] = []
        """Sequence, and whether it is a new stage."""
        self.as_of: datetime | None = None
        """When the newest figures that the store had heard were news."""

    def apply(self, update: JobUpdate, *, attempt_changed: bool) -> None:
        self.applied.append((update.sequence, attempt_changed))

    def heard(self, update: JobUpdate, *, at: datetime) -> None:
        self.applied.append((update.sequence, False))
        self.as_of = at

    def publish_progress(self, update: JobUpdate, *, is_new_stage: bool) -> None:
        self.published.append((update.sequence, is_new_stage))


class Poll:
    """A poll in flight, answered by the test."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.answer: Answer[JobState] | Exception | None = None
        self.is_cancelled = False

    def done(self) -> bool:
        return self.answer is not None

    def result(self) -> Answer[JobState]:
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer is not None
        return self.answer

    def cancel(self) -> None:
        self.is_cancelled = True


class Look:
    """A look into the store, answered at once."""

    def __init__(self, heard: Heard | None) -> None:
        self._heard = heard

    def cancel(self) -> None:
        """Its answer is not read."""

    def done(self) -> bool:
        return True

    def result(self) -> Heard | None:
        return self._heard


class Polls:
    """Replaces the calls of a task; keeps each poll and each look."""

    call_for = CallFor(task_id="t1", tenant_id="tenant", user_id="user", scene=Scene.IMAGE_GENERATE)

    def __init__(self, limits: TaskLimits) -> None:
        self.all: list[Poll] = []
        self.looks: list[HeardOrder] = []
        self.heard: Heard | None = None
        """What the store has."""
        self.limits = limits

    def visible(self, method: Any, call: Any, *, summary: str, **_: Any) -> Poll:
        assert (method, summary) == (IMAGE_ROUTES.get, "4 poll")
        self.all.append(Poll(call.job_id))
        return self.all[-1]

    def local(self, method: Any, order: HeardOrder, *, summary: str) -> Look:
        assert summary == "4 ticks heard"
        self.looks.append(order)
        return Look(self.heard)


class Watched:
    """A job watch; the test moves its time."""

    def __init__(
        self, patch: pytest.MonkeyPatch, carried: WatchState | None = None, limits: TaskLimits | None = None
    ) -> None:
        self.now = NOON
        patch.setattr(workflow, "now", lambda: self.now)
        patch.setattr(workflow, "patched", lambda _: True)
        patch.setattr(workflow, "info", lambda: SimpleNamespace(continued_run_id=None))
        self.record, self.polls = FakeRecord(), Polls(limits or limits_of())
        self.updates: list[int] = []
        self.watch = JobWatch(
            "t1",
            IMAGE_ROUTES,
            cast(OutsideCall, self.polls),
            cast(TaskRecord, self.record),
            carried or WatchState(),
            lambda update: self.updates.append(update.sequence),
        )

    @property
    def state(self) -> WatchState:
        return self.watch.state

    def pass_seconds(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def receive(self, *messages: dict[str, Any]) -> None:
        for body in messages:
            self.watch.take(json.dumps(body).encode())
        self.watch.read()

    def due_in(self) -> float | None:
        due = self.watch.due()
        return None if due is None else (due - self.now).total_seconds()

    def ask(self) -> Poll:
        """Wait until a poll of ComfyUI is due; the poll."""
        due_in = self.due_in()
        assert due_in is not None
        self.pass_seconds(due_in - 0.001)
        before = len(self.polls.all)
        self.watch.check()
        assert len(self.polls.all) == before, "polled before it was due"
        self.pass_seconds(0.001)
        self.watch.check()
        return self.polls.all[-1]

    def look(self) -> None:
        """Wait until something is due, which is a look into the store, and take its answer."""
        due_in, before = self.due_in(), len(self.polls.looks)
        assert due_in is not None
        self.pass_seconds(due_in)
        self.watch.check()
        assert len(self.polls.looks) == before + 1
        self.watch.read()

    def answered(self, answer: Answer[JobState] | Exception) -> None:
        """Poll, and take this answer."""
        poll = self.ask()
        poll.answer = answer
        assert self.watch.has_update()
        self.watch.read()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched(monkeypatch)
    watched.watch.follow("j1")
    return watched


def said(sequence: int, job_status: str = "processing", **fields: Any) -> dict[str, Any]:
    return {
        "task_id": "t1",
        "job_id": "j1",
        "job_status": job_status,
        "sequence": sequence,
        "occurred_at": NOON.isoformat(),
        **fields,
    }


def delivered(sequence: int) -> dict[str, Any]:
    return said(sequence, "delivery", result_urls=["https://results/1.png"], actual_cost=24)


def state(sequence: int, **fields: Any) -> JobState:
    return JobState.model_validate({"job_id": "j1", "job_status": "processing", "sequence": sequence, **fields})


# What is accepted


@pytest.mark.parametrize(
    "payload",
    [
        None,
        b"",
        b"{",
        b"[]",
        b'"t1"',
        json.dumps(said(1) | {"task_id": "t2"}).encode(),
        json.dumps({"task_id": "t1"}).encode(),
        json.dumps(said(1, message="x" * MAX_SIGNAL_BYTES)).encode(),
    ],
    ids=["nothing", "empty", "no JSON", "a list", "a text", "another task's", "no job", "too large"],
)
def test_an_unreadable_or_foreign_message_is_counted_and_raises_nothing(
    watched: Watched, payload: bytes | None
) -> None:
    watched.watch.take(payload)

    assert MAX_SIGNAL_BYTES == 256 * 1024, "what the gateway takes"
    assert (watched.state.callbacks_refused, watched.state.inbox) == (1, [])
    assert not watched.watch.has_update()


@pytest.mark.parametrize("named", [{"task_id": "t1"}, {"task_id": ""}, {}], ids=["its task", "an empty one", "none"])
def test_a_message_that_names_its_task_or_none_is_taken(watched: Watched, named: dict[str, str]) -> None:
    body = {name: value for name, value in said(1).items() if name != "task_id"}
    watched.watch.take(json.dumps(body | named).encode())

    assert watched.watch.has_update()
    assert watched.state.callbacks_refused == 0


def test_a_full_inbox_keeps_the_newest_and_every_final_message(watched: Watched) -> None:
    watched.watch.take(json.dumps(delivered(1)).encode())
    for sequence in range(2, MAX_INBOX + 3):
        watched.watch.take(json.dumps(said(sequence)).encode())

    kept = [update.sequence for update in watched.state.inbox]
    assert kept == [1, *range(4, MAX_INBOX + 3)]
    assert len(kept) == MAX_INBOX == 256


def test_a_full_inbox_keeps_a_message_of_each_stage(watched: Watched) -> None:
    watched.watch.take(json.dumps(said(1, "queued")).encode())
    for sequence in range(2, 2 * MAX_INBOX):
        watched.watch.take(json.dumps(said(sequence)).encode())

    stages = [update.stage for update in watched.state.inbox]
    assert (len(stages), stages[0], set(stages[1:])) == (MAX_INBOX, "queued", {"processing"})


def test_an_inbox_full_of_final_messages_drops_the_oldest(watched: Watched) -> None:
    for sequence in range(MAX_INBOX + 1):
        watched.watch.take(json.dumps(delivered(sequence)).encode())

    assert [update.sequence for update in watched.state.inbox] == [*range(1, MAX_INBOX + 1)]


def test_a_run_reads_eight_of_the_largest_messages_and_then_small_ones_alone(watched: Watched) -> None:
    """Each is read again with every replay: a flood of them would make a workflow task too long."""
    largest = MAX_READ_BYTES // MAX_SIGNAL_BYTES
    for sequence in range(1, largest + 2):
        watched.watch.take(json.dumps(said(sequence)).encode().ljust(MAX_SIGNAL_BYTES))
    watched.watch.take(json.dumps(said(100)).encode().ljust(SMALL_SIGNAL_BYTES))

    assert largest == 8
    assert [update.sequence for update in watched.state.inbox] == [*range(1, 9), 100]
    assert watched.state.callbacks_refused == 1


def test_what_comes_before_its_job_is_known_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    watched.watch.take(json.dumps(said(3)).encode())
    assert not watched.watch.has_update()

    watched.watch.follow("j1")
    assert watched.watch.has_update()
    watched.watch.read()
    assert watched.record.applied == [(3, True)]


# What is applied


def test_the_newest_wins_and_an_older_or_repeated_message_changes_nothing(watched: Watched) -> None:
    watched.receive(said(2), said(1), said(2), said(5))

    assert watched.record.applied == [(2, True), (5, False)]
    assert watched.watch.newest is not None and watched.watch.newest.sequence == 5


def test_after_a_final_update_nothing_counts(watched: Watched) -> None:
    watched.receive(delivered(2), said(3, error_details={"code": "node_error", "message": "x"}))

    assert watched.record.applied == [(2, True)]
    assert watched.watch.newest is not None and watched.watch.newest.succeeded


def test_only_a_new_stage_and_a_final_update_are_published_immediately(watched: Watched) -> None:
    watched.receive(said(1, "queued"), said(2), said(3), delivered(4))

    assert watched.record.published == [(1, True), (2, True), (3, False), (4, True)]


def test_a_final_update_within_a_stage_is_published_immediately(watched: Watched) -> None:
    watched.receive(said(1), said(2, error_details={"code": "node_error", "message": "x"}))

    assert watched.record.published == [(1, True), (2, True)]


def test_each_applied_message_is_passed_on_once(watched: Watched) -> None:
    watched.receive(said(2), said(1))

    assert watched.updates == [2]


def test_another_jobs_messages_are_counted_and_never_applied(watched: Watched) -> None:
    watched.receive(said(1))
    watched.watch.follow("j2")
    watched.receive(said(7), said(1) | {"job_id": "j2"})

    assert watched.record.applied == [(1, True), (1, True)]
    assert watched.state.callbacks_refused == 1
    assert (watched.state.current, watched.state.earlier) == ("j2", ["j1"])


def test_the_same_job_followed_again_is_no_earlier_one(watched: Watched) -> None:
    watched.watch.follow("j1", first=JobUpdate(job_id="j1", sequence=0, status=TaskStatus.QUEUED))

    assert watched.state.earlier == []
    assert watched.record.applied == [(0, True)]


def test_a_new_job_begins_with_nothing_of_the_one_before(watched: Watched) -> None:
    watched.answered(Answer(refusal=UNKNOWN))
    poll = watched.ask()
    watched.pass_seconds(5)
    watched.watch.follow("j2")

    assert poll.is_cancelled and not watched.watch.is_polling()
    assert watched.watch.newest is None
    assert watched.state.unknown_since is None
    assert watched.due_in() == 30.0


# When ComfyUI is polled


def test_a_job_is_polled_after_a_silence_and_again_after_twice_that_up_to_a_limit(watched: Watched) -> None:
    silences = list[float | None]()
    for _ in range(4):
        silences.append(watched.due_in())
        watched.answered(Answer())

    assert silences == [30.0, 60.0, 120.0, 120.0]
    watched.receive(said(1))
    assert watched.due_in() == 30.0


def test_silence_counts_from_the_last_update(watched: Watched) -> None:
    watched.pass_seconds(20)
    watched.receive(said(1))

    assert watched.due_in() == 30.0


def test_a_message_during_a_poll_drops_no_poll(watched: Watched) -> None:
    poll = watched.ask()
    watched.receive(said(1))
    poll.answer = Answer(reply=state(2))
    watched.watch.read()

    assert watched.record.applied == [(1, True), (2, False)]


def test_a_limit_below_the_first_silence_shortens_none(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch, limits=limits_of(poll_after_seconds=40.0, poll_at_most_seconds=10.0))
    watched.watch.follow("j1")

    assert watched.due_in() == 40.0
    watched.answered(Answer())
    assert watched.due_in() == 40.0


@pytest.mark.parametrize(("eta_seconds", "silence"), [(10, 30.0), (90, 90.0), (500, 120.0)])
def test_what_is_expected_stretches_the_silence_up_to_its_limit(
    watched: Watched, eta_seconds: float, silence: float
) -> None:
    watched.receive(said(1, next_eta=(NOON + timedelta(seconds=eta_seconds)).isoformat()))

    assert watched.due_in() == silence


async def test_a_poll_in_flight_is_dropped_at_the_end_of_its_job(watched: Watched) -> None:
    """Where ComfyUI is away it would be repeated for as long as the task is settled."""
    poll = watched.ask()
    watched.watch.take(json.dumps(delivered(2)).encode())
    following = Following(watched.watch, cast(JobClock, None), Stop(), Alarm(), [], cast(Any, None))

    assert (await following.job_end()).succeeded
    assert poll.is_cancelled


def test_one_poll_at_a_time_of_the_current_job(watched: Watched) -> None:
    assert watched.ask().job_id == "j1"
    assert watched.due_in() is None
    assert watched.watch.is_polling()
    assert not watched.watch.has_update()
    watched.pass_seconds(1_000)
    watched.watch.check()
    assert len(watched.polls.all) == 1


def test_nothing_is_polled_before_there_is_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    assert watched.due_in() is None

    watched.watch.started(watched.now)
    watched.pass_seconds(1_000)
    watched.watch.check()
    assert watched.polls.all == []


def test_a_trainings_silence_counts_from_its_start(watched: Watched) -> None:
    watched.pass_seconds(20)
    watched.watch.started(watched.now)

    assert watched.due_in() == 30.0


def test_work_that_was_seen_before_its_start_counts_from_there(watched: Watched) -> None:
    """A server without a start route works from the beginning on."""
    watched.receive(said(1))
    watched.pass_seconds(60)
    start = watched.now
    watched.pass_seconds(1)
    watched.watch.started(start)

    assert watched.watch.begun_at() == start


def test_work_that_was_seen_after_its_start_counts_from_when_it_was_seen(watched: Watched) -> None:
    start = watched.now
    watched.pass_seconds(1)
    watched.receive(said(1))
    watched.pass_seconds(1)
    watched.watch.started(start)

    assert watched.watch.begun_at() == start + timedelta(seconds=1)


def test_an_older_run_counts_work_that_was_seen_before_its_start_from_when_it_was_seen(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its history holds the timers of that deadline: with others it would be stuck."""
    monkeypatch.setattr(workflow, "patched", lambda _: False)
    watched.receive(said(1))
    seen = watched.now
    watched.pass_seconds(60)
    watched.watch.started(watched.now)

    assert watched.watch.begun_at() == seen


@pytest.mark.parametrize("seen_before", [True, False])
def test_a_job_that_worked_before_its_id_was_known_counts_from_its_attempt_at_the_earliest(
    watched: Watched, seen_before: bool
) -> None:
    """A run that was reset gets the callbacks of the job that it is about to request."""
    watched.receive(said(1) | {"job_id": "j2"})
    seen = watched.now
    watched.pass_seconds(60)
    start = watched.now if seen_before else seen - timedelta(seconds=1)
    watched.watch.follow("j2", since=start)

    assert watched.watch.begun_at() == (start if seen_before else seen)


def test_a_poll_is_applied_like_any_other_update(watched: Watched) -> None:
    watched.answered(Answer(reply=state(4)))

    assert watched.record.applied == [(4, True)]
    assert not watched.watch.is_polling()
    assert watched.due_in() == 30.0


def test_a_poll_with_nothing_new_makes_the_next_silence_longer(watched: Watched) -> None:
    watched.receive(said(4))
    watched.answered(Answer(reply=state(4)))

    assert watched.record.applied == [(4, True)]
    assert watched.due_in() == 60.0


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """A job that reported half an hour ago, and was heard of in the store since."""
    watched = Watched(monkeypatch, limits=limits_of(short_way=True))
    watched.watch.follow("j1")
    watched.receive(said(4))
    watched.pass_seconds(1_800)
    watched.state.last_news_at = watched.now
    return watched


def test_a_poll_that_shows_what_ticks_have_shown_ends_the_polls_for_half_an_hour(ticking: Watched) -> None:
    ticking.answered(Answer(reply=state(4)))

    assert ticking.due_in() == 30.0, "the store is looked into, before a poll after 60 s"


@pytest.fixture
def expected_late(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """A job that expects to be done in ten minutes: it is polled after 120 s, and first looked for after 30 s."""
    watched = Watched(monkeypatch, limits=limits_of(short_way=True))
    watched.watch.follow("j1")
    watched.receive(said(4, next_eta=(NOON + timedelta(minutes=10)).isoformat()))
    return watched


def test_a_job_that_ticks_again_after_a_look_that_heard_nothing_is_not_polled(expected_late: Watched) -> None:
    expected_late.look()
    newest, [order] = expected_late.watch.newest, expected_late.polls.looks
    assert newest is not None and order.digest == digest_of(newest), "only ticks that are like it are heard"
    assert expected_late.due_in() == 90.0
    expected_late.polls.heard = Heard(sequence=90, progress=60.0, seconds_ago=1.0)
    expected_late.look()

    assert expected_late.polls.all == []
    assert expected_late.record.applied == [(4, True), (90, False)]
    assert expected_late.due_in() == 29.0


@pytest.mark.parametrize("scene", Scene)
def test_the_figures_of_a_job_that_ticks_are_as_old_as_a_silence_before_a_poll_at_most(
    monkeypatch: pytest.MonkeyPatch, scene: Scene
) -> None:
    spec = SCENES[scene]
    silence = {"poll_after_seconds": spec.poll_after_seconds, "poll_at_most_seconds": spec.poll_at_most_seconds}
    watched = Watched(monkeypatch, limits=limits_of(short_way=True, **silence))
    watched.watch.follow("j1")
    next_eta = NOON + timedelta(days=3)
    watched.receive(said(1, next_eta=next_eta.isoformat()))
    for sequence in range(2, 6):
        watched.polls.heard = Heard(sequence=sequence, progress=1.0, next_eta=next_eta, seconds_ago=1.0)
        watched.look()
        assert watched.record.as_of is not None
        due = watched.watch.due()
        assert due is not None and due - watched.record.as_of == timedelta(seconds=spec.poll_after_seconds)
    assert watched.polls.all == []


def test_a_job_that_stays_silent_is_polled_after_a_second_look(expected_late: Watched) -> None:
    expected_late.look()
    expected_late.look()
    expected_late.watch.check()

    assert len(expected_late.polls.looks) == 2
    assert [poll.job_id for poll in expected_late.polls.all] == ["j1"]


def test_one_look_at_a_time_and_no_poll_beside_it(expected_late: Watched) -> None:
    """The store is slow: its answer may make the poll needless."""
    expected_late.pass_seconds(30)
    expected_late.watch.check()
    assert expected_late.due_in() is None
    expected_late.pass_seconds(90)
    expected_late.watch.check()

    assert (len(expected_late.polls.looks), expected_late.polls.all) == (1, [])


@pytest.fixture
def half_lost(expected_late: Watched) -> Watched:
    """ComfyUI answered 404 once; a second one would end the job in ten seconds."""
    expected_late.look()
    expected_late.look()
    expected_late.watch.check()
    [poll] = expected_late.polls.all
    poll.answer = Answer(refusal=UNKNOWN)
    expected_late.watch.read()
    assert expected_late.due_in() == 10.0
    return expected_late


def test_a_job_that_ticks_after_a_404_is_known(half_lost: Watched) -> None:
    """Seen: the second 404 ended it as lost. A signal in between keeps it."""
    half_lost.polls.heard = Heard(sequence=90, progress=60.0, seconds_ago=4.0)
    half_lost.look()

    assert len(half_lost.polls.all) == 1
    assert half_lost.due_in() == 26.0
    assert half_lost.record.applied[-1] == (90, False)


@pytest.mark.parametrize(
    "heard", [None, Heard(sequence=90, progress=60.0, seconds_ago=12.0)], ids=["nothing", "before"]
)
def test_a_job_that_was_not_heard_since_a_404_is_lost_with_the_second(half_lost: Watched, heard: Heard | None) -> None:
    half_lost.polls.heard = heard
    half_lost.look()
    half_lost.watch.check()
    half_lost.polls.all[1].answer = Answer(refusal=UNKNOWN)
    half_lost.watch.read()

    newest = half_lost.watch.newest
    assert newest is not None and newest.error is not None and newest.error.code == "lost"


@pytest.mark.parametrize("seconds_ago", [None, 100.0, 330.0], ids=["nothing", "since the 404", "before"])
def test_what_was_heard_while_a_second_404_was_awaited_decides_whether_the_job_is_lost(
    half_lost: Watched, seconds_ago: float | None
) -> None:
    """Seen: a job that ticked all the time ended as lost, where the poll took five minutes."""
    half_lost.look()
    half_lost.watch.check()
    half_lost.pass_seconds(300)
    half_lost.polls.all[1].answer = Answer(refusal=UNKNOWN)
    half_lost.polls.heard = Heard(sequence=90, progress=60.0, seconds_ago=seconds_ago) if seconds_ago else None
    half_lost.watch.read()
    assert len(half_lost.polls.looks) == 4
    half_lost.watch.read()

    newest = half_lost.watch.newest
    assert newest is not None
    assert (newest.error is None) == (seconds_ago == 100.0)


def test_a_loss_whose_look_is_dropped_as_the_run_continues_is_confirmed_at_once(half_lost: Watched) -> None:
    """Seen: the job was polled again after the usual pause, half an hour for a training."""
    half_lost.look()
    half_lost.watch.check()
    half_lost.pass_seconds(300)
    half_lost.polls.all[1].answer = Answer(refusal=UNKNOWN)
    half_lost.watch.read()
    half_lost.watch.stop_polling()
    due_in = half_lost.due_in()
    assert due_in is not None and due_in <= 0.0
    half_lost.watch.check()
    half_lost.polls.all[2].answer = Answer(refusal=UNKNOWN)
    half_lost.watch.read()

    newest = half_lost.watch.newest
    assert newest is not None and newest.error is not None and newest.error.code == "lost"


@pytest.mark.parametrize("answer", ["the same state", "unknown", "unreadable"])
def test_one_last_poll_is_made_before_a_timeout(ticking: Watched, answer: str) -> None:
    answers: dict[str, Answer[JobState] | Exception] = {
        "the same state": Answer(reply=state(4)),
        "unknown": Answer(refusal=UNKNOWN),
        "unreadable": UNREADABLE,
    }
    deadline = ticking.now
    assert ticking.watch.asks_before_timeout(deadline)
    [poll] = ticking.polls.all
    ticking.pass_seconds(1)
    assert ticking.watch.asks_before_timeout(deadline), "its answer is awaited"
    poll.answer = answers[answer]
    ticking.watch.read()

    assert not ticking.watch.asks_before_timeout(deadline)
    assert len(ticking.polls.all) == 1

    ticking.pass_seconds(60)
    assert ticking.watch.asks_before_timeout(ticking.now), "a later deadline has a last poll of its own"


def test_a_job_that_reported_to_its_run_is_not_polled_before_a_timeout(ticking: Watched) -> None:
    """Its task ends at the deadline: no answer is awaited."""
    ticking.receive(said(5))

    assert not ticking.watch.asks_before_timeout(ticking.now)
    assert ticking.polls.all == []


def test_a_poll_that_was_dropped_is_not_read(watched: Watched) -> None:
    poll = watched.ask()
    watched.watch.stop_polling()
    watched.watch.stop_polling()
    poll.answer = Answer(reply=state(4))
    watched.watch.read()

    assert poll.is_cancelled
    assert watched.record.applied == []


# Jobs that are lost, and answers that cannot be read


def failed_with(cause: Exception) -> ActivityError:
    error = ActivityError(
        "Activity task failed",
        scheduled_event_id=1,
        started_event_id=2,
        identity="worker",
        activity_type="get_job",
        activity_id="1",
        retry_state=RetryState.NON_RETRYABLE_FAILURE,
    )
    error.__cause__ = cause
    return error


UNREADABLE = failed_with(ApplicationError("No JSON.", type=FailureCode.REPLY_INVALID))


def test_a_job_that_is_unknown_twice_ten_seconds_apart_is_lost(watched: Watched) -> None:
    watched.receive(said(3))
    watched.answered(Answer(refusal=UNKNOWN))
    assert watched.due_in() == 10.0
    assert watched.watch.newest is not None and not watched.watch.newest.is_final

    watched.answered(Answer(refusal=UNKNOWN))

    newest = watched.watch.newest
    assert newest.error == ErrorDetails(code="lost", message="ComfyUI no longer knows the job.", retryable=True)
    assert (newest.sequence, newest.succeeded) == (3, False)


def test_a_job_that_never_sent_a_message_can_be_lost_too(watched: Watched) -> None:
    for _ in range(2):
        watched.answered(Answer(refusal=UNKNOWN))

    newest = watched.watch.newest
    assert newest is not None and newest.error is not None and newest.error.code == "lost"
    assert (newest.job_id, newest.sequence, newest.status) == ("j1", 0, TaskStatus.QUEUED)


def test_a_message_in_between_shows_that_the_job_is_known(watched: Watched) -> None:
    watched.answered(Answer(refusal=UNKNOWN))
    watched.receive(said(3))
    assert watched.due_in() == 30.0

    watched.answered(Answer(refusal=UNKNOWN))
    assert watched.watch.newest is not None and not watched.watch.newest.is_final


def test_an_answer_without_news_in_between_shows_that_the_job_is_known(watched: Watched) -> None:
    watched.receive(said(3))
    watched.answered(Answer(refusal=UNKNOWN))
    watched.answered(Answer(reply=state(3)))
    assert watched.due_in() == 120.0, "as after any answer without news"

    watched.answered(Answer(refusal=UNKNOWN))
    assert watched.watch.newest is not None and not watched.watch.newest.is_final
    watched.answered(Answer(refusal=UNKNOWN))
    assert watched.watch.newest.is_final


@pytest.mark.parametrize("answer", ["unreadable", "refused"])
def test_what_is_no_second_404_is_repeated_with_the_usual_pauses(watched: Watched, answer: str) -> None:
    refused = UNKNOWN.model_copy(update={"code": FailureCode.NOT_AUTHORIZED})
    watched.answered(Answer(refusal=UNKNOWN))
    pauses = list[float | None]()
    for _ in range(3):
        pauses.append(watched.due_in())
        watched.answered(UNREADABLE if answer == "unreadable" else Answer(refusal=refused))
    assert pauses == [10.0, 120.0, 120.0]

    watched.answered(Answer(refusal=UNKNOWN))
    assert watched.watch.newest is not None and watched.watch.newest.is_final, "nothing shows that it is known"


def test_a_last_poll_soon_after_a_404_does_not_put_the_second_look_off(watched: Watched) -> None:
    watched.answered(Answer(refusal=UNKNOWN))
    watched.pass_seconds(4)
    watched.watch._ask()
    watched.polls.all[-1].answer = Answer(refusal=UNKNOWN)
    watched.watch.read()
    assert watched.watch.newest is None
    assert watched.due_in() == 6.0


def test_another_refusal_is_no_loss(watched: Watched) -> None:
    for _ in range(2):
        watched.answered(Answer(refusal=UNKNOWN.model_copy(update={"code": FailureCode.NOT_AUTHORIZED})))

    assert watched.watch.newest is None


def test_answers_that_stay_unreadable_for_a_quarter_of_an_hour_end_the_job(watched: Watched) -> None:
    watched.answered(UNREADABLE)
    since = watched.now
    while watched.watch.newest is None:
        assert watched.state.unreadable == "No JSON."
        watched.answered(UNREADABLE)
    assert watched.now - since == timedelta(minutes=15), "polled after 1 minute, then every 2"
    assert watched.watch.newest.error == ErrorDetails(code="reply_invalid", message="No JSON.")


@pytest.mark.parametrize("heals_by", ["a poll", "a callback", "another job"])
def test_a_readable_answer_restarts_the_count(watched: Watched, heals_by: str) -> None:
    watched.answered(UNREADABLE)
    if heals_by == "a poll":
        watched.answered(Answer())
    elif heals_by == "a callback":
        watched.receive(said(1))
    else:
        watched.watch.follow("j2")

    assert (watched.state.unreadable, watched.state.unreadable_since) == ("", None)


def test_silence_is_not_unreadable(watched: Watched) -> None:
    watched.answered(failed_with(ApplicationError("away", type=FailureCode.COMFYUI_UNAVAILABLE)))

    assert (watched.state.unreadable, watched.due_in()) == ("", 60.0)


def test_a_poll_that_was_cancelled_says_nothing(watched: Watched) -> None:
    watched.answered(failed_with(CancelledError("cancelled")))

    assert watched.state.silence_seconds == 0.0
    assert watched.state.unreadable == ""


def test_a_continued_run_goes_on_from_its_continuation(monkeypatch: pytest.MonkeyPatch) -> None:
    carried = WatchState(current="j1", last_news_at=NOON - timedelta(seconds=10), silence_seconds=60.0)
    watched = Watched(monkeypatch, carried)

    assert watched.due_in() == 50.0
    assert watched.watch.carry() is carried

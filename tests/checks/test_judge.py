"""The shared rules see each violation, and find none where all is well; only what is exempt by name passes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from temporalio.api.enums.v1 import EventType as HistoryEventType
from temporalio.api.enums.v1 import WorkflowTaskFailedCause
from temporalio.api.history.v1 import HistoryEvent

from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.task_events import EventType, TaskEvent
from comfyui_temporal.contracts.task_store import TaskRow, TaskState
from comfyui_temporal.contracts.tasks import CreditsSummary, SettlementState, TaskStatus
from proof.checks.finished_task import Charges, Exempt, Expected, FinishedTask, Rule
from proof.checks.judge import NotCollected, judge
from proof.checks.money import SAY_UNKNOWN
from proof.simulators.credits_profile import CONTRACT, FIELD

NOW = datetime.now(UTC)
ALL_EVIDENCE: dict[str, Any] = {"result": {"status": "completed"}, "histories": [], "snapshot_files": []}
DOUBLED = ("hold_doubled", {"amount": 24})
UNKNOWN = ("settlement_unknown", {"cost": 24})
ONCE = Expected(is_delivered=True)


def event(seq: int, kind: EventType, **given: Any) -> TaskEvent:
    fixed: dict[str, Any] = {"task_id": "t", "task_type": Scene.IMAGE_GENERATE, "attempt": 1, "ts": NOW, "cursor": "c"}
    return TaskEvent(event_id=f"t:{seq}", seq=seq, event=kind, **{"status": TaskStatus.RUNNING, **fixed, **given})


def events(status: TaskStatus = TaskStatus.COMPLETED) -> list[TaskEvent]:
    """Held 24, of which 4 came back when 20 were charged; or nothing."""
    if status is TaskStatus.COMPLETED:
        settled = event(3, EventType.CREDITS, credits_delta=4)
        end = event(4, EventType.COMPLETED, result_urls=["https://x.example/"])
        return [event(1, EventType.ACCEPTED), event(2, EventType.CREDITS, credits_delta=-24), settled, end]
    end = event(2, EventType.FAILED if status is TaskStatus.FAILED else EventType.CANCELLED)
    return [event(1, EventType.ACCEPTED), end]


def row(status: TaskStatus = TaskStatus.COMPLETED, **given: Any) -> TaskState:
    is_completed = status is TaskStatus.COMPLETED
    credits: dict[str, Any] = {"held": 24, "charged": 20, "returned": 4} if is_completed else {}
    credits |= {"settlement": SettlementState.SETTLED, **given.pop("credits", {})}
    urls = ["https://x.example/"] if is_completed else []
    return TaskState(
        **{"version": 1, "status": status, "credits": CreditsSummary(**credits), "result_urls": urls, **given}
    )


def task(status: TaskStatus = TaskStatus.COMPLETED, **given: Any) -> FinishedTask:
    """A task that is as it must be; `given` changes it."""
    kept = given.pop("events", events(status))
    is_completed = status is TaskStatus.COMPLETED
    fixed: dict[str, Any] = {
        "task_id": "t",
        "profile": CONTRACT,
        "row": row(status),
        "last_seq": len(kept),
        "events": kept,
        "streamed": kept,
        "charges": Charges(20, commits=1) if is_completed else Charges(),
        "holds": [hold(24, "committed")] if is_completed else [],
        **ALL_EVIDENCE,
        "result": {"status": status.value},
    }
    return FinishedTask(**{**fixed, **given})


def hold(amount: int, phase: str) -> Any:
    return SimpleNamespace(pre_deduct_id=f"hold-{phase}", amount=amount, phase=phase)


def job(*, is_over: bool, **given: Any) -> Any:
    return SimpleNamespace(**{"run_id": "job-1", "is_over": is_over, "kind": "image", "state": {}, **given})


def stored(state: TaskState, *, resolution: str = "hd") -> TaskRow:
    """The row as the store returns it."""
    claimed: dict[str, Any] = {"tenant_id": "tenant", "user_id": "u", "template_id": "t", "resolution": resolution}
    claimed |= {"scene": Scene.IMAGE_GENERATE, "priority": "standard", "workflow_id": "w", "input_sha256": "0"}
    claimed |= {"first_execution_run_id": "r", "created_at": NOW, "updated_at": NOW, "ended_at": NOW, "last_seq": 4}
    return TaskRow(task_id="t", **claimed, **state.model_dump())


def broken(judged: FinishedTask, expected: Expected = ONCE, *exempt: Exempt) -> set[Rule]:
    return {finding.rule for finding in judge(judged, expected, exempt)}


@pytest.mark.parametrize("status", [TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED])
def test_nothing_is_found_where_all_is_well(status: TaskStatus) -> None:
    assert broken(task(status)) == set()


def test_evidence_that_was_not_collected_has_to_be_exempt_by_name() -> None:
    for name, exemption in (("result", Exempt.RESULT), ("streamed", Exempt.STREAM), ("histories", Exempt.HISTORY)):
        missing: dict[str, Any] = {name: None}
        with pytest.raises(NotCollected):
            judge(task(**missing))
        assert broken(task(**missing), ONCE, exemption) == set()


@pytest.mark.parametrize(
    ("charges", "rule"),
    [
        (Charges(40, commits=2), Rule.DOUBLE_CHARGE),
        (Charges(24, commits=1), Rule.DOUBLE_CHARGE),
        (Charges(19, commits=1), Rule.MISCHARGE),
        (Charges(0), Rule.MISCHARGE),
        (Charges(20, commits=1, charges=1), Rule.MISCHARGE),
    ],
)
def test_another_charge_than_is_reported_is_found(charges: Charges, rule: Rule) -> None:
    assert rule in broken(task(charges=charges))
    assert rule in broken(task(charges=charges, records=[UNKNOWN])), "a record excuses no wrong figure"


@pytest.mark.parametrize(("taken", "is_exempt"), [(40, True), (19, False)])
def test_a_charge_that_may_have_been_sent_twice_is_exempt_by_name(taken: int, is_exempt: bool) -> None:
    """Never one of fewer points than are reported."""
    charged = task(charges=Charges(taken, charges=2))
    assert broken(charged, Expected()) != set()
    assert (broken(charged, Expected(), Exempt.CHARGED_TWICE) == set()) is is_exempt


@pytest.mark.parametrize(
    ("cost", "charged", "shortfall", "records", "rules"),
    [
        (20, 20, 0, [], set()),
        (21, 20, 0, [], {Rule.MISCHARGE}),
        (19, 20, 0, [], {Rule.DOUBLE_CHARGE}),
        (30, 24, 0, [], set()),
        (24, 20, 4, [("shortfall", {"shortfall": 4})], set()),
        (24, 20, 4, [], {Rule.MISREPORTED}),
        (24, 20, 4, [("shortfall", {"shortfall": 3})], {Rule.MISREPORTED}),
    ],
)
def test_an_image_costs_what_its_job_says_and_no_more_than_was_held(
    cost: int, charged: int, shortfall: int, records: list[Any], rules: set[Rule]
) -> None:
    delivered = job(is_over=True, kind="image", state={"result_urls": ["u"], "actual_cost": cost})
    credits = {"charged": charged, "returned": 24 - charged, "shortfall": shortfall}
    kept = events()
    kept[2] = event(3, EventType.CREDITS, credits_delta=24 - charged)
    judged = task(
        row=stored(row(credits=credits)),
        charges=Charges(charged, commits=1),
        jobs=[delivered],
        records=records,
        events=kept,
    )
    assert broken(judged) == rules
    assert broken(judged, ONCE, Exempt.PRICE) == set()


@pytest.mark.parametrize(("taken", "is_right"), [(119, False), (180, True), (210, True), (211, False)])
def test_a_training_costs_its_last_jobs_hours_and_those_resumed_from(taken: int, is_right: bool) -> None:
    first = job(is_over=True, run_id="job-0", kind="training", state={"checkpoint": {"gpu_hours_used": 0.5}})
    last = job(is_over=True, kind="training", state={"output": {"model_path": "m"}, "gpu_hours_used": 2.0})
    kept = events()
    kept[1:3] = [
        event(2, EventType.CREDITS, credits_delta=-300),
        event(3, EventType.CREDITS, credits_delta=300 - taken),
    ]
    judged = task(
        row=stored(row(credits={"held": 300, "charged": taken, "returned": 300 - taken}), resolution="base"),
        charges=Charges(taken, commits=1),
        holds=[hold(300, "committed")],
        jobs=[first, last],
        events=kept,
    )
    assert (broken(judged) == set()) is is_right


def test_events_whose_times_do_not_rise_are_found() -> None:
    kept = events()
    kept[2] = kept[2].model_copy(update={"ts": NOW - timedelta(seconds=1)})
    assert broken(task(events=kept)) == {Rule.BROKEN_EVENTS}


def test_a_charge_for_nothing_is_found() -> None:
    assert Rule.DOUBLE_CHARGE in broken(task(TaskStatus.CANCELLED, charges=Charges(18, commits=1)))


def test_an_unknown_charge_has_to_be_recorded_and_reported_as_unknown() -> None:
    unknown = row(credits={"settlement": SettlementState.UNKNOWN, "charged": None, "returned": None})
    assert Rule.MISCHARGE in broken(task(row=unknown))
    assert Rule.MISCHARGE in broken(task(row=unknown, records=[DOUBLED]))
    for code in SAY_UNKNOWN:
        assert broken(task(row=unknown, records=[(code, {})])) == set()
    half_known = row(credits={"settlement": SettlementState.UNKNOWN, "charged": None, "returned": 4})
    assert Rule.MISREPORTED in broken(task(row=half_known, records=[UNKNOWN]))


def test_credits_that_contradict_themselves_are_found() -> None:
    assert Rule.MISREPORTED in broken(task(row=row(credits={"returned": 5})))
    assert Rule.MISREPORTED in broken(task(row=row(credits={"settlement": SettlementState.OPEN})))


@pytest.mark.parametrize(
    ("open_points", "records", "is_true"),
    [
        ([24], [DOUBLED], True),
        ([24], [], False),
        ([24], [UNKNOWN], False),
        ([30], [DOUBLED], False),
        ([24, 24], [DOUBLED], False),
        ([24, 24], [DOUBLED, DOUBLED], True),
        ([], [DOUBLED], False),
        ([24], [("hold_doubled", {})], False),
    ],
)
def test_a_doubled_hold_is_exempt_by_its_record_and_its_points(
    open_points: list[int], records: list[Any], is_true: bool
) -> None:
    holds = [hold(24, "committed"), *(hold(points, "open") for points in open_points)]
    assert (Rule.LEAKED_HOLD not in broken(task(holds=holds, records=records, profile=FIELD))) is is_true
    still = Rule.LEAKED_HOLD in broken(task(holds=holds, records=records))
    assert still is bool(open_points), "with keys and ids every hold can be named and given back"
    assert Rule.LEAKED_HOLD not in broken(task(holds=holds, records=records), ONCE, Exempt.HOLD_EXPIRES)


def test_points_in_events_that_do_not_add_up_are_found() -> None:
    kept = events()
    kept[2] = event(3, EventType.CREDITS, credits_delta=5)
    assert broken(task(events=kept)) == {Rule.MISCHARGE}
    assert broken(task(events=kept), ONCE, Exempt.POINTS_IN_EVENTS) == set()


def test_a_result_that_was_not_paid_for_is_found() -> None:
    assert broken(task(row=row(result_urls=[]))) == {Rule.UNPAID_RESULT}
    assert broken(task(row=row(result_urls=[])), Expected()) == set(), "another caller may have committed its hold"
    failed = TaskStatus.FAILED
    assert broken(task(failed, row=row(failed, result_urls=["https://x.example/"]))) == {Rule.UNPAID_RESULT}
    assert broken(task(failed, result={"status": "failed", "output": {}, "result_urls": ["u"]})) >= {Rule.UNPAID_RESULT}
    early = [*events()[:2], event(3, EventType.CREDITS, credits_delta=4, result_urls=["u"]), events()[3]]
    assert broken(task(events=early)) == {Rule.UNPAID_RESULT}


def test_a_job_that_runs_on_is_found() -> None:
    assert broken(task(jobs=[job(is_over=False)])) == {Rule.ORPHAN_JOB}
    assert broken(task(jobs=[job(is_over=False)]), ONCE, Exempt.JOB_RUNS_OUT) == set()
    assert broken(task(jobs=[job(is_over=True)]), Expected(jobs=2)) == {Rule.WRONG_END}


@pytest.mark.parametrize(
    "kept",
    [
        events()[:3],
        events()[1:],
        [*events()[:1], *events()[2:]],
        [*events(), event(5, EventType.RUNNING)],
        [*events(), event(5, EventType.COMPLETED)],
        [*events()[:3], event(4, EventType.FAILED)],
        [event(1, EventType.ACCEPTED, progress=5.0), *events()[1:]],
        [],
    ],
)
def test_an_event_history_that_is_not_whole_is_found(kept: list[TaskEvent]) -> None:
    assert Rule.BROKEN_EVENTS in broken(task(events=kept))


def test_a_row_that_counts_other_events_is_found() -> None:
    assert broken(task(last_seq=5)) == {Rule.BROKEN_EVENTS}


@pytest.mark.parametrize(
    ("streamed", "rule"),
    [
        ([1, 2, 3], Rule.LOST_EVENT),
        ([], Rule.LOST_EVENT),
        ([1, 2, 3, 3, 4], Rule.REPEATED_EVENT),
        ([2, 1, 3, 4], Rule.REPEATED_EVENT),
        ([1, 2, 3, 4, 5], Rule.REPEATED_EVENT),
        ([*events()[:3], event(4, EventType.COMPLETED)], Rule.BROKEN_EVENTS),
    ],
)
def test_a_client_must_receive_each_event_once_and_in_order(streamed: list[Any], rule: Rule) -> None:
    assert broken(task(streamed=[1, 2, 3, 4])) == set()
    assert broken(task(streamed=streamed)) == {rule}


def test_a_task_that_is_missing_or_open_or_ended_wrongly_is_found() -> None:
    assert Rule.NOT_ENDED in broken(task(has_ended=False))
    assert Rule.NOT_ENDED in broken(task(TaskStatus.FAILED, row=None, events=[]))
    assert broken(task(TaskStatus.FAILED, row=None, events=[]), ONCE, Exempt.NO_ROW) == set()
    assert broken(task(), Expected(ends=frozenset({TaskStatus.CANCELLED}))) == {Rule.WRONG_END}


def test_a_result_that_differs_from_the_row_is_found() -> None:
    assert broken(task(result={"status": "failed"})) == {Rule.WRONG_END}
    kept = row().model_dump(mode="json")
    assert broken(task(result={"status": "completed", "credits": kept["credits"]})) == set()
    assert broken(task(result={"status": "completed", "credits": {}})) == {Rule.MISREPORTED}


def test_a_dataset_copy_that_is_left_is_found() -> None:
    assert broken(task(snapshot_files=["a.png"])) == {Rule.LEFT_SNAPSHOT}
    assert broken(task(snapshot_files=["a.png"]), ONCE, Exempt.SNAPSHOT) == set()


def failed_task(cause: str) -> list[HistoryEvent]:
    failed = HistoryEvent(event_type=HistoryEventType.EVENT_TYPE_WORKFLOW_TASK_FAILED)
    named = f"WORKFLOW_TASK_FAILED_CAUSE_{cause}"
    failed.workflow_task_failed_event_attributes.cause = WorkflowTaskFailedCause.Value(named)
    return [failed]


def test_a_workflow_task_that_failed_is_found() -> None:
    unhandled = failed_task("WORKFLOW_WORKER_UNHANDLED_FAILURE")
    assert broken(task(histories=[[], unhandled])) == {Rule.FAILED_WORKFLOW_TASK}
    assert broken(task(histories=[unhandled]), ONCE, Exempt.BUG) == set()
    assert broken(task(histories=[failed_task("UNHANDLED_COMMAND")])) == set()
    reset = failed_task("RESET_WORKFLOW")
    assert broken(task(histories=[reset])) == {Rule.FAILED_WORKFLOW_TASK}
    assert broken(task(histories=[reset]), ONCE, Exempt.RESET) == set()


def test_a_run_that_leaves_a_call_behind_or_does_not_explain_itself_is_found() -> None:
    scheduled = HistoryEvent(event_id=5, event_type=HistoryEventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED)
    scheduled.activity_task_scheduled_event_attributes.activity_type.name = "commit"
    assert broken(task(histories=[[scheduled]])) == {Rule.BROKEN_HISTORY}
    scheduled.user_metadata.summary.data = b'"5 commit"'
    assert broken(task(histories=[[scheduled]])) == set()
    continued = HistoryEvent(event_type=HistoryEventType.EVENT_TYPE_WORKFLOW_EXECUTION_CONTINUED_AS_NEW)
    assert broken(task(histories=[[scheduled, continued]])) == {Rule.BROKEN_HISTORY}
    scheduled.activity_task_scheduled_event_attributes.activity_type.name = "write"
    assert broken(task(histories=[[scheduled, continued]])) == set()

"""The budget of what a run carries (contracts/size_budget.py), filled to its limit: every list, every text, both kinds.

Input from outside is read by the production models, so that a limit that they lack shows here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from temporalio import workflow

from activities.earlier_runs import MOST_BYTES
from comfyui_temporal.contracts.calls import CallFor, SnapshotOrder
from comfyui_temporal.contracts.comfyui import (
    JobCallback,
    JobRequest,
    ManifestReference,
    SnapshotReference,
    TrainingCallback,
)
from comfyui_temporal.contracts.continuation import (
    Continuation,
    DatasetState,
    HeldProgress,
    ImageRun,
    JobUpdate,
    PriceState,
    RecordState,
    TrainingRun,
    WatchState,
)
from comfyui_temporal.contracts.credits import Estimate, PreDeductRequest
from comfyui_temporal.contracts.errors import Answer, ErrorDetails, ExceptionCode, FailureCode
from comfyui_temporal.contracts.give_back import EarlierRunsRead, Orphans, OwnEnd
from comfyui_temporal.contracts.lives import EarlierLife
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.policy import Policy
from comfyui_temporal.contracts.prices import PriceTable
from comfyui_temporal.contracts.requests import HoldState, RequestedJob, older_than_kept
from comfyui_temporal.contracts.size_budget import (
    MAX_ATTEMPTS,
    MAX_EXCEPTIONS,
    MAX_INBOX,
    MAX_INBOX_BYTES,
    MAX_KEPT_HOLDS,
    MAX_LORAS,
    MAX_TABLE_ENTRIES,
    MAX_UNWRITTEN,
    MAX_UNWRITTEN_BYTES,
    PAYLOAD_BYTES,
    json_bytes,
)
from comfyui_temporal.contracts.start_answer import Reached, StartAnswer
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import (
    Fact,
    PriceToConfirm,
    RowSeen,
    TaskException,
    TaskRow,
    TaskState,
    TaskWrite,
    TrainedModel,
)
from comfyui_temporal.contracts.tasks import CreditsSummary, ImageResult, TaskStatus, TrainingProgress, TrainingResult
from store.lives import MOST_EARLIER_RUNS
from workflows.backlog import LEFT_OUT, Backlog
from workflows.inbox import Inbox

NOW = datetime(2026, 5, 4, 9, 15, 0, 123_456, tzinfo=UTC)
ID = "i" * 64
OUTSIDE_ID = "o" * 128
CONTROLS = "\x01" * 3_000
"""Six bytes a character in JSON: the longest form of a text."""
TEXTS = [
    pytest.param(CONTROLS, id="controls"),
    pytest.param('"' * 20_000, id="quotes", marks=pytest.mark.slow),
    pytest.param("🦁" * 3_000, id="four bytes"),
]
URLS = [f"https://example.org/{n:02}/".ljust(2_048, "x") for n in range(64)]


@pytest.fixture(autouse=True)
def _newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run that replays nothing."""
    monkeypatch.setattr(workflow, "patched", lambda _: True)


def through_json(model: Any) -> Any:
    """As a continued run gets it."""
    return type(model).model_validate_json(model.model_dump_json())


def error_details(text: str) -> dict[str, Any]:
    return {"code": text, "message": text, "node": text, "retryable": True}


def job_callback(n: int, text: str, **fields: Any) -> JobUpdate:
    body = {"job_id": OUTSIDE_ID, "job_status": "processing", "sequence": n, "next_eta": NOW.isoformat()}
    body |= {"stage_progress": 12.345678901234567, "estimated_time": 1e4 / 3, "queue_position": 2**53, "gpu_slots": 99}
    return JobUpdate.of_job(JobCallback.model_validate(body | {"error_details": error_details(text)} | fields))


def delivery(n: int) -> JobUpdate:
    return job_callback(n, "", job_status="delivery", error_details=None, result_urls=URLS, actual_cost=10**9)


def training_callback(n: int, text: str, **fields: Any) -> JobUpdate:
    uri = f"file:///{n}/".ljust(2_048, "x")
    body: dict[str, Any] = {"training_id": OUTSIDE_ID, "training_status": "running", "sequence": n}
    body |= {"training_stage": "data_ingest", "gpu_hours": 1e5 / 3, "gpu_hours_used": 1e5 / 3}
    body["checkpoint"] = {"uri": uri, "epoch": 2**53, "step": 2**53, "gpu_hours_used": 1e5 / 3}
    body["output"] = {"model_path": uri, "version": text, "metrics": {f"{m}{text}": 1e300 / 3 for m in range(80)}}
    return JobUpdate.of_training(
        TrainingCallback.model_validate(body | {"error_details": error_details(text)} | fields)
    )


# The parts, each filled as a run fills it


def filled_holds() -> HoldState:
    """Thirty days of renewals, each of them refused a few times by a balance that is short."""
    state = HoldState(estimated=10**9, next_renewal_at=NOW, uncovered_since=NOW)
    for renewal in range(1_440):
        for attempt in range(4):
            hold = state.add(
                4 * renewal + attempt + 1,
                PreDeductRequest(
                    task_id=ID,
                    template_id=ID,
                    tenant_id=ID,
                    user_id=ID,
                    scene=Scene.IMAGE_GENERATE,
                    estimated_cost=10**9,
                    expire_in=3_600,
                ),
                NOW + timedelta(minutes=30 * renewal + attempt),
            )
            hold.refused = attempt < 3
        hold.pre_deduct_id, hold.amount, hold.resolved = f"{renewal:06}".ljust(128, "h"), 10**9, renewal < 1_438
    state.leave_out_old()
    return through_json(state)  # type: ignore[no-any-return]


def fact(key: str, event: EventType = EventType.CREDITS, **fields: Any) -> Fact:
    return Fact(
        **{
            "key": key,
            "event": event,
            "ts": NOW,
            "attempt": 4,
            "status": TaskStatus.RUNNING,
            "stage": "checkpointing",
            "progress": 12.345678901234567,
            "next_eta": NOW,
            "queue_position": 2**53,
            **fields,
        }
    )


def filled_record(text: str, credits: CreditsSummary) -> RecordState:
    """The store has been away for thirty days; only the newest fact is certain to be in its place."""
    details = ErrorDetails.model_validate(error_details(text))
    confirmation = PriceToConfirm(
        estimated_cost=10**9,
        options=estimate(text).options or [],
        current_balance=10**9,
        suggest_topup=10**9,
        confirm_by=NOW,
    )
    newest = training_callback(1, text, error_details=None)
    state = TaskState(
        version=10**6,
        status=TaskStatus.RUNNING,
        stage="checkpointing",
        job_id=OUTSIDE_ID,
        credits=credits,
        confirmation=confirmation,
        output=newest.output,
        error=details,
    )
    record = RecordState(state=state, last_shown="x" * 200, last_news_at=NOW, last_progress_at=NOW)
    record.held_back = HeldProgress(job_id=OUTSIDE_ID, sequence=2**53)
    backlog = Backlog(record)
    for n in range(400):
        backlog.add(
            fact(f"held:{n}", credits_delta=-(10**9), balance_after=10**9, message="1000000000 points are held.")
        )
        backlog.add(fact(f"given_back:{n}", credits_delta=10**9, message="1000000000 points were given back."))
        backlog.add(
            fact(f"checkpoint:{OUTSIDE_ID}:{n}", EventType.CHECKPOINT, message="Checkpoint at epoch 1, step 2.")
        )
        backlog.add(fact(f"{OUTSIDE_ID}:{n}", EventType.RUNNING, job_id=OUTSIDE_ID, sequence=n))
        backlog.add(fact(f"retry:{n}", EventType.RUNNING, error=details, message=details.message))
        backlog.add(fact(f"confirm:{n}", confirmation=confirmation, message="confirm_price is waited for."))
    for n in range(20):
        for code in (*ExceptionCode, *FailureCode):
            backlog.add_exception(exception(code, n, details.message))
    return through_json(record)  # type: ignore[no-any-return]


def exception(code: str, n: int, message: str) -> TaskException:
    at = NOW + timedelta(seconds=n)
    return TaskException(
        key=f"{code}:{at.isoformat()}", code=code, message=message, ts=at, details={"pre_deduct_id": OUTSIDE_ID}
    )


def filled_watch(make: Callable[..., JobUpdate], text: str) -> WatchState:
    state = WatchState(
        current=OUTSIDE_ID, newest=make(0, text, error_details=None), earlier=[OUTSIDE_ID] * MAX_ATTEMPTS
    )
    inbox = Inbox(state)
    for n in range(1, 300):
        inbox.put(make(n, text, error_details=None if n % 2 else error_details(text)))
        if make is job_callback and n % 10 == 0:
            inbox.put(delivery(n))
    return through_json(state)  # type: ignore[no-any-return]


def estimate(text: str) -> Estimate:
    option = {"priority": "standard", "total_cost": 10**9, "eta_minutes": 1e5 / 3, "note": text}
    return Estimate.model_validate(
        {
            "selected_cost": 10**9,
            "calculation_basis": {f"n{i}": 1e5 for i in range(50_000)},
            "extras": {f"{n}{text}": 1 for n in range(1_000)},
            "audit_id": text,
            "current_balance": 10**9,
            "options": [option] * 2_000,
        }
    )


def policy() -> Policy:
    entries = {f"{n:04}".ljust(64, "x"): 10**6 for n in range(MAX_TABLE_ENTRIES // 2)}
    return Policy(
        prices=PriceTable(extras=entries, base_models=entries),
        callback_url="https://" + "c" * 2_000,
        poll_after_seconds=30,
        poll_at_most_seconds=120,
        deadline_factor=3,
        cap_minutes=43_200,
        queue_sla_minutes=3,
        retry_after_seconds=[120.0] * (MAX_ATTEMPTS - 1),
        dataset_roots=["s3://" + "b" * 250] * 8,
    )


def carried(make: Callable[..., JobUpdate], text: str) -> Continuation:
    holds = filled_holds()
    ids = [hold.pre_deduct_id for hold in holds.granted_holds() if hold.pre_deduct_id]
    credits = CreditsSummary(estimated=10**9, held=10**9, pre_deduct_ids=ids[-MAX_KEPT_HOLDS:], pre_deduct_count=1_440)
    jobs = [
        RequestedJob(attempt=n, key=f"{ID}:submit:{n}", asked_at=NOW, job_id=OUTSIDE_ID, cancelled=True)
        for n in range(MAX_ATTEMPTS)
    ]
    uri = "s3://" + "x" * 2_043
    manifest = ManifestReference(uri=uri, sha256="0" * 64, file_count=10_000, total_bytes=10**11)
    snapshot = SnapshotReference(dataset_id=ID, snapshot_uri=uri, manifest=manifest)
    newest = training_callback(1, text)
    return Continuation(
        policy=policy(),
        record=filled_record(text, credits),
        watch=filled_watch(make, text),
        hold=holds,
        jobs=jobs,
        price=PriceState(resume_from=uri, checkpoint=newest.checkpoint, asked_at_checkpoint=uri),
        dataset=DatasetState(snapshot=snapshot, is_asked=True),
        models=[TrainedModel(model_id=ID, model_path=uri, sha256="0" * 64) for _ in range(MAX_LORAS)],
    )


IDS = {"task_id": ID, "tenant_id": ID, "user_id": ID, "template_id": ID}


def most_of(text: str, limit_bytes: int) -> str:
    return text.encode()[:limit_bytes].decode("utf-8", "ignore")


def image_run(text: str) -> ImageRun:
    values = [text[:120] for _ in range(60)]
    while len(repr({"negative_prompt": values}).encode()) > 32_000:
        values.pop()
    control = {"image_url": text[:2_048], "strength": 10 / 3, "kind": text[:64]}
    unblank = "".join(character for character in text if character > " ") or "x" * 2_048
    return ImageRun(
        **IDS,
        prompt=most_of(text, 16 * 1024),
        controls=[control] * 16,
        extras={"negative_prompt": values},
        loras=[
            {"model_url": f"https://x/{unblank[:2_038]}", "sha256": f"{n}" * 64, "strength": 4 / 3}
            for n in range(MAX_LORAS)
        ],
        max_credits=10**9,
        carried=carried(job_callback, text),
    )


def training_run(text: str) -> TrainingRun:
    values = [text[:120] for _ in range(60)]
    while len(repr({"x": values}).encode()) > 32_000:
        values.pop()
    return TrainingRun(
        **IDS,
        dataset={"dataset_id": ID, "source_uri": text[:2_048], "manifest": {"uri": text[:2_048], "sha256": "0" * 64}},
        hyperparameters={"epochs": 10**6, "batch_size": 10**6, "learning_rate": 1 / 3, "x": values},
        resume_from=text[:2_048],
        max_credits=10**9,
        carried=carried(training_callback, text),
    )


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("run", [image_run, training_run])
def test_a_run_at_its_worst_fits_its_budget(run: Callable[[str], ImageRun | TrainingRun], text: str) -> None:
    worst = run(text)
    assert worst.carried is not None
    parts = {name: json_bytes(getattr(worst.carried, name)) for name in ("policy", "record", "watch", "hold", "price")}
    assert json_bytes(worst) <= PAYLOAD_BYTES, parts


@pytest.mark.parametrize("text", TEXTS)
def test_the_last_write_of_a_long_backlog_fits(text: str) -> None:
    """The end of an image: its addresses in the row and in the event, and the whole backlog."""
    record = filled_record(text, CreditsSummary())
    record.state.result_urls = URLS
    Backlog(record).add(fact("end", EventType.COMPLETED, result_urls=URLS, is_end=True))
    write = TaskWrite(
        task_id=ID,
        first_execution_run_id=ID,
        state=record.state,
        facts=record.unwritten,
        exceptions=record.exceptions,
    )
    assert json_bytes(write) <= PAYLOAD_BYTES
    assert record.unwritten[-1].key == "end"


def filled_row(state: TaskState) -> TaskRow:
    """Of a training that was renewed for thirty days: no list of its row is cut."""
    return TaskRow(
        **state.model_dump(),
        **IDS,
        scene=Scene.MODEL_TRAIN,
        priority="standard",
        resolution="base",
        workflow_id=ID,
        first_execution_run_id=ID,
        input_sha256="0" * 64,
        created_at=NOW,
        updated_at=NOW,
        last_seq=1,
        run_id=ID,
        given_back_by=ID,
        hold_ids=[f"{n:06}".ljust(128, "h") for n in range(1_440)],
        job_ids=[f"{n:06}".ljust(128, "o") for n in range(MAX_ATTEMPTS)],
    )


def test_the_input_of_a_give_back_fits() -> None:
    run = training_run(CONTROLS)
    assert run.carried is not None
    row = filled_row(run.carried.record.state)
    call_for = CallFor(task_id=ID, tenant_id=ID, user_id=ID, scene=Scene.MODEL_TRAIN)
    left = Orphans(
        row=row,
        how="terminated",
        holds=run.carried.hold.asked,
        jobs=run.carried.jobs,
        snapshot=SnapshotOrder(call_for=call_for, dataset_id=ID, source_uri="s3://" + "x" * 2_043),
        own_end=OwnEnd(status=TaskStatus.COMPLETED, message=CONTROLS[:340], result_urls=URLS, output=row.output),
    )
    assert json_bytes(left) <= PAYLOAD_BYTES // 2


def test_what_an_attempt_has_read_of_many_earlier_runs_fits() -> None:
    """Each run made four jobs. The room for unanswered ones is enough for the largest."""
    made = [
        RequestedJob(attempt=n, key=f"{ID}:submit:{n}", asked_at=NOW, job_id=f"{n}".ljust(128, "o"))
        for n in range(4 * MOST_EARLIER_RUNS)
    ]
    run_ids = [f"{n}".ljust(36, "r") for n in range(MOST_EARLIER_RUNS)]
    assert json_bytes(EarlierRunsRead(run_ids=run_ids, made=made)) <= PAYLOAD_BYTES - MOST_BYTES
    body = JobRequest.model_validate(
        image_run(CONTROLS).model_dump(include=set(JobRequest.model_fields))
        | {"callback_url": "https://x", "loras": []}
    )
    job = RequestedJob(attempt=1, key=f"{ID}:submit:1", request=body, asked_at=NOW)
    assert json_bytes(job) <= MOST_BYTES


@pytest.mark.parametrize("text", TEXTS)
def test_what_a_run_reads_of_its_row_fits(text: str) -> None:
    run = training_run(text)
    assert run.carried is not None
    life = EarlierLife(lives=MAX_ATTEMPTS, given_back_by=ID)
    seen = RowSeen(life=life, row=filled_row(run.carried.record.state), told_points=-(10**9), life_seconds=1e6 / 3)
    assert json_bytes(seen) <= PAYLOAD_BYTES // 4


@pytest.mark.parametrize("text", TEXTS)
def test_results_and_answers_of_a_run_fit(text: str) -> None:
    run = training_run(text)
    assert run.carried is not None
    state = run.carried.record.state.model_copy(update={"result_urls": URLS})
    shared = {"task_id": ID, "status": state.status, "attempts": 4, "error_details": state.error}
    assert state.confirmation is not None
    answers = [
        ImageResult(**shared, credits=state.credits, job_id=OUTSIDE_ID, result_urls=URLS),
        TrainingResult(**shared, credits=state.credits, training_id=OUTSIDE_ID, output=state.output),
        TrainingProgress(**shared, job_id=OUTSIDE_ID, confirmation=state.confirmation.shown()),
        StartAnswer(reached=Reached.ENDED, state=state),
    ]
    for answer in answers:
        assert json_bytes(answer) <= PAYLOAD_BYTES // 4, type(answer)


def test_an_estimate_whose_numbers_grow_when_rewritten_keeps_what_is_used() -> None:
    answer = Answer[Estimate](reply=estimate(CONTROLS))
    assert json_bytes(answer) < 4_096
    kept = through_json(answer).reply
    assert (kept.selected_cost, kept.current_balance, len(kept.options)) == (10**9, 10**9, 8)


# What is left out is counted


def test_holds_that_are_over_are_counted_and_numbers_go_on() -> None:
    holds = filled_holds()
    assert holds.asked_count == 1_440 * 4
    assert holds.granted_before + len(holds.granted_holds()) == 1_440
    assert [hold.pre_deduct_id for hold in holds.granted_holds()][-1] == "001439".ljust(128, "h")
    assert [hold.n for hold in holds.asked if not hold.resolved] == [1_439 * 4, 1_440 * 4], "open holds are kept"
    assert len(holds.asked) <= MAX_KEPT_HOLDS + 2


@pytest.mark.parametrize(("left_out", "older"), [(0, []), (3, ["e1", "e2"]), (4, ["e1"]), (5, []), (9, [])])
def test_what_is_older_than_the_kept_holds_and_was_not_counted_is_an_earlier_lifes(
    left_out: int, older: list[str]
) -> None:
    in_order = ["e1", "e2", "o1", "o2", "o3", "o4", "o5"]
    assert older_than_kept(in_order, {"o4", "o5"}, left_out) == older


def test_what_the_first_release_carried_is_counted_from_its_list() -> None:
    state = HoldState.model_validate_json(
        json.dumps({"asked": [json.loads(hold.model_dump_json()) for hold in filled_holds().asked]})
    )
    assert state.asked_count == 1_440 * 4


def test_facts_say_how_many_are_missing() -> None:
    record = RecordState()
    backlog = Backlog(record)
    for n in range(3_000):
        backlog.add(fact(f"held:{n}", message="24 points are held."))
    backlog.add(fact("settled"))
    backlog.add(fact("end", EventType.COMPLETED, is_end=True))
    waiting = record.unwritten
    assert sum(json_bytes(each) for each in waiting) <= MAX_UNWRITTEN_BYTES
    [marker] = [each for each in waiting if each.key.startswith(LEFT_OUT)]
    assert waiting[0] is marker
    kept = len(waiting) - 1
    assert marker.message == f"{3_002 - kept} events were left out while the task store was away."
    assert [each.key for each in waiting[-3:]] == ["held:2999", "settled", "end"]


def test_progress_is_left_out_only_within_a_stage() -> None:
    record = RecordState()
    backlog = Backlog(record)
    progress = partial(fact, event=EventType.RUNNING, job_id="j1", message=None)
    backlog.add(progress("j1:1", sequence=1, stage="data_ingest"))
    for n in range(2, MAX_UNWRITTEN // 2 + 20):
        backlog.add(progress(f"j1:{n}", sequence=n, stage="training"))
        backlog.add(fact(f"checkpoint:j1:{n}", EventType.CHECKPOINT, message="Checkpoint."))

    keys = [each.key for each in record.unwritten]
    assert keys[0] == "j1:1" and "j1:2" not in keys
    assert len(keys) == MAX_UNWRITTEN and not any(key.startswith(LEFT_OUT) for key in keys)


def test_what_is_being_written_is_not_touched() -> None:
    record = RecordState()
    backlog = Backlog(record)
    for n in range(600):
        backlog.add(fact(f"held:{n}", message="24 points are held."))
    for n in range(MAX_EXCEPTIONS + 2):
        backlog.add_exception(exception("uncovered", n, "short"))
    facts, exceptions = backlog.take()
    for n in range(600, 1_200):
        backlog.add(fact(f"held:{n}", message="24 points are held."))
        backlog.add_exception(exception("uncovered", n, "short"))
    assert record.unwritten[: len(facts)] == facts and record.exceptions[: len(exceptions)] == exceptions
    backlog.written()
    assert record.unwritten[-1].key == "held:1199"
    keys = [each.key for each in [*facts, *record.unwritten]]
    assert len(set(keys)) == len(keys), "a known key would write nothing"
    kept = {key for key in keys if not key.startswith(LEFT_OUT)}
    assert len(kept) + sum(int(key.rpartition(":")[2]) for key in keys if key.startswith(LEFT_OUT)) == 1_200
    records = [*exceptions, *record.exceptions]
    counted = sum(int(each.details.get("left_out", 0)) for each in records)
    named = [each for each in records if "left_out" not in each.details]
    assert counted + len(named) == MAX_EXCEPTIONS + 2 + 600
    assert len({each.key for each in records}) == len(records)


def while_a_full_write_hangs() -> tuple[RecordState, Backlog]:
    """A thousand facts, of which as many as have room are being written."""
    record = RecordState()
    backlog = Backlog(record)
    for n in range(1_000):
        backlog.add(fact(f"held:{n}", message="24 points are held."))
    assert record.unwritten[0].key.startswith(LEFT_OUT)
    backlog.take()
    return record, backlog


def test_while_a_full_write_hangs_the_newest_fact_waits_with_the_number_of_the_rest() -> None:
    record, backlog = while_a_full_write_hangs()
    for n in range(1_000, 1_010):
        backlog.add(fact(f"held:{n}", message="24 points are held."))
    backlog.written()
    assert [each.key for each in record.unwritten] == [f"{LEFT_OUT}held:1000:9", "held:1009"]
    assert record.unwritten[0].message == "9 events were left out while the task store was away."


def test_while_a_full_write_hangs_the_settlement_is_kept_too() -> None:
    record, backlog = while_a_full_write_hangs()
    backlog.add(fact("held:1000", message="24 points are held."))
    backlog.add(fact("settled", credits_delta=-24))
    backlog.add(fact("given_back:1000", credits_delta=24))
    backlog.add(fact("end", EventType.COMPLETED, is_end=True))
    backlog.written()
    assert [each.key for each in record.unwritten] == [f"{LEFT_OUT}held:1000:2", "settled", "end"]


def test_the_first_record_of_each_code_is_kept_and_the_rest_are_counted() -> None:
    record = RecordState()
    backlog = Backlog(record)
    for n in range(1_000):
        backlog.add_exception(exception("uncovered", n, "x"))
    backlog.add_exception(exception("shortfall", 0, "x" * 2_000))
    counted = [each for each in record.exceptions if "left_out" in each.details]
    assert [(each.code, each.details["left_out"]) for each in counted] == [("uncovered", 1_000 - MAX_EXCEPTIONS)]
    assert (
        counted[0].message
        == f"{1_000 - MAX_EXCEPTIONS} more records of this kind were left out while the task store was away."
    )
    assert [each.code for each in record.exceptions if each.message.endswith("…")] == ["shortfall"]


# The inbox


def test_a_full_inbox_keeps_the_newest_and_every_end() -> None:
    state = WatchState()
    inbox = Inbox(state)
    for n in range(1_000):
        inbox.put(job_callback(n, "", error_details=None))
    inbox.put(delivery(1_000))
    inbox.put(job_callback(1_001, "", error_details=None))
    assert len(state.inbox) <= MAX_INBOX
    assert sum(json_bytes(each) for each in state.inbox) <= MAX_INBOX_BYTES
    assert [each.sequence for each in state.inbox if each.succeeded] == [1_000]
    assert state.inbox[-1].sequence == 1_001
    taken = inbox.take_all()
    assert [each.sequence for each in taken] == sorted(each.sequence for each in taken)
    assert state.inbox == []


def test_a_flood_of_large_ends_leaves_the_newest_and_the_ends_of_other_jobs() -> None:
    state = WatchState()
    inbox = Inbox(state)
    inbox.put(job_callback(1, "x", job_id="mine"))
    for n in range(40):
        inbox.put(delivery(n))
    assert [(each.job_id, each.sequence) for each in state.inbox] == [("mine", 1), (OUTSIDE_ID, 39)]


def test_only_a_delivery_brings_addresses() -> None:
    """A message on the way that repeats 64 addresses is a small message."""
    assert job_callback(1, "", error_details=None, result_urls=URLS).result_urls == []
    assert training_callback(1, "", error_details=None).output is None
    assert delivery(1).result_urls == URLS

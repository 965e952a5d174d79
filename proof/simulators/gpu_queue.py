"""Which run has a GPU and how far it is: discrete events in work time, each applied at the time it happened.

`settle()` applies everything that is due, in order, after a clock jump of any length: a job that ended in between frees
its GPU at that time for the next one. Accelerated goes before standard, then first come, first served.
"""

from __future__ import annotations

import asyncio
import heapq
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from comfyui_temporal.contracts.comfyui import TaskPriority
from comfyui_temporal.contracts.errors import ErrorDetails
from proof.simulators.admin_wire import RunSeen
from proof.simulators.callbacks import Outbox
from proof.simulators.clock import Clock
from proof.simulators.jobs import ImageRun
from proof.simulators.runs import ONLY_AT_THE_END, Forecast, Run, Trouble
from proof.simulators.state_file import StateFile
from proof.simulators.trainings import TrainingRun
from runtime.background import woken

_LONGEST_SLEEP_SECONDS = 30.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    run_id TEXT PRIMARY KEY,
    task_id TEXT NOT NULL,
    is_open INTEGER NOT NULL,
    document TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS runs_open ON runs (is_open) WHERE is_open = 1;
CREATE TABLE IF NOT EXISTS gpus (
    gpu_type TEXT PRIMARY KEY,
    total INTEGER NOT NULL
);
"""
AnyRun = Annotated[ImageRun | TrainingRun, Field(discriminator="kind")]
_any_run: TypeAdapter[ImageRun | TrainingRun] = TypeAdapter(AnyRun)


class GpuQueue:
    """Every open run, in memory and in the state file; ended ones in the file alone."""

    def __init__(self, state: StateFile, clock: Clock, outbox: Outbox, folder: Path, gpus: dict[str, int]) -> None:
        self._state = state
        self._clock = clock
        self._outbox = outbox
        self._folder = folder
        self._first_gpus = gpus
        self._wake = asyncio.Event()
        state.lay_out(_SCHEMA)
        clock.on_change(self._wake.set)
        self.load()

    def load(self) -> None:
        """Read the open runs and the GPUs from the state file."""
        rows = self._state.rows("SELECT document FROM runs WHERE is_open = 1 ORDER BY rowid")
        self._open = {run.run_id: run for run in (_run_of(row["document"]) for row in rows)}
        self._cursor = 0.0
        for gpu_type, total in self._first_gpus.items():
            self._state.run("INSERT OR IGNORE INTO gpus VALUES (?, ?)", gpu_type, total)
        self._gpus: dict[str, int] = {
            row["gpu_type"]: row["total"] for row in self._state.rows("SELECT * FROM gpus ORDER BY rowid")
        }

    @property
    def gpus(self) -> dict[str, int]:
        """GPU type → how many there are."""
        return dict(self._gpus)

    def set_gpus(self, gpu_type: str, total: int) -> None:
        self.settle()
        self._state.run("INSERT OR REPLACE INTO gpus VALUES (?, ?)", gpu_type, total)
        self._gpus[gpu_type] = total
        self.settle()

    def available(self, gpu_type: str) -> int:
        return max(0, self._gpus.get(gpu_type, 0) - len(self._working(gpu_type)))

    def find(self, run_id: str) -> AnyRun | None:
        if run_id in self._open:
            return self._open[run_id]
        row = self._state.row("SELECT document FROM runs WHERE run_id = ?", run_id)
        return _run_of(row["document"]) if row else None

    def all_runs(self, task_id: str | None = None) -> list[AnyRun]:
        """Oldest first; of one task, or of all."""
        query = "SELECT run_id, document FROM runs WHERE ?1 IS NULL OR task_id = ?1 ORDER BY rowid"
        rows = self._state.rows(query, task_id)
        return [self._open.get(row["run_id"]) or _run_of(row["document"]) for row in rows]

    def task_of(self, run_id: str) -> str | None:
        row = self._state.row("SELECT task_id FROM runs WHERE run_id = ?", run_id)
        return row["task_id"] if row else None

    def add(self, run: AnyRun) -> None:
        """Keep a new run; it waits for nothing until `enqueue`."""
        self._open[run.run_id] = run
        self._save(run)

    def enqueue(self, run: AnyRun) -> None:
        """Let it wait for a GPU from now on; an instantaneous run is done before this returns."""
        at = self._clock.work()
        run.phase, run.counted_from, run.waiting_since = "waiting", at, at
        run.ready_at = at + run.queue_seconds
        if run.is_instant:
            run.phase, run.has_begun, run.segment_since, run.index = "working", True, at, len(run.plan)
            for segment in run.plan:
                run.segment_ended(segment, self._clock.datetime_of(at), self._folder)
            self._finish(run, at)
        self._save(run)
        self.settle()
        self._wake.set()

    def cancel(self, run: AnyRun) -> None:
        """End it as `cancelled`; one that is over is left as it is."""
        self.end(run, ErrorDetails(code="cancelled", message="Cancelled on request.", retryable=False))

    def end(self, run: AnyRun, error: ErrorDetails) -> None:
        """End an open run with an error and report it; frees its GPU."""
        if run.is_open:
            self._end(run, self._clock.work(), error)
            self.settle()

    def finish_now(self, run: AnyRun) -> None:
        """Deliver an open run at once."""
        if run.is_open:
            run.has_begun = True
            self._finish(run, self._clock.work())
            self.settle()

    def forget(self, run: AnyRun) -> None:
        """Forget it, open or over: a GET answers 404, and it holds no GPU."""
        run.phase = "forgotten"
        self._close(run)
        self.settle()

    def apply_now(self, run: AnyRun, trouble: Trouble) -> None:
        """Apply a fault to an open run at once."""
        if run.is_open:
            self._trouble(run, trouble, self._clock.work())
            self.settle()

    def resume(self, run: AnyRun) -> None:
        """Let a stalled run go on from where it stopped."""
        if run.is_open and run.stalled_at is not None:
            run.segment_since += self._clock.work() - run.stalled_at
            run.stalled_at = None
            self._save(run)
            self._wake.set()

    def observe(self, run: AnyRun, at: float | None = None) -> dict[str, Any]:
        """What others see of it now; `sequence` rises when any field differs from what was seen last."""
        if run.is_open or not run.shown:
            fields = self._fields(run, self._clock.work() if at is None else at)
            if fields != run.shown:
                run.shown = fields
                run.sequence += 1
                self._save(run)
        return run.shown | {"sequence": run.sequence}

    def _fields(self, run: AnyRun, at: float) -> dict[str, Any]:
        return run.lied(run.fields(at, self.forecast(run, at), self._clock.datetime_of, self._clock.speed))

    def seen(self, run: AnyRun) -> RunSeen:
        """What an admin sees; looking changes nothing."""
        shown = self._fields(run, self._clock.work()) if run.is_open else run.shown
        return RunSeen(
            run_id=run.run_id,
            kind=run.kind,
            task_id=run.task_id,
            tenant_id=run.tenant_id,
            user_id=run.user_id,
            phase=run.phase,
            holds_gpu=run.holds_gpu,
            pool=run.pool,
            state=shown | {"sequence": run.sequence},
        )

    def forecast(self, run: AnyRun, at: float) -> Forecast:
        """When it starts and ends if nothing goes wrong from here."""
        if run.phase == "waiting":
            return self._waiting_forecast(run, at)
        if run.phase == "working":
            return Forecast(starts=at, ends=run.ends_if_undisturbed())
        if run.is_open:
            starts = run.counted_from + run.queue_seconds
            return Forecast(starts=starts, ends=starts + run.total_seconds)
        return Forecast(starts=at, ends=at)

    def wait_of_new(self, gpu_type: str, priority: TaskPriority) -> float:
        """Work seconds that a run of this priority, submitted now, would wait for a GPU of this type."""
        at = self._clock.work()
        free = self._free_times(gpu_type, at)
        if not free:
            return 0.0
        for other in self._waiting(gpu_type):
            if _rank(other) <= (priority is TaskPriority.STANDARD, at):
                start = max(heapq.heappop(free), other.ready_at)
                heapq.heappush(free, start + other.total_seconds)
        return max(0.0, free[0] - at)

    def _waiting_forecast(self, run: AnyRun, at: float) -> Forecast:
        free = self._free_times(run.pool, at)
        for ahead, other in enumerate(self._waiting(run.pool)):
            start = max(heapq.heappop(free) if free else at, other.ready_at, at)
            ends = start + other.total_seconds
            if other.run_id == run.run_id:
                return Forecast(starts=start, ends=ends, ahead=ahead)
            heapq.heappush(free, ends)
        raise LookupError(f"{run.run_id} does not wait")

    def _free_times(self, pool: str, at: float) -> list[float]:
        """When each GPU of the pool is free, as a heap."""
        ends = sorted(max(at, run.ends_if_undisturbed()) for run in self._working(pool))
        free = [at] * max(0, self._gpus.get(pool, 0) - len(ends)) + ends
        heapq.heapify(free)
        return free

    def _working(self, pool: str) -> list[AnyRun]:
        return [run for run in self._open.values() if run.pool == pool and run.holds_gpu]

    def _waiting(self, pool: str) -> list[AnyRun]:
        return sorted((run for run in self._open.values() if run.pool == pool and run.phase == "waiting"), key=_rank)

    def settle(self) -> None:
        """Apply everything that has come due by now, in the order it happened."""
        now = self._clock.work()
        with self._state.transaction():
            while (due := self._next()) and due[0] <= now:
                at, run = due
                self._cursor = max(self._cursor, at)
                self._step(run, at)
            self._cursor = max(self._cursor, now)

    async def keep_time(self) -> None:
        """Settle whenever something is due, also without a request."""
        while True:
            self._wake.clear()
            self.settle()
            due = self._next()
            rest = _LONGEST_SLEEP_SECONDS if due is None else self._clock.timestamp_of(due[0]) - self._clock.timestamp()
            await woken(self._wake, within_seconds=min(max(rest, 0.001), _LONGEST_SLEEP_SECONDS))

    def _next(self) -> tuple[float, AnyRun] | None:
        """The next thing to happen: its work time and the run it happens to."""
        due = [(at, run) for run in self._open.values() if (at := self._boundary(run)) is not None]
        for pool in self._gpus:
            if self.available(pool) and (start := self._next_start(pool)):
                due.append(start)
        return min(due, key=lambda item: item[0], default=None)

    def _boundary(self, run: AnyRun) -> float | None:
        """When a run's own next event comes: a segment's end or a trouble."""
        if run.stalled_at is not None:
            return None
        if run.phase == "waiting" and any(trouble.parameters.while_queued for trouble in run.troubles):
            return run.ready_at
        if run.phase != "working":
            return None
        ends = run.segment_since + run.segment.seconds
        trouble = run.next_trouble()
        return min(ends, trouble[0]) if trouble else ends

    def _next_start(self, pool: str) -> tuple[float, AnyRun] | None:
        """Which run gets the pool's free GPU, and when: the best ranked of those that are ready by then."""
        waiting = [run for run in self._waiting(pool) if run.stalled_at is None]
        if not waiting:
            return None
        at = max(self._cursor, min(run.ready_at for run in waiting))
        return at, next(run for run in waiting if run.ready_at <= at)

    def _step(self, run: AnyRun, at: float) -> None:
        queued = [trouble for trouble in run.troubles if trouble.parameters.while_queued]
        if run.phase == "waiting" and queued:
            run.troubles.remove(queued[0])
            self._trouble(run, queued[0], at)
        elif run.phase == "waiting":
            self._begin(run, at)
        elif (trouble := run.next_trouble()) and trouble[0] <= run.segment_since + run.segment.seconds:
            run.troubles.remove(trouble[1])
            self._trouble(run, trouble[1], at)
        else:
            self._end_segment(run, at)

    def _begin(self, run: AnyRun, at: float) -> None:
        for segment in run.plan:
            segment.seconds *= run.slow_factor
        run.phase, run.has_begun, run.segment_since = "working", True, at
        self._tell(run, at)

    def _end_segment(self, run: AnyRun, at: float) -> None:
        run.segment_ended(run.segment, self._clock.datetime_of(at), self._folder)
        if run.index + 1 >= len(run.plan):
            self._finish(run, at)
            return
        run.segment_since += run.segment.seconds
        run.index += 1
        self._tell(run, at)

    def _trouble(self, run: AnyRun, trouble: Trouble, at: float) -> None:
        given = trouble.parameters
        if trouble.kind == "fail":
            details = ErrorDetails(code=given.code, message=given.message, retryable=given.retryable, node=given.node)
            run.error_as_text = given.as_text
            self._end(run, at, details)
        elif trouble.kind == "forget":
            run.phase = "forgotten"
            self._close(run)
        elif trouble.kind == "stall":
            run.stalled_at = at
            self._save(run)
        elif trouble.kind == "lie":
            run.overlay |= given.fields
            self._save(run)
            if set(given.fields) - ONLY_AT_THE_END:
                self._tell(run, at)
        elif isinstance(run, TrainingRun) and given.gpu_hours is not None:
            run.gpu_hours = given.gpu_hours
            self._tell(run, at)

    def _finish(self, run: AnyRun, at: float) -> None:
        run.finish(self._clock.datetime_of(at), self._folder)
        run.index = len(run.plan)
        run.phase = "over"
        self._tell(run, at, is_last=True)
        self._close(run)

    def _end(self, run: AnyRun, at: float, error: ErrorDetails) -> None:
        # Its progress is computed while it still counts as working.
        fields = run.fields(at, Forecast(starts=at, ends=at), self._clock.datetime_of, self._clock.speed)
        run.error_details = error
        run.phase = "over"
        after = run.fields(at, Forecast(starts=at, ends=at), self._clock.datetime_of, self._clock.speed)
        kept = {name: fields[name] for name in ("stage_progress", "gpu_hours_used") if name in fields}
        run.shown = run.lied(after | kept)
        run.sequence += 1
        self._put_callback(run, at)
        self._close(run)

    def _tell(self, run: AnyRun, at: float, *, is_last: bool = False) -> None:
        """Show the run as it is at `at`, and call back."""
        if is_last:
            run.shown = {}
        self.observe(run, at)
        self._put_callback(run, at)

    def _put_callback(self, run: AnyRun, at: float) -> None:
        body: dict[str, Any] = {
            "task_id": run.task_id,
            "occurred_at": self._clock.datetime_of(at).isoformat(timespec="milliseconds"),
            **run.shown,
            "sequence": run.sequence,
        }
        if run.kind == "training":
            body["log"] = run.log
            run.log = []
        self._outbox.put(
            run_id=run.run_id,
            task_id=run.task_id,
            tenant_id=run.tenant_id,
            status=run.standing()[0],
            url=run.callback_url,
            body=json.dumps(body),
        )
        self._save(run)

    def _close(self, run: AnyRun) -> None:
        self._save(run)
        self._open.pop(run.run_id, None)

    def _save(self, run: AnyRun) -> None:
        self._state.run(
            "INSERT INTO runs VALUES (?1, ?2, ?3, ?4) ON CONFLICT (run_id) DO UPDATE SET is_open = ?3, document = ?4",
            run.run_id,
            run.task_id,
            run.is_open,
            run.model_dump_json(),
        )


def _rank(run: Run) -> tuple[bool, float]:
    return run.priority is TaskPriority.STANDARD, run.waiting_since


def _run_of(document: str) -> ImageRun | TrainingRun:
    return _any_run.validate_json(document)

"""Places a graph on a server, runs it there and stores its results. If a server fails, it moves to another.

A job returns to the pool only if the failure is its server's (`RunFailureType`), and goes before the jobs that still
wait for their first server. Only if the prompt is lost or over does the run's number rise, and with it the
prompt's id change. No job goes to more than `MAX_FAILED_RUNS` servers: see `FailedRuns`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Final

from pydantic import ValidationError
from temporalio import workflow
from temporalio.common import Priority, RetryPolicy
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    TimeoutType,
    is_cancelled_exception,
)
from temporalio.exceptions import TimeoutError as TemporalTimeout
from temporalio.workflow import ActivityCancellationType, ActivityHandle

from bridge.calls import (
    CHECK_SERVERS,
    CLEAN_SERVER,
    COPY_RESULTS,
    RUN_GRAPH,
    TAKE_SERVER,
    TEMPLATE_UNFIT,
    RunFailureType,
    pool_queue,
    template_queue,
)
from bridge.orders import (
    CleanOrder,
    CopyOrder,
    DatasetOrder,
    FailedRun,
    GraphOutcome,
    GraphRun,
    ServerTaken,
    StoredResult,
    TakeOrder,
    TemplatePlace,
    control_name,
)
from bridge.server import ResultFile
from bridge.task_files import FOLDER
from comfyui_temporal.contracts.errors import JOB_CODES, ErrorDetails, FailureCode

WAIT_TOLD_AFTER: Final = timedelta(seconds=30)
CHECKED_AFTER: Final = timedelta(seconds=5)
"""How soon a job that waits for a server that can run it looks whether there is any; doubled each time."""
CHECKED_AT_LEAST: Final = timedelta(minutes=10)
MAX_FAILED_RUNS: Final = 3
"""A job ends after this many servers failed."""
SERVER_AWAY: Final = timedelta(minutes=2)
"""How long a server's worker may be away before its job returns to the pool."""
HEARTBEAT_TIMEOUT: Final = timedelta(seconds=5)
"""A heartbeat is sent each second. This long after a worker is killed, another attempt looks for its run."""
LONGEST_RUN: Final = timedelta(hours=24)
COPY_WITHIN: Final = timedelta(hours=1)
CLEAN_WITHIN: Final = timedelta(minutes=10)
CANCELLED: Final = ErrorDetails(code=FailureCode.CANCELLED.value, message="It was cancelled.", retryable=False)
MOVED_KEYS: Final = {0: 2, 1: 1, 2: 2, 3: 2}
"""Priority keys of jobs that a server failed: before the jobs of their own priority, after higher ones."""
_ANOTHER_SERVER: Final = "waits for another server"
_PROMPTS: Final = uuid.UUID("6f0d5e64-3c6f-4d5e-9a43-6f2f0f3a5c11")
_MOVING_FAILURES: Final = frozenset(RunFailureType)
_TAKE_RETRY: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=10))
_RUN_RETRY: Final = RetryPolicy(
    initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=10), maximum_attempts=100
)
_COPY_RETRY: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(seconds=10))
"""Within `COPY_WITHIN`: what is to be copied has cost GPU time."""
_CLEAN_RETRY: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_attempts=3)
_STOP_RETRY: Final = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(minutes=5))


class RunRefused(Exception):
    """The run failed for good. The job ends with `details`."""

    def __init__(self, details: ErrorDetails) -> None:
        super().__init__(details.message)
        self.details = details


class FailedRuns:
    """The servers that failed one graph, and how the job ends if they are too many.

    If every one of them failed while it ran the graph, the graph is the likely cause: the job ends as the last server
    said, or `internal`, and is not tried again. Otherwise it ends `lost`, and another attempt of its task may follow.
    """

    def __init__(self) -> None:
        self.servers: list[str] = []
        self._are_all_suspect = True

    def add(self, server: str, failed: FailedRun) -> None:
        """Raises RunRefused if this was one too many."""
        self.servers.append(server)
        self._are_all_suspect = self._are_all_suspect and (failed.was_sent or failed.error is not None)
        if len(self.servers) < MAX_FAILED_RUNS:
            return
        if not self._are_all_suspect:
            message = f"{len(self.servers)} servers in a row failed this job."
            raise RunRefused(ErrorDetails(code=FailureCode.LOST.value, message=message, retryable=True))
        if failed.error is not None and failed.error.code != FailureCode.CANCELLED:
            raise RunRefused(failed.error)
        message = f"{len(self.servers)} servers in a row failed while they ran this job: it is not tried again."
        raise RunRefused(ErrorDetails(code=FailureCode.INTERNAL.value, message=message, retryable=False))


class Placement:
    """The servers that one job or training runs on, one after another."""

    def __init__(
        self,
        run_id: str,
        pool: str,
        template_id: str,
        priority: Priority,
        *,
        is_for_some: bool,
        on_wait: Callable[[timedelta, str], None],
    ) -> None:
        """`is_for_some`: not every server of the pool can run the template.

        `on_wait` is called now and then while a job that was at work waits: with how long it has, and for what.
        """
        self._on_wait = on_wait
        self._run_id = run_id
        self.pool = pool
        self._template_id = template_id
        self._is_handed_over = is_for_some
        self._priority = priority
        self._part = 0
        self.run = 1
        self.percent = 0
        self.server: str | None = None
        self._left: dict[str, CleanOrder] = {}
        """Task queue of a server → what the job left there."""
        self._unended: dict[str, set[str]] = {}
        """Task queue of a server → prompts whose end was not seen there: it may still run them."""
        self._first_given: dict[tuple[str, str], datetime] = {}
        """(Task queue of a server, prompt) → when this workflow first gave it to that server."""

    def prompt_id(self) -> str:
        """The id of the next prompt."""
        return prompt_id_of(self._run_id, self._part, self.run)

    async def run_graph(
        self,
        graph_run: Callable[[ServerTaken], GraphRun],
        *,
        on_end: Callable[[], None],
        is_wanted: Callable[[], bool] = lambda: True,
        prepare: Callable[[ServerTaken], Awaitable[None]] | None = None,
        on_copy: Callable[[], None] = lambda: None,
        folder: str = "",
    ) -> tuple[GraphOutcome, list[StoredResult]]:
        """Run a graph, on as many servers as needed. Raises RunRefused, or a cancellation.

        `prepare` runs on the taken server before the graph. `on_copy` is called before the results are copied to
        `folder` (default: the job's results). `on_end` is called after each run on a server, however it ended, when
        `percent` is up to date.

        `is_wanted` is checked before every step. A cancel that arrives in the same workflow task as a step's result
        cannot cancel that step any more, so it takes effect here.
        """
        failed_runs = FailedRuns()
        while True:
            _check_wanted(is_wanted)
            taken = await self._take_server(failed_runs.servers)
            _check_wanted(is_wanted)
            self.server = taken.server
            self._left.setdefault(taken.task_queue, CleanOrder(job_id=self._run_id))
            try:
                if prepare is not None:
                    await prepare(taken)
                    _check_wanted(is_wanted)
                run = graph_run(taken)
                self._will_leave(taken, run)
                outcome = await self._run_on(taken, run, on_end)
                _check_wanted(is_wanted)
                on_copy()
                return outcome, await self._copy(taken, run, outcome, folder)
            except ActivityError as error:
                if is_cancelled_exception(error):
                    raise
                failed = self._moving_failure(error, taken)
            if failed is not None:
                failed_runs.add(taken.server, failed)

    async def _take_server(self, avoid: list[str]) -> ServerTaken:
        """A server of the pool, or, once one of them has said that it cannot run the template, of those that can."""
        try:
            return await self._taken_from_queue(avoid)
        except ActivityError as error:
            if not isinstance(error.cause, ApplicationError) or error.cause.type != TEMPLATE_UNFIT:
                raise
        self._is_handed_over = True
        return await self._taken_from_queue(avoid)

    async def _taken_from_queue(self, avoid: list[str]) -> ServerTaken:
        bridge_queue = workflow.info().task_queue
        moved = dataclasses.replace(self._priority, priority_key=MOVED_KEYS[self._priority.priority_key or 0])
        taking = workflow.start_activity(
            TAKE_SERVER,
            TakeOrder(
                job_id=self._run_id,
                run=self.run,
                avoid=list(dict.fromkeys(avoid)),
                template_id=self._template_id,
                is_handed_over=self._is_handed_over,
            ),
            result_type=ServerTaken,
            task_queue=(
                template_queue(bridge_queue, self.pool, self._template_id)
                if self._is_handed_over
                else pool_queue(bridge_queue, self.pool)
            ),
            start_to_close_timeout=timedelta(seconds=45),
            retry_policy=_TAKE_RETRY,
            priority=moved if avoid else self._priority,
            summary="wait for a server",
        )
        waits_again = self.server is not None
        if waits_again and self._is_handed_over and workflow.patched("checked-while-it-waits-again"):
            await self._waited_again(taking)
        elif waits_again and workflow.patched("told-while-it-waits-again"):
            await self.waited_for(taking, _ANOTHER_SERVER)
        elif self.server is None and self._is_handed_over and workflow.patched("refused-where-no-server-can-run-it"):
            await self._waited_while_any_can(taking)
        taken: ServerTaken = await taking
        return taken

    async def _waited_while_any_can(self, taking: ActivityHandle[ServerTaken]) -> None:
        """Wait for a server that can run the template. Raises RunRefused once every server of the pool says it cannot.

        The job was queued before they had reported, or what it needs was removed from them since.
        """
        wait = CHECKED_AFTER
        try:
            while True:
                with suppress(TimeoutError):
                    summary = "see whether any server can run it"
                    await workflow.wait_condition(taking.done, timeout=wait, timeout_summary=summary)
                    return
                await self._demand_any_can(taking)
                wait = min(2 * wait, CHECKED_AT_LEAST)
        except asyncio.CancelledError:
            taking.cancel()
            raise

    async def _demand_any_can(self, taking: ActivityHandle[ServerTaken]) -> None:
        """Raises RunRefused if every server of the pool says that it cannot run the template."""
        problems: list[ErrorDetails] = await workflow.execute_activity(
            CHECK_SERVERS,
            TemplatePlace(pool=self.pool, template_id=self._template_id),
            result_type=list[ErrorDetails],
            start_to_close_timeout=timedelta(seconds=15),
            priority=self._priority,
            summary="can any server run it?",
        )
        if problems and not taking.done():
            taking.cancel()
            raise RunRefused(problems[0])

    async def _waited_again(self, taking: ActivityHandle[ServerTaken]) -> None:
        """As `waited_for` and `_waited_while_any_can` at once: its server may have come back without what it needs."""
        began, longest, wait = workflow.now(), WAIT_TOLD_AFTER, CHECKED_AFTER
        tell_at, check_at = began + longest, began + wait
        try:
            while True:
                with suppress(TimeoutError):
                    left = max(min(tell_at, check_at) - workflow.now(), timedelta(milliseconds=1))
                    summary = "tell that it still waits, see whether any server can run it"
                    await workflow.wait_condition(taking.done, timeout=left, timeout_summary=summary)
                    return
                if workflow.now() >= tell_at:
                    self._on_wait(longest, _ANOTHER_SERVER)
                    longest *= 2
                    tell_at = began + longest
                if workflow.now() >= check_at:
                    await self._demand_any_can(taking)
                    wait = min(2 * wait, CHECKED_AT_LEAST)
                    check_at = workflow.now() + wait
        except asyncio.CancelledError:
            taking.cancel()
            raise

    async def waited_for(self, awaited: ActivityHandle[Any], what: str) -> None:
        """Tell, at first after 30 s and then each time the wait has doubled, that a job that was at work waits.

        Its task's deadline runs meanwhile.
        """
        began, longest = workflow.now(), WAIT_TOLD_AFTER
        try:
            while True:
                try:
                    left = began + longest - workflow.now()
                    summary = "tell that it still waits"
                    await workflow.wait_condition(awaited.done, timeout=left, timeout_summary=summary)
                    return
                except TimeoutError:
                    self._on_wait(longest, what)
                    longest *= 2
        except asyncio.CancelledError:
            awaited.cancel()
            raise

    async def _run_on(self, taken: ServerTaken, graph_run: GraphRun, on_end: Callable[[], None]) -> GraphOutcome:
        given = (taken.task_queue, graph_run.prompt_id)
        is_first = given not in self._first_given
        began = self._first_given.setdefault(given, workflow.now())
        try:
            outcome: GraphOutcome = await workflow.execute_activity(
                RUN_GRAPH,
                graph_run,
                result_type=GraphOutcome,
                task_queue=taken.task_queue,
                schedule_to_start_timeout=SERVER_AWAY,
                start_to_close_timeout=LONGEST_RUN,
                heartbeat_timeout=HEARTBEAT_TIMEOUT,
                retry_policy=_RUN_RETRY,
                cancellation_type=ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
                priority=self._priority,
                summary=f"run on {taken.server}",
            )
            self.percent = max(self.percent, outcome.percent)
            self._unended[taken.task_queue].discard(graph_run.prompt_id)
        except ActivityError as error:
            self._keep_percent(error.cause)
            raise
        finally:
            on_end()
        if outcome.error is not None:
            raise RunRefused(outcome.error)
        if outcome.was_found and is_first:
            # It began before the workflow was reset: its time is not this workflow's to measure.
            return outcome
        # The server measures by its clock, which may be set meanwhile. GPU hours are billed.
        longest = (workflow.now() - began).total_seconds()
        if outcome.seconds > longest and workflow.patched("no-longer-than-its-run"):
            return outcome.model_copy(update={"seconds": longest})
        return outcome

    async def _copy(self, taken: ServerTaken, run: GraphRun, outcome: GraphOutcome, folder: str) -> list[StoredResult]:
        """Store a run's results. While storage is away this is repeated, and the job says that it waits."""
        is_told = workflow.patched("told-while-it-is-copied")
        copying = workflow.start_activity(
            COPY_RESULTS,
            CopyOrder(
                job_id=self._run_id,
                folder=folder,
                files=outcome.files,
                texts=outcome.texts,
                keep_metadata=run.graph.keep_metadata,
            ),
            result_type=list[StoredResult],
            task_queue=taken.task_queue,
            schedule_to_start_timeout=SERVER_AWAY,
            schedule_to_close_timeout=COPY_WITHIN,
            start_to_close_timeout=COPY_WITHIN,
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
            retry_policy=_COPY_RETRY if is_told else _RUN_RETRY,
            priority=self._priority,
            summary=f"copy results from {taken.server}",
        )
        if is_told:
            await self.waited_for(copying, "waits until its results are stored")
        stored: list[StoredResult] = await copying
        return stored

    def _will_leave(self, taken: ServerTaken, run: GraphRun) -> None:
        self._unended.setdefault(taken.task_queue, set()).add(run.prompt_id)
        left = self._left[taken.task_queue]
        self._left[taken.task_queue] = left.model_copy(
            update={
                "prompts": list(dict.fromkeys([*left.prompts, run.prompt_id])),
                "files": [*left.files, *files_left_by(run)],
            }
        )

    async def clean_up(self, dataset: DatasetOrder | None = None, *, is_last: bool = False) -> None:
        """Remove what the job left on its servers, as far as they answer. Raises nothing but a cancellation.

        `dataset`: remove it as well, from every server that had it. `is_last`: a server that may still run what nobody
        wants is waited for as long as a run may take.
        """
        if not self._left or not workflow.patched("clean-servers"):
            return
        orders = {queue: left.model_copy(update={"dataset": dataset}) for queue, left in self._left.items()}
        waits = is_last and any(self._unended.values()) and workflow.patched("stopped-however-late-its-worker-is")
        if waits:
            orders = {queue: self._with_unended(queue, order) for queue, order in orders.items()}
        cleaning = {
            queue: self._clean(queue, order, is_waited_for=waits and bool(self._unended.get(queue)))
            for queue, order in sorted(orders.items())
            if order.prompts or order.files or order.dataset
        }
        for queue, handle in cleaning.items():
            try:
                await handle
                self._unended.get(queue, set()).difference_update(orders[queue].prompts)
            except ActivityError as error:
                if is_cancelled_exception(error):
                    raise
                workflow.logger.warning("left on a server: %s", error.cause)
        self._left = {queue: CleanOrder(job_id=self._run_id) for queue in self._left}

    def _with_unended(self, queue: str, order: CleanOrder) -> CleanOrder:
        """The order with prompts of earlier parts of the work that may still run there."""
        prompts = dict.fromkeys([*order.prompts, *sorted(self._unended.get(queue, ()))])
        return order.model_copy(update={"prompts": list(prompts)})

    def _clean(self, queue: str, order: CleanOrder, *, is_waited_for: bool) -> ActivityHandle[int]:
        return workflow.start_activity(
            CLEAN_SERVER,
            order,
            result_type=int,
            task_queue=queue,
            schedule_to_start_timeout=LONGEST_RUN if is_waited_for else SERVER_AWAY,
            schedule_to_close_timeout=LONGEST_RUN if is_waited_for else CLEAN_WITHIN,
            start_to_close_timeout=CLEAN_WITHIN,
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
            retry_policy=_STOP_RETRY if is_waited_for else _CLEAN_RETRY,
            summary="stop and remove what the job left" if is_waited_for else "remove what the job left",
        )

    def begin_part(self, part: int) -> None:
        """Begin the next part of the work: its prompts have their own ids, and its progress restarts at 0."""
        self._part = part
        self.percent = 0
        self._first_given.clear()

    def _moving_failure(self, error: ActivityError, taken: ServerTaken) -> FailedRun | None:
        """The failure after which the job moves to another server; None if it just waits again.

        Raises RunRefused if the job does not move.
        """
        cause = error.cause
        is_away = (TimeoutType.SCHEDULE_TO_START, TimeoutType.HEARTBEAT)
        if isinstance(cause, TemporalTimeout) and cause.type in is_away:
            return _failed_run(cause.last_heartbeat_details)
        if isinstance(cause, ApplicationError) and cause.type in _MOVING_FAILURES:
            kind, failed = RunFailureType(cause.type), _failed_run(cause.details)
            if failed.is_over or kind in (RunFailureType.LOST, RunFailureType.HANDED_BACK):
                self._unended.get(taken.task_queue, set()).discard(self.prompt_id())
            self.run += kind is RunFailureType.LOST or failed.is_over
            if kind is RunFailureType.HANDED_BACK:
                is_counted = failed.error is not None and workflow.patched("counted-where-a-file-is-unreadable")
                return failed if is_counted else None
            return failed
        known = isinstance(cause, ApplicationError) and cause.type in set(JOB_CODES)
        code = str(cause.type) if isinstance(cause, ApplicationError) and known else FailureCode.INTERNAL.value
        message = cause.message if isinstance(cause, ApplicationError) else str(cause or error)
        raise RunRefused(ErrorDetails(code=code, message=message, retryable=not known))

    def _keep_percent(self, cause: BaseException | None) -> None:
        """Keep the failed run's progress, so that the next run never shows less."""
        details: Sequence[Any] = ()
        if isinstance(cause, TemporalTimeout):
            details = cause.last_heartbeat_details
        elif isinstance(cause, ApplicationError):
            details = cause.details
        self.percent = max(self.percent, min(_failed_run(details).percent, 99))


def files_left_by(run: GraphRun) -> list[ResultFile]:
    """The files of a run that no history names: its uploads, and what `SaveLoRA` writes."""
    folder = f"{FOLDER}/{run.job_id}"
    controls = [
        ResultFile(node="", kind="", filename=control_name(number, control), subfolder=folder, type="input")
        for number, control in enumerate(run.controls)
    ]
    lora = run.existing_lora
    continued = [ResultFile(node="", kind="", filename=lora.name, subfolder=f"loras/{folder}")] if lora else []
    return [*controls, *continued, *run.named_files]


def _failed_run(details: Sequence[Any]) -> FailedRun:
    """What the run's worker said of it last. What another version of the worker says otherwise is left out."""
    try:
        return FailedRun.model_validate(details[0]) if details else FailedRun()
    except ValidationError:
        return FailedRun()


def prompt_id_of(run_id: str, part: int, run: int) -> str:
    """A UUID derived from the job, the part of its work and the run's number."""
    return str(uuid.uuid5(_PROMPTS, f"{run_id}:{part}:{run}"))


def _check_wanted(is_wanted: Callable[[], bool]) -> None:
    if not is_wanted():
        raise RunRefused(CANCELLED)

"""The activities of one GPU worker on its server: take a job, run its graph, copy its results.

A heartbeat carries the run's whole percent and whether the prompt was submitted, so that the attempt after a killed
worker finds the prompt again and never submits it twice.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import urlsplit

import structlog
from pydantic import BaseModel, JsonValue, ValidationError
from temporalio import activity
from temporalio.exceptions import ApplicationError

from bridge.callbacks import CallbackSender
from bridge.calls import (
    CLEAN_SERVER,
    COPY_RESULTS,
    INGEST_DATASET,
    RUN_GRAPH,
    TAKE_SERVER,
    TEMPLATE_UNFIT,
    RunFailureType,
)
from bridge.dataset_copies import DatasetCopies
from bridge.fitness import Fitness, TemplateState
from bridge.graph_check import NoModel, chosen_models, relink
from bridge.graphs import needed_part
from bridge.heartbeats import with_heartbeats
from bridge.lora_cache import LoraCache
from bridge.orders import (
    CleanOrder,
    CopyOrder,
    DatasetOrder,
    ExistingLora,
    FailedRun,
    GraphOutcome,
    GraphRun,
    ServerTaken,
    StoredResult,
    TakeOrder,
    control_name,
)
from bridge.placement import files_left_by
from bridge.prompt_run import (
    Interrupted,
    Patience,
    PromptLost,
    PromptRun,
    RunFailure,
    ServerDead,
    ServerGone,
    ServerSick,
    ServerUnfit,
)
from bridge.result_copies import ResultCopies
from bridge.server import FileParts, FileUse, PromptRefused, PromptState, Server, ServerError
from bridge.slot import Slot
from bridge.storage import STORAGE_ERRORS, Storage
from bridge.storage_health import ObjectUnreadable, StorageAway, StorageHealth
from bridge.task_files import FOLDER, foreign_files, is_left_by, saved_apart, shown
from bridge.ticks import RunningJobs, Ticks
from bridge.warm_up import WarmUps
from comfyui_temporal.contracts.errors import ErrorDetails, FailureCode

STOP_AGAIN_SECONDS: Final = 0.2
OTHERS_FIRST: Final = timedelta(seconds=20)
"""So long a server leaves a job that it failed to the other servers of its pool."""
UNREADABLE: Final = ErrorDetails(
    code=FailureCode.INTERNAL.value, message="A file that it needs cannot be read from storage.", retryable=True
)
_LOSS: Final = re.compile(r"loss=([0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?)")
_TYPES: Final[dict[type[RunFailure], RunFailureType]] = {
    PromptLost: RunFailureType.LOST,
    ServerGone: RunFailureType.GONE,
    ServerDead: RunFailureType.DEAD,
    ServerSick: RunFailureType.SICK,
    ServerUnfit: RunFailureType.UNFIT,
    Interrupted: RunFailureType.INTERRUPTED,
}

log = structlog.get_logger(__name__)


class RunBeat(BaseModel):
    """Details of a heartbeat of `run_graph`, and of its failure (`FailedRun`)."""

    percent: int = 0
    was_sent: bool = False


@dataclass(frozen=True)
class ServerIdentity:
    """The server's name, its task queue and its type of GPU."""

    name: str
    task_queue: str
    gpu_type: str


class GpuActivities:
    """The activities of one server. Without a `sender` ticks are not published, only polled."""

    def __init__(
        self,
        server: Server,
        identity: ServerIdentity,
        slot: Slot,
        fitness: Fitness,
        storage: Storage,
        sender: CallbackSender | None,
        *,
        loras: LoraCache,
        storage_health: StorageHealth,
        warm_ups: WarmUps,
        patience: Patience | None = None,
        jobs: RunningJobs | None = None,
        are_others: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """`are_others`: whether the pool has other servers; default: none."""
        self._jobs = jobs
        self._are_others = are_others or _nobody
        self._server = server
        self._identity = identity
        self._slot = slot
        self._fitness = fitness
        self._storage = storage
        self._sender = sender
        self._loras = loras
        self._warm_ups = warm_ups
        self._patience = patience or Patience()
        self._copying = 0
        self._followed: Counter[str] = Counter()
        """Prompt id → how many calls follow it: the one of a reset workflow follows that of the one before."""
        self._storage_health = storage_health
        self._results = ResultCopies(server, storage, storage_health, identity.name)
        self._datasets = DatasetCopies(server, storage)

    @property
    def is_copying(self) -> bool:
        return self._copying > 0

    @activity.defn(name=TAKE_SERVER)
    async def take_server(self, order: TakeOrder) -> ServerTaken:
        """Hold this server for a job. Raises ApplicationError, retried on any server, if it is not free or not fit.

        A job in the pool's queue for which it is not fit is not retried there: it is for its template's queue.
        """
        if self._identity.name in order.avoid and _is_young(activity.info()) and await self._are_others():
            raise ApplicationError(f"{self._identity.name}: it failed this job; others go first", type="server_taken")
        if self._fitness.state_of(order.template_id) is not TemplateState.FIT:
            raise ApplicationError(
                f"{self._identity.name} cannot run {order.template_id}",
                type=TEMPLATE_UNFIT,
                non_retryable=not order.is_handed_over,
            )
        problem = await self._slot.take(order.job_id)
        if problem is not None:
            raise ApplicationError(f"{self._identity.name}: {problem}", type="server_taken")
        log.info("job_taken", job_id=order.job_id, run=order.run, server=self._identity.name)
        return ServerTaken(
            server=self._identity.name, task_queue=self._identity.task_queue, gpu_type=self._identity.gpu_type
        )

    @activity.defn(name=RUN_GRAPH)
    async def run_graph(self, run: GraphRun) -> GraphOutcome:
        """Run one graph to its end. Raises ApplicationError of a `RunFailureType`, not retried on this server.

        Where storage cannot be used for what the graph needs, the job is handed back. If only what this graph needs
        cannot be read, that counts as a failed run.
        """
        beat = _last_beat()
        ticks = Ticks(run, self._sender, self._jobs)
        prompt = PromptRun(
            self._server,
            run.model_copy(update={"first_percent": max(run.first_percent, beat.percent)}),
            lambda: self._prepare(run),
            was_sent=beat.was_sent,
            patience=self._patience,
            on_percent=ticks.reached,
        )
        began = time.monotonic()
        bound = {"job_id": run.job_id, "task_id": run.task_id, "tenant_id": run.tenant_id, "run": run.run}
        with structlog.contextvars.bound_contextvars(**bound), self._held(run.job_id), self._following(run.prompt_id):
            try:
                async with ticks.following(prompt, is_repeated=activity.info().attempt > 1):
                    outcome = await with_heartbeats(
                        prompt.finish(),
                        lambda: (RunBeat(percent=prompt.percent, was_sent=prompt.was_sent).model_dump(),),
                        on_cancel=lambda: self._stop(prompt),
                        on_unknown=lambda: self._stop_unwanted(run, prompt),
                        left=lambda: [_failed_run(prompt, is_over=prompt.was_interrupted)],
                    )
                await self._judge(run, outcome, time.monotonic() - began, is_whole=not prompt.was_found)
            except RunFailure as failure:
                await self._learn_from(failure)
                log.warning("run_failed", kind=type(failure).__name__, reason=str(failure))
                failure.error = self._shown(failure.error, run.job_id)
                raise _moving(failure, prompt) from None
            except StorageAway as away:
                # The server is free meanwhile, and the job waits where its task is given time.
                await self._stop(prompt)
                raise _handed_back(str(away), prompt) from None
            except ObjectUnreadable as unreadable:
                await self._stop(prompt)
                log.warning("run_failed", kind=type(unreadable).__name__, reason=str(unreadable))
                raise _handed_back(str(unreadable), prompt, error=UNREADABLE) from None
            if outcome.error is not None:
                outcome = outcome.model_copy(update={"error": self._shown(outcome.error, run.job_id)})
            outcome = await self._with_loss(run, outcome)
            log.info(
                "run_ended",
                outcome=outcome.error.code if outcome.error else "ok",
                seconds=round(outcome.seconds, 3),
                attempt=activity.info().attempt,
            )
            return outcome

    async def _stop(self, prompt: PromptRun) -> None:
        if not await prompt.stop():
            self._does_not_stop()

    async def _stop_unwanted(self, run: GraphRun, prompt: PromptRun) -> None:
        """Stop and remove what a job runs whose workflow was terminated or reset.

        A run of the reset workflow may follow the same prompt here by now. An open workflow has another attempt.
        """
        info = activity.info()
        workflow_id, run_id = info.workflow_id, info.workflow_run_id
        if self._jobs is None or workflow_id is None or run_id is None or self._followed[run.prompt_id] > 1:
            return
        if not await self._jobs.is_closed(workflow_id, run_id) or self._followed[run.prompt_id] > 1:
            return
        log.info("run_unwanted", prompt_id=run.prompt_id)
        await self._stop(prompt)
        with suppress(PromptRefused, ServerError, *STORAGE_ERRORS):
            await self._clean(CleanOrder(job_id=run.job_id, prompts=[run.prompt_id], files=files_left_by(run)))

    def _does_not_stop(self) -> None:
        """What hangs in the server keeps it for ever: that must be seen, and a test pattern shows when it is over."""
        self._slot.health.fell_sick(f"a cancelled run did not stop within {self._patience.stop:g} s")

    def _shown(self, error: ErrorDetails | None, job_id: str) -> ErrorDetails | None:
        """The error as the job's tenant may read it."""
        address = urlsplit(self._server.url)
        places = (self._server.url, address.netloc, address.hostname or "", self._identity.name)
        return None if error is None else shown(error, job_id, places=places)

    async def _learn_from(self, failure: RunFailure) -> None:
        if isinstance(failure, PromptLost | ServerGone):
            self._warm_ups.was_away()
        if isinstance(failure, ServerDead | ServerSick):
            self._slot.health.fell_sick(str(failure))
        if isinstance(failure, ServerUnfit):
            with suppress(ServerError):
                await self._fitness.refresh()

    async def _judge(self, run: GraphRun, outcome: GraphOutcome, seconds: float, *, is_whole: bool) -> None:
        """Whether a failure is more likely the server's. Raises ServerSick, ServerUnfit.

        `is_whole`: the run began within these `seconds`.
        """
        template_id, error = run.graph.template_id, outcome.error
        if error is not None and error.code == FailureCode.WORKFLOW_INVALID:
            with suppress(ServerError):
                await self._fitness.refresh()
            if self._fitness.state_of(template_id) is TemplateState.UNFIT:
                raise ServerUnfit(error.message, error=error)
        # By the server's clock a run that succeeded may have taken any time: it may have been set meanwhile.
        ran_seconds = outcome.seconds or seconds if error is not None else min(outcome.seconds or seconds, seconds)
        reason = self._slot.health.ran(run.task_id, run.tenant_id, outcome, ran_seconds, is_whole=is_whole)
        if reason is not None:
            raise ServerSick(reason, error=outcome.error, is_over=True)
        if error is None:
            self._warm_ups.ran(template_id)

    @activity.defn(name=COPY_RESULTS)
    async def copy_results(self, order: CopyOrder) -> list[StoredResult]:
        """Copy a run's files to storage. Raises ApplicationError: `prompt_lost` if they are gone, else retried."""
        self._copying += 1
        try:
            return await with_heartbeats(self._results.copied(order), tuple)
        finally:
            self._copying -= 1

    @activity.defn(name=CLEAN_SERVER)
    async def clean_server(self, order: CleanOrder) -> int:
        """Remove a job's files and prompts from this server. Returns the number of files. Raises ApplicationError."""
        self._copying += 1
        try:
            return await with_heartbeats(self._clean(order), tuple)
        except ServerError as error:
            raise ApplicationError(str(error), type=RunFailureType.GONE.value) from None
        except (PromptRefused, *STORAGE_ERRORS) as error:
            raise ApplicationError(f"{type(error).__name__}", type=FailureCode.INTERNAL.value) from None
        finally:
            self._copying -= 1

    async def _clean(self, order: CleanOrder) -> int:
        files = list(order.files)
        for prompt_id in order.prompts:
            await self._stop_left(prompt_id)
            files += [file for file in await self._server.produced(prompt_id) if is_left_by(file, order.job_id)]
        if order.dataset is not None:
            files += await self._datasets.files(order.dataset)
            self._datasets.forget(order.dataset)
        for file in files:
            await self._server.erase(file)
        for prompt_id in order.prompts:
            await self._server.forget(prompt_id)
        return len(files)

    async def _stop_left(self, prompt_id: str) -> None:
        """Stop what its job has given up: a server that was away may still run it. Raises ServerError."""
        until = time.monotonic() + self._patience.stop
        while (await self._server.look_up(prompt_id, ())).state in (PromptState.PENDING, PromptState.RUNNING):
            await self._server.cancel(prompt_id)
            if time.monotonic() > until:
                self._does_not_stop()
            if self._slot.health.problem is not None:
                return
            await asyncio.sleep(STOP_AGAIN_SECONDS)

    @activity.defn(name=INGEST_DATASET)
    async def ingest_dataset(self, order: DatasetOrder) -> int:
        """Put a training's dataset on this server. Returns the number of files.

        Raises ApplicationError: `workflow_invalid`, a `RunFailureType`, or retried.
        """
        with self._held(order.training_id, is_kept=True):
            return await with_heartbeats(self._datasets.ingest(order), tuple)

    async def _prepare(self, run: GraphRun) -> Mapping[str, Any]:
        """What the results need of the graph, with this server's models, images and checkpoint filled in.

        Raises PromptRefused, StorageAway, ObjectUnreadable.
        """
        graph = needed_part(json.loads(json.dumps(run.graph.graph)), run.graph.result_nodes)
        if run.run > 1:
            name = f"{activity.info().workflow_run_id}:{run.run}"
            for node in graph.values():
                node["inputs"] = saved_apart(node["inputs"], run.job_id, name)
        if run.graph.models:
            await self._put_models(graph, run)
        for upload in run.graph.uploads:
            if upload.node not in graph:
                continue
            control = run.controls[upload.control]
            graph[upload.node]["inputs"][upload.input] = await self._sent(
                control_name(upload.control, control),
                (control.path, "A file of the request"),
                content_type=control.content_type,
                folder=f"{FOLDER}/{run.job_id}",
            )
        if run.existing_lora is not None:
            await self._put_lora(graph, run, run.existing_lora)
        if foreign := next(foreign_files(graph, run.job_id), None):
            message = f"Node {foreign[0]}, input {foreign[1]!r} names a file of another task."
            raise PromptRefused(ErrorDetails(code=FailureCode.WORKFLOW_INVALID.value, message=message))
        if run.graph.lora_inputs:
            # After that check: these files are the tenant's, of no one task, and no request can name them.
            async with self._storage_health.used():
                names = await self._loras.take(run.job_id, run.tenant_id, run.graph.loras)
            for place in run.graph.lora_inputs:
                if place.node in graph:
                    graph[place.node]["inputs"][place.input] = names[place.lora]
        return graph

    async def _sent(
        self, name: str, stored: tuple[str, str], *, content_type: str, folder: str, use: FileUse = FileUse.INPUT
    ) -> str:
        """Send a file of the bridge's storage (its path, and what it is) to the server. Returns its name there.

        Raises PromptRefused where it is gone, StorageAway, ObjectUnreadable.
        """
        path, what = stored
        try:
            async with self._storage_health.used():
                content = FileParts(await self._storage.size_bytes(path), self._storage.read(path))
                return await self._server.upload(name, content, content_type=content_type, folder=folder, use=use)
        except FileNotFoundError:
            message = f"{what} is no longer in storage."
            raise PromptRefused(ErrorDetails(code=FailureCode.INTERNAL.value, message=message)) from None

    async def _put_models(self, graph: dict[str, Any], run: GraphRun) -> None:
        """Name this server's models in the graph. What was removed since the last reading is read again."""
        info = await self._fitness.node_types()
        try:
            chosen = chosen_models(graph, info, run.graph.models, run.graph.result_nodes)
        except NoModel:
            await self._fitness.refresh()
            info = await self._fitness.node_types()
            try:
                chosen = chosen_models(graph, info, run.graph.models, run.graph.result_nodes)
            except NoModel as missing:
                raise PromptRefused(
                    ErrorDetails(code=FailureCode.MODEL_MISSING.value, message=f"{run.graph.template_id}: {missing}")
                ) from None
        if run.named_files:
            relink(graph, info)
        for choice, name in chosen:
            graph[choice.node]["inputs"][choice.input] = name

    async def _put_lora(self, graph: dict[str, Any], run: GraphRun, lora: ExistingLora) -> None:
        """Upload the checkpoint as a LoRA and name it in the graph."""
        stored = await self._sent(
            lora.name,
            (lora.path, "The checkpoint"),
            content_type="application/octet-stream",
            folder=f"{FOLDER}/{run.job_id}",
            use=FileUse.LORA,
        )
        for node, name in lora.inputs:
            if node in graph:
                graph[node]["inputs"][name] = stored

    async def _with_loss(self, run: GraphRun, outcome: GraphOutcome) -> GraphOutcome:
        """A training's outcome with the last loss in the server's log, if the server offers its log."""
        if not run.named_files or outcome.error is not None:
            return outcome
        try:
            lines = await self._server.log_lines()
        except ServerError:
            return outcome
        losses = _LOSS.findall("".join(lines))
        return outcome.model_copy(update={"loss": float(losses[-1])}) if losses else outcome

    @contextmanager
    def _held(self, job_id: str, *, is_kept: bool = False) -> Iterator[None]:
        """Hold the server. `is_kept`: if the body succeeds the job's next run begins at once, before another job's."""
        kept_for: str | None = None
        self._slot.begin(job_id)
        try:
            yield
            kept_for = job_id if is_kept else None
        finally:
            self._loras.release(job_id)
            self._slot.end(kept_for=kept_for)

    @contextmanager
    def _following(self, prompt_id: str) -> Iterator[None]:
        self._followed[prompt_id] += 1
        try:
            yield
        finally:
            self._followed[prompt_id] -= 1
            self._followed += Counter()  # Drops what nobody follows.


async def _nobody() -> bool:
    return False


def _is_young(info: activity.Info) -> bool:
    return datetime.now(UTC) - info.scheduled_time < OTHERS_FIRST


def _moving(failure: RunFailure, prompt: PromptRun) -> ApplicationError:
    """The failure as the job's workflow reads it."""
    failed = _failed_run(prompt, is_over=failure.is_over, error=failure.error)
    return ApplicationError(str(failure), failed, type=_TYPES[type(failure)].value, non_retryable=True)


def _handed_back(reason: str, prompt: PromptRun, error: ErrorDetails | None = None) -> ApplicationError:
    failed = _failed_run(prompt, is_over=prompt.was_interrupted, error=error)
    return ApplicationError(reason, failed, type=RunFailureType.HANDED_BACK.value, non_retryable=True)


def _failed_run(prompt: PromptRun, *, is_over: bool, error: ErrorDetails | None = None) -> JsonValue:
    failed = FailedRun(percent=prompt.percent, was_sent=prompt.was_sent, is_over=is_over, error=error)
    return failed.model_dump(mode="json")


def _last_beat() -> RunBeat:
    details = activity.info().heartbeat_details
    try:
        return RunBeat.model_validate(details[0]) if details else RunBeat()
    except ValidationError:
        return RunBeat()

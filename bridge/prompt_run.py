"""Runs one prompt on one server, from the look-up to its end. Nothing here depends on Temporal.

look up ─ unknown, never sent ─→ submit ─→ follow ─→ outcome
   │                                          │
   ├─ unknown, but it was sent ─→ PromptLost (a restart empties queue and history)
   └─ known ─→ follow ──────────────────────→ outcome

ServerGone   no answer for 2 minutes
ServerDead   the server answers but runs nothing: its worker thread has died, or hangs inside a node
ServerSick   the server takes no prompt, or its GPU is broken
ServerUnfit  the server lacks a model or node that the graph needs
Interrupted  someone stopped the run at the server, not by a cancel of the job
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import structlog

from bridge.graphs import shown_name
from bridge.orders import GraphOutcome, GraphRun
from bridge.progress import RunProgress
from bridge.result_files import too_much
from bridge.server import (
    Prompt,
    PromptRefused,
    PromptResult,
    PromptState,
    PromptUpdate,
    ResultFile,
    Server,
    ServerError,
    ServerUnavailable,
    SubmitRefused,
    UnexpectedAnswer,
)
from comfyui_temporal.contracts.errors import ErrorDetails, FailureCode

T = TypeVar("T")
log = structlog.get_logger(__name__)

_QUICK_SECONDS: Final = 0.1
_QUICK_LOOK_UPS: Final = 30


class RunFailure(Exception):
    """This server will not finish this prompt; the text gives the reason.

    `error` is what the server said of the run, if it said anything. `is_over`: the prompt has ended there.
    """

    def __init__(self, text: str, *, error: ErrorDetails | None = None, is_over: bool = False) -> None:
        super().__init__(text)
        self.error = error
        self.is_over = is_over


class PromptLost(RunFailure):
    """The server no longer knows a prompt that it had accepted."""


class ServerGone(RunFailure):
    """The server has not answered for too long."""


class ServerDead(RunFailure):
    """The server answers but no longer runs anything."""


class ServerSick(RunFailure):
    """The server takes no prompt, or fails whatever it is given."""


class ServerUnfit(RunFailure):
    """The server lacks what this graph needs."""


class Interrupted(RunFailure):
    """The run was stopped at the server."""


@dataclass(frozen=True)
class Patience:
    """Waits and limits in seconds."""

    poll: float = 2.0
    silent: float = 120.0
    """No answer for this long: the job moves to another server."""
    dead: float = 60.0
    """Prompts queued but none running for this long: the server's worker thread has died."""
    stalled: float = 900.0
    """Running without a message for this long, and for `stalled_runs` times the expected run time: it hangs."""
    stalled_runs: float = 10.0
    look_again: float = 3.0
    """How long an unknown prompt is looked for before it counts as lost, or as never sent."""
    stop: float = 120.0
    """How long cancelling a prompt is repeated."""
    submits: int = 3
    """So many submits without a usable answer: the server is sick. None was queued."""


class PromptRun:
    """`was_sent`: an earlier attempt submitted the prompt. `prepare` returns the graph to submit."""

    def __init__(
        self,
        server: Server,
        run: GraphRun,
        prepare: Callable[[], Awaitable[Mapping[str, Any]]],
        *,
        was_sent: bool = False,
        patience: Patience | None = None,
        on_percent: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._server = server
        self._run = run
        self._prepare = prepare
        self._patience = patience or Patience()
        self._on_percent = on_percent
        self._progress = RunProgress(run.graph.graph, run.graph.result_nodes, run.first_percent)
        self._wake = asyncio.Event()
        self._published_percent = run.first_percent
        self._last_update_at = time.monotonic()
        self._is_heard = False
        self._blocked = ""
        self._running_at: float | None = None
        self._idle_since: float | None = None
        self._is_submitting = was_sent
        self.was_sent = was_sent
        self.was_found = False
        """The server knew the prompt at the first look-up: this attempt did not see it begin."""
        self.was_interrupted = False
        """`stop` ended it in mid-run: under its id it will never have a result."""

    @property
    def percent(self) -> int:
        return self._progress.percent

    @property
    def ran_seconds(self) -> float:
        """Since the prompt was first seen running; 0 before."""
        return 0.0 if self._running_at is None else time.monotonic() - self._running_at

    @property
    def is_heard(self) -> bool:
        """Whether the server's messages about this prompt get through."""
        return self._is_heard

    async def finish(self) -> GraphOutcome:
        """Submit the prompt unless it is known already, and follow it to its end. Raises RunFailure."""
        found = await self._look_up()
        self.was_found = found.state is not PromptState.UNKNOWN
        async with self._server.follow(self._run.prompt_id, self._receive):
            if found.state is PromptState.UNKNOWN:
                if self.was_sent and await self._is_still_unknown():
                    raise PromptLost(f"{self._server.url} no longer knows the prompt: it was restarted")
                if not self.was_sent:
                    refusal = await self._submit()
                    if refusal is not None:
                        return GraphOutcome(error=refusal, percent=self.percent)
            return await self._follow()

    async def stop(self) -> bool:
        """Repeat the cancel until the prompt has ended. Returns False if the server still has it at the end.

        Gives up on a server that stays silent, which takes nothing anyway.
        """
        until = time.monotonic() + self._patience.stop
        unknown_since: float | None = None
        is_there = False
        while time.monotonic() < until:
            try:
                state = await self._server.cancel(self._run.prompt_id)
                is_there = state in (PromptState.PENDING, PromptState.RUNNING)
                unknown_since = (unknown_since or time.monotonic()) if state is PromptState.UNKNOWN else None
                # A submit that was cut off may still reach the queue.
                unknown_seconds = time.monotonic() - unknown_since if unknown_since else 0.0
                may_appear = self._is_submitting and not self.was_sent and unknown_seconds < self._patience.look_again
                if state is PromptState.ENDED or (state is PromptState.UNKNOWN and not may_appear):
                    await self._see_whether_interrupted(state)
                    return True
            except ServerError as error:
                log.info("comfyui_cancel_unanswered", reason=str(error))
            await asyncio.sleep(0.2)
        log.warning("comfyui_cancel_given_up", prompt_id=self._run.prompt_id)
        return not is_there

    async def _see_whether_interrupted(self, state: PromptState) -> None:
        if state is PromptState.ENDED:
            found = await self._server.look_up(self._run.prompt_id, self._run.graph.result_nodes)
            self.was_interrupted = found.result is not None and found.result.is_interrupted

    async def _submit(self) -> ErrorDetails | None:
        """Submit it once. Returns the refusal, or None. Without an answer it is looked up before the next submit."""
        sent = 0
        while True:
            try:
                graph = await self._patiently(self._prepare)
                self._is_submitting = True
                sent += 1
                await self._server.submit(graph, self._run.prompt_id, self._run.graph.result_nodes)
                self.was_sent = True
                return None
            except PromptRefused as refused:
                if refused.details.code == FailureCode.MODEL_MISSING:
                    raise ServerUnfit(str(refused), error=refused.details) from None
                return refused.details
            except SubmitRefused as refused:
                error = _too_large(refused) if refused.is_too_large else None
                raise ServerSick(str(refused), error=error) from None
            except (ServerUnavailable, UnexpectedAnswer) as failure:
                reason = str(failure)
                log.info("comfyui_submit_unanswered", reason=reason)
            if not await self._is_still_unknown():
                self.was_sent = True
                return None
            if sent >= self._patience.submits:
                raise ServerSick(f"{reason}; {sent} submits had no effect")

    async def _is_still_unknown(self) -> bool:
        """Whether two more look-ups do not find it either: a submitted prompt may take a moment to be queued."""
        for _ in range(2):
            await asyncio.sleep(self._patience.look_again / 2)
            if (await self._look_up()).state is not PromptState.UNKNOWN:
                return False
        return True

    async def _follow(self) -> GraphOutcome:
        quick_look_ups = 0
        while True:
            found = await self._look_up()
            self._publish_percent()
            if found.result is not None:
                return self._outcome(found.result)
            if found.state is PromptState.UNKNOWN and await self._is_still_unknown():
                raise PromptLost(f"{self._server.url} no longer knows the prompt: it was restarted or emptied")
            await self._check_server(found)
            # The message about the end arrives before the history has the result.
            quick_look_ups = _QUICK_LOOK_UPS if self._wake.is_set() else max(0, quick_look_ups - 1)
            self._wake.clear()
            await self._wait_for_end(_QUICK_SECONDS if quick_look_ups else self._patience.poll)

    async def _wait_for_end(self, within_seconds: float) -> None:
        """Return early on a message about the end. Publishes whole percents meanwhile."""
        until = time.monotonic() + within_seconds
        while not self._wake.is_set() and (left := until - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(min(left, 0.25)):
                    await self._wake.wait()
            except TimeoutError:
                self._publish_percent()

    def _publish_percent(self) -> None:
        if self.percent > self._published_percent:
            self._published_percent = self.percent
            self._on_percent(self._published_percent)

    def _receive(self, update: PromptUpdate) -> None:
        self._last_update_at = time.monotonic()
        self._is_heard = not update.is_deaf
        self._blocked = update.blocked or self._blocked
        self._progress.add(update)
        if update.is_end:
            self._wake.set()

    async def _check_server(self, found: Prompt) -> None:
        """Cancel the prompt and raise ServerDead if the server makes no progress."""
        now = time.monotonic()
        if found.state is PromptState.RUNNING:
            self._idle_since = None
            if self._running_at is None:
                self._running_at = self._last_update_at = now
            if not self._is_heard:
                # Where messages do not get through, their absence says nothing: the queue shows that it runs.
                return
            patience = max(self._patience.stalled, self._patience.stalled_runs * self._run.graph.expected_seconds)
            if now - self._last_update_at > patience:
                await self._give_up(f"{self._server.url} has run the prompt without a message for {patience:.0f} s")
        elif found.state is PromptState.PENDING:
            if (await self._patiently(self._server.queue)).running:
                self._idle_since = None
                return
            self._idle_since = self._idle_since or now
            if now - self._idle_since > self._patience.dead:
                await self._give_up(f"{self._server.url} has queued prompts but runs none: its worker thread has died")

    async def _give_up(self, reason: str) -> None:
        try:
            await self._server.cancel(self._run.prompt_id)
        except ServerError as error:
            log.info("comfyui_cancel_unanswered", reason=str(error))
        raise ServerDead(reason, is_over=await self._is_withdrawn())

    async def _is_withdrawn(self) -> bool:
        """Whether the cancelled prompt is gone or ended: nobody finds a result under its id any more."""
        until = time.monotonic() + self._patience.look_again
        while time.monotonic() < until:
            with suppress(ServerError):
                found = await self._server.look_up(self._run.prompt_id, self._run.graph.result_nodes)
                if found.state is PromptState.UNKNOWN or (found.result is not None and found.result.is_interrupted):
                    return True
            await asyncio.sleep(0.2)
        return False

    async def _look_up(self) -> Prompt:
        return await self._patiently(lambda: self._server.look_up(self._run.prompt_id, self._run.graph.result_nodes))

    async def _patiently(self, request: Callable[[], Awaitable[T]]) -> T:
        """Repeat a request while the server does not answer. Raises ServerGone after 2 minutes."""
        silent_since: float | None = None
        while True:
            try:
                return await request()
            except (ServerUnavailable, UnexpectedAnswer) as error:
                now = time.monotonic()
                silent_since = silent_since or now
                if now - silent_since > self._patience.silent:
                    raise ServerGone(f"{error}; silent for {self._patience.silent:.0f} s") from None
                await asyncio.sleep(min(1.0, self._patience.poll))

    def _outcome(self, result: PromptResult) -> GraphOutcome:
        error, files = result.error, result.files
        if error is not None and result.is_interrupted:
            raise Interrupted(error.message, error=error, is_over=True)
        if error is not None and result.is_servers_fault:
            raise ServerSick(error.message, error=error, is_over=True)
        if error is None:
            files = files + self._run.named_files
        if error is None:
            named = {file.node for file in self._run.named_files}
            empty = result.empty_nodes if files or result.texts else self._run.graph.result_nodes
            error = self._half_result([node for node in empty if node not in named]) or too_much(files, result.texts)
            error = error or self._too_few(files)
        if error is not None:
            files, result = [], replace(result, texts=[])
        return GraphOutcome(
            files=files,
            texts=result.texts,
            error=error,
            seconds=result.seconds,
            percent=self.percent,
            was_found=self.was_found and not self.was_sent,
        )

    def _half_result(self, empty_nodes: Sequence[str]) -> ErrorDetails | None:
        """The error of a run that succeeded without some of its results: they were asked for, and are all paid for."""
        if not empty_nodes:
            return None
        if self._blocked:
            message = f"A node stopped what its results need: {self._blocked}"
            return ErrorDetails(code=FailureCode.NODE_ERROR.value, message=message, retryable=False)
        graph = self._run.graph.graph
        message = (
            "ComfyUI reports success, but its result nodes returned nothing: "
            f"{', '.join(shown_name(graph, node) for node in empty_nodes)}."
        )
        return ErrorDetails(code=FailureCode.INTERNAL.value, message=message, retryable=True, node=empty_nodes[0])

    def _too_few(self, files: Sequence[ResultFile]) -> ErrorDetails | None:
        """The error of a run that made fewer images than were asked for: each is paid for."""
        wanted = self._run.graph.images
        if wanted == 1 or len(files) >= wanted:
            return None
        message = f"{wanted} images were asked for, and ComfyUI returned {len(files)}."
        return ErrorDetails(code=FailureCode.INTERNAL.value, message=message, retryable=True)


def _too_large(refused: SubmitRefused) -> ErrorDetails:
    message = f"{refused}: the graph is larger than it accepts."
    return ErrorDetails(code=FailureCode.WORKFLOW_INVALID.value, message=message, retryable=False)

"""One prompt on one server, from look-up to its end; no Temporal here.

look up ─ not there, never sent ─→ send ─→ follow ─→ outcome
   │                                          │
   ├─ not there, but it was sent ─→ PromptLost (a restart empties queue and history)
   └─ there ─→ follow ──────────────────────→ outcome

ServerGone   no answer for 2 minutes
ServerDead   HTTP answers and nothing runs: its thread has died, or hangs inside a node
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import structlog

from bridge.native import Found, NativeServer, Standing
from bridge.native_errors import NativeFailure, PromptRefused, ServerConfused, ServerSilent
from bridge.native_events import listening
from bridge.orders import GraphOutcome, GraphRun
from bridge.progress import RunProgress
from comfyui_temporal.contracts.errors import ErrorDetails, FailureCode

T = TypeVar("T")
log = structlog.get_logger(__name__)

_END_MESSAGES: Final = frozenset({"execution_success", "execution_error", "execution_interrupted"})
_SOON_SECONDS: Final = 0.1
_SOON_LOOKS: Final = 30


class RunFailure(Exception):
    """This server will not end this prompt; the text says why."""


class PromptLost(RunFailure):
    """The server no longer knows a prompt that it had taken."""


class ServerGone(RunFailure):
    """The server has not answered for too long."""


class ServerDead(RunFailure):
    """The server answers, and runs nothing any more."""


@dataclass(frozen=True)
class Patience:
    """How long what is waited for, in seconds."""

    poll: float = 2.0
    silent: float = 120.0
    """No answer for this long: the job goes elsewhere."""
    dead: float = 60.0
    """Queued prompts and none running for this long: the server's thread has died."""
    stalled: float = 900.0
    """Running without any message for this long, or for `stalled_runs` times the expected run: it hangs."""
    stalled_runs: float = 10.0
    look_again: float = 3.0
    """Between two looks before what is not there counts as lost, or as never sent."""
    stop: float = 120.0
    """How long a cancelled prompt is asked to end."""


class PromptRun:
    """`was_sent`: the server had taken the prompt before. `prepare` gives the graph that is sent."""

    def __init__(
        self,
        server: NativeServer,
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
        self._told = run.first_percent
        self._sign_at = time.monotonic()
        self._running_at: float | None = None
        self._idle_since: float | None = None
        self._is_asked = was_sent
        self.was_sent = was_sent

    @property
    def percent(self) -> int:
        return self._progress.percent

    async def to_its_end(self) -> GraphOutcome:
        """Run it, or follow it where it runs already. Raises RunFailure."""
        prompt_id = self._run.prompt_id
        found = await self._look()
        # The client id is the prompt's: whoever comes after us hears the messages of the prompt that we sent.
        async with listening(self._server.ws_url, prompt_id, prompt_id, self._heard):
            if found.standing is Standing.UNKNOWN:
                if self.was_sent and await self._is_unknown_still():
                    raise PromptLost(f"{self._server.url} no longer knows the prompt: it was restarted")
                if not self.was_sent:
                    refused = await self._sent()
                    if refused is not None:
                        return GraphOutcome(error=refused, percent=self.percent)
            return await self._followed()

    async def stop(self) -> None:
        """See to it that the prompt does not run on, whatever it takes; gives up on a server that stays silent."""
        until = time.monotonic() + self._patience.stop
        unknown_since: float | None = None
        while time.monotonic() < until:
            try:
                standing = await self._server.cancel(self._run.prompt_id)
                unknown_since = (unknown_since or time.monotonic()) if standing is Standing.UNKNOWN else None
                # A request that was cut while it was sent may still be queued.
                looked_for = time.monotonic() - unknown_since if unknown_since else 0.0
                waits = self._is_asked and not self.was_sent and looked_for < self._patience.look_again
                if standing is Standing.ENDED or (standing is Standing.UNKNOWN and not waits):
                    return
            except NativeFailure as failure:
                log.info("comfyui_cancel_unanswered", reason=str(failure))
            await asyncio.sleep(0.2)
        log.warning("comfyui_cancel_given_up", prompt_id=self._run.prompt_id)

    async def _sent(self) -> ErrorDetails | None:
        """Send it once; the refusal, or None. After silence it is looked up before it is sent again."""
        while True:
            try:
                graph = await self._patiently(self._prepare)
                self._is_asked = True
                await self._server.submit(graph, prompt_id=self._run.prompt_id, client_id=self._run.prompt_id)
                self.was_sent = True
                return None
            except PromptRefused as refused:
                return refused.details
            except (ServerSilent, ServerConfused) as failure:
                log.info("comfyui_submit_unanswered", reason=str(failure))
            if not await self._is_unknown_still():
                self.was_sent = True
                return None

    async def _is_unknown_still(self) -> bool:
        """Whether it is not there at two looks, some seconds apart: what was sent may take a moment to be queued."""
        for _ in range(2):
            await asyncio.sleep(self._patience.look_again / 2)
            if (await self._look()).standing is not Standing.UNKNOWN:
                return False
        return True

    async def _followed(self) -> GraphOutcome:
        soon = 0
        while True:
            found = await self._look()
            self._tell()
            if found.standing is Standing.ENDED:
                return self._outcome(found)
            if found.standing is Standing.UNKNOWN and await self._is_unknown_still():
                raise PromptLost(f"{self._server.url} no longer knows the prompt: it was restarted or emptied")
            await self._judge(found)
            # The end's message comes before the history has it.
            soon = _SOON_LOOKS if self._wake.is_set() else max(0, soon - 1)
            self._wake.clear()
            await self._woken(_SOON_SECONDS if soon else self._patience.poll)

    async def _woken(self, within_seconds: float) -> None:
        """Until something about the end was heard; whole percents are told on the way."""
        until = time.monotonic() + within_seconds
        while not self._wake.is_set() and (left := until - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(min(left, 0.25)):
                    await self._wake.wait()
            except TimeoutError:
                self._tell()

    def _tell(self) -> None:
        if self.percent > self._told:
            self._told = self.percent
            self._on_percent(self._told)

    def _heard(self, kind: str, data: Mapping[str, Any]) -> None:
        self._sign_at = time.monotonic()
        self._progress.heard(kind, data)
        if kind in _END_MESSAGES or (kind == "executing" and data.get("node") is None):
            self._wake.set()

    async def _judge(self, found: Found) -> None:
        """Raise ServerDead where the server will not get on with it; the prompt is taken back first."""
        now = time.monotonic()
        if found.standing is Standing.RUNNING:
            self._idle_since = None
            if self._running_at is None:
                self._running_at = self._sign_at = now
            patience = max(self._patience.stalled, self._patience.stalled_runs * self._run.graph.expected_seconds)
            if now - self._sign_at > patience:
                await self._give_up(f"{self._server.url} runs the prompt and has said nothing for {patience:.0f} s")
        elif found.standing is Standing.PENDING:
            if (await self._patiently(self._server.queue)).running:
                self._idle_since = None
                return
            self._idle_since = self._idle_since or now
            if now - self._idle_since > self._patience.dead:
                await self._give_up(f"{self._server.url} has prompts queued and runs none: its thread has died")

    async def _give_up(self, reason: str) -> None:
        try:
            await self._server.cancel(self._run.prompt_id)
        except NativeFailure as failure:
            log.info("comfyui_cancel_unanswered", reason=str(failure))
        raise ServerDead(reason)

    async def _look(self) -> Found:
        return await self._patiently(lambda: self._server.find(self._run.prompt_id))

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask again while the server is silent; raise ServerGone after 2 minutes of it."""
        silent_since: float | None = None
        while True:
            try:
                return await ask()
            except (ServerSilent, ServerConfused) as failure:
                now = time.monotonic()
                silent_since = silent_since or now
                if now - silent_since > self._patience.silent:
                    raise ServerGone(f"{failure}; silent for {self._patience.silent:.0f} s") from None
                await asyncio.sleep(min(1.0, self._patience.poll))

    def _outcome(self, found: Found) -> GraphOutcome:
        error = found.error()
        nodes = self._run.graph.result_nodes
        files, texts = found.files(nodes), found.texts(nodes)
        if error is None:
            files = files + self._run.named_files
        if error is None and not files and not texts:
            error = ErrorDetails(
                code=FailureCode.INTERNAL.value,
                message="ComfyUI says that the run succeeded, and its result nodes gave nothing.",
                retryable=True,
            )
        return GraphOutcome(
            files=files, texts=texts, error=error, seconds=ran_seconds(found.entry), percent=self.percent
        )


def ran_seconds(entry: Mapping[str, Any]) -> float:
    """How long a prompt ran, by the times in its history; 0 where it does not tell."""
    status = entry.get("status")
    messages = status.get("messages") if isinstance(status, Mapping) else None
    times: list[float] = []
    for message in messages if isinstance(messages, list) else ():
        data = message[1] if isinstance(message, list) and len(message) == 2 else None
        at = data.get("timestamp") if isinstance(data, Mapping) else None
        if isinstance(at, int | float) and not isinstance(at, bool):
            times.append(at / 1000)
    return max(0.0, max(times) - min(times)) if times else 0.0

"""Warm-up runs: a template is run once on its server, so that its models are loaded before a job needs them.

    comes up, comes back, is well again ──→ cold ── free, and no job waits ──→ warming ── ended ──→ warm
                                             ↑                                    │
                                             └──────────── a job waits ───────────┘

Jobs go first. A server that warms up takes none, so that one that is warm gets them; where a job waits all the same,
the warm-up is given up: what it has loaded stays loaded. It is no job: no points, no workflow, no measured run; its
files and its prompt are removed. One that fails is reported, and not repeated before the server comes back. One that
loses its server, as a graph does that takes ComfyUI down, is repeated once.
"""

from __future__ import annotations

import asyncio
import copy
import io
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import structlog
from PIL import Image

from bridge.fitness import Fitness, TemplateState
from bridge.graph_check import NoModel, chosen_models
from bridge.graphs import needed_part
from bridge.manifest import FileExtra
from bridge.server import NotListening, PromptRefused, PromptResult, PromptState, Server, ServerError
from bridge.slot import Slot
from bridge.task_files import FOLDER, is_left_by
from bridge.templates import RequestRefused, Template
from comfyui_temporal.contracts.comfyui import JobRequest, Resolution, TaskPriority
from comfyui_temporal.contracts.fields import repaired, shortened
from runtime.background import running_in_background

PROMPT: Final = "a lighthouse at dusk"
MOST_LOSSES: Final = 2
"""So often a template's warm-up may lose its server, until a job of that template has succeeded there."""
MOST_REASON: Final = 300
FIRST_SECONDS: Final = 2.0
"""How long the start waits for the first warm-up to begin. Jobs are polled for afterwards."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class WarmUpPace:
    """Waits and limits in seconds."""

    look: float = 2.0
    poll: float = 1.0
    within: float = 900.0
    """A run that takes longer is stopped. Jobs that wait stop it at once."""
    silent: float = 120.0
    """No answer for so long: it is away."""
    stop: float = 60.0
    """A server that still runs it this long after a stop is sick."""
    appears: float = 3.0
    """A submit without an answer may still be queued for so long."""


class _GivenUp(Exception):
    """A job waits."""


class _Failed(Exception):
    """The run failed; the text says why. `is_away`: the server does not know it any more, or does not answer.
    `is_broken`: whatever it runs would fail."""

    def __init__(self, text: str, *, is_away: bool = False, is_broken: bool = False) -> None:
        super().__init__(text)
        self.is_away = is_away
        self.is_broken = is_broken


class WarmUps:
    """The warm-up runs of one server. `waiting` tells how many jobs wait that it could run."""

    def __init__(
        self,
        server: Server,
        slot: Slot,
        fitness: Fitness,
        template_ids: Iterable[str],
        *,
        waiting: Callable[[], Awaitable[int]],
        pace: WarmUpPace | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._server = server
        self._slot = slot
        self._fitness = fitness
        self._wanted = list(dict.fromkeys(template_ids))
        self._waiting = waiting
        self._pace = pace or WarmUpPace()
        self.on_change = on_change
        self.cold = list(self._wanted)
        """Templates whose warm-up is still to come."""
        self.failed: dict[str, str] = {}
        """Template → why its warm-up failed."""
        self._was_away = False
        self._silent_since: float | None = None
        self._losses: Counter[str] = Counter()
        self._decided = asyncio.Event()

    def was_away(self) -> None:
        """The server lost what it had: once it can be used again, it is cold."""
        self._was_away = True

    def ran(self, template_id: str) -> None:
        """A job of this template succeeded: its models are loaded."""
        self._losses.pop(template_id, None)
        if template_id in self.cold or template_id in self.failed:
            self._is_warm(template_id)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Warm up what is cold while the body runs. The first one has the server before the body begins."""
        if not self._wanted:
            yield
            return
        async with running_in_background(self._watch()):
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_SECONDS):
                    await self._decided.wait()
            yield

    async def _watch(self) -> None:
        while True:
            if await self._is_usable():
                for template_id in list(self.cold):
                    await self._warm(template_id)
            self._decided.set()
            await asyncio.sleep(self._pace.look)

    async def _is_usable(self) -> bool:
        """Whether the server answers and is well. One that was gone, or sick, has lost its models."""
        if self._slot.health.problem is not None:
            self._was_away = True
            return False
        try:
            await self._server.queue()
        except ServerError as error:
            self._is_silent(is_gone=isinstance(error, NotListening))
            return False
        self._silent_since = None
        if self._was_away:
            self._was_away = False
            self.cold = [name for name in self._wanted if self._losses[name] < MOST_LOSSES]
            self.failed = {name: why for name, why in self.failed.items() if name not in self.cold}
            self.on_change()
        return True

    def _is_silent(self, *, is_gone: bool) -> None:
        """It did not answer. While it loads a model it is slow, and has lost nothing."""
        now = time.monotonic()
        self._silent_since = self._silent_since or now
        if is_gone or now - self._silent_since > self._pace.silent:
            self._was_away = True

    async def _warm(self, template_id: str) -> None:
        template = self._fitness.template(template_id)
        if template is None or self._fitness.state_of(template_id) is not TemplateState.FIT:
            return
        if self._slot.is_held or await self._slot.problem() is not None or await self._waiting():
            return
        try:
            info = await self._fitness.node_types()
        except ServerError:
            return
        run = _Run(self._server, template, self._waiting, self._pace)
        if not self._slot.hold(run.run_id):
            return
        self._decided.set()
        began = time.monotonic()
        said = log.bind(template_id=template_id, server=self._server.url)
        try:
            await run.finish(info)
        except _GivenUp:
            said.info("warm_up_given_up", seconds=round(time.monotonic() - began, 3))
            return
        except _Failed as failure:
            said.warning("warm_up_failed", reason=str(failure))
            self._has_failed(template_id, failure)
        else:
            said.info("warm_up_done", seconds=round(time.monotonic() - began, 3))
            self._is_warm(template_id)
        finally:
            try:
                await self._clear(run)
            finally:
                self._slot.end()

    async def _clear(self, run: _Run) -> None:
        """Stop it if it still runs, and remove what it left."""
        try:
            async with asyncio.timeout(self._pace.stop):
                await run.clear()
        except TimeoutError:
            self._slot.health.fell_sick(f"a warm-up run did not stop within {self._pace.stop:g} s")
        except ServerError as error:
            log.info("warm_up_not_cleared", reason=str(error))

    def _is_warm(self, template_id: str) -> None:
        self.cold = [name for name in self.cold if name != template_id]
        self.failed.pop(template_id, None)
        self.on_change()

    def _has_failed(self, template_id: str, failure: _Failed) -> None:
        if failure.is_broken:
            self._slot.health.fell_sick(str(failure))
        if failure.is_away or failure.is_broken:
            self._losses[template_id] += 1
            self._was_away = True
        self.cold = [name for name in self.cold if name != template_id]
        self.failed[template_id] = shortened(repaired(str(failure)), MOST_REASON)
        self.on_change()


class _Run:
    """One run of a template. Its id is that of no job, and stands in the paths of its files."""

    def __init__(
        self, server: Server, template: Template, waiting: Callable[[], Awaitable[int]], pace: WarmUpPace
    ) -> None:
        self.run_id = f"warm-up-{uuid.uuid4().hex[:16]}"
        self._prompt_id = str(uuid.uuid4())
        self._server = server
        self._template = template
        self._waiting = waiting
        self._pace = pace
        self._was_sent = False
        self._is_queued = False

    async def finish(self, info: Mapping[str, Any]) -> None:
        """Run it to its end. Raises _GivenUp, _Failed."""
        try:
            graph = await self._prepared(info)
            self._was_sent = True
            await self._server.submit(graph, self._prompt_id, self._template.result_nodes)
            self._is_queued = True
            await self._follow()
        except (RequestRefused, NoModel) as refused:
            raise _Failed(str(refused)) from None
        except PromptRefused as refused:
            self._was_sent = False
            raise _Failed(refused.details.message) from None
        except ServerError as error:
            raise _Failed(str(error), is_away=True) from None

    async def clear(self) -> None:
        """Raises ServerError."""
        if not self._was_sent:
            return
        appears_until = time.monotonic() + self._pace.appears
        while True:
            state = (await self._server.look_up(self._prompt_id, ())).state
            if state in (PromptState.PENDING, PromptState.RUNNING):
                self._is_queued = True
                await self._server.cancel(self._prompt_id)
            elif state is not PromptState.UNKNOWN or self._is_queued or time.monotonic() > appears_until:
                break
            await asyncio.sleep(min(0.2, self._pace.poll))
        for file in await self._server.produced(self._prompt_id):
            if is_left_by(file, self.run_id):
                await self._server.erase(file)
        await self._server.forget(self._prompt_id)

    async def _prepared(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """The graph for the smallest job of the template, with this server's models. Raises RequestRefused, NoModel."""
        slots, extras = self._template.manifest.controls, self._template.manifest.extras
        needed = [name for name, extra in extras.items() if isinstance(extra, FileExtra) and extra.required]
        request = JobRequest(
            **{"task_id": self.run_id, "tenant_id": "warm-up", "user_id": "warm-up", "callback_url": ""},
            template_id=self._template.template_id,
            prompt=PROMPT,
            controls=[{"image_url": "warm-up"} for _ in slots],
            # Of a video or sound a grey picture is none: that warm-up fails, and says so.
            extras=dict.fromkeys(needed, "warm-up"),
            resolution=Resolution.SD,
            priority=TaskPriority.STANDARD,
        )
        rendered = self._template.render(request, job_id=self.run_id)
        graph: dict[str, Any] = needed_part(copy.deepcopy(rendered.graph), rendered.result_nodes)
        for choice, name in chosen_models(graph, info, rendered.models, rendered.result_nodes):
            graph[choice.node]["inputs"][choice.input] = name
        for upload in rendered.uploads:
            if upload.node in graph:
                graph[upload.node]["inputs"][upload.input] = await self._server.upload(
                    f"control-{upload.control}.png", _grey(), content_type="image/png", folder=f"{FOLDER}/{self.run_id}"
                )
        return graph

    async def _follow(self) -> None:
        until = time.monotonic() + self._pace.within
        heard_at = time.monotonic()
        while time.monotonic() < until:
            try:
                prompt = await self._server.look_up(self._prompt_id, self._template.result_nodes)
            except ServerError as error:
                # It is slow to answer while it loads a model, which is what it is here for.
                if time.monotonic() - heard_at > self._pace.silent:
                    raise _Failed(str(error), is_away=True) from None
            else:
                heard_at = time.monotonic()
                if prompt.result is not None:
                    return _check(prompt.result)
                if prompt.state is PromptState.UNKNOWN:
                    raise _Failed("the server no longer knows it: it was restarted or emptied", is_away=True)
            if await self._waiting():
                raise _GivenUp
            await asyncio.sleep(self._pace.poll)
        raise _Failed(f"it did not end within {self._pace.within:g} s")


def _check(result: PromptResult) -> None:
    if result.error is not None:
        raise _Failed(result.error.message, is_broken=result.is_servers_fault)


def _grey() -> bytes:
    """A picture for templates that need one."""
    written = io.BytesIO()
    Image.new("RGB", (512, 512), (128, 128, 128)).save(written, "PNG")
    return written.getvalue()

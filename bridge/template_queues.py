"""One task queue for each template, polled by the servers that can run it.

A job waits in its pool's queue, which every server of the pool polls: there the order is strict over all templates. A
server that takes a job that it cannot run hands it over to its template's queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import structlog
from temporalio.worker import Worker

from runtime.background import running_in_background, woken

AGAIN_SECONDS: Final = 5.0
log = structlog.get_logger(__name__)


class TemplateQueues:
    """The workers of one server, one for each template that it can run."""

    def __init__(self, fit: Callable[[], set[str]], worker: Callable[[str], Worker]) -> None:
        self._fit = fit
        self._worker = worker
        self._polled: dict[str, _Polling] = {}
        self._changed = asyncio.Event()

    def changed(self) -> None:
        self._changed.set()

    @asynccontextmanager
    async def polled(self) -> AsyncIterator[None]:
        """Poll the queues of the templates that are fit, while the body runs."""
        await self._follow(self._fit())
        try:
            async with running_in_background(self._follow_always()):
                yield
        finally:
            await self._follow(set())

    async def _follow_always(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._follow(self._fit())

    async def _follow(self, wanted: set[str]) -> None:
        for template_id in wanted - set(self._polled):
            self._polled[template_id] = _Polling(template_id, self._worker)
        unwanted = set(self._polled) - wanted
        await asyncio.gather(*(self._polled[template_id].end() for template_id in unwanted))
        for template_id in unwanted:
            del self._polled[template_id]


class _Polling:
    """Polls one template's queue until `end`. Where its worker fails, it is polled again a little later."""

    def __init__(self, template_id: str, worker: Callable[[str], Worker]) -> None:
        self._template_id = template_id
        self._make = worker
        self._worker = worker(template_id)
        self._ending = asyncio.Event()
        self._running = asyncio.create_task(self._run())

    async def end(self) -> None:
        self._ending.set()
        # A worker that is not at work never says that it has shut down.
        stopping = asyncio.create_task(self._worker.shutdown())
        await asyncio.gather(self._running, return_exceptions=True)
        stopping.cancel()

    async def _run(self) -> None:
        while not self._ending.is_set():
            try:
                await self._worker.run()
                return
            except Exception as error:
                log.warning("template_queue_left", template_id=self._template_id, reason=str(error))
            await woken(self._ending, within_seconds=AGAIN_SECONDS)
            if self._ending.is_set():
                return
            # One that never began is run again: it keeps its place at the connection, which takes no second one.
            if getattr(self._worker, "_started", True):
                self._worker = self._make(self._template_id)

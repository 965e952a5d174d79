"""One task queue for each template, polled by the servers that can run it.

A job waits in its pool's queue, which every server of the pool polls: there the order is strict over all templates. A
server that takes a job that it cannot run hands it over to its template's queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from temporalio.worker import Worker

from runtime.background import running_in_background


class TemplateQueues:
    """The workers of one server, one for each template that it can run."""

    def __init__(self, fit: Callable[[], set[str]], worker: Callable[[str], Worker]) -> None:
        self._fit = fit
        self._worker = worker
        self._polled: dict[str, tuple[Worker, asyncio.Task[None]]] = {}
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
            worker = self._worker(template_id)
            self._polled[template_id] = (worker, asyncio.create_task(worker.run()))
        unwanted = set(self._polled) - wanted
        await asyncio.gather(*(_end(*self._polled[template_id]) for template_id in unwanted))
        for template_id in unwanted:
            del self._polled[template_id]


async def _end(worker: Worker, running: asyncio.Task[None]) -> None:
    if not running.done():
        await worker.shutdown()
    await asyncio.gather(running, return_exceptions=True)

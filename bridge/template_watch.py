"""Templates whose files change while a process runs are read again. While the new ones are wrong, the old ones stay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import structlog

from bridge.template_library import TemplateLibrary, load_library
from bridge.templates import TemplateProblem
from runtime.background import running_in_background

EVERY_SECONDS: Final = 2.0

log = structlog.get_logger(__name__)
Signature = tuple[tuple[str, int, int], ...]


class TemplateWatch:
    """Keeps a library up to date with its folders while `watched` is entered. `on_change` is called afterwards."""

    def __init__(
        self,
        library: TemplateLibrary,
        folders: Sequence[Path],
        *,
        on_change: Callable[[], None] = lambda: None,
        every_seconds: float = EVERY_SECONDS,
    ) -> None:
        self._library = library
        self._folders = list(folders)
        self._on_change = on_change
        self._every_seconds = every_seconds
        self._read = self._signature()

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        async with running_in_background(self._watch()):
            yield

    async def _watch(self) -> None:
        seen = self._read
        while True:
            await asyncio.sleep(self._every_seconds)
            now = await asyncio.to_thread(self._signature)
            # Who copies a folder writes one file after another: it is read once nothing changes any more.
            if now == seen and now != self._read:
                self._read = now
                await self._reload()
            seen = now

    async def _reload(self) -> None:
        try:
            loaded = await asyncio.to_thread(load_library, *self._folders)
        except TemplateProblem as problem:
            log.warning("templates_not_reloaded", reason=str(problem))
            return
        self._library.replace(loaded)
        log.info("templates_reloaded", templates=sorted(template.template_id for template in loaded))
        self._on_change()

    def _signature(self) -> Signature:
        """Names, times and sizes of all files of templates."""
        found: list[tuple[str, int, int]] = []
        for folder in self._folders:
            for path in sorted(folder.glob("*/*")):
                with suppress(OSError):
                    stat = path.stat()
                    found.append((str(path), stat.st_mtime_ns, stat.st_size))
        return tuple(found)

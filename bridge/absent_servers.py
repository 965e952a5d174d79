"""Servers that were there a short time ago: a worker that drains, is replaced or was killed comes back.

What only they can run is not refused meanwhile, nor a training for their type of GPU, and jobs that wait for them go on
waiting.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

from bridge.seen_server import SeenServer

COMES_BACK_WITHIN: Final = timedelta(minutes=30)
"""More than a drain takes (`GPU_GRACE_SECONDS`, 10 minutes), and the start of another machine."""


class AbsentServers:
    """The last known state of each server, by name."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[SeenServer, datetime]] = {}
        self._present: set[str] = set()

    def look(self, present: Iterable[SeenServer], absent: Iterable[tuple[SeenServer, datetime]]) -> None:
        """Take in what was seen now: the servers that are there, and others with the time of their last poll."""
        now = datetime.now(UTC)
        there = {server.name: server for server in present}
        self._present = set(there)
        for server, at in absent:
            self._last.setdefault(server.name, (server, at))
        self._last |= {name: (server, now) for name, server in there.items()}
        self._last = {name: seen for name, seen in self._last.items() if now - seen[1] < COMES_BACK_WITHIN}

    @property
    def servers(self) -> list[SeenServer]:
        """Those that may come back, sorted by name."""
        return [self._last[name][0] for name in sorted(self._last.keys() - self._present)]

    def can_run(self, pool: str, template_id: str) -> bool:
        """Whether a server of the pool that may come back could run the template."""
        return any(
            server.pool == pool and server.report is not None and server.can_run(template_id) for server in self.servers
        )

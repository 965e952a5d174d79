"""One LISTEN connection: which task was written, as soon as the write is committed (pitfall 28).

PostgreSQL delivers no notification to a closed connection, and a hanging one gives no error. So the connection is
checked regularly and replaced if it does not answer. After each new start the listener reports that notifications
may have been missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import asyncpg
import structlog

from store.database import ALIVE, DRIVER_ERRORS
from store.tables import EVENTS_CHANNEL

log = structlog.get_logger(__name__)

SIGN_OF_LIFE_SECONDS: Final = 2.0
ANSWER_SECONDS: Final = 1.5
CONNECT_SECONDS: Final = 1.5
FIRST_RETRY_SECONDS: Final = 0.1
LAST_RETRY_SECONDS: Final = 1.0


class EventListener:
    """Calls `written(task_id, seq)` for each write, and `resumed()` each time that it starts to listen."""

    def __init__(
        self, dsn: str, address: str, *, written: Callable[[str, int], None], resumed: Callable[[], None]
    ) -> None:
        self._dsn = dsn
        self._address = address
        self._written = written
        self._resumed = resumed
        self.is_listening = False

    async def run(self) -> None:
        """Listen until cancelled."""
        retry = FIRST_RETRY_SECONDS
        while True:
            try:
                connection = await asyncpg.connect(
                    self._dsn,
                    timeout=CONNECT_SECONDS,
                    server_settings={"application_name": "comfyui-temporal listener"},
                )
            except DRIVER_ERRORS as error:
                self._warn("listener_not_connected", error)
                await asyncio.sleep(retry)
                retry = min(LAST_RETRY_SECONDS, retry * 2)
                continue
            retry = FIRST_RETRY_SECONDS
            try:
                await self._listen(connection)
            except DRIVER_ERRORS as error:
                self._warn("listener_lost", error)
                await asyncio.sleep(retry)
            finally:
                self.is_listening = False
                connection.terminate()

    async def _listen(self, connection: asyncpg.Connection[Any]) -> None:
        """Return when the connection no longer answers."""
        ended = asyncio.Event()
        connection.add_termination_listener(lambda _connection: ended.set())
        await asyncio.wait_for(connection.add_listener(EVENTS_CHANNEL, self._notified), ANSWER_SECONDS)
        self.is_listening = True
        self._resumed()
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), SIGN_OF_LIFE_SECONDS)
                raise ConnectionResetError("the server closed the connection")
            await connection.execute(ALIVE, timeout=ANSWER_SECONDS)

    def _notified(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        task_id, _, seq = str(payload).rpartition(":")
        if task_id and seq.isascii() and seq.isdigit():
            self._written(task_id, int(seq))

    def _warn(self, event: str, error: Exception) -> None:
        log.warning(event, database=self._address, reason=type(error).__name__)

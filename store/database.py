"""The connection to PostgreSQL: engine, time limits, and driver errors as failures.

Departures from the usual
1. Work that exceeds its limit fails with `StoreUnavailable` immediately but is left to end by itself. Cancelling it
   would make the driver wait for a hanging server and block the caller for seconds. All work here may be repeated, so
   a write that lands late does no harm.
2. No ping before use: it would cost every write a round trip. A pooled connection that the server has closed fails
   at first use, and the work is repeated once on a new one. So does one whose server only reads since a failover.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, NoReturn, TypeVar

import asyncpg
from sqlalchemy import event
from sqlalchemy.engine import ExceptionContext, make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from store.failures import StoreFailure, StoreUnavailable, WriteRefused

T = TypeVar("T")

STATEMENT_TIMEOUT_SECONDS: Final = 1.5
CONNECT_SECONDS: Final = 1.5
WORK_SECONDS: Final = 2.0
"""Limit for one piece of work, unless its caller sets a lower one."""
POOL_SIZE: Final = 5

DRIVER_ERRORS: Final = (
    SQLAlchemyError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    # asyncpg raises it if the server closes the connection between two of its own messages.
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
_REFUSED_CLASSES: Final = ("22", "23")
"""SQLSTATE classes: data exception, integrity constraint violation."""
_MISSING_TABLE: Final = "42P01"
_READ_ONLY: Final = "25006"
_LEFT: Final = frozenset({_READ_ONLY, "57P01", "57P02"})
"""A new connection may lead to another server: this one only reads (a standby, after a failover), or shuts down."""
ALIVE: Final = f"""
DO $$ BEGIN
  IF current_setting('transaction_read_only') = 'on' THEN
    RAISE SQLSTATE '{_READ_ONLY}' USING MESSAGE = 'the server only reads';
  END IF;
END $$
"""
"""Fails where the server answers and takes no writes."""


def address_of(dsn: str) -> str:
    """Host, port and database of a DSN, to display: without user and password. Raises ValueError."""
    try:
        url = make_url(dsn)
    except (SQLAlchemyError, ValueError):
        url = None
    if url is None or url.drivername not in ("postgresql", "postgres"):
        raise ValueError("The database DSN must look like postgresql://user:password@host:port/database.") from None
    host = url.host or next(iter(url.normalized_query.get("host", ())), "localhost")
    return f"{host}{f':{url.port}' if url.port else ''}/{url.database or ''}"


def _leave_server(context: ExceptionContext) -> None:
    """No connection that the pool has now is used again."""
    if getattr(context.original_exception, "sqlstate", None) in _LEFT:
        context.is_disconnect = True


class Database:
    """A small pool of connections to one PostgreSQL database. It opens none before the first use."""

    def __init__(self, dsn: str, *, pool_size: int = POOL_SIZE) -> None:
        """`dsn` is libpq's: `postgresql://user:password@host:port/database?sslmode=…`. Raises ValueError."""
        self.address = address_of(dsn)
        self._dsn = dsn
        self._engine = create_async_engine(
            "postgresql+asyncpg://",
            async_creator=self._connect,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=CONNECT_SECONDS,
        )
        event.listen(self._engine.sync_engine, "handle_error", _leave_server)
        self._autocommit = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._outliving: set[asyncio.Task[Any]] = set()

    async def _connect(self) -> asyncpg.Connection[Any]:
        milliseconds = str(int(STATEMENT_TIMEOUT_SECONDS * 1000))
        return await asyncpg.connect(
            self._dsn,
            timeout=CONNECT_SECONDS,
            command_timeout=WORK_SECONDS,
            server_settings={
                "application_name": "comfyui-temporal",
                "statement_timeout": milliseconds,
                # A client that vanished during a transaction must not keep a task's row locked.
                "idle_in_transaction_session_timeout": "5000",
            },
        )

    async def transaction(
        self, work: Callable[[AsyncConnection], Awaitable[T]], *, doing: str, within_seconds: float = WORK_SECONDS
    ) -> T:
        """Do `work` in one transaction. `doing` describes it in failures. Raises StoreFailure."""

        async def once() -> T:
            async with self._engine.begin() as connection:
                return await work(connection)

        return await self._bounded(once, doing, within_seconds)

    async def read(
        self, work: Callable[[AsyncConnection], Awaitable[T]], *, doing: str, within_seconds: float = WORK_SECONDS
    ) -> T:
        """Do `work`, which changes nothing, without a transaction around it. Raises StoreFailure."""
        return await self.statement(work, doing=doing, within_seconds=within_seconds)

    async def statement(
        self, work: Callable[[AsyncConnection], Awaitable[T]], *, doing: str, within_seconds: float = WORK_SECONDS
    ) -> T:
        """Do `work` that is a single statement: it needs no transaction around it, which would be two round trips.

        Raises StoreFailure.
        """

        async def once() -> T:
            async with self._autocommit.connect() as connection:
                return await work(connection)

        return await self._bounded(once, doing, within_seconds)

    async def close(self) -> None:
        """Wait for work that still runs, then close every connection."""
        if self._outliving:
            await asyncio.wait(self._outliving)
        await self._engine.dispose()

    async def _bounded(self, once: Callable[[], Awaitable[T]], doing: str, seconds: float) -> T:
        task = asyncio.ensure_future(self._mapped(once, doing))
        self._outliving.add(task)
        task.add_done_callback(self._forget)
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise StoreUnavailable(self._sentence(doing, f"it did not answer within {seconds:.1f} s"))
        return task.result()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._outliving.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as retrieved: the caller timed out and has its failure already

    async def _mapped(self, once: Callable[[], Awaitable[T]], doing: str) -> T:
        try:
            try:
                return await once()
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
                return await once()
        except StoreFailure:
            raise
        except DRIVER_ERRORS as error:
            self._raise_failure(error, doing)

    def _raise_failure(self, error: Exception, doing: str) -> NoReturn:
        cause = error.orig if isinstance(error, DBAPIError) else error
        state = str(getattr(cause, "sqlstate", None) or "")
        if state[:2] in _REFUSED_CLASSES:
            # The driver's text may quote values, which may be a caller's: only the error's kind is reported.
            raise WriteRefused(
                f"PostgreSQL at {self.address} rejected the values while {doing} (SQLSTATE {state}): "
                "this is a defect; report it."
            ) from None
        if state == _MISSING_TABLE:
            raise StoreUnavailable(
                f"PostgreSQL at {self.address} has no task store tables, noticed while {doing}: "
                "run `python -m store migrate`."
            ) from None
        if state == _READ_ONLY:
            raise StoreUnavailable(
                self._sentence(doing, "it takes no writes (a standby, or set to read only)")
            ) from None
        reason = f"{type(cause).__name__}{f' (SQLSTATE {state})' if state else ''}"
        raise StoreUnavailable(self._sentence(doing, reason)) from None

    def _sentence(self, doing: str, reason: str) -> str:
        return (
            f"PostgreSQL at {self.address} could not be used while {doing}: {reason}. "
            "Check that it runs and can be reached; the write is repeated until it succeeds."
        )

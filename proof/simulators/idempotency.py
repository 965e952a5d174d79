"""Idempotency keys (contract §4): the first answer again for the same key and body, for 30 days.

Keys are scoped by tenant and compared by method, path and body (canonical JSON). A repeat waits while the first is in
flight. Only 2xx and definite refusals are kept: an act gives nothing else, since a missing token, 429 and 5xx answer
before or around it (`edge.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from proof.simulators.clock import Clock
from proof.simulators.replies import Refused, Reply
from proof.simulators.state_file import StateFile

KEPT_SECONDS: Final = 30 * 24 * 3600
NOT_ALLOWED: Final = Refused("authorization_missing").reply()
"""Leaves its key free (contract §4)."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS idempotency (
    tenant_id TEXT NOT NULL,
    key TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    status INTEGER NOT NULL,
    body TEXT NOT NULL,
    kept_at REAL NOT NULL,
    PRIMARY KEY (tenant_id, key)
);
CREATE INDEX IF NOT EXISTS idempotency_age ON idempotency (kept_at);
"""


def fingerprint(method: str, path: str, body: Any) -> str:
    """One hash for all bodies that are the same JSON; the order of fields does not matter."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{method} {path}\n{canonical}".encode()).hexdigest()


class IdempotencyKeys:
    """The answers that are kept under keys."""

    def __init__(self, state: StateFile, clock: Clock) -> None:
        self._state = state
        self._clock = clock
        self._in_flight: dict[tuple[str, str], tuple[asyncio.Lock, int]] = {}
        state.lay_out(_SCHEMA)

    @asynccontextmanager
    async def only_one(self, tenant_id: str, key: str) -> AsyncIterator[None]:
        """Hold the key: a second request with it waits here until the first has its answer."""
        name = (tenant_id, key)
        lock, waiting = self._in_flight.get(name, (asyncio.Lock(), 0))
        self._in_flight[name] = (lock, waiting + 1)
        try:
            async with lock:
                yield
        finally:
            _, waiting = self._in_flight.pop(name)
            if waiting > 1:
                self._in_flight[name] = (lock, waiting - 1)

    def answer(self, tenant_id: str, key: str, print_: str, act: Callable[[], Reply]) -> tuple[Reply, bool]:
        """The kept answer, or that of `act`; its effect and its answer are written together.

        The second value says whether the answer is a repeat. A refusal undoes what `act` had begun.
        """
        kept = self._kept(tenant_id, key)
        if kept is not None:
            if kept["fingerprint"] != print_:
                return Refused("idempotency_conflict").reply(), False
            return Reply(kept["status"], json.loads(kept["body"])), True
        with self._state.transaction():
            reply = self.tried(act)
            if reply != NOT_ALLOWED:
                self._keep(tenant_id, key, print_, reply)
        return reply, False

    def tried(self, act: Callable[[], Reply]) -> Reply:
        """The answer of `act`; a refusal undoes what it had begun."""
        try:
            with self._state.transaction():
                return act()
        except Refused as refusal:
            return refusal.reply()

    def _kept(self, tenant_id: str, key: str) -> Any:
        self._state.run("DELETE FROM idempotency WHERE kept_at < ?", self._clock.timestamp() - KEPT_SECONDS)
        return self._state.row("SELECT * FROM idempotency WHERE tenant_id = ? AND key = ?", tenant_id, key)

    def _keep(self, tenant_id: str, key: str, print_: str, reply: Reply) -> None:
        self._state.run(
            "INSERT INTO idempotency VALUES (?, ?, ?, ?, ?, ?)",
            tenant_id,
            key,
            print_,
            reply.status,
            json.dumps(reply.body),
            self._clock.timestamp(),
        )

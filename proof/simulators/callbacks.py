"""Callbacks out (contract §2): an outbox in the state file, signed by Standard Webhooks, repeated on its schedule.

A callback is written in the transaction that changed the job and sent afterwards, so that neither is lost without the
other. One request at a time per job, oldest due first; each attempt has its own signature and its own wall-clock
`webhook-timestamp` under the same `webhook-id`.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from datetime import UTC, datetime
from typing import Any, Final

import httpx
import structlog
from standardwebhooks import Webhook

from proof.simulators.admin_wire import CALLBACK_KINDS, CallbackSeen, Fault, FaultKind
from proof.simulators.clock import Clock
from proof.simulators.faults import Faults, Occasion
from proof.simulators.state_file import StateFile
from runtime.background import woken

RETRY_AFTER_SECONDS: Final = (1.0, 5.0, 30.0, 120.0, 600.0)
HOURLY_SECONDS: Final = 3600.0
GIVEN_UP_AFTER_SECONDS: Final = 24 * 3600.0
NOT_REPEATED: Final = frozenset({401, 404, 413})
_MOST_AT_ONCE: Final = 32
_SEND_LIMIT_SECONDS: Final = 10.0
_REORDER_WITHIN_SECONDS: Final = 2.0
_GARBAGE: Final = '{"job_id": 17, "sequence": "many", "job_status": ["queued"'
_SCHEMA = """
CREATE TABLE IF NOT EXISTS callbacks (
    callback_id INTEGER PRIMARY KEY AUTOINCREMENT,
    webhook_id TEXT NOT NULL,
    run_id TEXT NOT NULL,
    task_id TEXT NOT NULL,
    url TEXT NOT NULL,
    body TEXT NOT NULL,
    kind TEXT NOT NULL,
    phase TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    last_status INTEGER,
    first_due_at REAL NOT NULL,
    due_at REAL NOT NULL,
    waits_for_next INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS callbacks_due ON callbacks (due_at) WHERE phase = 'pending';
"""

log = structlog.get_logger(__name__)


class Outbox:
    """`secrets`: the first signs."""

    def __init__(self, state: StateFile, clock: Clock, faults: Faults, secrets: list[str]) -> None:
        self._state = state
        self._clock = clock
        self._faults = faults
        self._webhook = Webhook(secrets[0])
        self._forger = Webhook(b"not the secret that was agreed on")
        self._wake = asyncio.Event()
        self._sending: dict[str, asyncio.Task[None]] = {}
        state.lay_out(_SCHEMA)
        clock.on_change(self._wake.set)

    def put(self, *, run_id: str, task_id: str, tenant_id: str, status: str, url: str, body: str) -> None:
        """Write one callback, changed by the faults that hit it; call it in the transaction of the change."""
        occasion = Occasion("callback", "POST", task_id, tenant_id, status)
        hits = {fault.kind: fault for fault in self._faults.hit(occasion, CALLBACK_KINDS)}
        webhook_id = f"msg-{uuid.uuid4().hex}"
        # A callback that was held back for reordering is sent right after this one.
        self._state.run(
            "UPDATE callbacks SET due_at = ?, waits_for_next = 0 WHERE run_id = ? AND phase = 'pending'"
            " AND waits_for_next = 1",
            self._clock.timestamp() + 0.05,
            run_id,
        )

        def write(text: str, kind: str, name: str = webhook_id) -> None:
            self._write(hits, run_id, task_id, url, text, kind, name)

        for fault_kind, kind in ((FaultKind.CALLBACK_FORGE, "forged"), (FaultKind.CALLBACK_GARBAGE, "garbage")):
            if fault := hits.get(fault_kind):
                for _ in range(fault.parameters.copies):
                    write(_false_body(fault, body), kind, f"msg-{uuid.uuid4().hex}")
                if fault.parameters.instead:
                    self._wake.set()
                    return
        write(body, "true")
        if fault := hits.get(FaultKind.CALLBACK_DUPLICATE):
            for _ in range(fault.parameters.copies):
                write(body, "duplicate", webhook_id if fault.parameters.same_id else f"msg-{uuid.uuid4().hex}")
        self._wake.set()

    def _write(
        self,
        hits: dict[FaultKind, Fault],
        run_id: str,
        task_id: str,
        url: str,
        body: str,
        kind: str,
        webhook_id: str,
    ) -> None:
        due_at = self._clock.timestamp()
        is_held = FaultKind.CALLBACK_REORDER in hits
        if is_held:
            due_at += hits[FaultKind.CALLBACK_REORDER].parameters.seconds or _REORDER_WITHIN_SECONDS
        if FaultKind.CALLBACK_LATE in hits:
            due_at += hits[FaultKind.CALLBACK_LATE].parameters.seconds or 0
        self._state.run(
            "INSERT INTO callbacks (webhook_id, run_id, task_id, url, body, kind, phase, attempts, first_due_at,"
            " due_at, waits_for_next) VALUES (?, ?, ?, ?, ?, ?, ?, 0, ?, ?, ?)",
            webhook_id,
            run_id,
            task_id,
            url,
            body,
            kind,
            "withheld" if FaultKind.CALLBACK_WITHHOLD in hits else "pending",
            due_at,
            due_at,
            is_held,
        )

    def release(self) -> None:
        """Send what was withheld."""
        self._state.run(
            "UPDATE callbacks SET phase = 'pending', due_at = ?1, first_due_at = ?1 WHERE phase = 'withheld'",
            self._clock.timestamp(),
        )
        self._wake.set()

    def seen(self, task_id: str | None = None) -> list[CallbackSeen]:
        """Oldest first."""
        rows = self._state.rows(
            "SELECT * FROM callbacks WHERE ?1 IS NULL OR task_id = ?1 ORDER BY callback_id", task_id
        )
        return [_seen(row) for row in rows]

    async def keep_sending(self) -> None:
        """Send what is due until cancelled, then end the requests in flight."""
        async with httpx.AsyncClient(timeout=_SEND_LIMIT_SECONDS, follow_redirects=False) as client:
            try:
                while True:
                    self._wake.clear()
                    self._send_due(client)
                    await woken(self._wake, within_seconds=self._seconds_to_next())
            finally:
                await self._stop_sending()

    async def _stop_sending(self) -> None:
        for task in self._sending.values():
            task.cancel()
        await asyncio.gather(*self._sending.values(), return_exceptions=True)

    def _send_due(self, client: httpx.AsyncClient) -> None:
        free = _MOST_AT_ONCE - len(self._sending)
        for row in self._due(free) if free else ():
            if row["run_id"] not in self._sending:
                task = asyncio.create_task(self._send(client, row))
                self._sending[row["run_id"]] = task

    def _due(self, limit: int) -> list[Any]:
        """The oldest that are due, of jobs for which no request is in flight."""
        return self._state.rows(
            "SELECT * FROM callbacks WHERE phase = 'pending' AND due_at <= ?"
            " AND run_id NOT IN (SELECT value FROM json_each(?)) ORDER BY due_at, callback_id LIMIT ?",
            self._clock.timestamp(),
            json.dumps(list(self._sending)),
            limit,
        )

    def _seconds_to_next(self) -> float:
        row = self._state.row(
            "SELECT min(due_at) AS soonest FROM callbacks WHERE phase = 'pending' AND due_at > ?",
            self._clock.timestamp(),
        )
        soonest = row["soonest"] if row else None
        return 30.0 if soonest is None else max(0.001, min(30.0, soonest - self._clock.timestamp()))

    async def _send(self, client: httpx.AsyncClient, row: Any) -> None:
        status: int | None = None
        try:
            response = await client.post(row["url"], content=row["body"].encode(), headers=self._signed(row))
            status = response.status_code
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            log.info("callback not delivered", run_id=row["run_id"], url=row["url"], error=type(error).__name__)
        finally:
            self._sending.pop(row["run_id"], None)
            self._wake.set()
        self._settle(row, status)

    def _signed(self, row: Any) -> dict[str, str]:
        now = datetime.now(UTC)
        signer = self._forger if row["kind"] == "forged" else self._webhook
        return {
            "content-type": "application/json",
            "webhook-id": row["webhook_id"],
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": signer.sign(row["webhook_id"], now, row["body"]),
        }

    def _settle(self, row: Any, status: int | None) -> None:
        """Write what came of an attempt, and when the next is due."""
        phase, due_at = "pending", self._clock.timestamp()
        if status is not None and 200 <= status < 300:
            phase = "delivered"
        elif status in NOT_REPEATED:
            phase = "refused"
        elif due_at - row["first_due_at"] >= GIVEN_UP_AFTER_SECONDS:
            phase = "given_up"
        else:
            attempt = row["attempts"]
            due_at += RETRY_AFTER_SECONDS[attempt] if attempt < len(RETRY_AFTER_SECONDS) else HOURLY_SECONDS
        self._state.run(
            "UPDATE callbacks SET phase = ?, attempts = attempts + 1, last_status = ?, due_at = ?"
            " WHERE callback_id = ?",
            phase,
            status,
            due_at,
            row["callback_id"],
        )


def _false_body(fault: Fault, body: str) -> str:
    """A forged callback has the genuine one's body; garbage is the configured body, or half a message."""
    if isinstance(fault.parameters.body, str):
        return fault.parameters.body
    return body if fault.kind is FaultKind.CALLBACK_FORGE else _GARBAGE


def _seen(row: Any) -> CallbackSeen:
    fields = {name: row[name] for name in CallbackSeen.model_fields}
    return CallbackSeen(**fields | {"due_at": datetime.fromtimestamp(row["due_at"], UTC)})

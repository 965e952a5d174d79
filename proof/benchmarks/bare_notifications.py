"""What PostgreSQL alone takes for a tick: one statement stores a row of `task_events` and notifies; one client listens.

No check, no figures of the task, no gateway, no HTTP: the least that storing and showing an event can cost.
"""

from __future__ import annotations

import time
from typing import Final

import asyncpg

from proof.benchmarks.rate import at_a_rate, settled

CHANNEL: Final = "bare_events"
TABLE: Final = "CREATE TABLE bare_events (LIKE task_events INCLUDING ALL)"
STORE_AND_NOTIFY: Final = """
WITH stored AS (
    INSERT INTO bare_events (task_id, seq, key, event, ts, attempt, status, stage, progress, job_id, sequence)
    VALUES ($1, $2, $3, 'task.running', clock_timestamp(), 1, 'running', 'processing', 50, $1, $2)
    RETURNING task_id, seq
)
SELECT pg_notify('bare_events', task_id || ':' || seq) FROM stored
"""
CONNECTIONS: Final = 8
"""Enough for 1,000 statements a second; more would wait for the processors."""


async def bare_notifications(dsn: str, *, targets: int, per_second: float, seconds: float) -> tuple[list[float], int]:
    """Seconds from each statement's sending to its notification at a client, and how many never arrived.

    `dsn`: its user must be allowed to create a table. It is dropped at the end.
    """
    sent_at: dict[str, float] = {}
    spans: dict[str, float] = {}

    def arrived(_connection: object, _pid: int, _channel: str, payload: object) -> None:
        spans.setdefault(str(payload), time.monotonic() - sent_at[str(payload)])

    listener = await asyncpg.connect(dsn)
    try:
        await listener.execute(TABLE)
        await listener.add_listener(CHANNEL, arrived)
        async with asyncpg.create_pool(dsn, min_size=CONNECTIONS, max_size=CONNECTIONS) as pool:

            async def send(number: int, target: int) -> None:
                sent_at[f"bare-{target}:{number}"] = time.monotonic()
                await pool.fetchval(STORE_AND_NOTIFY, f"bare-{target}", number, f"bare-{target}:{number}")

            await at_a_rate(send, targets=targets, per_second=per_second, seconds=seconds)
            await settled(lambda: len(spans) == len(sent_at))
        await listener.execute("DROP TABLE bare_events")
    finally:
        await listener.close()
    return list(spans.values()), len(sent_at) - len(spans)

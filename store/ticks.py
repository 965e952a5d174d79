"""Ticks: figures of a job that the gateway stores without the workflow (contract §2, decision 4).

One statement for a batch: it locks the rows that no other writer has, checks each against what the workflow last took,
moves the figures, numbers and stores the event and notifies. Every guard reads the task's row alone. A tick touches
neither `version` nor `updated_at`: the reconciler looks at rows that nothing else changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import Double, Text, bindparam, select, text
from sqlalchemy import func as sql
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncConnection

from comfyui_temporal.contracts.fields import repaired
from comfyui_temporal.contracts.task_store import Heard, HeardOrder
from comfyui_temporal.contracts.ticks import Tick, TickVerdict
from store.tables import EVENTS_CHANNEL, tasks

# The guards stand twice: in `locked` for the verdict, in `ticked` for the row as it is when it is changed.
# A row that another writer has is left out, so that its tick delays no other task's. In the last part `tasks` is the
# row as it was when the statement began.
# A task has one tick a second, at all gateways together. A fraction of a percent is no event of its own: a training of
# a month would have millions. Nor is an ETA within ten seconds of the newest event's. The row alone cannot tell: its
# figures move with each tick, so that a small slide would never add up, and the workflow writes some without an event.
_WRITE: Final = text(
    """
WITH given AS (
    SELECT * FROM jsonb_to_recordset(:ticks) AS given (
        task_id text, job_id text, sequence bigint, digest text,
        progress double precision, next_eta timestamptz, queue_position bigint, traceparent text
    )
), locked AS (
    SELECT given.*, tasks.ticked_at,
        tasks.taken ->> 'job_id' = given.job_id AND tasks.taken ->> 'digest' = given.digest AS is_known,
        tasks.ended_at IS NOT NULL AS has_ended,
        given.sequence <= greatest(
            (tasks.job_sequences ->> given.job_id)::bigint,
            CASE WHEN tasks.taken ->> 'job_id' = given.job_id THEN (tasks.taken ->> 'sequence')::bigint END
        ) AS is_outdated,
        floor(greatest(tasks.progress, given.progress)) > floor(tasks.progress)
            OR tasks.queue_position IS DISTINCT FROM given.queue_position
            OR (tasks.next_eta IS NULL) <> (given.next_eta IS NULL)
            OR EXISTS (
                SELECT FROM task_events AS newest WHERE newest.task_id = tasks.task_id AND newest.seq = tasks.last_seq
                    AND (
                        floor(given.progress) > floor(newest.progress)
                        OR newest.queue_position IS DISTINCT FROM given.queue_position
                        OR coalesce(
                            abs(extract(epoch FROM newest.next_eta - given.next_eta)) >= 10,
                            newest.next_eta IS DISTINCT FROM given.next_eta
                        )
                    )
            ) AS is_shown
    FROM tasks JOIN given USING (task_id)
    ORDER BY tasks.task_id
    FOR NO KEY UPDATE OF tasks SKIP LOCKED
), ticked AS (
    UPDATE tasks SET
        progress = greatest(tasks.progress, locked.progress),
        next_eta = locked.next_eta,
        queue_position = locked.queue_position,
        job_sequences = tasks.job_sequences || jsonb_build_object(locked.job_id, locked.sequence),
        ticked_at = clock_timestamp(),
        last_seq = tasks.last_seq + locked.is_shown::int,
        last_event_at = CASE
            WHEN locked.is_shown THEN greatest(clock_timestamp(), tasks.last_event_at) ELSE tasks.last_event_at
        END
    FROM locked
    WHERE tasks.task_id = locked.task_id
        AND tasks.ended_at IS NULL
        AND tasks.taken ->> 'job_id' = locked.job_id
        AND tasks.taken ->> 'digest' = locked.digest
        AND coalesce((tasks.job_sequences ->> locked.job_id)::bigint, -1) < locked.sequence
        AND (tasks.taken ->> 'sequence')::bigint < locked.sequence
        AND (tasks.ticked_at IS NULL OR tasks.ticked_at <= clock_timestamp() - interval '1 second')
    RETURNING tasks.*, locked.is_shown, locked.sequence, locked.traceparent
), events AS (
    INSERT INTO task_events (
        task_id, seq, key, event, ts, attempt, status, stage, progress, next_eta, queue_position, job_id, sequence,
        traceparent
    )
    SELECT task_id, last_seq, (taken ->> 'job_id') || ':' || sequence, 'task.running', last_event_at,
        greatest(attempts, 1), status, stage, progress, next_eta, queue_position, taken ->> 'job_id', sequence,
        traceparent
    FROM ticked WHERE is_shown
)
SELECT task_id,
    CASE WHEN ticked.task_id IS NOT NULL THEN 'written'
         WHEN locked.task_id IS NULL AND tasks.ended_at IS NULL AND tasks.taken ->> 'job_id' = given.job_id
            AND tasks.taken ->> 'digest' = given.digest THEN 'too_early'
         WHEN locked.task_id IS NULL THEN 'locked'
         WHEN locked.has_ended THEN 'ended'
         WHEN locked.is_outdated THEN 'outdated'
         WHEN locked.is_known THEN 'too_early'
         ELSE 'not_known' END AS verdict,
    CASE WHEN locked.task_id IS NULL THEN :locked_for
         ELSE 1 - coalesce(extract(epoch FROM clock_timestamp() - coalesce(ticked.ticked_at, locked.ticked_at)), 1)
    END AS ready_in,
    CASE WHEN ticked.is_shown THEN pg_notify(:channel, ticked.task_id || ':' || ticked.last_seq) END
FROM given JOIN tasks USING (task_id) LEFT JOIN locked USING (task_id) LEFT JOIN ticked USING (task_id)
"""
).bindparams(bindparam("ticks", type_=JSONB), bindparam("locked_for", type_=Double))
LOCKED_SECONDS: Final = 0.1
"""Until a row that another writer has is tried again."""

_JOB: Final = bindparam("job", type_=Text)
_DIGEST: Final = bindparam("digest", type_=Text)
_HEARD: Final = select(
    tasks.c.job_sequences[_JOB].astext.label("sequence"),
    tasks.c.progress,
    tasks.c.next_eta,
    tasks.c.queue_position,
    sql.extract("epoch", sql.clock_timestamp() - tasks.c.ticked_at).label("seconds_ago"),
    tasks.c.run_id,
).where(
    tasks.c.task_id == bindparam("task"),
    tasks.c.run_id.in_((bindparam("run", type_=Text), bindparam("continued", type_=Text))),
    tasks.c.ticked_at.is_not(None),
    tasks.c.taken["job_id"].astext == _JOB,
    _DIGEST.is_(None) | (tasks.c.taken["digest"].astext == _DIGEST),
)


class TickAnswer(NamedTuple):
    """What a task's row says about a tick, and in how many seconds the next one may be written."""

    verdict: TickVerdict
    ready_in: float


async def write_ticks(connection: AsyncConnection, ticks: Sequence[Tick]) -> dict[str, TickAnswer]:
    """Task → what its row says about its tick; a task without a row is left out. One tick of each task at most."""
    documents = [_document(tick) for tick in ticks]
    values = {"ticks": documents, "channel": EVENTS_CHANNEL, "locked_for": LOCKED_SECONDS}
    found = await connection.execute(_WRITE, values)
    return {
        task_id: TickAnswer(TickVerdict(verdict), max(0.0, float(ready_in))) for task_id, verdict, ready_in, _ in found
    }


def _document(tick: Tick) -> dict[str, Any]:
    return tick.model_dump(mode="json") | {"job_id": repaired(tick.job_id)}


class HeardBy(NamedTuple):
    """What was heard, and the acting run: the one that asks, or the one before it."""

    heard: Heard
    run_id: str


async def heard(connection: AsyncConnection, order: HeardOrder, run_id: str) -> HeardBy | None:
    """The newest figures of the task's current job that came as a tick; None without any.

    None too where the ticks are not like the run's newest report, whose write is under way: they say something else.
    None for a run that neither acts nor continues the acting one as new, because it was reset: an earlier life may have
    learned of the job by a poll what this run has not, and its sequence would hide that from this run.
    """
    values = {"task": order.task_id, "job": repaired(order.job_id), "digest": order.digest, "run": run_id}
    row = (await connection.execute(_HEARD, values | {"continued": order.continued_run_id})).one_or_none()
    if row is None or row.sequence is None:
        return None
    return HeardBy(Heard.model_validate(dict(row._mapping)), row.run_id)

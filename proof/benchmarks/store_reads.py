"""Whether reads grow with the store: the gateway's reads at 10,000 tasks and at 100,000 with 1,000,000 events.

`python -m proof.benchmarks.store_reads` starts the stack's PostgreSQL. It prints the median and the 99th percentile of
each read at both sizes, and their ratio.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import asyncpg

from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.tasks import TaskStatus
from proof.site.parts import OwnStack
from store import TaskStore

TENANTS: Final = 100
ROUNDS: Final = 200

# One in 50 tasks is open, one in 10 a training, one in 20 failed; each tenant has a hundredth of all.
_CLAIMS: Final = """
INSERT INTO task_claims
SELECT 'task-' || n, 'run-' || n, 'task-task-' || n, 'tenant-' || n % 100, repeat('0', 64),
    now() - n * interval '1 second'
FROM generate_series($1::int, $2::int) n
"""
_TASKS: Final = """
INSERT INTO tasks (task_id, tenant_id, user_id, scene, template_id, priority, resolution, workflow_id,
    first_execution_run_id, input_sha256, created_at, updated_at, ended_at, version, last_seq, status, progress,
    attempts, credits, prices, result_urls)
SELECT 'task-' || n, 'tenant-' || n % 100, 'user-a',
    CASE WHEN n / 100 % 10 = 0 THEN 'model.train' ELSE 'image.generate' END,
    'text-to-image', CASE WHEN n % 3 = 0 THEN 'accelerated' ELSE 'standard' END, 'hd', 'task-task-' || n, 'run-' || n,
    repeat('0', 64), now() - n * interval '1 second', now() - n * interval '1 second',
    CASE WHEN n / 100 % 50 = 0 THEN NULL ELSE now() - n * interval '1 second' END, 10, $3::int,
    CASE WHEN n / 100 % 50 = 0 THEN 'queued' WHEN n / 100 % 20 = 10 THEN 'failed' ELSE 'completed' END, 100, 1,
    '{"held": 24, "charged": 24}', '{}', '[]'
FROM generate_series($1::int, $2::int) n
"""
_EVENTS: Final = """
INSERT INTO task_events (task_id, seq, key, event, ts, attempt, status, stage, progress)
SELECT 'task-' || n, s, 'fact:' || s, 'task.running', now() - n * interval '1 second', 1, 'running', 'processing', s
FROM generate_series($1::int, $2::int) n, generate_series(1, $3::int) s
"""
_LOG: Final = """
INSERT INTO training_log (task_id, position, training_id, sequence, line, ts, level, message)
SELECT 'task-' || n, s, 'training-' || n, s, 1, now(), 'info', 'a line'
FROM generate_series($1::int, $2::int) n, generate_series(1, 20) s WHERE n / 100 % 10 = 0
"""
_EXCEPTIONS: Final = """
INSERT INTO task_exceptions (task_id, key, code, message, details, ts)
SELECT 'task-' || n, 'end', 'internal', 'a sentence', '{}', now() - n * interval '1 second'
FROM generate_series($1::int, $2::int) n WHERE n / 100 % 20 = 10
"""


async def fill(dsn: str, first: int, last: int, *, events_each: int) -> None:
    """Tasks number `first` to `last` of 100 tenants, each with its events; then statistics as autovacuum keeps them."""
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(_CLAIMS, first, last)
        for statement in (_TASKS, _EVENTS):
            await connection.execute(statement, first, last, events_each)
        for statement in (_LOG, _EXCEPTIONS):
            await connection.execute(statement, first, last)
        await connection.execute("ANALYZE")
    finally:
        await connection.close()


def reads_of(store: TaskStore) -> dict[str, Callable[[int], Awaitable[object]]]:
    """Every read that the gateway makes, by name; each takes the number of a round."""

    def tenant(n: int) -> str:
        return f"tenant-{n % TENANTS}"

    def task(n: int) -> str:
        return f"task-{n * 37 % 9_000 + 1}"

    failed, training = TaskStatus.FAILED, Scene.MODEL_TRAIN
    return {
        "task": lambda n: store.task(task(n)),
        "claimed input": lambda n: store.claimed_input(task(n)),
        "is claimed": lambda n: store.is_claimed(task(n)),
        "list": lambda n: store.tasks(limit=5, tenant_id=tenant(n)),
        "list by status": lambda n: store.tasks(limit=5, tenant_id=tenant(n), status=failed),
        "list by scene": lambda n: store.tasks(limit=5, tenant_id=tenant(n), scene=training),
        "list by both": lambda n: store.tasks(limit=5, tenant_id=tenant(n), scene=training, status=TaskStatus.FAILED),
        "events": lambda n: store.events_after(task(n), 3),
        "training log": lambda n: store.training_log(task(n)),
        "exceptions": lambda n: store.exceptions(task_id=task(n)),
        "events of 50 tasks": lambda n: store.events_of_each({task(n + i): 5 for i in range(50)}),
        "heads of 50 tasks": lambda n: store.heads([task(n + i) for i in range(50)]),
    }


async def measured(store: TaskStore) -> dict[str, tuple[float, float]]:
    """Median and 99th percentile of each read, in milliseconds."""
    found: dict[str, tuple[float, float]] = {}
    for name, read in reads_of(store).items():
        spans = []
        for n in range(ROUNDS):
            began = time.perf_counter()
            await read(n)
            spans.append((time.perf_counter() - began) * 1000)
        found[name] = (statistics.median(spans), statistics.quantiles(spans, n=100)[98])
    return found


async def compare(dsn: str) -> None:
    store = TaskStore(dsn)
    try:
        await fill(dsn, 1, 10_000, events_each=10)
        await measured(store)  # the first pass fills caches and prepares statements
        small = await measured(store)
        for first in range(10_001, 100_001, 10_000):
            await fill(dsn, first, first + 9_999, events_each=10)
        large = await measured(store)
    finally:
        await store.close()
    print(f"{'read':<20} {'10,000 tasks':>22} {'100,000 tasks':>22}   ratio of medians")
    for name, (median, p99) in small.items():
        more, more99 = large[name]
        shown = f"{median:>8.2f} ms (p99 {p99:>5.1f}) {more:>8.2f} ms (p99 {more99:>5.1f})"
        print(f"{name:<20} {shown}   {more / median:.2f}")


async def main() -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        stack = OwnStack(Path(folder))
        async with stack.running(servers=("postgres",)):
            await compare(stack.owner_dsn)  # who owns the tables may analyse them


if __name__ == "__main__":
    asyncio.run(main())

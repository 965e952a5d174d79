"""The contestants do the same job: the same events stored, the same calls, each once; and the table shows ratios."""

from __future__ import annotations

from contextlib import aclosing
from datetime import UTC, datetime
from importlib.util import find_spec

import asyncpg
import pytest

from proof.benchmarks.contestants import OnDbos, Ours
from proof.benchmarks.results import Machine, Results
from proof.benchmarks.throughput import Comparison, Rate, contest, measure, towards

TASKS = 3


async def stored(dsn: str) -> set[tuple[str, ...]]:
    """The different stories of all tasks: each event's type, status and stage, in order."""
    connection = await asyncpg.connect(dsn)
    rows = await connection.fetch("SELECT task_id, event, status, stage FROM task_events ORDER BY task_id, seq")
    await connection.close()
    stories: dict[str, list[str]] = {}
    for row in rows:
        stories.setdefault(row["task_id"], []).append(f"{row['event']} {row['status']} {row['stage'] or '-'}")
    return {tuple(story) for story in stories.values()}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(find_spec("dbos") is None, reason="DBOS is in the benchmarks' own environment")
async def test_dbos_stores_the_same_events_as_ours() -> None:
    stories = {}
    for kind in (Ours, OnDbos):
        async with contest() as (servers, party), aclosing(kind(servers)) as contestant:
            await contestant.run_workers(1, towards(party))
            await measure(contestant, servers, party, TASKS)
            assert len(party.committed) == len(party.held) == TASKS
            stories[kind] = await stored(servers.database_dsn)
    assert stories[Ours] == stories[OnDbos], "\n".join(map(str, stories.values()))


def test_the_table_shows_ratios_and_their_targets() -> None:
    def rate(name: str, tasks_per_second: float) -> Rate:
        return Rate(name=name, tasks=10, tasks_per_second=tasks_per_second, processor_seconds={"temporal": 0.1})

    results = Results(at=datetime.now(UTC), quick=True, machine=Machine.here())
    rounds = [rate("ours", 5.0), rate("bare Temporal", 4.0), rate("DBOS", 10.0)]
    results.comparison = Comparison(rounds=rounds, to_bare=1.25, to_dbos=0.5)
    results.by_workers = [rate("ours", 9.0).model_copy(update={"workers": 2})]
    table = results.table()
    assert "| ours to bare Temporal | 1.25 (aim 1); by processor time 1.00 |" in table
    assert "| ours to DBOS | 0.50 (aim 1.5); by processor time 1.00 |" in table
    assert "| ours on 2 workers | 9.00 tasks a second, 100 ms processor a task |" in table
    assert Results.model_validate_json(results.model_dump_json()) == results

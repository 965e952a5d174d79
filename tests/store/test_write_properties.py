"""For any writes, in any order and repeated: the history is that of contract §6.

The model below is a second, deliberately naive reading of the rules; the store must agree with it after every write.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comfyui_temporal.contracts.task_store import Fact, TaskWrite
from store import NotTheClaimant, TaskStore
from tests.store.facts import claim_of, end, fact, new_task_id, write_of

JOBS = ("j1", "j2")


@st.composite
def facts(draw: st.DrawFn) -> Fact:
    kind = draw(st.sampled_from(["plain", "job", "job", "job", "end"]))
    if kind == "plain":
        return fact(draw(st.sampled_from(["accepted", "held:1", "settled", "note"])))
    if kind == "end":
        return end()
    job, sequence = draw(st.sampled_from(JOBS)), draw(st.integers(0, 6))
    return fact(f"{job}:{sequence}", job_id=job, sequence=sequence)


@st.composite
def writes(draw: st.DrawFn) -> TaskWrite:
    run_id = draw(st.sampled_from(["run-1"] * 9 + ["run-2"]))
    version = draw(st.integers(0, 8))
    return write_of(
        "", *draw(st.lists(facts(), max_size=5)), run_id=run_id, version=version, stage=f"stage of {version}"
    )


@dataclass
class Model:
    """A task by the rules of contract §6, not optimized for speed."""

    written: list[Fact] = field(default_factory=list)
    version: int = 0
    stage: str | None = None

    def write(self, write: TaskWrite) -> None:
        had_ended = any(one.is_end for one in self.written)
        for one in write.facts:
            is_known = one.key == "accepted" or one.key in [other.key for other in self.written]
            newest = max(
                (other.sequence or 0 for other in self.written if one.job_id and other.job_id == one.job_id), default=-1
            )
            is_older = one.sequence is not None and one.sequence < newest
            if not (is_known or is_older or any(other.is_end for other in self.written)):
                self.written.append(one)
        ends_now = any(one.is_end for one in self.written) and not had_ended
        if ends_now or (not had_ended and write.state.version > self.version):
            self.version, self.stage = write.state.version, write.state.stage


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(writes(), min_size=1, max_size=8))
async def test_every_sequence_of_writes_leaves_the_history_of_the_contract(
    task_store: TaskStore, sequence: list[TaskWrite]
) -> None:
    task_id = new_task_id()
    await task_store.claim(claim_of(task_id))
    model = Model()
    for write in sequence:
        write = write.model_copy(update={"task_id": task_id})
        if write.first_execution_run_id != "run-1":
            with pytest.raises(NotTheClaimant):
                await task_store.write(write)
            continue
        model.write(write)
        await task_store.write(write)

    events = await task_store.events(task_id)
    assert [event.seq for event in events] == list(range(1, len(model.written) + 2))
    assert [event.event for event in events[1:]] == [one.event for one in model.written]
    row = await task_store.task(task_id)
    assert row is not None
    assert (row.version, row.stage, row.last_seq) == (model.version, model.stage, len(events))
    assert (row.ended_at is not None) == any(one.is_end for one in model.written)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(writes(), min_size=2, max_size=6))
async def test_concurrent_and_repeated_writes_break_no_rule(task_store: TaskStore, at_once: list[TaskWrite]) -> None:
    task_id = new_task_id()
    await task_store.claim(claim_of(task_id))
    ours = [write.model_copy(update={"task_id": task_id, "first_execution_run_id": "run-1"}) for write in at_once]

    await asyncio.gather(*(task_store.write(write) for write in ours * 2))

    events = await task_store.events(task_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    ends = [event.seq for event in events if event.event == "task.completed"]
    assert ends in ([], [len(events)])
    row = await task_store.task(task_id)
    assert row is not None
    assert row.last_seq == len(events)

"""The look at a task's row before a call that starts something: whether it is made, and what its answer tells."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError
from temporalio.testing import ActivityEnvironment

from activities.lives import Lives
from activities.outside_http import current_time_limit_seconds, time_limit
from comfyui_temporal.contracts.calls import CallFor, Post
from comfyui_temporal.contracts.comfyui import JobAccepted
from comfyui_temporal.contracts.credits import HoldReply
from comfyui_temporal.contracts.errors import Answer, RefusalKind
from comfyui_temporal.contracts.give_back import GIVE_BACK_WORKFLOW
from comfyui_temporal.contracts.lives import STORE_UNAVAILABLE, TaskRun
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.tasks import IMAGE_WORKFLOW
from store import StoreUnavailable, TaskStore
from store.task_store import Made
from tests.activities.calls import job_call
from tests.activities.temporal_in_memory import AWAY, NO_RUN, Run, Temporal
from tests.store.facts import claim_of, end, new_task_id, write_of

HELD: Answer[Any] = Answer(reply=HoldReply(pre_deduct_id="hold-1", frozen_amount=24, balance_after=76))
ACCEPTED: Answer[Any] = Answer(reply=JobAccepted(job_id="job-1", estimated_cost=24))
LIMIT = 5.0


class Party:
    """Answers every call, and counts them."""

    def __init__(self, answer: Answer[Any] = HELD) -> None:
        self.answer = answer
        self.limits: list[float] = []
        """How long each call had."""

    async def __call__(self, _: Any) -> Answer[Any]:
        self.limits.append(current_time_limit_seconds())
        return self.answer


class Task:
    """A task whose row has seen one run. Calls are made in the name of any."""

    def __init__(self, store: TaskStore, task_id: str) -> None:
        self.store, self.task_id = store, task_id
        self.temporal = Temporal()
        self.party = Party()

    def run(self, run_id: str) -> TaskRun:
        return TaskRun(task_id=self.task_id, run_id=run_id, first_execution_run_id="run-1")

    async def call(self, how: str, *, by: str = "run-1", workflow: str = IMAGE_WORKFLOW, **of_post: Any) -> Answer[Any]:
        """A call as the activities make it: `how` names what it does to the task."""
        env = ActivityEnvironment(self.temporal.client)
        env.info = replace(env.info, workflow_type=workflow, workflow_run_id=by)
        call_for = CallFor(
            task_id=self.task_id,
            tenant_id="tenant-a",
            user_id="user-a",
            scene=Scene.IMAGE_GENERATE,
            first_execution_run_id="run-1",
        )
        post = Post[dict[str, str]](call_for=call_for, key="t:any:1", body={}, **of_post)

        async def called() -> Answer[Any]:
            with time_limit(LIMIT):
                answer: Answer[Any] = await getattr(Lives(self.store), how)(post, self.party)
            return answer

        return await env.run(called)


@pytest_asyncio.fixture
async def task(task_store: TaskStore) -> Task:
    task = Task(task_store, new_task_id())
    await task_store.claim(claim_of(task.task_id), task.run("run-1"))
    return task


@pytest_asyncio.fixture
async def away(task: Task) -> AsyncIterator[Task]:
    """The task, whose store does not answer."""
    store = TaskStore("postgresql://user:word@127.0.0.1:1/tasks")
    yield Task(store, task.task_id)
    await store.close()


def kind_of(answer: Answer[Any]) -> RefusalKind | None:
    return answer.refusal.kind if answer.refusal else None


@pytest.mark.parametrize("how", ["begin", "charge", "settle"])
async def test_a_task_without_an_earlier_life_is_called_for_at_once(task: Task, how: str) -> None:
    assert await task.call(how) == HELD
    [limit] = task.party.limits
    assert LIMIT - 2 < limit <= LIMIT, "the look is part of the call's time"


@pytest.mark.parametrize(("answer", "kind"), [(HELD, "hold"), (ACCEPTED, "job")], ids=["hold", "job"])
async def test_what_a_call_makes_is_noted_in_the_row(task: Task, answer: Answer[Any], kind: Made) -> None:
    """A run that is reset before its next write would forget it; the one after it learns that it was known."""
    task.party = Party(answer)
    assert await task.call("begin") == answer
    row = await task.store.task(task.task_id)
    assert row is not None
    assert (row.hold_ids, row.job_ids) == ((["hold-1"], []) if kind == "hold" else ([], ["job-1"]))
    again = await task.call("begin", by="reset")
    assert again.reply == answer.reply and again.earlier_life is not None
    assert (again.earlier_life.is_known, again.earlier_life.lives) == (True, 1)


async def test_what_an_earlier_life_had_not_made_is_not_known(task: Task) -> None:
    first = await task.call("begin", by="reset")
    assert first.earlier_life is not None
    assert (first.earlier_life.is_known, first.earlier_life.lives) == (False, 1)


async def test_a_refusal_makes_nothing_known(task: Task) -> None:
    task.party = Party(Answer(not_offered=True))
    answer = await task.call("begin", by="reset")
    assert answer.earlier_life is not None and not answer.earlier_life.is_known


async def test_an_answer_counts_where_it_could_not_be_noted(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    async def note_made(*_: Any, **__: Any) -> bool:
        raise StoreUnavailable("The store is away.")

    monkeypatch.setattr(task.store, "note_made", note_made)
    answer = await task.call("begin", by="reset")
    assert answer.reply == HELD.reply and answer.earlier_life is not None
    assert not answer.earlier_life.is_known


# After a reset


@pytest.mark.parametrize("how", ["charge", "settle"])
async def test_a_reset_run_charges_only_once_it_has_read_the_ledger(task: Task, how: str) -> None:
    answer = await task.call(how, by="reset")
    assert kind_of(answer) is RefusalKind.READ_THE_LEDGER and not task.party.limits
    assert answer.earlier_life is not None and answer.earlier_life.lives == 1
    assert await task.call(how, by="reset", has_read_ledger=True) == HELD


@pytest.mark.parametrize("how", ["begin", "charge", "settle"])
async def test_a_run_that_was_reset_away_calls_nobody(task: Task, how: str) -> None:
    await task.store.register(task.run("reset"))
    task.temporal.runs = [Run("run-1"), Run("reset", "RUNNING")]
    answer = await task.call(how, has_read_ledger=True)
    assert kind_of(answer) is RefusalKind.TASK_ENDED and not task.party.limits
    assert answer.earlier_life is not None and answer.earlier_life.is_superseded


@pytest.mark.parametrize(
    ("runs", "acts"),
    [
        ([Run("run-1"), Run("reset", "RUNNING")], True),
        ([Run("run-1"), Run("reset", "TERMINATED")], False),
        ([Run("run-1"), Run("reset"), Run("newer", "RUNNING")], False),
        ([], False),
    ],
    ids=["it is the current one", "it has ended", "another one is", "Temporal knows none"],
)
async def test_a_run_that_a_late_call_displaced_acts_where_temporal_names_it_as_the_current_one(
    task: Task, runs: list[Run], acts: bool
) -> None:
    """The row alone does not show which of the two is alive."""
    for run_id in ("reset", "late"):
        await task.store.register(task.run(run_id))
    task.temporal.runs = runs
    answer = await task.call("begin", by="reset")
    assert (answer.reply, kind_of(answer)) == ((HELD.reply, None) if acts else (None, RefusalKind.TASK_ENDED))
    row = await task.store.task(task.task_id)
    assert row is not None and row.run_id == ("reset" if acts else "late")


@pytest.mark.parametrize(("problem", "is_tried_again"), [(AWAY, True), (NO_RUN, False)], ids=["away", "no run"])
async def test_a_displaced_run_waits_until_temporal_says_which_one_is_current(
    task: Task, problem: RPCError, is_tried_again: bool
) -> None:
    for run_id in ("reset", "late"):
        await task.store.register(task.run(run_id))
    task.temporal.problem = problem
    if is_tried_again:
        with pytest.raises(ApplicationError, match="UNAVAILABLE") as failed:
            await task.call("begin", by="reset")
        assert (failed.value.type, failed.value.non_retryable) == ("internal", False)
    else:
        assert kind_of(await task.call("begin", by="reset")) is RefusalKind.TASK_ENDED
    assert not task.party.limits


async def test_a_task_that_has_ended_begins_nothing_more_but_repeats_what_it_undoes(task: Task) -> None:
    await task.store.write(write_of(task.task_id, end()), task.run("run-1"))
    answer = await task.call("begin")
    assert kind_of(answer) is RefusalKind.TASK_ENDED and not task.party.limits
    assert answer.refusal is not None and answer.refusal.http_status == 0, "no service refused it"
    assert await task.call("begin", is_undo=True) == HELD


async def test_a_call_without_a_body_is_looked_at_too(task: Task) -> None:
    """A training is started by one."""
    call = job_call().model_copy(update={"call_for": job_call().call_for.model_copy(update={"task_id": task.task_id})})
    await task.store.write(write_of(task.task_id, end()), task.run("run-1"))
    env = ActivityEnvironment()
    env.info = replace(env.info, workflow_type=IMAGE_WORKFLOW, workflow_run_id="run-1")
    answer = await env.run(Lives(task.store).begin, call, task.party)
    assert kind_of(answer) is RefusalKind.TASK_ENDED and not task.party.limits


async def test_a_workflow_that_is_no_task_is_not_looked_at(away: Task) -> None:
    assert await away.call("begin", workflow="AnotherWorkflow") == HELD


# The store is away


@pytest.mark.parametrize("how", ["begin", "charge"])
async def test_nothing_is_begun_while_the_store_is_away(away: Task, how: str) -> None:
    with pytest.raises(ApplicationError) as failed:
        await away.call(how)
    assert (failed.value.type, failed.value.non_retryable) == (STORE_UNAVAILABLE, False)
    assert not away.party.limits


async def test_a_settlement_relies_on_the_ledger_while_the_store_is_away(away: Task) -> None:
    """An earlier life may have settled the task; done work is paid for all the same."""
    answer = await away.call("settle")
    assert kind_of(answer) is RefusalKind.READ_THE_LEDGER and not away.party.limits
    assert answer.earlier_life is not None and answer.earlier_life.is_store_away
    assert await away.call("settle", has_read_ledger=True) == HELD


# A give-back


async def charged_by(task: Task, give_back: str) -> Answer[Any]:
    return await task.call("charge", by=give_back, workflow=GIVE_BACK_WORKFLOW)


async def test_a_give_back_charges_while_it_is_the_one_that_has_claimed_the_row(task: Task) -> None:
    assert await task.store.claim_give_back(task.task_id, by="first", found_run="run-1")
    assert await charged_by(task, "first") == HELD
    [limit] = task.party.limits
    assert LIMIT - 2 < limit <= LIMIT, "the look is part of the call's time"
    assert await task.store.claim_give_back(task.task_id, by="second", found_run="run-1")
    answer = await charged_by(task, "first")
    assert kind_of(answer) is RefusalKind.TASK_ENDED and len(task.party.limits) == 1
    assert answer.earlier_life is not None and answer.earlier_life.is_given_back


async def test_a_give_back_charges_nothing_while_the_store_is_away(away: Task) -> None:
    with pytest.raises(ApplicationError) as failed:
        await charged_by(away, "first")
    assert (failed.value.type, failed.value.non_retryable) == (STORE_UNAVAILABLE, False)
    assert not away.party.limits

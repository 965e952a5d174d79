"""Which run of a task counts as its last one, and what it and the runs before it left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import asyncpg
import pytest
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError
from temporalio.testing import ActivityEnvironment

from activities.closed_runs import ClosedRunActivities
from comfyui_temporal.contracts.give_back import GiveBackOrder, Orphans
from comfyui_temporal.contracts.lives import TaskRun
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.reconcile import ClosedRun
from comfyui_temporal.contracts.task_store import TaskRow
from comfyui_temporal.contracts.tasks import IMAGE_WORKFLOW, TRAINING_WORKFLOW, workflow_id_of
from store import TaskStore
from tests.activities.temporal_in_memory import (
    AWAY,
    NO_NAMESPACE,
    Run,
    Temporal,
    begun,
    continued_as,
    requested,
)
from tests.store.facts import claim_of, end, new_task_id, write_of
from tests.versions.fullest import DOCUMENTS, fullest

CHARGE = {**fullest(DOCUMENTS["charge"]), "key": "t:charge:1", "price": 100}
COMMIT = {**fullest(DOCUMENTS["commit"]), "price": 200}
PRE_DEDUCT = {**fullest(DOCUMENTS["pre-deduct"]), "key": "t:pre_deduct:1"}
SUBMIT = {**fullest(DOCUMENTS["submit-job"]), "key": "t:submit:1"}
SECOND_START = Run("second-start", "FAILED", first_run_id="second-start")


async def claimed(store: TaskStore, *acting: str, scene: Scene = Scene.IMAGE_GENERATE) -> str:
    """A task whose row has seen these runs act, one after the other; a claim alone names none."""
    task_id = new_task_id()
    first = run_of(task_id, acting[0]) if acting else None
    await store.claim(claim_of(task_id, scene=scene), first)
    for run_id in acting[1:]:
        await store.register(run_of(task_id, run_id))
    return task_id


def run_of(task_id: str, run_id: str) -> TaskRun:
    return TaskRun(task_id=task_id, run_id=run_id, first_execution_run_id="run-1")


async def row_of(store: TaskStore, task_id: str) -> TaskRow:
    row = await store.task(task_id)
    assert row is not None
    return row


async def left_behind(temporal: Temporal, store: TaskStore, task_id: str) -> Orphans:
    env = ActivityEnvironment()
    env.info = replace(env.info, workflow_run_id="give-back")
    return await env.run(ClosedRunActivities(temporal.client, store).orphans, GiveBackOrder(task_id=task_id))


# The last run


@pytest.mark.parametrize(
    ("acting", "runs", "how"),
    [
        (["run-1"], [Run("run-1")], "terminated"),
        (["run-1"], [Run("run-1"), Run("reset", "TIMED_OUT")], "timed_out"),
        (["run-1", "reset"], [Run("run-1"), Run("reset", "TIMED_OUT"), SECOND_START], "timed_out"),
        (["run-1", "reset"], [Run("run-1"), SECOND_START], "terminated"),
        ([], [Run("run-1"), SECOND_START], "terminated"),
        (
            ["run-1"],
            [
                Run("run-1", "CONTINUED_AS_NEW", events=[continued_as("run-2")]),
                Run("run-2", "CONTINUED_AS_NEW", events=[continued_as("run-3")]),
                Run("run-3", "TIMED_OUT"),
                SECOND_START,
            ],
            "timed_out",
        ),
        (["run-1"], [], "vanished"),
        (["run-1"], [SECOND_START], "vanished"),
    ],
    ids=[
        "the one that the row names",
        "a reset one that did nothing",
        "a reset one before a second start",
        "the first one where the reset one is deleted",
        "the first one where the row names none",
        "a continued one before a second start",
        "none",
        "none but a second start",
    ],
)
async def test_the_last_run_of_the_chain_that_claimed_the_task_is_given_back(
    task_store: TaskStore, acting: list[str], runs: list[Run], how: str
) -> None:
    task_id = await claimed(task_store, *acting)
    assert (await left_behind(Temporal(*runs), task_store, task_id)).how == how
    assert (await row_of(task_store, task_id)).given_back_by == "give-back", "no run of it starts anything more"


@pytest.mark.parametrize("status", ["RUNNING", "PAUSED"])
async def test_a_task_whose_newest_run_is_open_is_not_given_back(task_store: TaskStore, status: str) -> None:
    """The run that a reset made has not acted yet: the row names the one before it, which has ended."""
    task_id = await claimed(task_store, "run-1")
    with pytest.raises(ApplicationError, match="still open") as refused:
        await left_behind(Temporal(Run("run-1"), Run("reset", status)), task_store, task_id)
    assert (refused.value.type, refused.value.non_retryable) == ("task_conflict", True)
    assert (await row_of(task_store, task_id)).given_back_by is None


@pytest.mark.parametrize("problem", [NO_NAMESPACE, AWAY], ids=["no namespace", "no server"])
async def test_no_run_has_vanished_where_temporal_says_nothing_of_it(task_store: TaskStore, problem: RPCError) -> None:
    """With a wrong namespace every open task would be given back."""
    task_id = await claimed(task_store, "run-1")
    temporal = Temporal(Run("run-1"))
    temporal.problem = problem
    with pytest.raises(ApplicationError) as failed:
        await left_behind(temporal, task_store, task_id)
    assert (failed.value.type, failed.value.non_retryable) == ("internal", False)
    assert (await row_of(task_store, task_id)).given_back_by is None


async def test_a_task_that_is_not_known_is_not_tried_again(task_store: TaskStore) -> None:
    with pytest.raises(ApplicationError) as refused:
        await left_behind(Temporal(Run("run-1")), task_store, new_task_id())
    assert (refused.value.type, refused.value.non_retryable) == ("input_invalid", True)


async def test_a_store_that_is_away_is_asked_again() -> None:
    """The task is not unknown, and its published points are not none."""
    store = TaskStore("postgresql://user:word@127.0.0.1:1/tasks")
    activities = ClosedRunActivities(Temporal(Run("run-1")).client, store)
    for activity in (activities.orphans, activities.published_points):
        with pytest.raises(ApplicationError, match="PostgreSQL") as failed:
            await ActivityEnvironment().run(activity, GiveBackOrder(task_id="task-1"))
        assert (failed.value.type, failed.value.non_retryable) == ("internal", False)
    await store.close()


async def test_a_task_that_was_reset_while_it_was_read_is_not_given_back(task_store: TaskStore) -> None:
    task_id = await claimed(task_store, "run-1")
    temporal = Temporal(Run("run-1"))
    temporal.before_answer = lambda: task_store.register(run_of(task_id, "reset"))
    with pytest.raises(ApplicationError, match="nothing is given back") as refused:
        await left_behind(temporal, task_store, task_id)
    assert (refused.value.type, refused.value.non_retryable) == ("task_conflict", True)


async def test_a_task_that_has_ended_is_read_as_it_is(task_store: TaskStore) -> None:
    task_id = await claimed(task_store, "run-1")
    await task_store.write(write_of(task_id, end()), run_of(task_id, "run-1"))
    left = await left_behind(Temporal(Run("run-1", "COMPLETED")), task_store, task_id)
    assert left.row.ended_at is not None and left.row.given_back_by is None


async def test_a_vanished_run_leaves_the_holds_that_its_row_names(task_store: TaskStore) -> None:
    task_id = await claimed(task_store, "run-1")
    await task_store.note_made(task_id, "hold", "hold-1")
    left = await left_behind(Temporal(), task_store, task_id)
    assert [hold.pre_deduct_id for hold in left.holds] == ["hold-1"]


async def test_what_the_last_run_requested_is_left_beside_what_only_the_row_names(task_store: TaskStore) -> None:
    task_id = await claimed(task_store, "run-1")
    await task_store.note_made(task_id, "hold", "hold-of-before")
    await task_store.note_made(task_id, "job", "job-of-before")
    events = [requested("pre_deduct", PRE_DEDUCT), requested("submit_job", SUBMIT)]
    left = await left_behind(Temporal(Run("run-1", events=events)), task_store, task_id)
    assert [(hold.n, hold.pre_deduct_id) for hold in left.holds] == [(1, None), (2, "hold-of-before")]
    assert [(job.attempt, job.job_id) for job in left.jobs] == [(1, None), (2, "job-of-before")]


# Its earlier runs


CHARGED = [requested("charge", CHARGE), requested("submit_job", SUBMIT)]


@pytest.mark.parametrize("acting", [["run-1"], ["run-1", "reset"]], ids=["which has acted", "which has not"])
@pytest.mark.parametrize(
    ("own", "charges", "charges_before", "price_before"),
    [
        ([], [], 1, 100),
        ([requested("commit", COMMIT)], [], 1, None),
        ([requested("charge", CHARGE | {"key": "t:charge:2", "price": 200})], ["t:charge:2"], 0, None),
        ([requested("charge", CHARGE | {"key": "t:charge:2", "price": None})], ["t:charge:2"], 0, None),
    ],
    ids=["nothing", "a commit", "a charge", "a charge of an older worker"],
)
async def test_what_the_run_before_a_reset_charged_is_known_beside_what_the_last_one_did(
    task_store: TaskStore,
    acting: list[str],
    own: list[Any],
    charges: list[str],
    charges_before: int,
    price_before: int | None,
) -> None:
    task_id = await claimed(task_store, *acting)
    temporal = Temporal(Run("run-1", events=CHARGED), Run("reset", events=own))
    left = await left_behind(temporal, task_store, task_id)
    assert ([post.key for post in left.charges], left.charges_before, left.price_before) == (
        charges,
        charges_before,
        price_before,
    )
    assert [(job.key, job.job_id) for job in left.jobs] == [("t:submit:1", None)], "its answer was lost"


async def test_the_price_of_the_newest_run_that_named_one_counts(task_store: TaskStore) -> None:
    """The row knows two of the three runs: the last one has done nothing."""
    task_id = await claimed(task_store, "run-1", "reset-1")
    runs = [Run("run-1", events=CHARGED), Run("reset-1", events=[requested("commit", COMMIT)]), Run("reset-2")]
    left = await left_behind(Temporal(*runs), task_store, task_id)
    assert (left.price_before, left.charges_before) == (200, 1)


async def test_an_earlier_run_that_temporal_has_deleted_is_left_out(task_store: TaskStore) -> None:
    task_id = await claimed(task_store, "run-1", "reset")
    await task_store.note_made(task_id, "job", "job-1")
    left = await left_behind(Temporal(Run("reset")), task_store, task_id)
    assert ([job.job_id for job in left.jobs], left.charges_before, left.price_before) == (["job-1"], 0, None)


@pytest.mark.parametrize(
    ("acting", "is_left"),
    [(["run-1"], False), (["reset"], True), (["run-1", "reset"], True)],
    ids=["never reset", "reset before its first claim", "reset"],
)
async def test_a_reset_training_may_have_a_copy_of_its_dataset_that_its_own_history_does_not_show(
    task_store: TaskStore, acting: list[str], is_left: bool
) -> None:
    training = fullest(DOCUMENTS["training-run"]) | {"carried": None}
    training["dataset"] = {"dataset_id": "dataset-1", "source_uri": "file:///datasets/1/"}
    task_id = await claimed(task_store, *acting, scene=Scene.MODEL_TRAIN)
    runs = [Run(run_id, events=[begun(TRAINING_WORKFLOW, training)]) for run_id in acting]
    left = await left_behind(Temporal(*runs), task_store, task_id)
    assert (left.snapshot.dataset_id if left.snapshot else None) == ("dataset-1" if is_left else None)


async def test_a_history_that_cannot_be_read_here_is_left_to_another_worker(task_store: TaskStore) -> None:
    task_id = await claimed(task_store, "run-1")
    temporal = Temporal(Run("run-1", events=[begun(IMAGE_WORKFLOW, {}), requested("refund", {})]))
    with pytest.raises(ApplicationError, match="cannot be read here") as failed:
        await left_behind(temporal, task_store, task_id)
    assert (failed.value.type, failed.value.non_retryable) == ("internal", False)
    [unseen] = [each for each in await task_store.unseen_tasks() if each.task_id == task_id]
    assert "cannot be read here" in unseen.reason
    temporal.runs = [Run("run-1")]
    await left_behind(temporal, task_store, task_id)
    assert task_id not in [each.task_id for each in await task_store.unseen_tasks()]


# Looked at a second time


async def test_of_tasks_that_were_found_closed_only_those_still_open_are_given_back(
    task_store: TaskStore, postgres_dsn: str
) -> None:
    closed, ended, unreadable, taken_over = [await claimed(task_store, "run-1") for _ in range(4)]
    await task_store.write(write_of(ended, end()), run_of(ended, "run-1"))
    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute("UPDATE tasks SET status = 'archived' WHERE task_id = $1", unreadable)
    activities = ClosedRunActivities(Temporal(Run("run-1")).client, task_store)
    found = [
        ClosedRun(task_id=task_id, workflow_id=workflow_id_of(task_id), run_id="run-1", how="terminated")
        for task_id in (closed, unreadable, ended, new_task_id())
    ]
    other = ClosedRun(task_id=taken_over, workflow_id=workflow_id_of(taken_over), run_id="run-0", how="terminated")
    assert await ActivityEnvironment().run(activities.still_closed, [*found, other]) == found[:1]
    [unseen] = [each for each in await task_store.unseen_tasks() if each.task_id == unreadable]
    assert "status" in unseen.reason
    await connection.execute("UPDATE tasks SET status = 'queued' WHERE task_id = $1", unreadable)
    await connection.close()


async def test_a_look_without_the_namespace_fails_as_a_whole(task_store: TaskStore) -> None:
    """The configuration is wrong: it says nothing of any one task, and none is shown as not looked at."""
    task_id = await claimed(task_store, "run-1")
    temporal = Temporal(Run("run-1"))
    temporal.problem = NO_NAMESPACE
    found = [ClosedRun(task_id=task_id, workflow_id=workflow_id_of(task_id), run_id="run-1", how="terminated")]
    with pytest.raises(RPCError, match="Namespace"):
        await ActivityEnvironment().run(ClosedRunActivities(temporal.client, task_store).still_closed, found)
    assert task_id not in [each.task_id for each in await task_store.unseen_tasks()]
    temporal.problem = AWAY
    assert await ActivityEnvironment().run(ClosedRunActivities(temporal.client, task_store).still_closed, found) == []
    [unseen] = [each for each in await task_store.unseen_tasks() if each.task_id == task_id]
    assert "UNAVAILABLE" in unseen.reason

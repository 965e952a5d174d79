"""Rolling back by hand (contract §7): whatever became of the run, hold and job are given back once, or charged once."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from temporalio.client import WorkflowHandle

from comfyui_temporal.contracts.lives import TaskRun
from comfyui_temporal.contracts.task_events import TaskEvent
from comfyui_temporal.contracts.task_store import TaskWrite
from comfyui_temporal.contracts.tasks import workflow_id_of
from proof.simulators.admin_wire import FaultKind
from store import StoreUnavailable
from tests.conftest import unique
from tests.gateway.conftest import OTHER_TOKEN, Api
from tests.gateway.serving import token_for
from tests.pausing import pause, unpause
from tests.waiting import until
from tests.workflows.platform import answered
from workflows import ledger_search


def handle_of(api: Api, task_id: str) -> WorkflowHandle[Any, Any]:
    return api.platform.client.get_workflow_handle(workflow_id_of(task_id))


async def waiting_task(api: Api, scene: str = "image") -> str:
    """A task whose credits are held and whose job never ends."""
    task_id = unique(scene)
    await api.platform.simulators.admin.comfyui.fault("job_stall", task_id=task_id)
    made = api.platform.image(task_id=task_id) if scene == "image" else api.platform.training(task_id=task_id)
    answer = await api.call("POST", "/images" if scene == "image" else "/trainings", made)
    assert answer.status_code == 202, answer.text
    await api.platform.until_held(task_id)
    await api.platform.until_settled(handle_of(api, task_id))
    return task_id


async def check_nothing_left(api: Api, task_id: str) -> list[TaskEvent]:
    """No hold stands, no job runs, nothing was charged, and the last event is the task's only end."""
    admin = api.platform.simulators.admin
    assert [hold.phase for hold in await admin.credits.holds(task_id) if hold.phase == "open"] == []
    assert [run for run in await admin.comfyui.jobs(task_id) if not run.is_over] == []
    assert await admin.credits.charged(task_id) == 0
    assert (await admin.credits.balance_check()).ok
    assert api.platform.snapshot_files(task_id) == []
    events = await api.platform.store.events(task_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    ends = [event.event.value for event in events if event.status.is_end()]
    assert len(ends) == 1 and ends[0] == events[-1].event.value
    return events


async def test_an_open_task_is_cancelled(api: Api) -> None:
    task_id = await waiting_task(api)

    answer = await api.call("POST", f"/{task_id}/rollback", {"reason": "by mistake"})

    assert (answer.status_code, answer.json()["outcome"]) == (200, "cancelled")
    assert (await api.ended(task_id))["status"] == "cancelled"
    await check_nothing_left(api, task_id)
    again = await api.call("POST", f"/{task_id}/rollback")
    assert (again.status_code, again.json()["outcome"]) == (200, "nothing_held")


async def test_a_reason_as_long_as_is_taken_cancels_the_task(api: Api) -> None:
    """Its 500 characters may have 2,000 bytes, and stand behind the user's name."""
    task_id = await waiting_task(api)
    token = token_for("tenant-demo", "u" * 64)
    answer = await api.call("POST", f"/{task_id}/rollback", {"reason": "😀" * 500}, token=token)
    assert (answer.status_code, answer.json().get("outcome")) == (200, "cancelled"), answer.text
    assert (await api.ended(task_id))["status"] == "cancelled"


async def test_a_paused_task_is_reported_paused_and_left_alone(api: Api) -> None:
    task_id = await waiting_task(api)
    await pause(api.platform.client, workflow_id_of(task_id))

    answer = await api.call("POST", f"/{task_id}/rollback")

    assert (answer.status_code, answer.json()["code"]) == (503, "worker_unavailable")
    assert "unpause" in answer.json()["detail"]
    await unpause(api.platform.client, workflow_id_of(task_id))
    assert (await api.call("POST", f"/{task_id}/rollback")).json()["outcome"] == "cancelled"
    await api.ended(task_id)
    await check_nothing_left(api, task_id)


@pytest.mark.parametrize("scene", ["image", "training"])
async def test_what_a_terminated_run_left_is_given_back(api: Api, scene: str) -> None:
    task_id = await waiting_task(api, scene)
    await handle_of(api, task_id).terminate("by an operator")

    answer = await api.call("POST", f"/{task_id}/rollback", {"reason": "its run was terminated"})

    assert (answer.status_code, answer.json()["outcome"]) == (200, "given_back"), answer.text
    credits = answer.json()["credits"]
    assert credits["held"] == credits["returned"] > 0 and credits["charged"] == 0
    task = await api.ended(task_id)
    assert (task["status"], task["error"]["code"]) == ("failed", "internal")
    assert "terminated" in task["error"]["message"]
    events = await check_nothing_left(api, task_id)
    assert [event.event.value for event in events[-2:]] == ["credits.updated", "task.failed"]
    again = await api.call("POST", f"/{task_id}/rollback")
    assert (again.status_code, again.json()["outcome"]) == (200, "nothing_held")


@pytest.mark.parametrize("route", ["submit_job", "pre_deduct"])
async def test_a_call_whose_answer_was_lost_is_learned_and_given_back(api: Api, route: str) -> None:
    """Terminated while the call had landed and its answer had not: only the history knows of it."""
    task_id = unique("image")
    admin = api.platform.simulators.admin
    await admin.comfyui.fault("job_stall", task_id=task_id)
    fault = await api.platform.service_of(route).fault(FaultKind.DROP, route=route, task_id=task_id, times=None)
    await api.call("POST", "/images", api.platform.image(task_id=task_id))
    await api.platform.until_hit(route, fault)
    await handle_of(api, task_id).terminate("by an operator")
    await api.platform.service_of(route).remove_fault(fault)

    answer = await api.call("POST", f"/{task_id}/rollback")

    assert (answer.status_code, answer.json()["outcome"]) == (200, "given_back"), answer.text
    await check_nothing_left(api, task_id)
    assert [run.is_over for run in await admin.comfyui.jobs(task_id)] == [True]
    assert len(await admin.credits.holds(task_id)) == (route == "pre_deduct"), "learning its id takes no second one"


@pytest.mark.parametrize("scene", ["image", "training"])
async def test_a_submit_that_was_refused_is_not_sent_again(
    api: Api, scene: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Terminated once ComfyUI had refused the job, and before the task's end was written: there is no job to cancel."""
    route = "submit_job" if scene == "image" else "create_training"
    task_id = unique(scene)
    comfyui = api.platform.simulators.admin.comfyui
    refusal = {"detail": {"code": "42202", "message": "job_refused"}}
    await comfyui.fault(FaultKind.ANSWER, route=route, task_id=task_id, status=422, body=refusal)
    whole_write = api.platform.store.write

    async def write_of_ended_runs(write: TaskWrite, run: TaskRun | None = None, **given: Any) -> None:
        """The run's own writes fail, also one that is under way when it is terminated; the give-back's succeed."""
        if run is not None:
            raise StoreUnavailable("The task store is away.")
        await whole_write(write, run, **given)

    monkeypatch.setattr(api.platform.store, "write", write_of_ended_runs)
    made = api.platform.image(task_id=task_id) if scene == "image" else api.platform.training(task_id=task_id)
    await api.call("POST", "/images" if scene == "image" else "/trainings", made)
    await until(lambda: answered(handle_of(api, task_id), route))
    await handle_of(api, task_id).terminate("by an operator")

    answer = await api.call("POST", f"/{task_id}/rollback")

    assert (answer.status_code, answer.json()["outcome"]) == (200, "given_back"), answer.text
    await api.ended(task_id)
    assert len(await comfyui.requests_seen(route, task_id)) == 1
    assert await comfyui.jobs(task_id) == []
    await check_nothing_left(api, task_id)


@pytest.mark.slow  # Temporal takes half a minute to delete a run
async def test_a_vanished_run_is_given_back_by_its_row(api: Api) -> None:
    task_id = await waiting_task(api)
    handle = handle_of(api, task_id)
    await handle.terminate("by an operator")
    from temporalio.api.common.v1 import WorkflowExecution
    from temporalio.api.workflowservice.v1 import DeleteWorkflowExecutionRequest

    await api.platform.client.workflow_service.delete_workflow_execution(
        DeleteWorkflowExecutionRequest(
            namespace=api.platform.client.namespace, workflow_execution=WorkflowExecution(workflow_id=handle.id)
        )
    )

    async def is_gone() -> bool:
        from temporalio.service import RPCError

        try:
            await handle.describe()
        except RPCError:
            return True
        return False

    await until(is_gone, within_seconds=60)
    answer = await api.call("POST", f"/{task_id}/rollback")

    assert (answer.status_code, answer.json()["outcome"]) == (200, "given_back"), answer.text
    await check_nothing_left(api, task_id)


async def test_what_was_charged_is_not_refunded(api: Api) -> None:
    task_id = (await api.call("POST", "/images", api.platform.image())).json()["task_id"]
    charged = (await api.ended(task_id))["credits"]["charged"]

    answer = await api.call("POST", f"/{task_id}/rollback")

    assert (answer.status_code, answer.json()["code"]) == (409, "already_charged")
    assert str(charged) in answer.json()["detail"]


async def test_unknown_points_are_reported_as_unknown(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit acted, its answer was lost, and the ledger does not show it: neither charged nor given back."""
    monkeypatch.setattr(ledger_search, "LOOK_FOR", timedelta(seconds=1))
    task_id = unique("image")
    admin = api.platform.simulators.admin
    for kind in (FaultKind.IGNORE_KEYS, FaultKind.DROP):
        await admin.credits.fault(kind, route="commit", task_id=task_id)
    await admin.credits.fault(FaultKind.LEDGER_LAG, task_id=task_id, seconds=3_600)
    await api.call("POST", "/images", api.platform.image(task_id=task_id))
    credits = (await api.ended(task_id))["credits"]
    assert (credits["settlement"], credits["charged"], credits["returned"]) == ("unknown", None, None)

    answer = await api.call("POST", f"/{task_id}/rollback")

    assert (answer.status_code, answer.json()["code"]) == (409, "settlement_unknown"), answer.text
    events = await api.platform.store.events(task_id)
    assert [event.credits_delta for event in events if event.credits_delta is not None] == [-credits["held"]]


async def test_a_run_terminated_after_its_commit_landed_is_completed_and_keeps_its_picture(api: Api) -> None:
    task_id = unique("image")
    admin = api.platform.simulators.admin
    fault = await admin.credits.fault(FaultKind.DROP, route="commit", task_id=task_id, times=None)
    await api.call("POST", "/images", api.platform.image(task_id=task_id))
    await api.platform.until_hit("commit", fault)
    await handle_of(api, task_id).terminate("by an operator")

    answer = await api.call("POST", f"/{task_id}/rollback")

    assert (answer.status_code, answer.json()["code"]) == (409, "already_charged"), answer.text
    task = await api.ended(task_id)
    assert task["status"] == "completed" and task["result_urls"]
    assert task["credits"]["charged"] == await admin.credits.charged(task_id) > 0


async def test_another_tenants_task_is_answered_404(api: Api) -> None:
    task_id = await waiting_task(api)
    answer = await api.call("POST", f"/{task_id}/rollback", token=OTHER_TOKEN)
    assert (answer.status_code, answer.json()["code"]) == (404, "task_unknown")
    await api.call("POST", f"/{task_id}/rollback")
    await api.ended(task_id)

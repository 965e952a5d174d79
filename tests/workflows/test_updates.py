"""Invalid updates are refused to the caller, and the run goes on (pitfall 3)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from temporalio.api.common.v1 import Payload
from temporalio.client import WorkflowUpdateFailedError
from temporalio.common import RawValue
from temporalio.service import RPCError, RPCStatusCode

from comfyui_temporal.contracts.tasks import TaskStatus
from tests.workflows.books import ended
from tests.workflows.payers import until_started
from tests.workflows.platform import Handle, Platform

NOT_ONE_OBJECT: dict[str, list[Any]] = {
    "no argument": [],
    "null": [None],
    "two arguments": [{}, {}],
    "a list": [[{}]],
    "a text": ["no longer wanted"],
    "no JSON": [RawValue(Payload(metadata={"encoding": b"json/plain"}, data=b"{"))],
    "another service's encoding": [RawValue(Payload(metadata={"encoding": b"json/encrypted"}, data=b"{}"))],
}
BAD_FIELDS: dict[str, list[dict[str, Any]]] = {
    "cancel_task": [{"why": "x"}, {"reason": None}, {"reason": "\0"}, {"reason": "x" * 3_000}, {"reason": 1}],
    "wait_until_held": [{"why": "x"}, {"reached": "held"}],
    "confirm_price": [{}, {"max_credits": 0}, {"max_credits": 1.5}, {"max_credits": "200"}, {"max_credits": 10**30}],
}


async def refused(handle: Handle, update: str, arguments: list[Any]) -> None:
    try:
        await handle.execute_update(update, args=arguments)
    except WorkflowUpdateFailedError:
        return
    pytest.fail(f"{update} took {arguments}")


async def test_a_bad_update_is_refused_and_changes_nothing(direct_platform: Platform) -> None:
    handle = await direct_platform.start_training(max_credits=150)
    training_id = (await until_started(direct_platform, handle)).run_id
    for update, bodies in BAD_FIELDS.items():
        for arguments in [*NOT_ONE_OBJECT.values(), *([body] for body in bodies)]:
            await refused(handle, update, arguments)
    await refused(handle, "no_such_update", [{}])
    assert await handle.execute_update("confirm_price", {"max_credits": 1}) == {"max_credits": 150}
    assert (await direct_platform.progress(handle))["job_id"] == training_id
    assert await direct_platform.cancel(handle) == "accepted"
    assert (await ended(direct_platform, handle)).status is TaskStatus.CANCELLED


@pytest.mark.slow
async def test_each_of_many_concurrent_cancels_is_answered_or_refused_by_the_server(direct_platform: Platform) -> None:
    """They are answered once it is decided; more than ten in flight the server takes of no run."""
    task = direct_platform.image()
    hanging = await direct_platform.simulators.admin.comfyui.fault(
        "delay", route="submit_job", task_id=task["task_id"], seconds=1.0, when="after"
    )
    handle = await direct_platform.start(task)
    await direct_platform.until_hit("submit_job", hanging)
    answers = await asyncio.gather(*(direct_platform.cancel(handle) for _ in range(13)), return_exceptions=True)
    assert (await ended(direct_platform, handle)).status is TaskStatus.CANCELLED
    assert answers.count("accepted") >= 10
    for answer in answers:
        if isinstance(answer, BaseException):
            assert isinstance(answer, RPCError), answer
            assert answer.status in (RPCStatusCode.RESOURCE_EXHAUSTED, RPCStatusCode.NOT_FOUND), answer

"""A job of the bridge whose data Temporal holds encrypted (docs/encryption.md)."""

from __future__ import annotations

from pathlib import Path

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionRequest
from temporalio.client import Client
from temporalio.testing import WorkflowEnvironment

from bridge.__main__ import Bridge
from bridge.calls import workflow_of
from comfyui_temporal.encryption import PayloadEncryption
from comfyui_temporal.encryption_keys import EncryptionKey
from comfyui_temporal.plugin import TasksPlugin
from proof.simulators.serving import ServedApp
from tests.bridge.native import NativeServer
from tests.bridge.platform import running_bridge
from tests.conftest import unique

MARK = "a lighthouse that only this prompt names"


async def test_nothing_of_a_job_is_legible_in_temporal(
    temporal_env: WorkflowEnvironment, native: NativeServer, tmp_path: Path
) -> None:
    """API, job workflow and GPU worker share the key; the idempotency key is still recognised."""
    encryption = PayloadEncryption([EncryptionKey("2030", b"o" * 32)])
    address = temporal_env.client.service_client.config.target_host
    client = await Client.connect(address, plugins=[TasksPlugin(encryption)])
    async with running_bridge(client, tmp_path) as bridge, bridge.gpu(native):
        body, key = bridge.job_body(prompt=MARK), unique("key")
        accepted = await bridge.post("/jobs", body, key=key)
        state = await bridge.ended(accepted.json()["job_id"])
        again = await bridge.post("/jobs", body, key=key)
        other = await bridge.post("/jobs", body | {"prompt": "another"}, key=key)
        served = ServedApp(Bridge(bridge.settings, await Client.connect(address, plugins=[TasksPlugin()])).app)
        await served.start()
        job = f"{served.url}/comfyui/v1/jobs/{accepted.json()['job_id']}"
        unread = await bridge.http.get(job, headers=bridge.headers())
        await served.stop()
    assert (unread.status_code, "lacks the key" in unread.text) == (503, True), "a bridge without the key"
    assert (again.json(), other.status_code) == (accepted.json(), 409)
    execution = WorkflowExecution(workflow_id=workflow_of(accepted.json()["job_id"]))
    described = await client.workflow_service.describe_workflow_execution(
        DescribeWorkflowExecutionRequest(namespace=client.namespace, execution=execution)
    )
    stored = described.SerializeToString()
    async for event in client.get_workflow_handle(execution.workflow_id).fetch_history_events():
        stored += event.SerializeToString()
    assert b"2030" in stored and MARK.encode() not in stored
    assert state["result_urls"][0].encode() not in stored and body["callback_url"].encode() not in stored

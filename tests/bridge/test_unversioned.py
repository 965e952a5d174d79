"""The bridge and its GPU workers stay unversioned, also where the settings name a deployment for workers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from temporalio.client import Client

from bridge.calls import workflow_of
from tests.bridge.native import NativeServer
from tests.bridge.platform import running_bridge
from tests.conftest import unique


async def test_a_job_needs_no_version_to_be_current(
    temporal_client: Client, native: NativeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server's own queue has one poller: a versioned one would get nothing before an operator said so."""
    version = {"deployment_name": unique("deployment"), "build_id": "1.4.0"}
    for name, value in version.items():
        monkeypatch.setitem(os.environ, f"COMFYUI_TEMPORAL_{name.upper()}", value)
    async with running_bridge(temporal_client, tmp_path, **version) as bridge, bridge.gpu(native):
        job_id = (await bridge.submit())["job_id"]
        state = await bridge.ended(job_id)
    assert state["job_status"] == "delivery", state
    run = await temporal_client.get_workflow_handle(workflow_of(job_id)).describe()
    assert not run.raw_description.workflow_execution_info.HasField("versioning_info")

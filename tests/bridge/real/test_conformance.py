"""The bridge in front of a real ComfyUI passes every conformance case about images.

Trainings of the shipped template take an hour on a CPU: `test_trainings.py` trains on tiny pictures instead.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest
from temporalio.client import Client

from comfyui_temporal.contracts.permissions import Scope
from proof.conformance import Person, Profile, Verdict, cases, opened, run
from proof.conformance.receiver import CallbackReceiver, receiving
from tests.bridge.platform import CALLBACK_SECRET, running_bridge
from tests.bridge.real.worker_process import WorkerProcess

ME, STRANGER = Person("tenant-demo", "user-demo"), Person("tenant-other", "user-other")
PROFILE = Profile(patience_seconds=250)


@pytest.mark.timeout(580)
async def test_every_case_about_images_holds(temporal_client: Client, tmp_path: Path, comfyui_url: str) -> None:
    async with (
        receiving(CallbackReceiver(CALLBACK_SECRET)) as receiver,
        running_bridge(temporal_client, tmp_path, bridge_callback_urls=[receiver.url]) as bridge,
        WorkerProcess(bridge, temporal_client, comfyui_url, tmp_path),
    ):

        def token(person: Person, scopes: Collection[Scope]) -> str:
            return bridge.tokens.made_for(person.tenant_id, person.user_id, scopes)

        async with opened(bridge.url, token, ME, STRANGER, PROFILE, receiver) as subject:
            outcomes = await run(cases(with_trainings=False), subject)
    assert [f"{one.case.name}: {one.says}" for one in outcomes if one.verdict is not Verdict.HELD] == []

"""The bridge before two stand-in servers is held to every case, as the simulator is.

Those that make no job run in `make test`; with all the others it takes a minute, so that is `make test-all`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio
from PIL import Image
from temporalio.client import Client
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.comfyui import DatasetFile, DatasetSnapshot
from comfyui_temporal.contracts.permissions import Scope
from comfyui_temporal.plugin import TasksPlugin
from proof.conformance import Outcome, Person, Profile, Subject, Verdict, cases, opened, run
from proof.conformance.receiver import CallbackReceiver, receiving
from tests.bridge.native import NativeServer
from tests.bridge.platform import CALLBACK_SECRET, running_bridge

ME, STRANGER = Person("tenant-demo", "user-demo"), Person("tenant-other", "user-other")
MODELS: Final = {"checkpoints": ["v1-5-pruned.safetensors"]}
ALL = cases()


def written_dataset(folder: Path, task_id: str) -> DatasetSnapshot:
    """Two captioned pictures where the bridge looks for the task's snapshot (`running_bridge`)."""
    where = folder / "store" / "snapshots" / task_id / "cats" / "files"
    where.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(2):
        with BytesIO() as picture:
            Image.new("RGB", (16, 16), (number, 90, 20)).save(picture, "PNG")
            contents = {f"{number}.png": picture.getvalue(), f"{number}.txt": b"a cat"}
        for name, content in contents.items():
            (where / name).write_bytes(content)
            sha256 = hashlib.sha256(content).hexdigest()
            files.append(DatasetFile(path=name, size_bytes=len(content), sha256=sha256))
    return DatasetSnapshot(dataset_id="cats", snapshot_uri=f"{where.as_uri()}/", files=files)


@asynccontextmanager
async def held_to_account(temporal_env: WorkflowEnvironment, folder: Path, *, servers: int) -> AsyncIterator[Subject]:
    """The bridge before so many ComfyUI servers."""
    profile = Profile(dataset=partial(written_dataset, folder), patience_seconds=60)
    client = await Client.connect(temporal_env.client.service_client.config.target_host, plugins=[TasksPlugin()])
    async with (
        receiving(CallbackReceiver(CALLBACK_SECRET)) as receiver,
        running_bridge(client, folder, bridge_callback_urls=[receiver.url]) as platform,
        AsyncExitStack() as opened_servers,
    ):
        for number in range(servers):
            server = await opened_servers.enter_async_context(NativeServer(folder / str(number), models=MODELS))
            await opened_servers.enter_async_context(platform.gpu(server))

        def token(person: Person, scopes: Collection[Scope]) -> str:
            return platform.tokens.made_for(person.tenant_id, person.user_id, scopes)

        async with opened(platform.url, token, ME, STRANGER, profile, receiver) as subject:
            yield subject


async def test_the_bridge_holds_what_makes_no_job(
    temporal_env: WorkflowEnvironment, tmp_path_factory: pytest.TempPathFactory
) -> None:
    chosen = [case for case in ALL if case.changes_nothing or case.name.startswith(("job_refused", "training_refused"))]
    async with held_to_account(temporal_env, tmp_path_factory.mktemp("bridge"), servers=0) as subject:
        outcomes = await run(chosen, subject)
    broken = [f"{outcome.case.name}: {outcome.says}" for outcome in outcomes if outcome.verdict is not Verdict.HELD]
    assert broken == []


@pytest_asyncio.fixture(scope="module")
async def outcomes(temporal_env: WorkflowEnvironment, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Of all cases, which run side by side."""
    async with held_to_account(temporal_env, tmp_path_factory.mktemp("bridge"), servers=2) as subject:
        return {outcome.case.name: outcome for outcome in await run(ALL, subject)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in ALL])
def test_the_bridge_holds(outcomes: dict[str, Outcome], name: str) -> None:
    assert outcomes[name].verdict is Verdict.HELD, outcomes[name].says

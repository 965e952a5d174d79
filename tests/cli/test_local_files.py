"""Local files on the command line: uploaded by the gateway, named in the task by their addresses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from temporalio.testing import WorkflowEnvironment

from activities.upload_files import UploadFiles
from comfyui_temporal.command_line.connection import Connection, GatewayAccess
from comfyui_temporal.command_line.failures import BadInput, ExitCode
from comfyui_temporal.command_line.inputs import controls, named_files
from comfyui_temporal.command_line.local_files import with_uploads
from gateway.uploads import UploadSettings
from store import TaskStore
from tests.cli.conftest import Ended, image_task, run_command
from tests.conftest import unique
from tests.gateway.serving import served, token_for

PNG = b"\x89PNG\r\n\x1a\n" + b"a picture"
WAV = b"RIFF\x00\x00\x00\x00WAVEfmt sound"


@pytest.fixture
def tenant() -> str:
    return unique("tenant")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "uploads").mkdir()
    (tmp_path / "sketch, old.png").write_bytes(PNG)
    (tmp_path / "page.html").write_text("<html>")
    (tmp_path / "sound.wav").write_bytes(WAV)
    return tmp_path


@pytest_asyncio.fixture
async def connected(
    opened: Connection, temporal_env: WorkflowEnvironment, task_store: TaskStore, files: Path, tenant: str
) -> AsyncIterator[Connection]:
    """A connection whose gateway takes uploads of one tenant."""
    uploads = UploadSettings(UploadFiles.at((files / "uploads").as_uri()))
    async with served(temporal_env.client, task_store, uploads=uploads) as gateway:
        access = GatewayAccess(str(gateway.http.base_url), tokens={tenant: token_for(tenant)})
        yield replace(opened, gateway=access)


async def test_a_path_is_uploaded_and_an_address_stays(connected: Connection, files: Path, tenant: str) -> None:
    given = controls([f"{files}/sketch, old.png,0.5", "https://images.example/a.png", "upload:known"])
    task = image_task(tenant_id=tenant, controls=given, extras={"seed": 7})
    named = named_files([f"sound={files}/sound.wav", "mask=upload:known"])

    sent = await with_uploads(connected, task, named)

    addresses = [control.image_url for control in sent.controls]
    assert addresses[1:] == ["https://images.example/a.png", "upload:known"]
    assert (sent.controls[0].strength, sent.extras["seed"], sent.extras["mask"]) == (0.5, 7, "upload:known")
    for address, content in ((addresses[0], PNG), (str(sent.extras["sound"]), WAV)):
        assert (files / "uploads" / tenant / address.removeprefix("upload:")).read_bytes() == content


@pytest.mark.parametrize(
    ("control", "reason"),
    [("missing.png", "cannot be read: No such file"), ("page.html", "none of these"), ("sound.wav", "of kind image")],
)
async def test_a_file_that_cannot_be_used_starts_nothing(
    connected: Connection, files: Path, tenant: str, control: str, reason: str
) -> None:
    task = image_task(tenant_id=tenant, controls=controls([str(files / control)]))
    with pytest.raises(BadInput, match=reason) as refused:
        await with_uploads(connected, task, {})
    assert str(refused.value).startswith("Nothing was started")


async def test_a_start_with_files_may_be_repeated(connected: Connection, files: Path, tenant: str) -> None:
    assert connected.gateway is not None
    here = {
        "COMFYUI_TEMPORAL_GATEWAY_URL": connected.gateway.url,
        "COMFYUI_TEMPORAL_GATEWAY_TOKEN": connected.gateway.tokens[tenant],
    }
    sketch = files / "sketch, old.png"

    async def start() -> Ended:
        named = ["--task-id", f"repeated-{tenant}", "--tenant", tenant, "--user", "ann"]
        given = ["--control", f"{sketch},0.5", "--file", f"sound={files}/sound.wav", "--no-wait"]
        return await run_command("generate", "a cat", *named, *given, connection=connected, environment=here)

    first, again = await start(), await start()
    assert (first.exit_code, again.exit_code) == (0, 0), first.err + again.err
    assert first.out.startswith("Started task") and again.out.startswith("Already started")
    assert len(list((files / "uploads" / tenant).iterdir())) == 2, "nothing was uploaded twice"
    sketch.write_bytes(PNG + b", changed")
    assert (await start()).exit_code == ExitCode.TASK_EXISTS


async def test_without_a_gateway_for_the_tenant_a_path_is_refused(connected: Connection, files: Path) -> None:
    task = image_task(tenant_id="tenant-without-token", controls=controls([str(files / "sound.wav")]))
    for connection in (connected, replace(connected, gateway=None)):
        with pytest.raises(BadInput, match="COMFYUI_TEMPORAL_GATEWAY_URL"):
            await with_uploads(connection, task, {})
        unchanged = task.model_copy(update={"controls": []})
        assert await with_uploads(connection, unchanged, {}) == unchanged


def test_a_file_of_an_extra_is_named_with_it() -> None:
    assert named_files(["mask=a=b.png"]) == {"mask": "a=b.png"}
    for pair in ("mask", "=a.png", "mask="):
        with pytest.raises(BadInput) as refused:
            named_files([pair])
        assert "must be name=path" in str(refused.value.fields)

"""The ports and pages that manifests and docker-compose.yml name are those that the processes, started here, open."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import pytest
import pytest_asyncio
from temporalio.testing import WorkflowEnvironment

from local_stack.ports import any_free_port
from tests import test_compose as compose
from tests.conftest import NewDatabase, unique
from tests.deploy import test_kubernetes as kubernetes
from tests.our_processes import new_stack
from tests.waiting import until

PROCESSES: Final = ("worker", "gateway", "bridge", "gpu-worker")
PREFIX: Final = "COMFYUI_TEMPORAL_"
SOURCES: Final = ("kubernetes", "compose")


def port_settings(source: str, name: str) -> dict[str, int]:
    """The settings of a process that are ports, as the file gives them."""
    if source == "kubernetes":
        given = {variable["name"]: variable.get("value") for variable in kubernetes.container_of(name)["env"]}
    else:
        given = compose.services()[name]["environment"]
    found = {key.removeprefix(PREFIX): value for key, value in given.items() if key.endswith("_PORT")}
    return {key: int(value) for key, value in found.items()}


def named_ports(source: str, name: str) -> set[int]:
    """The ports that the file lets others reach, or asks for health."""
    if source == "kubernetes":
        return {port["containerPort"] for port in kubernetes.container_of(name)["ports"]}
    published = {int(port.split(":")[2]) for port in compose.services()[name]["ports"]}
    return published | {compose.page_of(name)[0]}


def asked_pages(source: str, name: str) -> set[tuple[int, str]]:
    """Port and path of what is asked for health, and of what Prometheus reads."""
    if source == "compose":
        return {compose.page_of(name)}
    container: dict[str, Any] = kubernetes.container_of(name)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    asked = [probe["httpGet"] for key, probe in container.items() if key.endswith("Probe")]
    metrics = {(port, "/metrics") for what, port in ports.items() if what in ("metrics", "operations")}
    return {(ports[page["port"]], page["path"]) for page in asked} | metrics


@dataclass
class Running:
    """A process, and for each port of the file the one that it was given here."""

    pid: int
    given: dict[int, int]


@pytest_asyncio.fixture(scope="module", params=SOURCES)
async def running(
    request: pytest.FixtureRequest, temporal_env: WorkflowEnvironment, new_database: NewDatabase, tmp_path_factory: Any
) -> AsyncIterator[tuple[str, dict[str, Running]]]:
    """All four as the file sets them, but with ports that are free here."""
    folder: Path = tmp_path_factory.mktemp("ports")
    address, dsn = temporal_env.client.service_client.config.target_host, await new_database()
    async with AsyncExitStack() as opened:
        found: dict[str, Running] = {}
        for name in PROCESSES:
            ports = {setting: (port, any_free_port()) for setting, port in port_settings(request.param, name).items()}
            stack = new_stack(folder / name, temporal=address, dsn=dsn, queue=unique("queue"))
            for setting in [setting for setting in stack.settings if setting.endswith("_PORT")]:
                del stack.settings[setting]
            stack.settings |= {setting: str(free) for setting, (_, free) in ports.items()}
            started = await opened.enter_async_context(stack.running(None, name))
            found[name] = Running(started[name].pid, dict(ports.values()))
        yield request.param, found


@pytest.mark.parametrize("name", PROCESSES)
async def test_a_process_opens_the_ports_that_are_named_and_no_other(
    running: tuple[str, dict[str, Running]], name: str
) -> None:
    source, processes = running
    process = processes[name]
    assert named_ports(source, name) == process.given.keys(), "a port that no setting of the process is"

    async def listening() -> bool:
        open_now = {c.laddr.port for c in psutil.Process(process.pid).net_connections("tcp") if c.status == "LISTEN"}
        return open_now == set(process.given.values())

    await until(listening, f"{name} opens {process.given}", within_seconds=60)


@pytest.mark.parametrize("name", PROCESSES)
async def test_a_page_that_is_asked_exists(running: tuple[str, dict[str, Running]], name: str) -> None:
    source, processes = running
    async with httpx.AsyncClient(trust_env=False, timeout=10) as http:
        for port, path in asked_pages(source, name):
            address = f"http://127.0.0.1:{processes[name].given[port]}{path}"

            async def answered(address: str = address) -> int | None:
                try:
                    return (await http.get(address)).status_code
                except httpx.TransportError:
                    return None

            status = await until(answered, address, within_seconds=60)
            assert status in (200, 503), f"{address} of {name}: {status}"

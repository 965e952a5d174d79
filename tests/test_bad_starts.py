"""What each process does with bad input at its start: it ends within seconds, with one sentence, and is never green."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from temporalio.api.workflowservice.v1 import RegisterNamespaceRequest
from temporalio.client import Client
from temporalio.service import RPCError
from temporalio.testing import WorkflowEnvironment

from local_stack.folder import PROJECT
from store import StoreHome, TaskStore
from store.migrate import revert
from tests.conftest import NewDatabase, unique
from tests.our_processes import environment_of, new_stack
from tests.waiting import until

ENDS_WITHIN_SECONDS: Final = 5.0
SIDE_BY_SIDE: Final = 2
COMMANDS: Final = {
    "worker": [str(PROJECT / "worker.py")],
    "gateway": ["-m", "gateway"],
    "bridge": ["-m", "bridge"],
    "gpu-worker": ["-m", "bridge.gpu_worker", "--server", "http://127.0.0.1:9"],
    "codec-server": [str(PROJECT / "codec_server.py")],
    "purge": ["-m", "store", "purge"],
    "migrate": ["-m", "store", "migrate"],
}
PAGES: Final = {
    "worker": ("HEALTH_PORT", "/startupz"),
    "gateway": ("GATEWAY_PORT", "/readyz"),
    "bridge": ("BRIDGE_PORT", "/readyz"),
    "gpu-worker": ("GPU_HEALTH_PORT", "/readyz"),
    "codec-server": ("CODEC_SERVER_PORT", "/healthz"),
}
"""What the check of the process's container asks (docker-compose.yml)."""
CHECK: Final = PROJECT / "runtime" / "health_check.py"
WRONG: Final = "a-value-that-is-wrong"


@dataclass(frozen=True)
class Fault:
    """`settings` replace good ones, None takes one away; `place`: database or namespace are not what they should be."""

    process: str
    name: str
    says: str
    settings: dict[str, str | None] = field(default_factory=dict)
    place: str | None = None

    def __str__(self) -> str:
        return f"{self.process}: {self.name}"


def _each(name: str, says: str, *processes: str, place: str) -> list[Fault]:
    return [Fault(process, name, says, place=place) for process in processes]


_STORES: Final = ("UPLOADS_URL", "BRIDGE_STORE_URL", "OBJECT_STORE_URL")
FAULTS: Final = [
    *(
        Fault(process, "a wrong setting", setting.lower(), {setting: WRONG})
        for process, setting in (
            *(("worker", "MAX_ACTIVITIES"), ("gateway", "TENANT_OPEN_TASKS"), ("bridge", "CREDITS_URL")),
            *(("gpu-worker", "GPU_GRACE_SECONDS"), ("codec-server", "CONNECTIONS_PER_ADDRESS")),
            *(("purge", "RETENTION_DAYS"), ("migrate", "RETENTION_DAYS")),
        )
    ),
    Fault("purge", "a wrong store", "BRIDGE_STORE_URL", {"BRIDGE_STORE_URL": "ftp://nowhere"}),
    Fault("bridge", "a wrong store", "BRIDGE_STORE_URL", {"BRIDGE_STORE_URL": "ftp://nowhere"}),
    *(
        Fault(
            process, "uploads among results", "uploads_url and bridge_store_url", dict.fromkeys(_STORES, "s3://bucket")
        )
        for process in ("worker", "gateway", "bridge", "gpu-worker", "purge")
    ),
    *(
        Fault(process, f"no {secret}", f"COMFYUI_TEMPORAL_{secret}", {secret: None})
        for process, secret in (
            *(("worker", "SERVICE_SECRET"), ("worker", "DATABASE_DSN")),
            *(("gateway", "CALLER_SECRET"), ("gateway", "CALLBACK_SECRETS"), ("gateway", "DATABASE_DSN")),
            *(("bridge", "SERVICE_SECRET"), ("bridge", "CALLBACK_SECRETS")),
            *(("codec-server", "CODEC_SERVER_TOKEN"), ("codec-server", "ENCRYPTION_KEYS")),
            *(("purge", "DATABASE_DSN"), ("migrate", "DATABASE_DSN")),
        )
    ),
    *_each("older tables", "python -m store migrate", "worker", "gateway", "purge", place="older"),
    *_each("no tables", "python -m store migrate", "worker", "gateway", "purge", place="empty"),
    *_each("another namespace's store", "belongs to Temporal namespace", "worker", "gateway", place="foreign"),
    *_each("no such namespace", "'no-such-namespace'", "worker", "gateway", "bridge", "gpu-worker", place="nowhere"),
    *_each("no search attributes", "search-attribute create", "worker", place="bare"),
    Fault("migrate", "no such server", "127.0.0.1:9", {"DATABASE_DSN": "postgresql://u:p@127.0.0.1:9/d"}),
    Fault("purge", "no such server", "127.0.0.1:9", {"DATABASE_DSN": "postgresql://u:p@127.0.0.1:9/d"}),
]


@dataclass
class End:
    """How a process ended."""

    code: int | None
    output: str
    seconds: float
    """Without those in which other processes had the processors."""
    greens: list[str]
    """What its container's check said whenever it was green."""

    @property
    def lines_for_people(self) -> list[str]:
        return [line for line in self.output.splitlines() if line and not _is_log(line)]


def _is_log(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


Places = dict[str | None, dict[str, str]]


@pytest_asyncio.fixture(scope="module")
async def places(temporal_env: WorkflowEnvironment, new_database: NewDatabase) -> Places:
    """What differs from good settings, for each `place`."""
    older, foreign, bare = await new_database(), await new_database(), unique("bare")
    await revert(older, revision="0009")
    store = TaskStore(foreign)
    await store.rebind(StoreHome(namespace="somebody-elses"))
    await store.close()
    await temporal_env.client.workflow_service.register_namespace(
        RegisterNamespaceRequest(namespace=bare, workflow_execution_retention_period=Duration(seconds=86_400))
    )
    address = temporal_env.client.service_client.config.target_host
    client = await Client.connect(address, namespace=bare)

    async def is_known() -> bool:
        # A new namespace reaches the parts of the server one by one.
        try:
            await client.count_workflows()
        except RPCError:
            return False
        return True

    await until(is_known, within_seconds=20)
    return {
        None: {},
        "older": {"DATABASE_DSN": older},
        "empty": {"DATABASE_DSN": await new_database(migrated=False)},
        "foreign": {"DATABASE_DSN": foreign},
        "nowhere": {"TEMPORAL_NAMESPACE": "no-such-namespace", "DATABASE_DSN": await new_database()},
        "bare": {"TEMPORAL_NAMESPACE": bare, "DATABASE_DSN": await new_database()},
    }


@pytest_asyncio.fixture(scope="module")
async def ends(
    request: pytest.FixtureRequest,
    temporal_env: WorkflowEnvironment,
    new_database: NewDatabase,
    places: Places,
    tmp_path_factory: Any,
) -> dict[str, asyncio.Task[End]]:
    """All that are chosen, two at a time: each test awaits its own."""
    folder: Path = tmp_path_factory.mktemp("bad-starts")
    address, dsn = temporal_env.client.service_client.config.target_host, await new_database()
    turns = asyncio.Semaphore(SIDE_BY_SIDE)

    async def end_of(number: int, fault: Fault) -> End:
        stack = new_stack(folder / str(number), temporal=address, dsn=dsn, queue=unique("queue"))
        codec = {"CODEC_SERVER_TOKEN": "of-the-codec-server-32-bytes-long", "ENCRYPTION_KEYS": f"k1:{'A' * 43}="}
        codec["CODEC_SERVER_PORT"] = str(stack.ports["worker-health"])
        given = {**stack.settings, **codec, **places[fault.place], **fault.settings}
        async with turns:
            settings = {name: value for name, value in given.items() if value is not None}
            return await asyncio.to_thread(_ended, fault, settings, stack.folder)

    wanted = " ".join(item.nodeid for item in request.session.items)
    chosen = [fault for fault in FAULTS if f"[{fault}]" in wanted]
    return {str(fault): asyncio.ensure_future(end_of(number, fault)) for number, fault in enumerate(chosen)}


def _ended(fault: Fault, settings: dict[str, str], folder: Path) -> End:
    """Asks the container's check all the while, and once more at the end."""
    log, began, greens = folder / "log", time.monotonic(), list[str]()
    with log.open("wb") as written:
        command = [sys.executable, *COMMANDS[fault.process]]
        process = subprocess.Popen(command, env=environment_of(settings), cwd=folder, stdout=written, stderr=written)
    try:
        queued = 0.0
        while process.poll() is None and time.monotonic() - began - queued < 2 * ENDS_WITHIN_SECONDS:
            greens += _green_now(fault, settings)
            time.sleep(0.2)
            queued = max(queued, _seconds_queued(process.pid))
        seconds = time.monotonic() - began - queued
        return End(process.poll(), log.read_text(), seconds, [*greens, *_green_now(fault, settings)])
    finally:
        process.kill()
        process.wait()


def _seconds_queued(pid: int) -> float:
    """How long the process waited for a processor: the tests of other files run beside this one."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _green_now(fault: Fault, settings: dict[str, str]) -> list[str]:
    """What the container's own check says, if it is green."""
    if fault.process not in PAGES:
        return []
    port, path = PAGES[fault.process]
    check = [sys.executable, "-IS", str(CHECK), f"http://127.0.0.1:{settings[port]}{path}"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    return [done.stdout] if done.returncode == 0 else []


FIRST_OF_EACH: Final = {fault.name: fault for fault in reversed(FAULTS)}


def _rows() -> list[Any]:
    """One process for each fault; the other processes are slow tests."""
    marks = {False: [pytest.mark.slow], True: []}
    return [pytest.param(fault, marks=marks[FIRST_OF_EACH[fault.name] is fault]) for fault in FAULTS]


@pytest.mark.parametrize("fault", _rows(), ids=str)
async def test_it_ends_with_one_sentence_and_is_never_green(ends: dict[str, asyncio.Task[End]], fault: Fault) -> None:
    end = await ends[str(fault)]
    assert end.code in (1, 2), end.output
    assert "Traceback" not in end.output, end.output
    assert len(end.lines_for_people) == 1, end.output
    [sentence] = end.lines_for_people
    assert fault.says in sentence
    assert sentence.endswith((".", ")")) or "python -m" in sentence or "temporal operator" in sentence
    assert WRONG not in sentence, "a value may be a secret"
    assert end.seconds <= ENDS_WITHIN_SECONDS
    assert end.greens == []


def _purged_at() -> float | None:
    mark = Path("/tmp/purged")
    return mark.stat().st_mtime if mark.exists() else None


async def test_a_purge_that_fails_ends_its_container_and_leaves_its_check_red(places: Places, tmp_path: Path) -> None:
    """The check looks for a file that only a purge makes which succeeded (deploy/purge.sh)."""
    before = _purged_at()
    environment = environment_of({**places["older"], "OBJECT_STORE_URL": tmp_path.as_uri()})
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    purge = await asyncio.create_subprocess_exec(
        *("sh", str(PROJECT / "deploy" / "purge.sh")),
        env={**environment, "PURGE_EVERY_SECONDS": "60"},
        cwd=tmp_path,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await asyncio.wait_for(purge.communicate(), 60)
    assert purge.returncode == 1
    assert said.decode().startswith("The tables of PostgreSQL")
    assert _purged_at() == before

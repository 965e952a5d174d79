"""Ten minutes of nonsense at a running gateway: its OpenAPI document, its WebSocket, its callbacks.

`FUZZ_SECONDS` (600 by default) is shared by the three; `FUZZ_SEED` repeats a run. No answer is a 5xx, no traceback
is written, and what was started or charged was accepted first.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import pytest_asyncio
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.tasks import WORKFLOW_ID_PREFIX, workflow_id_of
from gateway.streams_cursors import cursor_of
from proof.site.callbacks import signed_headers
from store import TaskStore
from tests.conftest import unique
from tests.doors.nonsense import Nonsense, close_code_in
from tests.gateway.serving import GatewayProcess, bearer, gateway_process, new_secret, token_for
from tests.gateway.test_openapi import CONFIG, schemathesis
from tests.waiting import until
from tests.workflows.platform import Platform, running_platform

FUZZ_SECONDS: Final = float(os.environ.get("FUZZ_SECONDS", "600"))
SHARE_SECONDS: Final = FUZZ_SECONDS / 3
SEED: Final = int(os.environ.get("FUZZ_SEED", str(random.SystemRandom().randrange(2**32))))
SIDE_BY_SIDE: Final = 4
ANSWER_SECONDS: Final = 30.0
NOT_ON_A_CALLERS_ACCOUNT: Final = ("Traceback", '"level": "error"', '"level": "critical"')
pytestmark = [pytest.mark.slow, pytest.mark.timeout(FUZZ_SECONDS + 300)]


@dataclass
class Target:
    """A gateway process with everything behind it."""

    platform: Platform
    process: GatewayProcess
    log: Path
    tasks: list[str]
    """One that runs, one that has ended, one that waits for its price."""
    token: str = field(
        default_factory=lambda: token_for("tenant-demo", "user-demo", valid_seconds=2 * FUZZ_SECONDS + 600)
    )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.process.port}"

    def audited(self) -> list[dict[str, Any]]:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if '"audit"' in line]
        return [line for line in map(json.loads, lines) if line["event"] == "audit"]

    async def started(self) -> set[str]:
        """The ids of all tasks of this platform that have a run."""
        runs = self.platform.client.list_workflows(f"TaskQueue = '{self.platform.task_queue}'")
        return {run.id.removeprefix(WORKFLOW_ID_PREFIX) async for run in runs if run.id.startswith(WORKFLOW_ID_PREFIX)}

    async def check_unharmed(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=10) as http:

            async def is_ready() -> bool:
                return (await http.get("/readyz")).is_success

            await until(is_ready, within_seconds=20)
            metrics = (await http.get("/metrics")).text
        written = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in written if any(sign in line for sign in NOT_ON_A_CALLERS_ACCOUNT)]
        assert errors == [], f"FUZZ_SEED={SEED}: {errors[0]}"
        failed = [line for line in metrics.splitlines() if 'status="5' in line and '"/readyz"' not in line]
        assert failed == [], f"FUZZ_SEED={SEED}: {failed}"
        accepted = {line["task_id"] for line in self.audited() if line["status"] < 300} | set(self.tasks)
        assert await self.started() <= accepted
        assert {entry.task_id for entry in await self.platform.simulators.admin.credits.ledger()} <= accepted | {None}


@pytest_asyncio.fixture(scope="module")
async def target(
    temporal_env: WorkflowEnvironment,
    task_store: TaskStore,
    postgres_dsn: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Target]:
    print(f"FUZZ_SEED={SEED}")
    folder = tmp_path_factory.mktemp("fuzz")
    log = folder / "gateway.log"
    async with running_platform(temporal_env, task_store, folder, speed=2_000) as platform, platform.worker():
        platform.policy = {"deadline_factor": 1_000.0}
        names = ("openapi-open-image", "openapi-ended-image", "openapi-waiting-training")
        tasks = [f"{name}-fuzz" for name in names]
        await platform.simulators.admin.comfyui.fault("job_stall", task_id=tasks[0])
        await platform.start_waiting_image(task_id=tasks[0])
        await (await platform.start_image(task_id=tasks[1])).result()
        await platform.start_training(task_id=tasks[2], max_credits=None)
        settings = {
            "TEMPORAL_ADDRESS": temporal_env.client.service_client.config.target_host,
            "DATABASE_DSN": postgres_dsn,
            "TASK_QUEUE": platform.task_queue,
            "OBJECT_STORE_URL": (folder / "objects").as_uri(),
            "UPLOADS_URL": (folder / "uploads").as_uri(),
        }
        async with gateway_process(settings, log=log) as process:
            target = Target(platform, process, log, tasks)
            yield target
            async with httpx.AsyncClient(base_url=target.url, headers=bearer(target.token), timeout=30) as http:
                for task_id in tasks:
                    await http.post(f"/api/v1/tasks/{task_id}/cancel")


async def test_no_request_of_the_document_is_answered_with_5xx(target: Target, tmp_path: Path) -> None:
    config = tmp_path / "schemathesis.toml"
    text = CONFIG.read_text().replace("deterministic = true", "deterministic = false")
    config.write_text(text.replace("-image", "-image-fuzz").replace("-training", "-training-fuzz"))
    code, report = await schemathesis(
        target.url,
        target.process.secret,
        *("--max-time", str(round(SHARE_SECONDS)), "--max-examples", "100000", "--seed", str(SEED)),
        *("--checks", "not_a_server_error,status_code_conformance,content_type_conformance"),
        config=config,
    )
    assert code == 0, report
    await target.check_unharmed()


async def for_its_share(one: Callable[[Nonsense], Awaitable[None]]) -> None:
    """Try again and again, several side by side, each from a seed of its own."""
    until_seconds = time.monotonic() + SHARE_SECONDS

    async def turn(number: int) -> None:
        tried = 0
        while time.monotonic() < until_seconds:
            seed = f"{SEED}-{number}-{tried}"
            tried += 1
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await one(Nonsense(seed))
            except AssertionError as error:
                raise AssertionError(f"with the seed {seed}: {error}") from None
            except TimeoutError:
                raise AssertionError(f"with the seed {seed}: no answer within {ANSWER_SECONDS} s") from None

    await asyncio.gather(*(turn(number) for number in range(SIDE_BY_SIDE)))


async def sent(port: int, request: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    return reader, writer


async def status_of(reader: asyncio.StreamReader) -> int:
    """0 where the connection was closed without an answer, as the door does with some."""
    head = b""
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        head = await reader.readuntil(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0


async def test_no_websocket_makes_an_error(target: Target) -> None:
    async with httpx.AsyncClient(base_url=target.url, headers=bearer(target.token)) as http:
        stream_token = (await http.get("/api/v1/tasks/stream/config")).json()["token"]
    cursors = [cursor_of(dict.fromkeys(target.tasks, 1)), cursor_of({target.tasks[1]: 2**40})]
    statuses: Counter[int] = Counter()

    async def one(nonsense: Nonsense) -> None:
        request = nonsense.handshake(tasks=target.tasks, tokens=[target.token, stream_token], cursors=cursors)
        reader, writer = await sent(target.process.port, request)
        try:
            status = await status_of(reader)
            statuses[status] += 1
            assert status < 500, request
            if status != 101:
                return
            received = b""
            with suppress(ConnectionError, TimeoutError):
                for frame in nonsense.frames():
                    writer.write(frame)
                    await writer.drain()
                async with asyncio.timeout(0.3):
                    while part := await reader.read(65_536):
                        received += part
            # 1011: the server met a condition that it did not expect.
            assert close_code_in(received) != 1011, request
        finally:
            writer.transport.abort()

    await for_its_share(one)
    assert statuses[101] > 0 and sum(count for status, count in statuses.items() if 400 <= status < 500) > 0, statuses
    await target.check_unharmed()


async def test_no_callback_makes_an_error_and_no_forged_one_acts(target: Target) -> None:
    running = unique("running")
    await target.platform.simulators.admin.comfyui.fault("job_stall", task_id=running)
    await target.platform.start_waiting_image(task_id=running)
    target.tasks.append(running)
    unknown, stranger, forged = unique("unknown"), new_secret(), unique("forged")
    statuses: Counter[int] = Counter()

    async def one(nonsense: Nonsense) -> None:
        task_id = nonsense.choice([*target.tasks, unknown])
        is_forged = nonsense.happens(0.25)
        raw = nonsense.callback(task_id, **({"job_id": forged, "training_id": forged} if is_forged else {}))
        secret = stranger if is_forged else target.process.secret
        headers = nonsense.webhook_headers(signed_headers(raw, secret), lambda at: signed_headers(raw, secret, at=at))
        request = nonsense.callback_request(task_id, raw, headers)
        reader, writer = await sent(target.process.port, request)
        try:
            status = await status_of(reader)
            statuses[status] += 1
            assert status < 500, request[:2_000]
        finally:
            writer.transport.abort()

    await for_its_share(one)
    assert {202, 400, 401, 404, 413} <= set(statuses), statuses
    for task_id in target.tasks:
        history = await target.platform.client.get_workflow_handle(workflow_id_of(task_id)).fetch_history()
        assert forged not in history.to_json()
    await target.check_unharmed()

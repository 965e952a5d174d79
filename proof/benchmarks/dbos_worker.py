"""Our job on DBOS: the same calls under the same keys, the same events in the same task store, one step each.

`python -m proof.benchmarks.dbos_worker` is one process of it. A step's result is recorded once it is done. The step of
a killed process runs again with the same key and the same body, which are computed from recorded results.
"""

from __future__ import annotations

import asyncio
import os
import signal
from datetime import UTC, datetime
from typing import Any, Final

from dbos import DBOS, DBOSClient, DBOSConfig, StepOptions

from activities.comfyui import ComfyUIClient
from activities.credits import CreditsClient
from activities.tokens import SignedTokens
from comfyui_temporal.contracts.comfyui import JobAccepted, JobCallback
from comfyui_temporal.contracts.credits import Estimate, HoldReply
from comfyui_temporal.contracts.errors import Answer
from comfyui_temporal.contracts.task_store import TaskWrite
from comfyui_temporal.contracts.tasks import ImageTask
from proof.benchmarks import job
from runtime.settings import Settings
from store import TaskStore

APPLICATION: Final = "benchmark"
QUEUE: Final = "jobs"
WORKFLOW: Final = "image_job"
TOPIC: Final = "comfyui_callback"
WAIT_SECONDS: Final = 3_600.0
LOOK_SECONDS: Final = 0.1
"""Polling of the queue; DBOS's default of 1 s only delays starts."""
VERSION: Final = "1"
TRIES: Final = 20


class Outside:
    """Clients of one event loop, opened when it first needs them."""

    _opened: Outside | None = None

    def __init__(self, settings: Settings) -> None:
        assert settings.service_secret is not None and settings.database_dsn is not None
        secret = settings.service_secret.get_secret_value()
        tokens = SignedTokens(secret, issuer=settings.service_issuer, audience=settings.service_audience)
        self.comfyui = ComfyUIClient(settings.comfyui_url, tokens)
        self.credits = CreditsClient(settings.credits_url, tokens)
        self.store = TaskStore(settings.database_dsn.get_secret_value())

    @classmethod
    async def opened(cls) -> Outside:
        if cls._opened is None:
            outside = cls._opened = cls(Settings())
            await outside.comfyui.__aenter__()
            await outside.credits.__aenter__()
        return cls._opened


async def claim(task: dict[str, Any], at: datetime) -> bool:
    return await (await Outside.opened()).store.claim(job.claim(ImageTask(**task), at))


async def submit(task: dict[str, Any]) -> dict[str, Any]:
    return _reply(await (await Outside.opened()).comfyui.submit_job(job.submit(ImageTask(**task))))


async def estimate(task: dict[str, Any]) -> dict[str, Any]:
    return _reply(await (await Outside.opened()).credits.estimate(job.estimate(ImageTask(**task))))


async def pre_deduct(task: dict[str, Any], cost: int) -> dict[str, Any]:
    return _reply(await (await Outside.opened()).credits.pre_deduct(job.pre_deduct(ImageTask(**task), cost)))


async def commit(task: dict[str, Any], hold: dict[str, Any]) -> dict[str, Any]:
    post = job.commit(ImageTask(**task), HoldReply(**hold))
    return _reply(await (await Outside.opened()).credits.commit(post))


async def write(task_write: TaskWrite) -> None:
    await (await Outside.opened()).store.write(task_write)


def _reply(answer: Answer[Any]) -> dict[str, Any]:
    assert answer.reply is not None
    reply: dict[str, Any] = answer.reply.model_dump(mode="json")
    return reply


def _step(name: str) -> StepOptions:
    return {"name": name, "retries_allowed": True, "max_attempts": TRIES}


@DBOS.workflow(name=WORKFLOW)  # type: ignore[untyped-decorator]  # DBOS is in the benchmarks' venv alone
async def image_job(task: dict[str, Any], at: str) -> str:
    """Claim, submit, agree, hold, callbacks up to the delivery, commit; every event is written when it happens."""
    now, given = datetime.fromisoformat(at), ImageTask(**task)
    await DBOS.run_step_async(_step("claim"), claim, task, now)
    accepted = JobAccepted(**await DBOS.run_step_async(_step("submit"), submit, task))
    estimated = Estimate(**await DBOS.run_step_async(_step("estimate"), estimate, task))
    cost = max(accepted.estimated_cost, estimated.selected_cost)
    held = await DBOS.run_step_async(_step("pre_deduct"), pre_deduct, task, cost)
    hold, story = HoldReply(**held), job.Story(given, accepted)
    await DBOS.run_step_async(_step("held"), write, story.held(hold, now))
    is_delivered = False
    while not is_delivered:
        callback = JobCallback(**await DBOS.recv_async(TOPIC, WAIT_SECONDS))
        await DBOS.run_step_async(_step("reported"), write, story.reported(callback, now))
        is_delivered = bool(callback.result_urls)
    await DBOS.run_step_async(_step("commit"), commit, task, held)
    await DBOS.run_step_async(_step("ended"), write, story.ended(callback, now))
    return accepted.job_id


def config() -> DBOSConfig:
    settings = Settings()
    assert settings.database_dsn is not None
    return {
        "name": APPLICATION,
        "system_database_url": system_database_url(settings.database_dsn.get_secret_value()),
        "application_version": VERSION,
        "executor_id": os.environ.get("DBOS_EXECUTOR", "1"),
        "log_level": "WARNING",
    }


def system_database_url(database_dsn: str) -> str:
    """DBOS's own tables are in the same database, in a schema of their own."""
    return database_dsn


def client(database_dsn: str) -> DBOSClient:
    return DBOSClient(system_database_url=system_database_url(database_dsn))


def now() -> str:
    return datetime.now(UTC).isoformat()


async def main() -> None:
    settings = Settings()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    DBOS(config=config())
    DBOS.launch()
    await DBOS.register_queue_async(QUEUE, polling_interval_sec=LOOK_SECONDS)

    async def healthy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(healthy, settings.worker_host, settings.health_port):
        await stop.wait()
    DBOS.destroy()


if __name__ == "__main__":
    asyncio.run(main())

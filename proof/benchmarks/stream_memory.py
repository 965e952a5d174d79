"""What open streams cost a gateway: resident memory by open streams, each of a task of its own.

    python -m proof.benchmarks.stream_memory [--streams 10000] [--alone]

The gateway is the stack's own, with all its middleware. The framework's own streams are measured in the same run on the
same HTTP server, in a process without anything else: `fastapi.sse` and a bare StreamingResponse, both silent.
Exits with 1 where the gateway takes more than 500 MB with 10,000 streams.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import asyncpg
import psutil
import uvicorn
from fastapi import FastAPI
from fastapi.sse import EventSourceResponse
from starlette.responses import StreamingResponse

from comfyui_temporal.contracts.permissions import Scope
from gateway.tokens import StreamTokens
from local_stack.parts import answers
from local_stack.ports import any_free_port
from proof.site.parts import OwnStack
from runtime.caller_tokens import Caller

KIB, MB = 1024, 1_000_000
TENANT = "tenant-demo"
SECRET = secrets.token_urlsafe(32)
SETTINGS = {
    "LOG_LEVEL": "ERROR",
    "STREAM_TOKEN_SECRET": SECRET,
    # All streams are one tenant's, from one address.
    "TENANT_OPEN_STREAMS": "0",
    "CONNECTIONS_PER_ADDRESS": "0",
}
LIMIT_BYTES = 500 * MB
LIMIT_STREAMS = 10_000
OPENING_AT_ONCE = 50
SERVER = (sys.executable, "-m", "proof.benchmarks.stream_memory", "--serve")
FRAMEWORK = (("fastapi.sse", "/sse"), ("StreamingResponse", "/bare"))
RETRY_SECONDS = 1


def framework_app() -> FastAPI:
    """The framework's own two kinds of a silent stream."""
    app = FastAPI()

    async def nothing() -> AsyncIterator[bytes]:
        yield b": open\n\n"
        await asyncio.Event().wait()

    @app.get("/sse", response_class=EventSourceResponse)
    async def sse() -> AsyncIterator[dict[str, str]]:
        yield {"event": "open"}
        await asyncio.Event().wait()

    @app.get("/bare")
    async def bare() -> StreamingResponse:
        return StreamingResponse(nothing(), media_type="text/event-stream")

    return app


async def opened(port: int, path: str, tries: int = 10) -> asyncio.StreamWriter:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: gateway\r\n\r\n".encode())
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
    status = head.split(b" ", 2)[1]
    if status == b"503" and tries > 1:
        # As a client does: too many requests reached the store at once.
        writer.close()
        await asyncio.sleep(RETRY_SECONDS)
        return await opened(port, path, tries - 1)
    if status != b"200":
        sys.exit(f"{path.split('?', maxsplit=1)[0]} answered {status.decode()}")
    return writer


async def cost(name: str, server: psutil.Process, port: int, paths: list[str]) -> int:
    """Open all paths and print what they cost. Returns the server's resident memory in bytes."""
    for path in paths[:20]:
        (await opened(port, path)).close()
    await asyncio.sleep(1)
    before = server.memory_info().rss
    began = time.monotonic()
    gate = asyncio.Semaphore(OPENING_AT_ONCE)

    async def open_one(path: str) -> asyncio.StreamWriter:
        async with gate:
            return await opened(port, path)

    writers = await asyncio.gather(*(open_one(path) for path in paths))
    took = time.monotonic() - began
    await asyncio.sleep(20 if name == "gateway" else 1)  # one round of heartbeats
    after = server.memory_info().rss
    each = (after - before) / len(paths) / KIB
    print(
        f"{name:<18} {len(paths):>6} streams   {before / MB:6.1f} → {after / MB:6.1f} MB   "
        f"{each:5.1f} KiB a stream   opened in {took:.1f} s",
        flush=True,
    )
    for writer in writers:
        writer.close()
    return int(after)


async def written_tasks(dsn: str, count: int) -> list[str]:
    """This many open tasks with one event each."""
    connection = await asyncpg.connect(dsn)
    ids = [f"task-{n}" for n in range(count)]
    await connection.execute(
        "INSERT INTO task_claims SELECT id, 'run', 'task-' || id, $2, '', now() FROM unnest($1::text[]) id",
        *(ids, TENANT),
    )
    await connection.execute(
        "INSERT INTO tasks (task_id, tenant_id, user_id, scene, template_id, priority, resolution, workflow_id, "
        "first_execution_run_id, input_sha256, created_at, updated_at, version, last_seq, status, progress, attempts, "
        "credits, prices, result_urls) SELECT id, $2, 'user', 'image.generate', 'test', 'standard', 'hd', "
        "'task-' || id, 'run', '', now(), now(), 0, 1, 'queued', 0, 1, '{}', '{}', '[]' FROM unnest($1::text[]) id",
        *(ids, TENANT),
    )
    await connection.execute(
        "INSERT INTO task_events (task_id, seq, key, event, ts, attempt, status) "
        "SELECT id, 1, 'accepted', 'task.accepted', now(), 1, 'queued' FROM unnest($1::text[]) id",
        ids,
    )
    await connection.close()
    return ids


def token() -> str:
    """A stream token, as `stream/config` gives it: the only kind that an address may hold."""
    caller = Caller(tenant_id=TENANT, user_id="user", scopes=[Scope.TASK_READ], expires_at=time.time() + 3_600)
    return StreamTokens(SECRET).made_for(caller)


async def measure_framework(stack: OwnStack, name: str, path: str, streams: int) -> None:
    port = any_free_port()
    command = [*SERVER, str(port)]
    stack.add(replace(stack.part("gateway"), name=name, command=command, is_ready=answers(port, "/"), port=port))
    await stack.start(name)
    await cost(name, stack.process(name), port, [path] * streams)
    await stack.kill(name)


async def measure(streams: int, *, alone: bool) -> bool:
    """Whether the gateway stays within its limit."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        stack = OwnStack(Path(folder), settings=SETTINGS)
        async with stack.running("gateway") as described:
            for name, path in () if alone else FRAMEWORK:
                await measure_framework(stack, name, path, streams)
            ids = await written_tasks(stack.owner_dsn, streams)
            paths = [f"/api/v1/tasks/stream/sse?task_id={task_id}&token={token()}" for task_id in ids]
            port = int(described.gateway_url.rpartition(":")[2])
            taken = await cost("gateway", stack.process("gateway"), port, paths)
    return streams < LIMIT_STREAMS or taken <= LIMIT_BYTES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=LIMIT_STREAMS)
    parser.add_argument("--alone", action="store_true", help="the gateway, without the framework's own streams")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if arguments.serve:
        uvicorn.run(framework_app(), port=arguments.serve, log_level="error", access_log=False)
        return 0
    if asyncio.run(measure(arguments.streams, alone=arguments.alone)):
        return 0
    print("more than 500 MB", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""Both simulators inside one process, for tests: real HTTP on loopback, ports free or given."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvicorn
from fastapi import FastAPI

from comfyui_temporal.contracts.prices import PriceTable
from proof.simulators.admin_client import Admin
from proof.simulators.comfyui_app import comfyui_app
from proof.simulators.connections import CuttableProtocol
from proof.simulators.credits_app import credits_app
from proof.simulators.credits_profile import CONTRACT, CreditsProfile
from proof.simulators.tokens import Tokens

LOOPBACK: Final = "127.0.0.1"
TEST_TOKEN_SECRET: Final = "simulators-in-tests-sign-with-this"
TEST_ADMIN_TOKEN: Final = "admin-token-of-simulators-in-tests"
TEST_CALLBACK_SECRET: Final = "whsec_c2ltdWxhdG9ycy1pbi10ZXN0cy1zaWduLXdpdGgtdGhpcw=="
DEFAULT_ISSUER: Final = "comfyui-temporal"
DEFAULT_AUDIENCE: Final = "comfyui-services"
_START_LIMIT_SECONDS = 10.0
_DRAIN_SECONDS = 2
KEPT_SECONDS: Final = 75
"""uvicorn's five seconds are those after which HTTP clients close theirs: a request that is sent just then is lost."""


class _QuietServer(uvicorn.Server):
    """Leaves the process's signals to its owner."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server_config(app: FastAPI, *, host: str = LOOPBACK, port: int = 0) -> uvicorn.Config:
    """How every simulator is served: HTTP/1.1 whose connections a fault can cut, no access log."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=CuttableProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_keep_alive=KEPT_SECONDS,
        timeout_graceful_shutdown=_DRAIN_SECONDS,
    )


class ServedApp:
    """One application on one port; it can be stopped and started again there, as a process would be."""

    def __init__(self, make_app: Callable[[], FastAPI], port: int = 0) -> None:
        self._make_app = make_app
        self._port = port
        self._server: _QuietServer | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self._port}"

    async def start(self) -> None:
        """Returns when it answers. Raises OSError where the port is taken."""
        # Without a named protocol asyncio does not set TCP_NODELAY, and every answer takes 40 ms.
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((LOOPBACK, self._port))
        self._port = listening.getsockname()[1]
        self._server = _QuietServer(server_config(self._make_app()))
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]))
        async with asyncio.timeout(_START_LIMIT_SECONDS):
            while not self._server.started:
                if self._task.done():
                    await self._task
                    raise RuntimeError("the simulator ended while it was starting")
                await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Stop serving; what is in flight has 2 s."""
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            await self._task
        self._server = self._task = None


@dataclass(frozen=True)
class Simulators:
    """Both services as a test sees them."""

    comfyui: ServedApp
    credits: ServedApp
    admin: Admin
    tokens: Tokens
    admin_token: str
    callback_secrets: list[str]
    credits_profile: CreditsProfile = CONTRACT

    @property
    def comfyui_url(self) -> str:
        return self.comfyui.url

    @property
    def credits_url(self) -> str:
        return self.credits.url


@asynccontextmanager
async def running_simulators(
    folder: Path,
    *,
    speed: float = 480.0,
    token_secret: str = TEST_TOKEN_SECRET,
    issuer: str = DEFAULT_ISSUER,
    audience: str = DEFAULT_AUDIENCE,
    admin_token: str = TEST_ADMIN_TOKEN,
    callback_secrets: list[str] | None = None,
    prices: PriceTable | None = None,
    gpus: dict[str, int] | None = None,
    credits_profile: CreditsProfile = CONTRACT,
    comfyui_port: int = 0,
    credits_port: int = 0,
    public_url: str | None = None,
) -> AsyncIterator[Simulators]:
    """Serve both from `folder`. At the default speed a standard image takes a second, a training about six.

    `gpus`: GPU type → how many (default `comfyui_service.FIRST_GPUS`). `public_url`: where results are said to be.
    """
    tokens = Tokens(token_secret, issuer, audience)
    signing = callback_secrets or [TEST_CALLBACK_SECRET]
    table = prices or PriceTable()

    def comfyui() -> FastAPI:
        return comfyui_app(
            folder=folder,
            tokens=tokens,
            admin_token=admin_token,
            callback_secrets=signing,
            prices=table,
            speed=speed,
            gpus=gpus,
            public_url=public_url,
        )

    def credits_() -> FastAPI:
        return credits_app(
            folder=folder,
            tokens=tokens,
            admin_token=admin_token,
            prices=table,
            speed=speed,
            profile=credits_profile,
        )

    served = [ServedApp(comfyui, comfyui_port), ServedApp(credits_, credits_port)]
    async with contextlib.AsyncExitStack() as stack:
        for app in served:
            await app.start()
            stack.push_async_callback(app.stop)
        admin = await stack.enter_async_context(Admin(served[0].url, served[1].url, admin_token))
        yield Simulators(served[0], served[1], admin, tokens, admin_token, signing, credits_profile)

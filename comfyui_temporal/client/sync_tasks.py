"""The same calls without `async`: for scripts, notebooks and synchronous web frameworks."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal
from temporalio.client import Client

from comfyui_temporal.client.http_tasks import HttpTasks
from comfyui_temporal.client.interface import WAIT_SECONDS, CancelAnswer, Tasks
from comfyui_temporal.client.models import StartedTask, TaskDetails, TaskOutcome, TaskSummary, TaskUpdate
from comfyui_temporal.client.temporal_tasks import TemporalTasks
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.scenes import AnyTask
from comfyui_temporal.contracts.start_answer import WaitFor
from comfyui_temporal.contracts.tasks import TASK_QUEUE, TaskStatus
from comfyui_temporal.contracts.uploads import InputKind, UploadView

T = TypeVar("T")
END_SECONDS: Final = 1.0
"""How long an interrupted call may take to end: it may have a connection to close."""
_NO_MORE: Final = object()


class SyncTasks(AbstractContextManager["SyncTasks"]):
    """Tasks with blocking calls. Use it as a context manager: until exit an event loop runs in its own thread.

    It works inside a running event loop (a notebook), and several threads may use it concurrently.
    """

    def __init__(self, open_tasks: Callable[[], Awaitable[Tasks]]) -> None:
        """`open_tasks` is called once, in this object's event loop."""
        self._open_tasks = open_tasks
        self._opened = ExitStack()
        self._portal: BlockingPortal | None = None
        self._tasks: Tasks | None = None

    @classmethod
    def by_temporal(
        cls,
        connect: Callable[[], Awaitable[Client]],
        *,
        task_queue: str = TASK_QUEUE,
        ui_url: str | None = None,
    ) -> SyncTasks:
        """Tasks by Temporal. `connect`: e.g. `lambda: Client.connect("localhost:7233")`."""

        async def open_tasks() -> Tasks:
            return TemporalTasks(await connect(), task_queue=task_queue, ui_url=ui_url)

        return cls(open_tasks)

    @classmethod
    def over_http(cls, base_url: str, token: str | Callable[[], str], **options: Any) -> SyncTasks:
        """Tasks over HTTP. `options`: those of `HttpTasks`."""

        async def open_tasks() -> Tasks:
            return HttpTasks(base_url, token, **options)

        return cls(open_tasks)

    def __enter__(self) -> Self:
        portal = self._opened.enter_context(start_blocking_portal())
        self._opened.callback(portal.call, portal.stop, True)  # `cancel_remaining`
        try:
            self._tasks = _called(portal, self._open_tasks)
        except BaseException:
            self._opened.close()
            raise
        self._portal = portal
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        portal, tasks = self._running()
        self._portal = self._tasks = None
        with self._opened:
            portal.call(tasks.aclose)

    def start(
        self, task: AnyTask, *, wait_for: WaitFor | None = None, wait_seconds: float = WAIT_SECONDS
    ) -> StartedTask:
        """See `Tasks.start`."""
        portal, tasks = self._running()
        return _called(portal, partial(tasks.start, task, wait_for=wait_for, wait_seconds=wait_seconds))

    def upload(self, file: bytes | str | os.PathLike[str], *, kind: InputKind | None = None) -> UploadView:
        """See `HttpTasks.upload`. Raises RuntimeError for tasks by Temporal: files go to the gateway."""
        portal, tasks = self._running()
        if not isinstance(tasks, HttpTasks):
            raise RuntimeError("Files are uploaded to the gateway: use SyncTasks.over_http(…)")
        return _called(portal, partial(tasks.upload, file, kind=kind))

    def follow(self, task_id: str, *, cursor: str | None = None) -> Generator[TaskUpdate, None, None]:
        """See `Tasks.follow`."""
        portal, tasks = self._running()
        return _blocking(portal, lambda: tasks.follow(task_id, cursor=cursor))

    def wait(self, task_id: str) -> TaskOutcome:
        """See `Tasks.wait`."""
        portal, tasks = self._running()
        return _called(portal, partial(tasks.wait, task_id))

    def show(self, task_id: str) -> TaskDetails:
        """See `Tasks.show`."""
        portal, tasks = self._running()
        return _called(portal, partial(tasks.show, task_id))

    def list(
        self, *, status: TaskStatus | None = None, scene: Scene | None = None, limit: int = 20
    ) -> Generator[TaskSummary, None, None]:
        """See `Tasks.list`."""
        portal, tasks = self._running()
        return _blocking(portal, lambda: tasks.list(status=status, scene=scene, limit=limit))

    def confirm(self, task_id: str, max_credits: int) -> int:
        """See `Tasks.confirm`."""
        portal, tasks = self._running()
        return _called(portal, partial(tasks.confirm, task_id, max_credits))

    def cancel(self, task_id: str, reason: str = "") -> CancelAnswer:
        """See `Tasks.cancel`."""
        portal, tasks = self._running()
        return _called(portal, partial(tasks.cancel, task_id, reason))

    def _running(self) -> tuple[BlockingPortal, Tasks]:
        if self._portal is None or self._tasks is None:
            raise RuntimeError("SyncTasks is not open: use it as `with SyncTasks.over_http(…) as tasks:`")
        return self._portal, self._tasks


def _called(portal: BlockingPortal, call: Callable[[], Awaitable[T]]) -> T:
    """The call's answer. An interrupt of this thread cancels the call, which would go on otherwise."""
    running: list[asyncio.Task[Any] | None] = []
    has_ended = threading.Event()

    async def run() -> T:
        running.append(asyncio.current_task())
        try:
            return await call()
        finally:
            has_ended.set()

    def cancel() -> None:
        for task in filter(None, running):
            task.cancel()  # once, so that it can close what it has opened; anyio would go on cancelling

    try:
        return portal.start_task_soon(run).result()
    except BaseException:
        if not has_ended.is_set():
            with suppress(RuntimeError):  # everything was closed before
                portal.call(cancel)
                has_ended.wait(END_SECONDS)
        raise


def _blocking(portal: BlockingPortal, opened: Callable[[], AsyncGenerator[T, None]]) -> Generator[T, None, None]:
    """The items of an async generator, one blocking call for each; closed with this generator."""
    items = opened()

    async def next_item() -> Any:
        return await anext(items, _NO_MORE)

    try:
        while (item := _called(portal, next_item)) is not _NO_MORE:
            yield item
    finally:
        with suppress(RuntimeError):  # the last call has not ended yet, or everything was closed before
            _called(portal, items.aclose)

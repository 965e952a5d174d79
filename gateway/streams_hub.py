"""New events of all tasks, once in each process: one LISTEN connection, one reader, all streams (pitfall 27, 28).

    NOTIFY ─┐                                 ┌─▶ streams that name the task
    sweep ──┴─▶ tasks with new events ─▶ read ─┴─▶ streams of its tenant

A notification only says that there are new events. The events themselves are read from the store, in order, from where
the last read ended. So a lost, repeated or late notification only delays them, and the sweep limits that delay to 2 s.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from itertools import count
from types import MappingProxyType
from typing import Final

import structlog

from comfyui_temporal.contracts.task_events import TaskEvent
from gateway.draining import Draining
from gateway.streams_subscriber import Subscriber
from gateway.streams_wires import EndReason, SharedEvent
from runtime.trace_context import SpanKind, span
from store import StoredEvent, StoreFailure, StoreUnavailable, TaskHead, TaskStore

log = structlog.get_logger(__name__)

SWEEP_SECONDS: Final = 2.0
HEARTBEAT_SECONDS: Final = 15
PAGE: Final = 100
"""Events of one task in one read."""
SWEEP_PAGE: Final = 2_000
HEADS_PAGE: Final = 1_000
EVENTS_AT_ONCE: Final = 2_000
"""New events in one read, whatever tasks they are of."""
GIVEN_AT_ONCE: Final = 64
"""New events between two moments at which streams can write: less than may wait for one of them."""
READERS: Final = 3
"""Streams that read history concurrently: the pool serves others too."""
STORE_RETRY_SECONDS: Final = 0.25
MAX_STRANGERS: Final = 10_000
WAITING_SECONDS: Final = 60.0
"""How long a stream watches a task without a row before it has to be opened again: its run may have ended so."""
ENDED_KEPT_SECONDS: Final = 120.0
"""How long an ended task of a watched tenant is remembered, so that it is not mistaken for a new task."""


def _sending_of(event: StoredEvent, streams: int) -> AbstractContextManager[object]:
    """The span of a new event on its way to `streams` streams, in the trace that wrote the event."""
    if event.traceparent is None or not streams:
        return nullcontext()
    named: dict[str, str | int] = {
        "comfyui.task_id": event.task_id,
        "comfyui.event": event.event,
        "comfyui.seq": event.seq,
    }
    return span("SendEvent", SpanKind.PRODUCER, {**named, "comfyui.streams": streams}, parent=event.traceparent)


class Feed:
    """A task that at least one stream watches."""

    __slots__ = (
        "began_at",
        "ended_at",
        "is_claimed",
        "last_seq",
        "notified_seq",
        "subscribers",
        "task_id",
        "tenant_id",
        "user_id",
    )

    def __init__(self, head: TaskHead, *, last_seq: int) -> None:
        self.task_id = head.task_id
        self.tenant_id = head.tenant_id
        self.user_id = head.user_id
        self.began_at = time.monotonic()
        self.is_claimed = head.last_seq > 0
        """Whether the task has a row. Until then nothing says that the next events of its id are of the same tenant."""
        self.last_seq = last_seq
        """The newest that the streams were given."""
        self.notified_seq = head.last_seq
        """The newest that is known to exist."""
        self.ended_at = time.monotonic() if head.has_ended and last_seq >= head.last_seq else None
        self.subscribers: set[Subscriber] = set()


class EventHub:
    """Gives the new events of tasks to every open stream of this process. `running()` is its lifetime."""

    def __init__(
        self,
        store: TaskStore,
        draining: Draining,
        *,
        heartbeat_seconds: int = HEARTBEAT_SECONDS,
        keeps_ended: bool = False,
        status_words: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`keeps_ended`: a stream whose tasks have all ended stays open. `status_words`: other words for ends."""
        self.keeps_ended = keeps_ended
        self._words = status_words
        self._store = store
        self._draining = draining
        self._listener = store.listener(written=self._written, resumed=self._sweep_now)
        self._feeds: dict[str, Feed] = {}
        self._tenants: dict[str, set[Subscriber]] = {}
        self._unknown: dict[str, None] = {}
        self._strangers: OrderedDict[str, None] = OrderedDict()
        self._with_news: set[str] = set()
        self._news = asyncio.Event()
        self._sweep_due = asyncio.Event()
        self._beats: list[set[Subscriber]] = [set() for _ in range(heartbeat_seconds)]
        self._joined = 0
        self._readers = asyncio.Semaphore(READERS)
        self.open_streams: Counter[str] = Counter()
        """Open streams by kind: `sse`, `ws`."""
        self.ended: Counter[EndReason] = Counter()
        """Streams that we ended, by reason."""

    def open_of(self, kind: str) -> float:
        return self.open_streams[kind]

    @property
    def is_draining(self) -> bool:
        return self._draining.has_begun

    @property
    def is_listening(self) -> bool:
        return self._listener.is_listening

    @property
    def watched_tenants(self) -> frozenset[str]:
        """Tenants with a stream of all their tasks."""
        return frozenset(self._tenants)

    @property
    def watched_tasks(self) -> int:
        """Tasks in at least one stream, and those whose last stream has just gone."""
        return len(self._feeds)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        lasting = (self._read_news, self._sweep, self._keep_time)
        parts = (self._listener.run(), self._drain(), *(self._going_on(part) for part in lasting))
        tasks = [asyncio.create_task(part) for part in parts]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks)

    async def _drain(self) -> None:
        """End every stream with a retry hint. By then new ones are refused."""
        await self._draining.wait()
        for subscriber in [subscriber for beat in self._beats for subscriber in beat]:
            self._end(subscriber, EndReason.DRAINING)

    async def heads(self, task_ids: Sequence[str]) -> dict[str, TaskHead]:
        """How far each task has come. Raises StoreFailure."""
        async with self._readers:
            return await self._store.heads(task_ids)

    async def serve(self, subscriber: Subscriber, heads: Mapping[str, TaskHead]) -> None:
        """Send the stream its tasks' history, then their new events, until its client has gone or it has ended."""
        beat = self._beats[self._joined % len(self._beats)]
        self._joined += 1
        beat.add(subscriber)
        self.open_streams[subscriber.wire.kind] += 1
        try:
            if self.is_draining:
                self._end(subscriber, EndReason.DRAINING)
            elif subscriber.is_of_tenant:
                await self._join_tenant(subscriber)
            else:
                await self._join_tasks(subscriber, heads)
            await subscriber.wire.until_gone()
        except asyncio.CancelledError:
            if not subscriber.is_aborted:
                raise
        finally:
            beat.discard(subscriber)
            self.open_streams[subscriber.wire.kind] -= 1
            self._leave(subscriber)
            await subscriber.closed()

    async def _join_tasks(self, subscriber: Subscriber, heads: Mapping[str, TaskHead]) -> None:
        for task_id in subscriber.open_tasks:
            feed = self._feeds.get(task_id)
            if feed is None:
                feed = self._feeds[task_id] = Feed(heads[task_id], last_seq=heads[task_id].last_seq)
            if feed.tenant_id != subscriber.tenant_id:
                # Another tenant's run has claimed the id of a task without a row.
                self._end(subscriber, EndReason.UNAVAILABLE)
                return
            feed.subscribers.add(subscriber)
            if not feed.is_claimed:
                subscriber.mark_caught_up(task_id)
        while (behind := subscriber.behind) and subscriber.ending is None:
            page = max(10, PAGE // len(behind))
            given = {task_id: self._feeds[task_id].last_seq for task_id in behind}
            try:
                async with self._readers:
                    events = await self._store.events_of_each(behind, limit_each=page)
            except StoreFailure:
                self._end(subscriber, EndReason.UNAVAILABLE)
                return
            subscriber.catch_up(SharedEvent(event, self._words) for event in events)
            self._mark_caught_up(subscriber, events, page, given)
            if any(heads[task_id].has_ended for task_id in subscriber.open_tasks - subscriber.behind.keys()):
                # Its end was purged while it was read.
                self._end(subscriber, EndReason.UNAVAILABLE)
            await subscriber.written()

    def _mark_caught_up(
        self, subscriber: Subscriber, events: Sequence[TaskEvent], page: int, given: Mapping[str, int]
    ) -> None:
        """Find the tasks whose history was read completely. `given`: the newest that others had before the read.

        Where nothing was read up to there, it was purged. What others were given during the read is read next.
        """
        read = Counter(event.task_id for event in events)
        for task_id, seq in subscriber.behind.items():
            last_seq = self._feeds[task_id].last_seq
            is_purged = not read[task_id] and last_seq == given[task_id]
            if read[task_id] < page and (seq >= last_seq or is_purged):
                subscriber.mark_caught_up(task_id)

    async def _join_tenant(self, subscriber: Subscriber) -> None:
        """Join from now on: of open tasks it gets only events that come after what their other streams have."""
        tenant_id = subscriber.tenant_id
        try:
            if tenant_id not in self._tenants:
                for head in await self._all_heads(tenant_id):
                    self._feeds.setdefault(head.task_id, Feed(head, last_seq=head.last_seq))
                self._strangers.clear()
        except StoreFailure:
            self._end(subscriber, EndReason.UNAVAILABLE)
            return
        self._tenants.setdefault(tenant_id, set()).add(subscriber)
        self._sweep_now()

    async def _all_heads(self, tenant_id: str) -> list[TaskHead]:
        """Of all open tasks of the tenant: one that is missing here is taken for new when it moves."""
        heads: list[TaskHead] = []
        while True:
            async with self._readers:
                page = await self._store.recent_heads(
                    tenant_id, older_than=heads[-1] if heads else None, limit=HEADS_PAGE
                )
            heads += page
            if len(page) < HEADS_PAGE:
                return heads

    def _leave(self, subscriber: Subscriber) -> None:
        """Feeds without streams are dropped by the next sweep."""
        for task_id in subscriber.positions:
            if feed := self._feeds.get(task_id):
                feed.subscribers.discard(subscriber)
        if of_tenant := self._tenants.get(subscriber.tenant_id):
            of_tenant.discard(subscriber)
            if not of_tenant:
                del self._tenants[subscriber.tenant_id]

    def _end(self, subscriber: Subscriber, reason: EndReason) -> None:
        if subscriber.ending is None:
            self.ended[reason] += 1
            subscriber.end(reason)

    def _written(self, task_id: str, seq: int) -> None:
        feed = self._feeds.get(task_id)
        if feed is not None and feed.is_claimed:
            self._has_news(feed, seq)
        elif feed is not None or (self._tenants and task_id not in self._strangers):
            self._unknown[task_id] = None
            self._news.set()

    async def _going_on(self, part: Callable[[], Awaitable[None]]) -> None:
        """Every stream of the process needs it: one defect must not end it for all."""
        while True:
            try:
                await part()
            except Exception:
                log.exception("streams_part_failed", part=part.__name__)
                self._news.set()
                await asyncio.sleep(1)

    def _has_news(self, feed: Feed, seq: int) -> None:
        feed.notified_seq = max(feed.notified_seq, seq)
        if feed.notified_seq > feed.last_seq:
            self._with_news.add(feed.task_id)
            self._news.set()

    async def _read_news(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                if self._unknown:
                    await self._find_new_tasks()
                if self._with_news:
                    await self._read_events()
            except StoreUnavailable as error:
                log.warning("news_not_read", reason=str(error))
                await asyncio.sleep(STORE_RETRY_SECONDS)
                self._news.set()
            except StoreFailure as error:
                log.error("news_unreadable", reason=str(error))
                await asyncio.sleep(SWEEP_SECONDS)

    async def _find_new_tasks(self) -> None:
        """Add tasks that were created after their tenant's first stream, and those that were watched without a row."""
        task_ids = list(self._unknown)[:SWEEP_PAGE]
        heads = await self._store.heads(task_ids)
        for task_id in task_ids:
            del self._unknown[task_id]
            head, feed = heads.get(task_id), self._feeds.get(task_id)
            if head is not None and feed is not None:
                self._goes_on(feed, head)
            elif head is not None and head.tenant_id in self._tenants:
                self._begin(head)
            elif feed is None:
                self._strangers[task_id] = None
        while len(self._strangers) > MAX_STRANGERS:
            self._strangers.popitem(last=False)
        if self._unknown:
            self._news.set()

    def _begin(self, head: TaskHead) -> None:
        if head.task_id not in self._feeds:
            feed = self._feeds[head.task_id] = Feed(head, last_seq=0)
            self._has_news(feed, head.last_seq)

    def _goes_on(self, feed: Feed, head: TaskHead) -> None:
        """The store says how far a watched task is. One without a row so far may have become another tenant's."""
        if not feed.is_claimed and (head.tenant_id, head.user_id) != (feed.tenant_id, feed.user_id):
            for subscriber in list(feed.subscribers):
                self._end(subscriber, EndReason.UNAVAILABLE)
            del self._feeds[feed.task_id]
            return
        feed.is_claimed = True
        self._has_news(feed, head.last_seq)

    async def _read_events(self) -> None:
        positions = self._next_to_read()
        events = await self._store.events_of_each(positions, limit_each=PAGE)
        self._with_news.difference_update(positions)
        for number, event in enumerate(events, start=1):
            self._give(event)
            if number % GIVEN_AT_ONCE == 0:
                await asyncio.sleep(0)
        for task_id in {event.task_id for event in events}:
            if feed := self._feeds.get(task_id):
                self._has_news(feed, feed.notified_seq)
        if self._with_news:
            self._news.set()

    def _next_to_read(self) -> dict[str, int]:
        """Some tasks with news, with the `seq` after which theirs begin."""
        positions: dict[str, int] = {}
        left = EVENTS_AT_ONCE
        for task_id in list(self._with_news):
            feed = self._feeds.get(task_id)
            if feed is None:
                self._with_news.discard(task_id)
                continue
            positions[task_id] = feed.last_seq
            left -= min(PAGE, feed.notified_seq - feed.last_seq)
            if left <= 0:
                break
        return positions

    def _give(self, event: StoredEvent) -> None:
        feed = self._feeds.get(event.task_id)
        if feed is None or event.seq <= feed.last_seq:
            return
        feed.last_seq = event.seq
        shared = SharedEvent(event, self._words)
        if shared.is_end:
            feed.ended_at = time.monotonic()
        of_tenant = (
            subscriber
            for subscriber in self._tenants.get(feed.tenant_id, ())
            if subscriber.user_id in (None, feed.user_id)
        )
        subscribers = (*feed.subscribers, *of_tenant)
        with _sending_of(event, len(subscribers)):
            for subscriber in subscribers:
                was_open = subscriber.ending is None
                subscriber.deliver(shared)
                if was_open and subscriber.ending is not None:
                    self.ended[subscriber.ending] += 1

    def _sweep_now(self) -> None:
        self._sweep_due.set()

    async def _sweep(self) -> None:
        """Look for new events that no notification announced."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._sweep_due.wait(), SWEEP_SECONDS)
            self._sweep_due.clear()
            self._drop_unwatched()
            try:
                await self._look_for_news()
            except StoreFailure as error:
                log.warning("sweep_failed", reason=str(error))

    async def _look_for_news(self) -> None:
        watched = [task_id for task_id, feed in self._feeds.items() if feed.ended_at is None or feed.subscribers]
        for start in range(0, len(watched), SWEEP_PAGE):
            given = {task_id: self._feeds[task_id].last_seq for task_id in watched[start : start + SWEEP_PAGE]}
            heads = await self._store.heads(list(given))
            for task_id, head in heads.items():
                feed = self._feeds.get(task_id)
                if feed is not None and head.last_seq < given[task_id]:
                    self._go_back(feed, head)
                elif feed is not None:
                    self._goes_on(feed, head)
            self._look_again(given.keys() - heads.keys())
        for tenant_id in list(self._tenants):
            for head in await self._store.recent_heads(tenant_id):
                self._begin(head)

    def _look_again(self, without_row: Iterable[str]) -> None:
        """Let streams be opened again that wait for a row: the store cannot say that a run ended without one."""
        for task_id in without_row:
            feed = self._feeds.get(task_id)
            if feed is not None and not feed.is_claimed and time.monotonic() > feed.began_at + WAITING_SECONDS:
                for subscriber in list(feed.subscribers):
                    self._end(subscriber, EndReason.UNAVAILABLE)
                del self._feeds[task_id]

    def _go_back(self, feed: Feed, head: TaskHead) -> None:
        """The store was restored and has fewer events than were given: those that come have numbers that were used.

        Streams that name the task cannot go on; opened again they begin where the task is now. Clients of its tenant's
        streams learn by their end that what they show is to be read again.
        """
        feed.last_seq = feed.notified_seq = head.last_seq
        feed.ended_at = time.monotonic() if head.has_ended else None
        for subscriber in (*feed.subscribers, *self._tenants.get(feed.tenant_id, ())):
            self._end(subscriber, EndReason.UNAVAILABLE)

    def _drop_unwatched(self) -> None:
        forgotten = time.monotonic() - ENDED_KEPT_SECONDS
        for feed in list(self._feeds.values()):
            is_kept = feed.tenant_id in self._tenants and (feed.ended_at is None or feed.ended_at > forgotten)
            if not feed.subscribers and not is_kept:
                del self._feeds[feed.task_id]
                self._with_news.discard(feed.task_id)

    async def _keep_time(self) -> None:
        """Each second: end streams whose token has expired, and send the heartbeats that are due."""
        for second in count():
            await asyncio.sleep(1)
            now = time.time()
            for beat in self._beats:
                for subscriber in [subscriber for subscriber in beat if subscriber.expires_at <= now]:
                    self._end(subscriber, EndReason.EXPIRED)
            for subscriber in list(self._beats[second % len(self._beats)]):
                try:
                    subscriber.beat()
                except Exception:
                    log.exception("heartbeat_failed", tenant_id=subscriber.tenant_id)
                    self._end(subscriber, EndReason.UNAVAILABLE)

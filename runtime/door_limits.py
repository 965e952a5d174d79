"""Limits on the connections to one port, and what was refused there.

An address has a limited number of connections. Where all places are taken, the connection that has waited longest for a
head makes room: whoever sends a request at once is served, however many others only sit there. What is refused is
counted by reason and logged once a minute for each, not once for each request.
"""

from __future__ import annotations

import ipaddress
import resource
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final, Protocol

import structlog

log = structlog.get_logger(__name__)

HEAD_SECONDS: Final = 10.0
KEPT_SECONDS: Final = 75.0
"""Longer than a load balancer keeps an idle connection (60 s): a request that is sent while this end closes is lost."""
STALL_SECONDS: Final = 30.0
MAX_CONNECTIONS: Final = 20_000
OWN_FILES: Final = 256
"""Files that a process opens besides its connections."""
IPV6_NETWORK_BITS: Final = 64
"""One site has at least so many addresses."""
LOG_SECONDS: Final = 60.0

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Refusal(StrEnum):
    """Why a connection was closed by the door itself."""

    HEAD_TOO_LARGE = "head_too_large"
    HEAD_TOO_SLOW = "head_too_slow"
    IDLE = "idle"
    """It sent nothing: a browser opens such connections in advance."""
    UNREADABLE = "unreadable"
    TOO_MANY_OF_ADDRESS = "too_many_of_address"
    TOO_MANY = "too_many"
    MADE_ROOM = "made_room"
    TOO_MANY_PIPELINED = "too_many_pipelined"
    BODY_AFTER_ANSWER = "body_after_answer"
    NOT_READ = "not_read"


_ANSWERS: Final = {
    Refusal.HEAD_TOO_LARGE: ("431 Request Header Fields Too Large", "The request's head is larger than 16 KiB."),
    Refusal.UNREADABLE: ("400 Bad Request", "This is no HTTP/1.1 request."),
    Refusal.TOO_MANY_OF_ADDRESS: ("429 Too Many Requests", "This address has too many connections open."),
    Refusal.TOO_MANY: ("503 Service Unavailable", "Too many connections are open: try again."),
}
_RETRY_AFTER: Final = {Refusal.TOO_MANY_OF_ADDRESS: 10, Refusal.TOO_MANY: 2}


def answer_to(refusal: Refusal) -> bytes:
    """What a client of HTTP/1.1 reads before its connection is closed. Only some refusals are answered."""
    status, sentence = _ANSWERS[refusal]
    retry = f"Retry-After: {_RETRY_AFTER[refusal]}\r\n" if refusal in _RETRY_AFTER else ""
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {len(sentence)}\r\n"
        f"Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n{retry}Connection: close\r\n\r\n{sentence}"
    ).encode()


@dataclass(frozen=True)
class DoorLimits:
    """What connections may cost. `connections_per_address`: 0 is any number.

    `trusted_proxies`: addresses and networks whose `X-Forwarded-…` headers are believed, and which may open any number
    of connections: everybody comes through them. Raises ValueError if one is neither.
    """

    connections_per_address: int = 1_000
    trusted_proxies: Sequence[str] = ("127.0.0.1", "::1")
    connections: int = MAX_CONNECTIONS
    head_seconds: float = HEAD_SECONDS
    kept_seconds: float = KEPT_SECONDS
    """How long a connection may wait for its next request. It makes room as every waiting connection does."""
    stall_seconds: float = STALL_SECONDS

    def __post_init__(self) -> None:
        for network in self.trusted_proxies:
            ipaddress.ip_network(network)


class Connection(Protocol):
    """One that waits for a head."""

    def drop(self, refusal: Refusal) -> None:
        """End the connection at once, nothing answered."""


class Door:
    """What is open at one port, and what was refused there. `on_refused` is called for each."""

    def __init__(self, limits: DoorLimits, on_refused: Callable[[Refusal], None] | None = None) -> None:
        self.limits = limits
        self.on_refused = on_refused
        self._trusted = [ipaddress.ip_network(network) for network in limits.trusted_proxies]
        self._of_address: Counter[str] = Counter()
        self._waiting: dict[Connection, None] = {}
        """Those that wait for a head; the one that has waited longest first."""
        self._unlogged: Counter[Refusal] = Counter()
        self._logged_at: dict[Refusal, float] = {}
        self.open = 0

    def enter(self, address: str) -> Refusal | None:
        """Counts a new connection, also one that must be refused; `leave` takes it back."""
        self.open += 1
        group = _group(address)
        self._of_address[group] += 1
        most = self.limits.connections_per_address
        if most and self._of_address[group] > most and not _is_in(address, self._trusted):
            return Refusal.TOO_MANY_OF_ADDRESS
        if self.open > self.limits.connections and not self._make_room():
            return Refusal.TOO_MANY
        return None

    def enter_again(self, address: str) -> None:
        """Counts a connection that goes on by another protocol; it was let in before."""
        self.open += 1
        self._of_address[_group(address)] += 1

    def leave(self, address: str) -> None:
        self.open -= 1
        group = _group(address)
        self._of_address[group] -= 1
        if not self._of_address[group]:
            del self._of_address[group]

    def waits(self, connection: Connection) -> None:
        self._waiting.pop(connection, None)
        self._waiting[connection] = None

    def waits_no_more(self, connection: Connection) -> None:
        self._waiting.pop(connection, None)

    def _make_room(self) -> bool:
        oldest = next(iter(self._waiting), None)
        if oldest is None:
            return False
        oldest.drop(Refusal.MADE_ROOM)
        return True

    def refused(self, refusal: Refusal, address: str) -> None:
        """Counted, and logged at most once a minute."""
        if self.on_refused is not None:
            self.on_refused(refusal)
        if refusal is Refusal.IDLE:
            return
        self._unlogged[refusal] += 1
        now = time.monotonic()
        if now - self._logged_at.get(refusal, -LOG_SECONDS) < LOG_SECONDS:
            return
        self._logged_at[refusal] = now
        log.warning("connections_refused", reason=refusal.value, count=self._unlogged.pop(refusal), latest=address)


def most_connections(wanted: int = MAX_CONNECTIONS) -> int:
    """As many as are wanted and as this process can open files for, besides its own."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if files == resource.RLIM_INFINITY else max(1, min(wanted, files - OWN_FILES))


@lru_cache(maxsize=4_096)
def _address_of(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


@lru_cache(maxsize=4_096)
def _group(address: str) -> str:
    """Whose connections are counted together: an IPv4 address, an IPv6 network."""
    found = _address_of(address)
    if isinstance(found, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((found, IPV6_NETWORK_BITS), strict=False))
    return str(found)


def _is_in(address: str, networks: Collection[Network]) -> bool:
    found = _address_of(address)
    return found is not None and any(found in network for network in networks)

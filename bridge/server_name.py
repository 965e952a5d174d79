"""Names of servers. A name is the name of a task queue: two servers under one name would run each other's jobs.

The default is made of the whole address, and of this machine's name where the address means another server on every
machine. Who has a name is seen at the pollers of the presence queue (`Forecast`); a name that someone else has is
refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import re
import socket
import time
from typing import Final
from urllib.parse import urlsplit

import structlog

from bridge.forecast import ALIVE_SECONDS, Forecast

MOST_LETTERS: Final = 64
LOCAL_HOSTS: Final = ("localhost", "host.docker.internal", "host.containers.internal")
TAKEN_WAIT_SECONDS: Final = ALIVE_SECONDS + 15
"""A worker that was killed is seen for as long as `ALIVE_SECONDS`."""
LOOK_SECONDS: Final = 2.0

log = structlog.get_logger(__name__)


class NameTaken(Exception):
    """Another server has this name."""


def name_of(url: str, machine: str | None = None) -> str:
    """The same for every worker of this server, and for no other server. `machine`: this machine's name."""
    where = _where(url, machine)
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", where).strip("-")
    digest = hashlib.sha256(where.encode()).hexdigest()[:8]
    return f"{readable[: MOST_LETTERS - len(digest) - 1]}-{digest}"


def owner_of(url: str, machine: str | None = None) -> str:
    """Who uses a name: the same for a restarted worker of this server on this machine."""
    return hashlib.sha256(f"{machine or socket.gethostname()} {url.rstrip('/')}".encode()).hexdigest()[:12]


async def demand_name(forecast: Forecast, name: str, owner: str, *, wait_seconds: float) -> None:
    """Wait until no other server is seen under this name. Raises NameTaken if one stays."""
    until = time.monotonic() + wait_seconds
    is_logged = False
    while await forecast.has_other_owner(name, owner):
        if time.monotonic() >= until:
            raise NameTaken(
                f"Another server is already called {name!r}: its worker polls at the same Temporal namespace. "
                "Give this server a name of its own with --name."
            )
        if not is_logged:
            log.warning("server_name_taken", name=name, waits_seconds=wait_seconds)
            is_logged = True
        await asyncio.sleep(min(LOOK_SECONDS, wait_seconds))


def _where(url: str, machine: str | None) -> str:
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    address = f"{host}-{parts.port or parts.scheme}{parts.path.rstrip('/')}"
    return f"{machine or socket.gethostname()}-{address}" if _is_local(host) else address


def _is_local(host: str) -> bool:
    if host in LOCAL_HOSTS or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified or address.is_link_local

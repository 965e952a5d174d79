"""A GPU worker as others see it: by its identity among Temporal's pollers, and by what it reports of its server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from bridge.orders import ServerReport

_IDENTITY: Final = re.compile(
    r"gpu\|(?P<name>[^|]+)\|(?P<pool>[^|]+)\|(?P<gpu_type>[^|]+)\|(?P<process>[^|]*)(\|(?P<owner>[^|]*))?"
)


@dataclass(frozen=True)
class SeenServer:
    """A GPU worker that is running, with what it reports of its server (None: nothing yet)."""

    name: str
    pool: str
    gpu_type: str
    owner: str = ""
    """Who uses the name (`server_name.py`)."""
    report: ServerReport | None = None

    @property
    def is_sick(self) -> bool:
        return self.report is not None and self.report.sick_since is not None

    def can_run(self, template_id: str) -> bool:
        return self.report is None or self.report.can_run(template_id)


def identity_of(server: SeenServer, process_id: int) -> str:
    """A GPU worker's identity in Temporal."""
    return f"gpu|{server.name}|{server.pool}|{server.gpu_type}|{process_id}|{server.owner}"


def server_of(identity: str) -> SeenServer | None:
    """The server of a poller's identity; None if it is no GPU worker."""
    match = _IDENTITY.fullmatch(identity)
    if match is None:
        return None
    return SeenServer(match["name"], match["pool"], match["gpu_type"], match["owner"] or "")

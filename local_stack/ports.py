"""The port of each part: the one of last time, else its usual port, else any free one."""

from __future__ import annotations

import socket
import sys
from collections.abc import Container, Mapping
from typing import Final

LOOPBACK: Final = "127.0.0.1"
PREFERRED: Final[dict[str, int]] = {
    "temporal": 7233,
    "temporal_ui": 8233,
    "gateway": 8180,
    "comfyui": 8188,
    "credits": 8190,
    "postgres": 8191,
    "worker": 8192,
}
"""The worker's port is that of its health page."""
_reserved: Final[dict[int, int]] = {}
"""Port → the file descriptor that reserves it until this process ends."""


def choose_ports(last_time: Mapping[str, int], preferred: Mapping[str, int] = PREFERRED) -> dict[str, int]:
    """A free port for each part, no two the same."""
    chosen: dict[str, int] = {}
    for part, usual in preferred.items():
        wishes = [last_time[part]] if part in last_time else []
        free = (port for port in [*wishes, usual] if port not in chosen.values() and is_free(port))
        found = next((port for port in free if reserve(port)), None)
        while found is None:
            port = any_free_port(set(chosen.values()))
            found = port if reserve(port) else None
        chosen[part] = found
    return chosen


def reserve(port: int) -> bool:
    """Keep other stacks of this machine off the port until this process ends; False if another has reserved it.

    A part listens seconds after its port was chosen: two stacks that started together took the same one.
    """
    if port in _reserved or sys.platform != "linux":  # elsewhere there are no abstract addresses
        return True
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as reserving:
        try:
            reserving.bind(f"\0comfyui-temporal-port-{port}")
        except OSError:
            return False
        _reserved[port] = reserving.detach()
    return True


def free_ports() -> dict[str, int]:
    """Any free port for each part, never the usual one: that may be another stack's."""
    ports: dict[str, int] = {}
    for part in PREFERRED:
        ports[part] = any_free_port(ports.values())
    return ports


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Servers set it too: a port with lingering connections can be used again.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except (OSError, OverflowError):
            return False
    return True


def any_free_port(taken: Container[int] = ()) -> int:
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((LOOPBACK, 0))
            port: int = probe.getsockname()[1]
        if port not in taken:
            return port

"""A name server that knows no name.

Containers on a machine without a name server wait for answers that never come: each connection of gRPC first asks for a
TXT record. Names of services are the engine's own business and never get here.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

PORT: Final = 53
_NO_SUCH_NAME: Final = b"\x81\x83"
"""Answer, recursion desired and available, NXDOMAIN (RFC 1035 §4.1.1)."""


@contextmanager
def answering_no(address: str, port: int = PORT) -> Iterator[None]:
    """Answers every question at this address while the body runs. Raises OSError if the port is taken."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, port))
        server.settimeout(0.5)
        over = threading.Event()
        thread = threading.Thread(target=_answer, args=(server, over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _answer(server: socket.socket, over: threading.Event) -> None:
    while not over.is_set():
        try:
            question, sender = server.recvfrom(512)
        except TimeoutError:
            continue
        # The question is repeated, without the records that follow it.
        server.sendto(question[:2] + _NO_SUCH_NAME + question[4:6] + bytes(6) + question[12:], sender)

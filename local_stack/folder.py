"""The folder `.run`: its files, its lock, its secrets, and what is kept from one start to the next."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from pydantic import BaseModel, ValidationError

from comfyui_temporal.contracts.stack import StackDescription

PROJECT: Final = Path(__file__).resolve().parent.parent
DEFAULT_FOLDER: Final = PROJECT / ".run"

Model = TypeVar("Model", bound=BaseModel)


class StackFailure(Exception):
    """Why the stack cannot do what was requested. The message says what to do about it."""


class AlreadyLocked(Exception):
    """Another stack uses this folder. `pid` is its supervisor's; None if the lock's file does not name it."""

    def __init__(self, pid: int | None) -> None:
        self.pid = pid
        super().__init__(f"process {pid} uses the folder")


class Secrets(BaseModel):
    """Made at the first start and then kept, so that tokens and callbacks of open tasks stay valid."""

    caller_secret: str
    service_secret: str
    callback_secret: str
    admin_token: str
    database_password: str

    @classmethod
    def new(cls) -> Self:
        return cls(
            caller_secret=secrets.token_urlsafe(48),
            service_secret=secrets.token_urlsafe(48),
            callback_secret="whsec_" + base64.b64encode(secrets.token_bytes(32)).decode(),
            admin_token=secrets.token_urlsafe(48),
            database_password=secrets.token_urlsafe(24),
        )


class ProcessRecord(BaseModel):
    """A process of the stack, identified so that another one with the same id is never mistaken for it."""

    pid: int
    started: float
    """Seconds since 1970, from the operating system."""
    restarts: int = 0


class StackRecord(BaseModel):
    """What a later command, or the next start after a kill, needs to know of this run."""

    speed: float
    credits_profile: str = "contract"
    """Which credits service is simulated."""
    comfyui: list[str] = []
    """The real ComfyUI servers behind the bridge; empty: ComfyUI is simulated, or a service of the user's own."""
    own_services: dict[str, str] = {}
    """Setting → address, of the services of the user's own."""
    processes: dict[str, ProcessRecord] = {}


class RunFolder:
    """`.run`, mode 0700; every file that holds a secret has mode 0600."""

    def __init__(self, path: Path = DEFAULT_FOLDER) -> None:
        """Creates the folder if it is missing. Raises StackFailure if that fails."""
        self.path = path.absolute()
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)
            for name in ("logs", "objects", "datasets", "simulators"):
                (self.path / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StackFailure(f"{self.path} cannot be used: {error.strerror}. Choose another with --folder.") from None
        self.temporal_file = self.path / "temporal.db"
        self.postgres = self.path / "postgres"
        self._description = self.path / "stack.json"
        self._record = self.path / "processes.json"
        self._ports = self.path / "ports.json"
        self._secrets = self.path / "secrets.json"
        self._lock = self.path / "lock"

    def log(self, part: str) -> Path:
        return self.path / "logs" / f"{part}.log"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock: for one supervisor, or a command that cleans up. Raises AlreadyLocked.

        The operating system frees the lock when the process ends, so a killed one leaves none behind.
        """
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise AlreadyLocked(self._holder()) from None
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            yield
        finally:
            os.close(descriptor)

    def is_locked(self) -> bool:
        try:
            with self.locked():
                return False
        except AlreadyLocked:
            return True

    def _holder(self) -> int | None:
        text = self._lock.read_text()
        return int(text) if text.isdigit() else None

    def secrets(self) -> Secrets:
        """The secrets. Those that are missing are made: an earlier version's folder keeps its database's password."""
        kept = _read(self._secrets, Secrets)
        if kept is None:
            try:
                earlier = json.loads(self._secrets.read_bytes())
            except (FileNotFoundError, ValueError):
                earlier = {}
            kept = Secrets.model_validate(Secrets.new().model_dump() | earlier)
            _write(self._secrets, kept.model_dump(mode="json"))
        return kept

    def ports(self) -> dict[str, int]:
        """Part → port of the last start."""
        try:
            kept = json.loads(self._ports.read_text())
        except (OSError, ValueError):
            return {}
        return {str(name): port for name, port in kept.items() if isinstance(port, int)}

    def remember_ports(self, ports: dict[str, int]) -> None:
        _write(self._ports, ports)

    def description(self) -> StackDescription | None:
        """How the stack in this folder describes itself; None if none is up."""
        return _read(self._description, StackDescription)

    def describe(self, description: StackDescription) -> None:
        _write(self._description, description.model_dump(mode="json"))

    def forget_description(self) -> None:
        self._description.unlink(missing_ok=True)

    def record(self) -> StackRecord | None:
        return _read(self._record, StackRecord)

    def write_record(self, record: StackRecord) -> None:
        _write(self._record, record.model_dump(mode="json"))

    def forget_record(self) -> None:
        self._record.unlink(missing_ok=True)


def _read(path: Path, model: type[Model]) -> Model | None:
    """A file's content; None if it is missing, or incomplete because its writer was killed."""
    try:
        return model.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _write(path: Path, content: Any) -> None:
    """Written completely or not at all, readable by its owner only."""
    new_file = path.with_suffix(".new")
    new_file.unlink(missing_ok=True)
    descriptor = os.open(new_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    new_file.replace(path)

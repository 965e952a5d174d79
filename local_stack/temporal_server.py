"""The local Temporal server: `temporal server start-dev` with a file, configured for our runs."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import yaml

from comfyui_temporal.contracts.tasks import SEARCH_ATTRIBUTES
from local_stack.child import Part
from local_stack.folder import PROJECT, RunFolder, StackFailure
from local_stack.ports import LOOPBACK

DYNAMIC_CONFIG: Final = PROJECT / "deploy" / "temporal-dynamic-config.yaml"
NAMESPACE: Final = "default"
SQLITE_PRAGMAS: Final = ("journal_mode=wal", "synchronous=normal")
"""A killed server loses nothing; a power cut may cost the last moment. Without these flags each of the dozens of
transactions of a task waits for the disk three times: 3.2 small workflows a second instead of 14 (two processors,
3.5 ms a sync)."""
RETENTION: Final = "720h"
"""30 days: as long as services keep idempotency keys (contract §4, pitfall 24)."""


class LocalTemporal:
    """The server, its UI and its file `.run/temporal.db`."""

    def __init__(self, folder: RunFolder, *, port: int, ui_port: int, environment: dict[str, str]) -> None:
        self._folder = folder
        self._port = port
        self._ui_port = ui_port
        self._environment = environment
        self._binary = temporal_binary()

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self._port}"

    @property
    def ui_url(self) -> str:
        return f"http://{LOOPBACK}:{self._ui_port}"

    def part(self) -> Part:
        command = [str(self._binary), "server", "start-dev", "--ip", LOOPBACK, "--port", str(self._port)]
        command += ["--ui-port", str(self._ui_port), "--ui-disable-news-fetch"]
        command += ["--db-filename", str(self._folder.temporal_file)]
        command += server_flags()
        return Part(
            name="temporal",
            command=command,
            environment=self._environment,
            is_ready=self._keeps_runs,
            port=self._port,
            finish=self._know_search_attributes,
        )

    async def _keeps_runs(self) -> bool:
        """Set the retention. It succeeds as soon as the server answers and its namespace exists."""
        done, _ = await self._operate("namespace", "update", "--namespace", NAMESPACE, "--retention", RETENTION)
        return done

    async def _know_search_attributes(self) -> None:
        """A file made by an earlier version may lack some: the server's own flag adds them to new files only."""
        named = [word for name in SEARCH_ATTRIBUTES for word in ("--name", name, "--type", "Keyword")]
        done, output = await self._operate("search-attribute", "create", "--namespace", NAMESPACE, *named)
        if not done:
            raise StackFailure(f"Temporal does not accept the search attributes: {output}")

    async def _operate(self, *words: str) -> tuple[bool, str]:
        process = await asyncio.create_subprocess_exec(
            *(str(self._binary), "operator", *words, "--address", self.address, "--command-timeout", "3s"),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        return process.returncode == 0, output.decode(errors="replace").strip()


def server_flags() -> list[str]:
    """The flags of all our servers with a file, here and in tests: journal, search attributes, configuration."""
    pragmas = [word for pragma in SQLITE_PRAGMAS for word in ("--sqlite-pragma", pragma)]
    attributes = [word for name in SEARCH_ATTRIBUTES for word in ("--search-attribute", f"{name}=Keyword")]
    return ["--log-level", "error", *pragmas, *attributes, *dynamic_config_flags(dynamic_config())]


def dynamic_config_flags(values: Mapping[str, object]) -> list[str]:
    return [word for key, value in values.items() for word in ("--dynamic-config-value", f"{key}={json.dumps(value)}")]


def dynamic_config(path: Path = DYNAMIC_CONFIG) -> dict[str, object]:
    """Key → value. The local server supports no constraints. Raises StackFailure for a file that has some."""
    found: dict[str, object] = {}
    for key, entries in yaml.safe_load(path.read_text()).items():
        if len(entries) != 1 or set(entries[0]) != {"value"}:
            raise StackFailure(f"{path.name}: {key} must have exactly one value and no constraints.")
        found[key] = entries[0]["value"]
    return found


def temporal_binary() -> Path:
    binary = Path(sys.executable).parent / "temporal"
    if not binary.exists():
        raise StackFailure(f"There is no {binary}. Run `make setup`.")
    return binary

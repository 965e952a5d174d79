"""A real Prometheus, where one is at hand, with our rules made quick.

The rules are not edited: `quickened` reads them and makes one change. Every duration (`for`, ranges like `[5m]`) is
divided by 60, and no `for` is longer than 2 s: so a test need not wait for minutes. Thresholds, expressions and labels
are those of the file. `offset` and the figures themselves keep their times.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import yaml

from local_stack.ports import any_free_port
from tests.waiting import until

PROMETHEUS: Final = shutil.which("prometheus")
QUICKER: Final = 60
LONGEST_FOR_SECONDS: Final = 2
SCRAPED_EVERY_SECONDS: Final = 1
_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_FOR: Final = re.compile(r"^(\s+for: )(\d+)([smhd])$", re.MULTILINE)
_RANGE: Final = re.compile(r"\[(\d+)([smhd])\]")


def quickened(rules: str) -> str:
    """The text of a rules file with its durations divided by 60. A range holds four scrapes at least, as ours do."""

    def pause(found: re.Match[str]) -> str:
        return f"{found[1]}{min(LONGEST_FOR_SECONDS, int(found[2]) * _UNITS[found[3]] // QUICKER)}s"

    def span(found: re.Match[str]) -> str:
        return f"[{max(4 * SCRAPED_EVERY_SECONDS, int(found[1]) * _UNITS[found[2]] // QUICKER)}s]"

    return _RANGE.sub(span, _FOR.sub(pause, rules))


@dataclass
class Alerts:
    """What Prometheus says."""

    url: str
    http: httpx.AsyncClient

    async def scraped(self) -> set[str]:
        """The scrape jobs whose page could be read."""
        answer = (await self.http.get(f"{self.url}/api/v1/targets")).json()
        return {target["labels"]["job"] for target in answer["data"]["activeTargets"] if target["health"] == "up"}

    async def firing(self) -> dict[str, dict[str, Any]]:
        """By name."""
        answer = (await self.http.get(f"{self.url}/api/v1/alerts")).json()
        found = [alert for alert in answer["data"]["alerts"] if alert["state"] == "firing"]
        return {alert["labels"]["alertname"]: alert for alert in found}

    async def until_firing(self, name: str, *, within_seconds: float = 40.0) -> dict[str, Any]:
        async def look() -> dict[str, Any] | None:
            return (await self.firing()).get(name)

        return await until(look, f"the alert {name} fires", within_seconds=within_seconds)

    async def until_silent(self, name: str, *, within_seconds: float = 40.0) -> None:
        async def look() -> bool:
            return name not in await self.firing()

        await until(look, f"the alert {name} ends", within_seconds=within_seconds)


@asynccontextmanager
async def running_prometheus(folder: Path, rules: Path, pages: Mapping[str, int]) -> AsyncIterator[Alerts]:
    """Scrapes `/metrics` at these ports, by the names of their jobs, and evaluates the rules every second."""
    assert PROMETHEUS is not None
    (folder / "rules.yaml").write_text(quickened(rules.read_text()))  # noqa: ASYNC240
    every = f"{SCRAPED_EVERY_SECONDS}s"
    config = {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]} for name, port in pages.items()
        ],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = any_free_port()
    with (folder / "prometheus.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(PROMETHEUS, f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"),
            f"--web.listen-address=127.0.0.1:{port}",
            stdout=log,
            stderr=log,
        )
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=10) as http:
            alerts = Alerts(f"http://127.0.0.1:{port}", http)

            async def answers() -> bool:
                assert process.returncode is None, (folder / "prometheus.log").read_text()
                try:
                    return await alerts.scraped() == pages.keys()
                except (httpx.HTTPError, ValueError):
                    return False

            await until(answers, "Prometheus reads every page", within_seconds=60)
            yield alerts
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()

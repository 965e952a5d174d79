"""The switches and counters of a stand-in server, for tests."""

from __future__ import annotations

from typing import Any, Self

import httpx
from pydantic import BaseModel, TypeAdapter

from tests.bridge.native.traps import Traps


class RunSeen(BaseModel):
    """One execution of a prompt. `outcome`: running, success, error, interrupted; `nodes` were not cached."""

    prompt_id: str
    began: float
    ended: float | None
    outcome: str
    nodes: list[str]


class RequestSeen(BaseModel):
    """One request outside `/admin`. `prompt_id` is the one in its body."""

    method: str
    path: str
    query: str
    origin: str | None
    prompt_id: str | None
    at: float


class GraphSeen(BaseModel):
    """A graph that a `/prompt` queued, and its `partial_execution_targets`."""

    graph: dict[str, Any]
    targets: list[str] | None

    @property
    def nodes(self) -> list[str]:
        return sorted(self.graph)


class SocketSeen(BaseModel):
    client_id: str
    origin: str | None


class NativeAdmin:
    """Switches and counters. Counters restart at 0 with the process."""

    def __init__(self, url: str) -> None:
        self._http = httpx.AsyncClient(base_url=f"{url}/admin", timeout=5.0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def set(self, **traps: Any) -> Traps:
        """Change some traps: `set(hold=True)`. Raises HTTPStatusError for an unknown trap."""
        answer = await self._http.patch("/traps", content=_json(traps), headers={"content-type": "application/json"})
        return Traps.model_validate_json(answer.raise_for_status().content)

    async def traps(self) -> Traps:
        return Traps.model_validate_json((await self._http.get("/traps")).raise_for_status().content)

    async def runs(self) -> list[RunSeen]:
        """Every execution, oldest first."""
        return await self._list(RunSeen, "/runs")

    async def runs_of(self, prompt_id: str) -> int:
        """How often a prompt was really executed."""
        return sum(run.prompt_id == prompt_id for run in await self.runs())

    async def submissions(self) -> list[str]:
        """The prompt id of every `/prompt` that took effect, answered or not."""
        return TypeAdapter(list[str]).validate_json((await self._http.get("/submissions")).content)

    async def sent(self) -> list[GraphSeen]:
        """The graph of every `/prompt` that took effect."""
        return await self._list(GraphSeen, "/sent")

    async def requests(self) -> list[RequestSeen]:
        return await self._list(RequestSeen, "/requests")

    async def sockets(self) -> list[SocketSeen]:
        return await self._list(SocketSeen, "/sockets")

    async def forget(self) -> None:
        """Clear queue, history and the running prompt, as a restart would. The process stays."""
        (await self._http.post("/forget")).raise_for_status()

    async def reset(self) -> None:
        """Remove traps, prompts, history and cache, and set counters to 0. Files stay."""
        (await self._http.post("/reset")).raise_for_status()

    async def _list(self, kind: type[Any], path: str) -> list[Any]:
        answer = (await self._http.get(path)).raise_for_status()
        return [kind.model_validate(entry) for entry in answer.json()]


def _json(traps: dict[str, Any]) -> bytes:
    return TypeAdapter(dict[str, Any]).dump_json(traps)

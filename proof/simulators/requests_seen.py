"""The log of requests seen: for assertions, never with a body, a token or a prompt."""

from __future__ import annotations

import json
from typing import Any

from proof.simulators.admin_wire import RequestSeen
from proof.simulators.state_file import StateFile

_SCHEMA = """
CREATE TABLE IF NOT EXISTS requests_seen (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    route TEXT NOT NULL,
    task_id TEXT,
    document TEXT NOT NULL
);
"""
_KEPT_ROWS = 100_000


class RequestsSeen:
    """Newest rows are kept; the oldest go when there are more than 100,000."""

    def __init__(self, state: StateFile) -> None:
        self._state = state
        state.lay_out(_SCHEMA)

    def note(self, seen: RequestSeen) -> None:
        number = self._state.run(
            "INSERT INTO requests_seen (route, task_id, document) VALUES (?, ?, ?)",
            seen.route,
            seen.task_id,
            seen.model_dump_json(),
        )
        if number % 1_000 == 0:
            self._state.run("DELETE FROM requests_seen WHERE number <= ?", number - _KEPT_ROWS)

    def matching(self, route: str | None, task_id: str | None, limit: int) -> list[dict[str, Any]]:
        """Oldest first; the last `limit` of them."""
        rows = self._state.rows(
            "SELECT document FROM requests_seen WHERE (?1 IS NULL OR route = ?1) AND (?2 IS NULL OR task_id = ?2)"
            " ORDER BY number DESC LIMIT ?3",
            route,
            task_id,
            limit,
        )
        return [json.loads(row["document"]) for row in reversed(rows)]

"""A simulator's state: one SQLite file, written through in transactions, so that a killed process loses nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


class StateFile:
    """One connection, used by one event loop. Transactions nest: an inner one that fails undoes only itself."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA journal_mode = WAL")
        # NORMAL survives a killed process, which is enough here; only a power cut could lose the last writes.
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._depth = 0

    def lay_out(self, schema: str) -> None:
        """Create the tables that are missing; `schema` holds `IF NOT EXISTS` statements."""
        self._connection.executescript(schema)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is written or nothing is."""
        name = f"level_{self._depth}"
        self._connection.execute("BEGIN IMMEDIATE" if self._depth == 0 else f"SAVEPOINT {name}")
        self._depth += 1
        try:
            yield
        except BaseException:
            self._depth -= 1
            self._connection.execute("ROLLBACK" if self._depth == 0 else f"ROLLBACK TO {name}")
            if self._depth:
                self._connection.execute(f"RELEASE {name}")
            raise
        self._depth -= 1
        self._connection.execute("COMMIT" if self._depth == 0 else f"RELEASE {name}")

    def run(self, sql: str, *values: object) -> int:
        """Execute one statement; the row id of an INSERT, else unspecified."""
        return self._connection.execute(sql, values).lastrowid or 0

    def rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        return self._connection.execute(sql, values).fetchall()

    def row(self, sql: str, *values: object) -> sqlite3.Row | None:
        found: sqlite3.Row | None = self._connection.execute(sql, values).fetchone()
        return found

    def clear(self, *, keeping: Collection[str]) -> None:
        """Empty every table but those in `keeping`."""
        with self.transaction():
            for row in self.rows("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"):
                if row["name"] not in keeping:
                    self.run(f"DELETE FROM {row['name']}")  # noqa: S608 - names from the file's own schema

    def close(self) -> None:
        self._connection.close()

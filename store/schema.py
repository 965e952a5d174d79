"""Whether the database's tables are those that this code needs."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

_VERSIONS: Final = Path(__file__).parent / "migrations" / "versions"
NEEDED: Final = max(path.name.partition("_")[0] for path in _VERSIONS.glob("[0-9]*_*.py"))
"""The newest revision here. Tables of a later one are a newer version's, beside which this one works."""
_IS_MIGRATED: Final = text("SELECT to_regclass('alembic_version') IS NOT NULL")
_REVISION: Final = text("SELECT max(version_num) FROM alembic_version")


async def revision(connection: AsyncConnection) -> str | None:
    """The tables' revision; None without tables."""
    if not await connection.scalar(_IS_MIGRATED):
        return None
    found: str | None = await connection.scalar(_REVISION)
    return found

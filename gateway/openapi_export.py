"""The gateway's OpenAPI document as a file: `python -m gateway.openapi_export [--check]`.

Without an option it writes `docs/openapi.json`. With `--check` it writes nothing, and the exit code is 1 if the file is
missing or differs from what the gateway serves.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from temporalio.client import Client

from activities.file_lists import FileLists
from gateway.access import Access
from gateway.app import create_app
from gateway.tokens import StreamTokens
from runtime.caller_tokens import CallerTokens, SharedSecret
from store import TaskStore

FILE: Final = Path("docs/openapi.json")
_NOT_CONNECTED: Final = "127.0.0.1:1"
_OBJECT_STORE: Final = "s3://openapi-export"
_DSN: Final = "postgresql://openapi@127.0.0.1:1/openapi"
_UNUSED_SECRET: Final = "openapi-export-reads-no-token-and-no-callback"
_UNUSED_CALLBACK_SECRET: Final = "whsec_b3BlbmFwaS1leHBvcnQtdmVyaWZpZXMtbm90aGluZw=="


def rendered() -> str:
    """The document as JSON text, always the same bytes for the same code. Connects to nothing."""
    return json.dumps(asyncio.run(_document()), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


async def _document() -> dict[str, object]:
    store = TaskStore(_DSN)
    app = create_app(
        temporal=await Client.connect(_NOT_CONNECTED, lazy=True),
        store=store,
        lists=FileLists.at(_OBJECT_STORE),
        callback_secrets=[_UNUSED_CALLBACK_SECRET],
        access=Access(CallerTokens(SharedSecret(_UNUSED_SECRET), issuer="", audience=""), StreamTokens(_UNUSED_SECRET)),
    )
    await store.close()
    return app.openapi()


def is_current(file: Path) -> bool:
    """Whether `file` holds the document that the gateway serves."""
    return file.exists() and file.read_text(encoding="utf-8") == rendered()


def main(arguments: Sequence[str]) -> int:
    """The command; its exit code."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write("usage: python -m gateway.openapi_export [--check]\n")
        return 2
    if not arguments:
        FILE.write_text(rendered(), encoding="utf-8")
        return 0
    if is_current(FILE):
        return 0
    sys.stderr.write(f"{FILE} differs from the gateway: run python -m gateway.openapi_export, commit it.\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

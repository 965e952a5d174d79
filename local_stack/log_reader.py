"""`make logs`: the lines of all parts, one after the other, as a person reads them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, TextIO

from local_stack.folder import RunFolder

LAST: Final = 20
LOOK_SECONDS: Final = 0.3
_SAID_APART: Final = frozenset({"event", "level", "timestamp", "logger", "exception"})
_LEVELS: Final = {"warning": "WARNING ", "error": "ERROR ", "critical": "ERROR "}


def readable(part: str, line: str) -> str:
    """A line of a part's log: time, part, what happened, then its fields."""
    try:
        record: Any = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        return f"{'':8}  {part:<9} {line}"
    at = str(record.get("timestamp", ""))[11:19]
    fields = " ".join(f"{name}={value}" for name, value in record.items() if name not in _SAID_APART)
    level = _LEVELS.get(str(record.get("level")), "")
    text = f"{at:8}  {part:<9} {level}{record.get('event', '')}  {fields}".rstrip()
    return text + "".join(f"\n{'':20}{one}" for one in str(record.get("exception", "")).splitlines())


def follow_logs(folder: RunFolder, *, is_over: bool = False) -> None:
    """Print the last lines of each log, then each new one until interrupted; `is_over`: only the last lines."""
    with ExitStack() as files:
        opened: dict[Path, TextIO] = {}
        while True:
            for file in sorted((folder.path / "logs").glob("*.log")):
                is_new = file not in opened
                if is_new:
                    opened[file] = files.enter_context(file.open(encoding="utf-8", errors="replace"))
                lines = list(_whole_lines(opened[file]))
                for line in lines[-LAST:] if is_new else lines:
                    print(readable(file.stem, line))
            sys.stdout.flush()
            if is_over:
                return
            time.sleep(LOOK_SECONDS)


def _whole_lines(file: TextIO) -> Iterator[str]:
    """Lines that are written to their end; a file that was cut is read from its beginning."""
    if file.tell() > Path(file.name).stat().st_size:
        file.seek(0)
    while True:
        place = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(place)
            return
        yield line.rstrip("\n")
